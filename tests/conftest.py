"""What every test shares: two busy workers on two cores, no network, and a browser that CI may not do without."""
import os
import shutil

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LONGEST = ("cli", "pages", "site", "damage", "gathered", "resume", "survive", "full_size", "browser_lab", "mutual_information", "browser_correspondence", "every_setting", "one_answer", "frozen")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "The files that take longest come first, so that no worker is left alone with one at the end."
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def chromium() -> str:
    "Path of a Chromium. Without one the test is skipped, or fails where MEDVIS_REQUIRE_BROWSER is set, as in CI."
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing = pytest.fail if os.environ.get("MEDVIS_REQUIRE_BROWSER") else pytest.skip
        missing("no Chromium on PATH: install it (Debian: apt-get install chromium)")
    return found
