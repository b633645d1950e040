"""The pages that say how to: what they say to type is typed, word for word, in an empty folder with an empty home."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import site_pages  # noqa: E402

PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for folder in ("howto", "start") for path in (ROOT / "docs" / folder).glob("*.md") if path.stem != "index")


def blocks(page: str) -> list[tuple[str, str]]:
    "Language and text of the blocks that a reader is to run."
    return re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed(page, tmp_path):
    (tmp_path / "siglip.py").write_text(site_pages.own_method(), encoding="utf-8")
    found = blocks(page)
    assert found, f"{page} has nothing to run"
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    shell = "\n".join(text for kind, text in found if kind == "sh")
    code = "\n".join(text for kind, text in found if kind == "python")
    for command in [["bash", "-euo", "pipefail", "-c", shell]] * bool(shell) + [[sys.executable, "-c", code]] * bool(code):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
