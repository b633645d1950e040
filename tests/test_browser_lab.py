"""A person with JupyterLab: opens the tour, runs it, points, pins, uses the keyboard alone. Everything the browser asks for is on this machine."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browser import browser  # noqa: F401
from correspondences import lit, pixels, shot, word
from notebooks import ROOT

from medvis.data.build import ImageRecord, StudyRecord, write_pack

KERNEL = "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"
EXECUTE = f"""async code => {{ let printed = ''; const future = {KERNEL}.requestExecute({{ code }});
    future.onIOPub = message => {{ if (message.header.msg_type === 'stream') printed += message.content.text }};
    await future.done; return printed }}"""


@contextmanager
def jupyter(folder: Path, home: Path):
    "A JupyterLab of its own on a free port; its address."
    pytest.importorskip("jupyterlab")
    settings = home / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
              "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    env = {**os.environ, "HOME": str(home), **{name: str(home / place) for name, place in places.items()}}
    env.pop("IN_TEST", None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab did not start:\n{(home / 'log').read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def random_study(index: int) -> StudyRecord:
    pixels = np.random.default_rng(index).integers(0, 255, (64, 64), np.uint8)
    report = f"The heart of study number {index} is normal in size. No pleural effusion is seen. The left lung is clear."
    return StudyRecord(f"random-{index:04d}", f"patient-{index}", "test", [ImageRecord(f"i{index}", pixels)], report, {"Nodule": float(index % 2)})


KERNELSPEC = {"name": "python3", "display_name": "python3", "language": "python"}
MANY = """from medvis.widgets import CorrespondenceWidget
widget = CorrespondenceWidget({"mixture-mi": "run"}, "pack500")
widget"""

EDIT = """import torch
import medvis as mv
from medvis.data.phantom import Phantom
from medvis.widgets import PhantomEditor

class Dark:
    "Dark cells go with air, bright ones with anything else: a stranger's model, wrapped."
    def embed_regions(self, images):
        cells = torch.nn.functional.adaptive_avg_pool2d(images, 8)[:, 0]
        return torch.stack([-cells, cells], -1)
    def embed_texts(self, texts):
        return torch.tensor([[1.0, 0.0] if "pneumothorax" in text.lower() else [0.0, 1.0] for text in texts])

phantom = Phantom(96)
index = next(i for i in range(200) if [f.name for f in phantom.scene(i).findings] == ["Pneumothorax"] and phantom[i].labels["Pneumothorax"] == 1)
editor = PhantomEditor({"dark": mv.wrap(Dark(), size=96, channels=1)}, phantom, index)
widget = editor.widget
editor"""


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):  # noqa: F811
    "A page on JupyterLab, whose folder holds copies; and all that it asked for."
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("home")
    shutil.copy(ROOT / "nbs/widgets/07_tour.ipynb", folder / "tour.ipynb")
    shutil.copytree(ROOT / "nbs/widgets/run", folder / "run")
    write_pack(folder / "pack500", range(500), random_study, 64, {"kind": "random"}, ["Nodule"], progress=False)
    for name, source in {"many": MANY, "edit": EDIT}.items():
        cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        (folder / f"{name}.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {"kernelspec": KERNELSPEC}, "nbformat": 4, "nbformat_minor": 5}))
    with jupyter(folder, home) as address:
        page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        page.asked, page.received = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: page.received.append(frame)))
        page.address = address
        yield page
        page.context.close()


def open_notebook(page, name: str) -> None:
    page.goto(f"{page.address}/lab/tree/{name}?reset", timeout=120_000)
    page.wait_for_function("window.jupyterapp", timeout=120_000)
    page.evaluate("jupyterapp.restored.then(() => true)")
    page.wait_for_function(f"{KERNEL}?.status === 'idle'", timeout=120_000)


def run_all(page) -> None:
    "As a person does it: Run, Run All Cells."
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_selector(".correspondence [data-item]", timeout=300_000)     # two other workers may be at work
    page.wait_for_function(f"{KERNEL}?.status === 'idle'", timeout=120_000)


def selection(page) -> dict:
    return json.loads(page.evaluate(EXECUTE, "import json; print(json.dumps(widget.selection))"))


@pytest.fixture(scope="module")
def tour(lab):
    open_notebook(lab, "tour.ipynb")
    run_all(lab)
    lab.evaluate(EXECUTE, "widget.set_trait('selection', {}); widget.scale, widget.colours, widget.threshold = 'normalised', 'inferno', 0.0")
    return lab


def bring(page, **traits) -> None:
    "Scroll to the widget (JupyterLab takes cells that are out of sight out of the page), and set its traits."
    page.evaluate(EXECUTE, f"for name, value in {traits!r}.items(): setattr(widget, name, value)")
    page.evaluate("""() => { const content = jupyterapp.shell.currentWidget.content;
        const at = content.widgets.findIndex(cell => cell.model.sharedModel.source.startsWith('widget = ')); content.activeCellIndex = at; return content.scrollToItem(at, 'start') }""")
    page.wait_for_selector(".correspondence [data-item]")
    page.wait_for_timeout(300)


TOLD = """import json; view, run = widget.study, widget.study.runs["mixture-mi"]; item = spoken.{grain}[0]; scores = run.scores["{grain}"][item]
hit = bool(view.cells["mixture-mi"][view.outlines.index(spoken), scores.argmax()])
print(json.dumps([item, int(scores.argmax()), int(scores.argmin()), run.grid, run.frame, hit]))"""


def hover_changes_the_right_place(page, grain: str) -> tuple[float, float]:
    "Hover what speaks of the effusion: its highest region changes, its lowest does not. Returns the place of the highest in shares."
    item, peak, lowest, (h, w), (x0, y0, x1, y1), hit = json.loads(page.evaluate(EXECUTE, TOLD.format(grain=grain)))
    page.mouse.move(5, 5)
    page.wait_for_timeout(200)
    before = {run: pixels(page, run) for run in ("mixture-mi", "random-init")}
    page.hover(word(item, grain))
    page.wait_for_timeout(300)
    change = np.abs(pixels(page, "mixture-mi") - before["mixture-mi"]).sum(2)
    places = [(y0 + (region // w + 0.5) / h * (y1 - y0), x0 + (region % w + 0.5) / w * (x1 - x0)) for region in (peak, lowest)]
    high, low = (np.median(change[int(y * 160) - 3:int(y * 160) + 4, int(x * 160) - 3:int(x * 160) + 4]) for y, x in places)
    assert high > 60 and low < 0.2 * high, f"{grain}: {high} at the highest score, {low} at the lowest"
    assert np.abs(pixels(page, "random-init") - before["random-init"]).max() > 20, "the other run answers too"
    assert page.locator('figure:has(canvas[data-run="mixture-mi"]) .badge').get_attribute("data-hit") == str(hit).lower()
    return places[0]


def test_the_tour_as_a_person_sees_it(tour):
    page = tour
    bring(page, outlines=False)     # an outline that is spoken of becomes thicker, wherever it is
    assert page.locator(".jp-OutputArea-output[data-mime-type*=error]").count() == 0
    assert page.locator(".correspondence canvas").count() == 2
    page.get_by_role("button", name="Grain: Words").click()
    hover_changes_the_right_place(page, "words")
    shot(page, "lab-word")
    page.get_by_role("button", name="Grain: Sentences").click()
    y, x = hover_changes_the_right_place(page, "sentences")
    bring(page, outlines=True)
    page.hover(word(0, "sentences"))
    shot(page, "lab-sentence")

    canvas = page.locator('canvas[data-run="mixture-mi"]').bounding_box()
    page.mouse.move(canvas["x"] + x * canvas["width"], canvas["y"] + y * canvas["height"])
    page.wait_for_timeout(200)
    scores = json.loads(page.evaluate(EXECUTE, 'print(json.dumps(widget.study.runs["mixture-mi"].scores["sentences"][:, scores.argmax()].tolist()))'))
    assert lit(page, "sentences").argmax() == np.argmax(scores) and lit(page).max() == 1
    shot(page, "lab-region")
    page.mouse.move(5, 5)

    page.get_by_role("button", name="Grain: Words").click()
    page.click(word(1))
    page.click(word(0))
    page.mouse.move(5, 5)
    assert selection(page)["words"] == [0, 1]
    page.evaluate(EXECUTE, "widget.selection = {'words': [2], 'boxes': [[0.25, 0.25, 0.5, 0.5]]}")
    page.wait_for_selector(word(2) + '[aria-pressed="true"]')
    shot(page, "lab-pinned")


def test_keyboard_alone_and_no_cell_is_harmed(tour):
    page, active = tour, "document.activeElement"
    bring(page, grain="words", selection={})
    cells = page.evaluate("jupyterapp.shell.currentWidget.content.widgets.length")
    page.get_by_label("Previous study").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate(f"{active}.dataset.run"):
            break
    assert page.evaluate(f"{active}.dataset.run") == "mixture-mi"
    for key in ("Escape", "ArrowDown", "ArrowDown", "Shift+ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    assert len(selection(page)["boxes"]) == 1 and page.evaluate(f"{active}.dataset.run") == "mixture-mi"
    for _ in range(4):
        page.keyboard.press("Tab")
        if page.evaluate(f"{active}.dataset.grain"):
            break
    assert page.evaluate(f"{active}.dataset.grain") == "words"
    for key in ("ArrowRight", " ", "b", "a", "x", "d", "d", "m"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Scale: Raw").focus()
    for key in ("ArrowRight", "ArrowDown", "b", "x", "Shift+Tab"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    assert selection(page)["words"] == [1] and page.evaluate("jupyterapp.shell.currentWidget.content.widgets.length") == cells
    page.keyboard.press("n")
    page.locator(".place", has_text="· 2 of 60").first.wait_for()
    for _ in range(40):
        if (position := page.evaluate(EXECUTE, "print(widget.position)").strip()) == "1":
            break
        page.wait_for_timeout(250)
    assert position == "1"
    shot(page, "lab-keyboard")


def test_keys_are_whole_words_in_lab(tour):
    bring(tour, grain="words", selection={}, scale="common")
    tour.locator(".keys summary").click()
    keys = tour.locator(".keylist b")
    assert keys.first.text_content() == "Tab" and all(box["height"] < 30 for box in (keys.nth(k).bounding_box() for k in range(keys.count())))
    keys.first.scroll_into_view_if_needed()
    shot(tour, "lab-keys")
    bring(tour, scale="normalised")
    tour.locator(".keys summary").click()


def test_dark_theme(tour):
    tour.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    tour.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    bring(tour, grain="words", selection={})
    ground = tour.evaluate("getComputedStyle(document.querySelector('.correspondence')).backgroundColor")
    assert sum(map(int, ground[4:-1].split(","))) < 150
    tour.hover(word(0))
    shot(tour, "lab-dark")
    tour.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")


def test_500_studies_come_one_by_one(lab):
    open_notebook(lab, "many.ipynb")
    lab.received.clear()
    run_all(lab)
    lab.wait_for_timeout(500)
    size = [len(frame) for frame in lab.received]
    scores = 256 * (25 + 3) * 4                                     # of one study, a little more than 28 kB
    assert sum(size) < 12 * scores, f"{sum(size)} bytes in {len(size)} messages before anything was touched"
    assert "of 500" in lab.locator(".place").text_content()
    lab.received.clear()
    lab.get_by_role("button", name="Next study").click()
    lab.wait_for_selector("[data-ready=random-0001]")
    again = sum(len(frame) for frame in lab.received)
    assert scores / 2 < again < 3 * scores, f"{again} bytes for the next study"
    print({"first": sum(size), "next": again})
    lab.received.clear()
    lab.get_by_label("Search ids and words").fill("number 437")
    lab.wait_for_selector("[data-ready=random-0437]")
    lab.get_by_label("Search ids and words").fill("")
    lab.get_by_label("Order").select_option("alignment")
    lab.locator(".place", has_text="· 1 of 500").first.wait_for(timeout=120_000)


def asked(page, code: str):
    "A value of the kernel."
    return json.loads(page.evaluate(EXECUTE, f"import json; print(json.dumps({code}))"))


def test_a_phrase_is_typed_and_the_phantom_edited(lab):
    "A stranger's model in a live kernel: what is typed is embedded there; a finding that is mirrored and erased takes map, outline and words along."
    open_notebook(lab, "edit.ipynb")
    run_all(lab)
    assert "Derived maps" in lab.locator(".report").inner_text() and "words (dark)" in lab.locator(".report").inner_text()
    lab.get_by_label("A phrase of your own").fill("is there a pneumothorax")
    lab.get_by_label("A phrase of your own").press("Enter")
    typed = lab.locator(".sentence[data-kind=typed] p")
    typed.wait_for(timeout=60_000)
    assert typed.all_text_contents() == ["is there a pneumothorax"] and asked(lab, "widget.typed") == ["is there a pneumothorax"]
    peak = "int(widget.study.runs['dark'].scores['sentences'][-1].argmax())"
    first, before = asked(lab, peak), pixels(lab, "dark")
    shot(lab, "lab-typed")
    side, words = asked(lab, "[editor.study.findings[0].side, widget.study.sentences]")

    lab.get_by_role("button", name="Mirror").click()
    lab.wait_for_selector("[data-ready='1: mirror Pneumothorax']", timeout=60_000)
    assert asked(lab, "editor.study.findings[0].side") == {"left": "right", "right": "left"}[side] and asked(lab, "widget.typed")
    assert asked(lab, "widget.study.sentences") != words and np.abs(pixels(lab, "dark") - before).max() > 20
    shot(lab, "lab-mirrored")
    lab.get_by_label("Keep the report").check()
    lab.get_by_role("button", name="Erase").click()
    lab.wait_for_selector("[data-ready='2: erase Pneumothorax']", timeout=60_000)
    assert asked(lab, "widget.study.sentences")[:-1] == words[:-1] and not asked(lab, "len(widget.study.outlines)") and first >= 0
    shot(lab, "lab-erased")
    lab.get_by_role("button", name="Previous study").click()
    lab.wait_for_selector("[data-ready='1: mirror Pneumothorax']")


def test_nothing_left_this_machine(lab):
    assert lab.asked
    assert [url for url in lab.asked if not url.startswith((lab.address, "data:", "blob:"))] == []
