"""Models of three fits on one padded Pack: pictures, masks, boxes, frames and hits agree, in the widget and in the tables."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from folders import folder_pack
from PIL import Image

import medvis as mv
from medvis.data.images import boxes_to_square, to_square
from medvis.data.phrases import Phrase
from medvis.data.refit import RefittedPack, as_fitted
from medvis.evaluate.ground import ground_phrases
from medvis.widgets import CorrespondenceWidget, Studies

SIDES = [(200, 260), (260, 200), (240, 240), (150, 300)]


class Bright:
    "Its map is the brightness of the cells, whatever is said."

    def __init__(self, grid):
        self.grid = grid

    def embed_regions(self, images):
        cells = torch.nn.functional.adaptive_avg_pool2d(images, self.grid)[:, 0]
        return torch.stack([cells, torch.ones_like(cells)], -1)

    def embed_texts(self, texts):
        return np.array([[1.0, 0.0]] * len(texts))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    "Pictures of several shapes, noise of little light, and in each one bright block with its box and mask."
    folder, rng, rows, boxes, masks = tmp_path_factory.mktemp("files"), np.random.default_rng(0), [], [], []
    for n, (width, height) in enumerate(SIDES * 2):
        block = np.zeros((height, width), np.uint8)
        picture = np.asarray(Image.fromarray(rng.integers(1, 60, (10, 8)).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC))
        x, y = width // 2 - 40 + 20 * (n % 3), height // 2 - 40 + 25 * (n % 2)
        block[y:y + 36, x:x + 36] = 255
        Image.fromarray(np.where(block > 0, 255, picture).astype(np.uint8)).save(folder / f"{n}.png")
        Image.fromarray(block).save(folder / f"mask{n}.png")
        rows.append({"image_path": f"{n}.png", "report": "There is a small left effusion.", "patient_id": f"p{n}", "study_id": f"s{n}", "split": "test"})
        boxes.append({"image_path": f"{n}.png", "label": "pleural effusion", "x1": x, "y1": y, "x2": x + 36, "y2": y + 36})
        masks.append({"image_path": f"{n}.png", "label": "pleural effusion", "mask_path": f"mask{n}.png"})
    for name, table in {"table": rows, "boxes": boxes, "masks": masks}.items():
        pd.DataFrame(table).to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def padded(files, tmp_path_factory):
    return folder_pack(files / "table.csv", tmp_path_factory.mktemp("packs") / "pad", size=300, fit="pad", boxes=files / "boxes.csv", masks=files / "masks.csv")


def three():
    return {fit: mv.wrap(Bright(grid), size=size, crop=crop, channels=1, fit=fit)
            for fit, grid, size, crop in (("pad", (10, 10), 260, 0.9), ("crop", (9, 9), 144, 1.0), ("stretch", (8, 12), 112, 0.875))}


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad-first"])
def test_pictures_are_those_of_the_files(files, padded, fit):
    again = RefittedPack(padded, fit, 144)
    for row, name in enumerate(padded.image_table.path):
        original = np.asarray(Image.open(files / name))
        shown, direct = again.image(row).astype(int), to_square(original, 144, fit).astype(int)
        assert np.abs(shown - direct).mean() < 2 and np.corrcoef(shown.ravel(), direct.ravel())[0, 1] > 0.97


def test_three_fits_in_one_widget(padded, tmp_path):
    "The map of each is highest on the outline, in its own cells, and the frame says where these cells lie in the picture that is shown."
    studies = Studies(three(), padded, split=None)
    for position in range(len(studies)):
        view = studies[position]
        outline = next(one for one in view.outlines if not one.said)
        ys, xs = np.nonzero(outline.mask)
        middle = np.array([(xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2]) / padded.size
        for name, run in view.runs.items():
            hits = view.hits(name, "sentences")
            assert hits and all(hit for *_, hit in hits), (name, position)
            (h, w), (x0, y0, x1, y1) = run.grid, run.frame
            best = int(run.scores["sentences"][0].argmax())
            place = np.array([x0 + (best % w + 0.5) / w * (x1 - x0), y0 + (best // w + 0.5) / h * (y1 - y0)])
            assert np.abs(place - middle).max() < 0.09, (name, position, place, middle)
    page = CorrespondenceWidget(three(), padded, split=None).to_html(tmp_path / "page.html")
    assert page.stat().st_size > 10_000
    CorrespondenceWidget(three(), padded, split=None).to_figure()


def test_the_frames_by_hand(padded):
    "Of a picture of 200 x 260 in a padded square: all but its bars, and of these the middle."
    runs = Studies(three(), padded, split=None)[0].runs
    left = 35 / 300   # 260 -> 300, 200 -> 230
    np.testing.assert_allclose(runs["pad"].frame, (0.05, 0.05, 0.95, 0.95), atol=2e-3)
    np.testing.assert_allclose(runs["crop"].frame, (left, left, 1 - left, 1 - left), atol=5e-3)
    inner = 0.125 / 2
    np.testing.assert_allclose(runs["stretch"].frame, (left + inner * 230 / 300, inner, 1 - left - inner * 230 / 300, 1 - inner), atol=3e-3)


def test_phrases_follow(padded):
    "Boxes in pixels of the originals: each model finds the block by phrases, on the Pack as its squares are."
    boxes = padded.boxes.groupby("image")[["x0", "y0", "x1", "y1"]].first()
    sides = padded.image_table[["width", "height"]]
    phrases = [Phrase(str(padded.image_table.image_id[n]), "small left effusion", "Pleural Effusion", (tuple(boxes.loc[n]),), *map(int, sides.loc[n])) for n in range(len(padded))]
    for name, method in three().items():
        rows = ground_phrases(method, as_fitted(padded, method.preprocessing), phrases)
        assert len(rows) == len(padded) and rows.hit.all(), name
    table = mv.ground(three()["crop"], padded, phrases, split=None, resamples=20)     # a table refits by itself
    assert len(table)


def test_masks_and_boxes_are_of_one_place(padded):
    for fit in ("crop", "stretch"):
        again = RefittedPack(padded, fit, 120)
        for row in range(len(padded)):
            width, height = map(int, padded.image_table.loc[row, ["width", "height"]])
            own = padded.boxes[padded.boxes.image == row][["x0", "y0", "x1", "y1"]].to_numpy()
            box = boxes_to_square(own, height, width, 120, fit)[0]
            ys, xs = np.nonzero(again.mask(row)[0])
            np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], box, atol=1.5)


def test_leaks_are_still_found(padded):
    "The hash is that of the Pack: a run trained on it is known to have seen it."
    again = RefittedPack(padded, "crop", 144)
    assert again.manifest["hash"] == padded.manifest["hash"] and again.manifest["source"]["refitted_from"] == "pad"
    assert padded.manifest["source"]["fit"] == "pad"


def test_what_cannot_be_refitted(files, padded, tmp_path):
    squashed = folder_pack(files / "table.csv", tmp_path / "stretch", size=64, fit="stretch")
    with pytest.raises(ValueError, match="squares made by 'stretch': only padded ones can be made 'crop' anew; prepare the data set with fit='pad'"):
        Studies(three()["crop"], squashed, split=None)
    with pytest.raises(ValueError, match="of which 'crop' leaves .*: pictures of 288 would be enlarged; prepare the data set with size="):
        mv.ground(mv.wrap(Bright((9, 9)), size=288, channels=1, fit="crop"), padded, split=None)
