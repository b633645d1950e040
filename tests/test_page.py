"""Maps and the HTML page: hostile text, degenerate runs, and a real browser."""
import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from medvis.analyse import maps, page
from medvis.data.pairs import Report
from medvis.methods.method import Correspondence

HOSTILE = "</pre></style></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;'\" $x_{2}$ 胸部\u202e"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync").split()


pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from font")     # DejaVu has no Chinese; the table shows it


def correspondence(words=3, grid=(4, 4)):
    scores = torch.rand(1, grid[0] * grid[1], words, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, words, dtype=bool)
    return Correspondence(scores, scores[..., :1], mask, mask[:, :1], grid)


def probe_rows(name=HOSTILE):
    rows = [{"encoder": encoder, "finding": finding, "fraction": fraction, "auroc": 0.7, "low": 0.6, "high": 0.8, "n": 30}
            for encoder in (name, "random-init") for fraction in (0.01, 1.0) for finding in (HOSTILE, "Edema", "macro")]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """A run in which every string is hostile."""
    metrics = pd.DataFrame({"step": [1, 2, 2], "split": ["train", "train", "validate"], "loss": [3.0, 2.0, 2.5], HOSTILE: [1.0, 0.5, 0.6]})
    pointing = pd.DataFrame({"finding": [HOSTILE, "all"], "hit_rate": [0.4, 0.4], "low": [0.3, 0.3], "high": [0.5, 0.5], "chance": [0.1, 0.1], "targets": [5, 5]})
    report = Report([], [], [], [HOSTILE, "Large heart."], [(0, 0, len(HOSTILE)), (1, 0, 5), (1, 6, 11)])
    mask = np.zeros((32, 32), bool)
    mask[:16, :16] = True
    card = page.correspondence_card(np.eye(32), correspondence(), 0, report, pick=[0, 2], masks={0: mask}, title=HOSTILE)
    sections = page.run_sections(metrics, probe_rows(), pointing, [card], {HOSTILE: {HOSTILE: [HOSTILE]}})
    path = tmp_path_factory.mktemp("page") / "run" / "page.html"
    return page.write_page(path, HOSTILE, sections, subtitle=HOSTILE, top=page.headlines([(HOSTILE,) * 3]))


def test_hostile_text_stays_text(hostile_page):
    text = hostile_page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;" in text and "胸部" in text
    for document in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text):
        svg = base64.b64decode(document).decode()
        assert "<script" not in svg and "onerror" not in re.sub(r"<!--.*?-->", "", svg, flags=re.S)


def test_same_run_same_bytes(tmp_path):
    first, second = (page.write_page(tmp_path / name, "run", page.run_sections(probe=probe_rows("a"))) for name in ("one.html", "two.html"))
    assert first.read_bytes() == second.read_bytes() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("given", [
    {},
    {"metrics": pd.DataFrame({"step": [], "split": [], "loss": []})},
    {"metrics": pd.DataFrame({"step": [1], "split": ["train"], "loss": [np.nan]})},
    {"metrics": pd.DataFrame({"step": [1], "split": ["train"], "loss": [1.0]})},
    {"probe": pd.DataFrame(), "pointing": pd.DataFrame()},
    {"probe": probe_rows("a").assign(auroc=np.nan, low=np.nan, high=np.nan)},
    {"probe": probe_rows("a").query("finding == 'macro'")},
    {"pointing": pd.DataFrame({"finding": ["all"], "hit_rate": [np.nan], "low": [np.nan], "high": [np.nan], "chance": [np.nan], "targets": [0]})},
])
def test_poor_runs_have_a_page(given, tmp_path):
    assert page.write_page(tmp_path / "page.html", "run", page.run_sections(**given)).stat().st_size > 1000


def test_text_can_be_withheld():
    report = Report([], [], [], ["Secret finding here."], [(0, 0, 6), (0, 7, 14), (0, 15, 19)])
    card = page.correspondence_card(np.eye(16), correspondence(), 0, report, pick=[0, 1], show_text=False)
    text = re.sub(r"base64,[\w+/=]+", "", card)     # where any word may turn up
    assert not re.search("secret|finding|here", text, re.I) and "word 2" in text


def test_a_map_lies_where_its_regions_are():
    """Each region lit alone brightens its own cell of the drawn picture, and the ring sits there."""
    for grid in ((3, 5), (4, 4)):
        for region in range(grid[0] * grid[1]):
            scores = np.zeros(grid[0] * grid[1])
            scores[region] = 1
            figure = Figure(figsize=(2, 2), dpi=60)
            ax = figure.add_axes((0, 0, 1, 1))
            maps.draw_map(ax, np.zeros((30, 40)), scores, grid)
            shown = maps._heat_colours(scores, grid)[..., 3]
            row, column = np.unravel_index(shown.argmax(), shown.shape)
            assert (row * grid[0] // maps._SIDE, column * grid[1] // maps._SIDE) == divmod(region, grid[1])
            x, y = ax.lines[0].get_xydata()[0]
            assert (int(y * grid[0] / 30), int(x * grid[1] / 40)) == divmod(region, grid[1])


def test_odd_maps_can_be_drawn():
    ax = Figure().subplots()
    maps.draw_map(ax, torch.zeros(3, 8, 8), torch.zeros(4, requires_grad=True), (2, 2), np.ones((8, 8), bool), HOSTILE)
    ax.figure.savefig("/dev/null", format="png")
    with pytest.raises(ValueError, match="2 x 2"):
        maps.draw_map(ax, np.zeros((8, 8)), np.zeros(5), (2, 2))
    assert maps.pick_words(correspondence(2), 0, 9) == [0, 1]
    empty = correspondence(2)
    empty.word_mask[:] = False
    assert maps.pick_words(empty, 0) == []


# ---------------------------------------------------------------- in a browser

def look(path: Path, folder: Path) -> dict:
    """Open a page in light, dark and on a phone; what it did and what it looks like."""
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    seen = {}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, width, scheme in (("light", 1280, "light"), ("dark", 1280, "dark"), ("phone", 360, "light")):
            tab = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
            asked, said = [], []
            tab.on("request", lambda request: asked.append(request.url))
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto(path.as_uri())
            tab.locator("img.chart").first.screenshot(path=folder / f"{name}.png")
            facts = tab.evaluate("""() => ({title: document.title, scripts: document.scripts.length, wide: document.documentElement.scrollWidth,
                broken: [...document.images].filter(i => !i.naturalWidth).length, images: document.images.length})""")
            seen[name] = {**facts, "asked": [url for url in asked if not url.startswith("data:")], "said": said}
        browser.close()
    return seen


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_in_a_browser(hostile_page, tmp_path):
    from PIL import Image
    seen = look(hostile_page, tmp_path)
    for name, facts in seen.items():
        assert facts["asked"] == [hostile_page.as_uri()] and facts["said"] == [], name
        assert facts["scripts"] == 0 and facts["title"] != "owned" and facts["broken"] == 0 and facts["images"] >= 6, name
    assert seen["phone"]["wide"] <= 360 and seen["light"]["wide"] <= 1280
    light, dark = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"), float) for name in ("light", "dark"))
    assert np.median(light) > 200 and light.min() < 100        # dark ink on a light ground, and the other way round
    assert np.median(dark) < 60 and dark.max() > 180


def probe_of(rates: dict) -> pd.DataFrame:
    rows = [{"encoder": encoder, "finding": finding, "fraction": 1.0, "auroc": rate, "low": rate, "high": rate, "n": 30}
            for encoder in ("mine", "random-init") for finding, rate in rates.items()]
    return pd.DataFrame(rows)


def test_figures_and_tables_have_one_order():
    table = probe_of({"Nodule": 0.6, "Edema": 0.9, "Fracture": 0.7, "macro": 0.73})
    drawn = [label.get_text() for label in page.probe_figure(table).axes[0].get_yticklabels()]
    assert drawn == page._probe_summary(table)["finding"].tolist() == ["macro", "Edema", "Fracture", "Nodule"]
    rates = pd.DataFrame({"finding": ["A", "B", "all"], "hit_rate": [0.1, 0.5, 0.3], "low": 0.0, "high": 1.0, "chance": 0.1, "targets": 9})
    section = page.run_sections(pointing=rates)[0].html()
    assert section.index("<td>all") < section.index("<td>B") < section.index("<td>A")


def test_a_curve_is_drawn_once():
    """A method with one part logs it beside the loss: one chart. Two parts, one of them the other's copy: two."""
    loss = [3.0, 2.0, 2.5]
    one = pd.DataFrame({"step": [1, 2, 2], "split": ["train", "train", "validate"], "loss": loss, "bound": loss})
    assert page._curve_names(one) == ["loss"] and page._curve_names(one.assign(other=[1.0, 0.5, np.nan])) == ["loss", "other"]
    axes = page.curves_figure(one).axes
    assert [(bool(ax.get_xlabel()), bool(ax.get_ylabel())) for ax in axes] == [(True, True)]


def test_a_map_has_its_colour_bar():
    report = Report([], [], [], ["Large heart."], [(0, 0, 5), (0, 6, 11)])
    card = page.correspondence_card(np.eye(16), correspondence(), 0, report, pick=[0, 1])
    assert card.count('class="bar"') == 2 and card.count("<figure>") == 3


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_only_the_live_card_runs(tmp_path):
    """The card's own script runs, offline; a script that got into the page does not."""
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    live = page.Live("Card", HOSTILE, page.Html('<p id="here">still</p>'), "document.getElementById('here').textContent = 'moved';")
    smuggled = page.Section("x", [page.Html("<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">")])
    path = page.write_page(tmp_path / "page.html", "fine", [smuggled], live=live)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page()
        tab.goto(path.as_uri())
        assert tab.inner_text("#here") == "moved" and tab.title() == "fine"
        browser.close()


def test_settings_are_shown_as_json():
    shown = page.to_html({"path": Path("/a"), "rate": 1e-3, "nested": {"x": None}})
    assert json.loads(re.sub("<.*?>", "", shown).replace("&quot;", '"')) == {"path": "/a", "rate": 1e-3, "nested": {"x": None}}
