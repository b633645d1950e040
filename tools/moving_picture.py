"""Record the landing page's moving picture: `python tools/moving_picture.py demo/run demo/pack`, after `medvis demo`. Needs Chromium.

A pointer goes over the words of a report that name something, and the map on the radiograph follows. The phantom only: no patient is shown."""
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import medvis as mv

OUT = Path(__file__).resolve().parents[1] / "docs/_static/widget.webp"
WIDTH, HEIGHT, STILL = 900, 620, 800  # pixels, pixels, milliseconds a word


def record(page: Path, words: int = 12) -> list[Image.Image]:
    "One picture a word."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        view.goto(page.as_uri())
        view.wait_for_selector("[data-ready]")
        shown = view.locator('[data-grain="words"][data-item]')
        telling = [number for number, text in enumerate(shown.all_inner_texts()) if len(text.strip(" .,")) >= 5]
        pictures = []
        for number in telling[:words]:
            shown.nth(number).hover()
            view.wait_for_timeout(250)
            pictures.append(Image.open(io.BytesIO(view.screenshot())).convert("RGB"))
        browser.close()
    return pictures


if __name__ == "__main__":
    run, pack = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        first, *rest = record(mv.CorrespondenceWidget(run, pack).to_html(Path(folder) / "widget.html"))
    first.save(OUT, save_all=True, append_images=rest, duration=STILL, loop=0, quality=60, method=6)
    print(f"{OUT}: {len(rest) + 1} pictures, {OUT.stat().st_size / 1000:.0f} kB")
