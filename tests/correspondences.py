"""Pages of the correspondence widget with planted scores: word w of run k is highest where `planted` says, and nothing was trained."""
import base64
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from medvis.evaluate.ground import on_target
from medvis.widgets.correspondence import _NOTHING, CorrespondenceWidget, pack_study, page_state
from medvis.widgets.shell import standalone
from medvis.widgets.study import Outline, RunScores, StudyView, word_spans

SIDE = 64
STATE = {"shown": ["fine", "coarse"], "runs": ["fine", "coarse"], "grain": "words", "grains": ["words", "sentences"], "scale": "normalised",
         "colours": "inferno", "opacity": 0.8, "threshold": 0.0, "smooth": True, "outlines": True, "masked": False, "window": [128, 255],
         "findings": [["Nodule", 9], ["Edema", 9]], "query": "", "finding": "", "order": "data"}
REPORT = ["Small nodule in the left upper zone.", "No effusion.", "Heart size is normal."]
GRIDS = {"fine": (8, 8), "coarse": (4, 4)}
FRAMES = {"fine": (0.0, 0.0, 1.0, 1.0), "coarse": (0.125, 0.125, 0.875, 0.875)}  # the coarse run sees a crop


def planted(run: str, item: int) -> int:
    "The region that scores highest for an item."
    h, w = GRIDS[run]
    return (item * 5 + 3) % (h * w)


def planted_scores(run: str, count: int, seed: int) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(0, 0.05, (count, GRIDS[run][0] * GRIDS[run][1])).astype(np.float32)
    for item in range(count):
        scores[item, planted(run, item)] += 1
    return scores


def square(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def make_view(position: int = 0, sentences=REPORT, labels=None, outlines=(), runs=("fine", "coarse"), kinds=None, judged="drawn") -> StudyView:
    spans = word_spans(sentences)
    scores = {name: RunScores(GRIDS[name], FRAMES[name], {
        "words": planted_scores(name, len(spans), position), "sentences": planted_scores(name, len(sentences), position + 100)}) for name in runs}
    masks = [outline.mask for outline in outlines]
    x0, x1 = (int(SIDE * FRAMES["coarse"][i]) for i in (0, 2))
    views = {"fine": masks, "coarse": [mask[x0:x1, x0:x1] for mask in masks]}
    cells = {name: on_target(np.stack(views[name]), GRIDS[name]) if masks else np.zeros((0, 1), bool) for name in runs}
    seen = {name: np.array([mask.any() for mask in views[name]], bool) for name in runs}
    picture = (np.add.outer(np.arange(SIDE), np.arange(SIDE)) + 60).astype(np.uint8)
    return StudyView(position, f"study-{position:03d}", "p", "test", picture, list(sentences), spans, labels or {"Nodule": 1.0, "Edema": -1.0},
                     list(outlines), scores, cells, seen, kinds or ["report"] * len(sentences), judged)


def write_views(path: Path, views: list[StudyView], masked: bool = False, **state) -> Path:
    "The widget in a page of its own, as `to_html` writes it."
    selection = {**_NOTHING, "study": views[0].id}
    state = page_state({**STATE, "selection": selection, "masked": masked, **state}, [pack_study(view, masked) for view in views])
    path.write_text(standalone("test", CorrespondenceWidget._esm, CorrespondenceWidget._css, state), encoding="utf-8")
    return path


NODULE = Outline("Nodule", square(24, 0, 32, 8), words=(0, 1, 4, 5), sentences=(0,))   # region 3 of the fine run: that of word 0


# ---------------------------------------------------------------- what a page shows

PIXELS = """run => { const copy = document.createElement('canvas'); copy.width = copy.height = 160;
    copy.getContext('2d').drawImage(document.querySelector(`canvas[data-run="${run}"]`), 0, 0, 160, 160); return copy.toDataURL() }"""


def pixels(page, run: str = "fine") -> np.ndarray:
    "A panel's picture, (160, 160, 3)."
    picture = base64.b64decode(page.evaluate(PIXELS, run).partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), float)


def place_of(run: str, region: int) -> tuple[float, float]:
    "Centre of a region in shares of the picture, x and y."
    (h, w), (x0, y0, x1, y1), (row, column) = GRIDS[run], FRAMES[run], divmod(region, GRIDS[run][1])
    return x0 + (column + 0.5) / w * (x1 - x0), y0 + (row + 0.5) / h * (y1 - y0)


def changed_at(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    "Centre of what changed most, in shares of the picture; the ring is around it."
    change = np.abs(after - before).sum(2)
    ys, xs = np.nonzero(change > 0.5 * change.max())
    return (np.median(xs) + 0.5) / change.shape[1], (np.median(ys) + 0.5) / change.shape[0]


def at_region(page, run: str, region: int) -> tuple[float, float]:
    "Where on the screen a region is."
    box = page.locator(f'canvas[data-run="{run}"]').bounding_box()
    x, y = place_of(run, region)
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def lit(page, grain: str = "words") -> np.ndarray:
    return np.array(page.eval_on_selector_all(f'[data-grain="{grain}"][data-item]', "all => all.map(e => Number(e.style.getPropertyValue('--lit') || 0))"))


def trait(page, name: str):
    return page.evaluate("name => document.getElementById('widget').model.get(name)", name)


def word(item: int, grain: str = "words") -> str:
    return f'[data-grain="{grain}"][data-item="{item}"]'


def shot(page, name: str) -> None:
    "Save a screenshot where MEDVIS_SHOTS says, to be looked at."
    if folder := os.environ.get("MEDVIS_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")
