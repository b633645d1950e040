"""A headless Chromium for tests: pages that cannot reach the network, and their complaints."""
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync").split()


@pytest.fixture(scope="module")
def browser(chromium):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@contextmanager
def opened(browser, path: Path, width: int = 1280, height: int = 800, **context):
    "A page of a file on disk, whose every request but that file fails the test, as does any message on its console."
    with browser.new_context(viewport={"width": width, "height": height}, offline=True, **context) as session:
        page, requests, complaints = session.new_page(), [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("[data-ready]")
        yield page
        asked = [url for url in requests if url != path.as_uri() and not url.startswith(("data:", "blob:"))]
        assert not asked and not complaints, f"requests {asked}, console {complaints}"
