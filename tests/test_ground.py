"""Grounding: measures against oracles written differently, MS-CXR's format there and back, and films whose boxes must be found again."""
import hashlib
import json
import shutil
import warnings
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from folders import folder_pack
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score
from torch import nn

from medvis.core.files import write_json
from medvis.data.images import to_square
from medvis.data.pack import Pack
from medvis.data.preprocessing import Preprocessing
from medvis.data.pairs import Sampling
from medvis.data.phrases import (
    Phrase, phantom_phrases, phrase_mask, read_ms_cxr, tight_boxes, write_ms_cxr)
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.evaluate import ground
from medvis.evaluate.audit import audit
from medvis.evaluate.map_recipes import ground_recipes
from medvis.evaluate.presence import ground_labels
from medvis.evaluate.stats import resample
from medvis.methods import MGCA
from medvis.methods.method import Correspondence, phantom_tokenizer
from medvis.train.run import Provenance


# ---------------------------------------------------------------- measures

def bilinear(scores, grid, size):
    "Pixel by pixel: the four nearest region centres, held at the border."
    (h, w), (H, W), out = grid, size, np.zeros(size)
    values = np.reshape(scores, grid)
    for y in range(H):
        for x in range(W):
            row, column = min(max((y + 0.5) * h / H - 0.5, 0), h - 1), min(max((x + 0.5) * w / W - 0.5, 0), w - 1)
            for r, share in ((int(row), 1 - row % 1), (min(int(row) + 1, h - 1), row % 1)):
                for c, part in ((int(column), 1 - column % 1), (min(int(column) + 1, w - 1), column % 1)):
                    out[y, x] += share * part * values[r, c]
    return out


def targets(draw):
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    scores = draw(hnp.arrays(np.float64, grid[0] * grid[1], elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 3.0])))
    mask = draw(hnp.arrays(bool, size))
    if not mask.any():
        mask[0, 0] = True
    return scores, mask, grid


@settings(max_examples=50, deadline=None)
@given(st.composite(targets)())
def test_measures_are_those_of_scikit_learn(target):
    scores, mask, grid = target
    told = ground.measure([scores], [mask], grid).iloc[0]
    drawn, truth = bilinear(scores, grid, mask.shape), mask.ravel()
    np.testing.assert_allclose(ground.upsample_map(scores, grid, mask.shape), drawn, atol=1e-12)
    spread = np.ptp(drawn)
    unit = ((drawn - drawn.min()) / spread if spread > 1e-9 else drawn * 0).ravel().round(9)
    heights = (0.1, 0.2, 0.3, 0.4, 0.5)
    clear = all(np.abs(unit - t).min() > 1e-6 for t in (*heights, *[(1 + t) / 2 for t in heights]))    # no pixel at a height
    if clear and spread > 1e-9:
        for name, cuts in (("miou", heights), ("miou_signed", [(1 + t) / 2 for t in heights])):
            assert told[name] == pytest.approx(np.mean([jaccard_score(truth, unit > t, zero_division=0) for t in cuts]))
        assert told["dice"] == pytest.approx(f1_score(truth, unit > 0.5, zero_division=0))
    best = max(f1_score(truth, unit >= t, zero_division=0) for t in np.unique(unit))
    assert told["best_dice"] == pytest.approx(best)
    assert told["chance"] == pytest.approx(truth.mean())
    if spread > 1e-9 and 0 < truth.sum() < truth.size:
        inside, outside = drawn.ravel()[truth], drawn.ravel()[~truth]
        if (noise := np.sqrt(inside.var() + outside.var())) > 1e-9:
            assert told["cnr"] == pytest.approx((inside.mean() - outside.mean()) / noise, rel=1e-6, abs=1e-9)


def test_raw_heights_are_those_of_the_scores():
    scores, mask = np.array([0.05, 0.15, 0.35, 0.6]), np.array([[False, False, True, True]])
    told = ground.measure([scores], [mask], (1, 4)).iloc[0]
    assert told["miou_raw"] == pytest.approx(np.mean([2 / 3, 1, 1, 1 / 2, 1 / 2]))      # above .1 three pixels, .2 and .3 two, .4 and .5 one
    assert ground.measure([scores + 1], [mask], (1, 4)).iloc[0]["miou_raw"] == 0.5       # all above every height
    assert ground.measure([scores + 1], [mask], (1, 4)).iloc[0]["miou"] == told["miou"]


def test_degenerate_maps():
    everywhere, dot = np.ones((1, 6, 6), bool), np.zeros((1, 6, 6), bool)
    dot[0, 5, 5] = True
    flat, peak = np.full((1, 9), 0.3), np.eye(9)[8:]
    told = pd.concat([ground.measure(scores, mask, (3, 3)) for scores in (flat, peak) for mask in (everywhere, dot)])
    assert np.isnan(told["cnr"].iloc[0]) and told["cnr"].iloc[1] == 0
    assert (told["miou"].iloc[:2] == 0).all() and told["best_dice"].tolist()[:2] == [1, 2 / 37]
    assert told["hit"].tolist() == [1, 1 / 9, 1, 1] and told["best_dice"].iloc[3] == 1      # the corner pixel alone is highest
    for bad, complaint in ((np.zeros((1, 8)), "(1, 9)"), (np.full((1, 9), np.nan), "not numbers")):
        with pytest.raises(ValueError, match=complaint.replace("(", r"\(").replace(")", r"\)")):
            ground.measure(bad, dot, (3, 3))


def test_the_table_is_what_pandas_computes_on_every_draw():
    draw, count = np.random.default_rng(0), 60
    rows = pd.DataFrame({name: draw.random(count) for name in ground._MEASURES})
    rows = rows.assign(finding=draw.choice(["Edema", "Nodule", "Effusion"], count), patient=draw.integers(0, 20, count), other_miou=draw.random(count))
    rows.loc[:4, "cnr"] = rows.loc[7:9, "other_miou"] = np.nan
    table = ground.grounding_table(rows, 40).set_index(["measure", "finding"])
    weights = resample(rows["patient"].astype(str), 40)

    def statistic(values, of):
        drawn = []
        for row in weights:
            times = rows.assign(value=values).loc[np.repeat(np.arange(count), row.astype(int))].dropna(subset="value")
            means = times.groupby("finding")["value"].mean()
            drawn.append({"all": times["value"].mean(), "macro": means.mean(), **means}.get(of, np.nan))
        return drawn

    for of in ("Edema", "all", "macro"):
        for values, columns, name in ((rows["cnr"], ["value", "low", "high"], "cnr"), (rows["miou"], ["value", "low", "high"], "miou"),
                                      (rows["miou"] - rows["other_miou"], ["gain", "gain_low", "gain_high"], "miou")):
            drawn = statistic(values, of)
            expected = [drawn[0], *np.nanquantile(drawn[1:], [0.025, 0.975])]
            np.testing.assert_allclose(table.loc[(name, of), columns].astype(float), expected, atol=1e-12)
    assert table.loc[("miou", "all"), "other"] == pytest.approx(rows["other_miou"].mean()) and np.isnan(table.loc[("hit", "all"), "gain"])
    assert table.loc["hit"]["targets"].drop(["all", "macro"]).sum() == count == table.loc[("hit", "macro"), "targets"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8))
def test_strangers(patients):
    for i, found in enumerate(ground._next_other_patient(patients)):
        others = [(i + step) % len(patients) for step in range(1, len(patients)) if patients[(i + step) % len(patients)] != patients[i]]
        assert found == (others[0] if others else i)


# ---------------------------------------------------------------- the format

sides = st.integers(40, 4000)
names = st.text("abcdef0123456789-", min_size=1, max_size=12)


@st.composite
def some_phrases(draw):
    phrases = {}
    for _ in range(draw(st.integers(1, 4))):
        image, category, text = draw(names), draw(st.sampled_from(["Edema", "Pneumonia"])), draw(st.sampled_from(["left, \"lower\"\nlobe", "Ödem", "a b"]))
        old = next((phrase for phrase in phrases.values() if phrase.image_id == image), None)
        width, height = (old.width, old.height) if old else (draw(sides), draw(sides))
        boxes = []
        for _ in range(draw(st.integers(1, 3))):
            x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
            boxes.append((float(x0), float(y0), float(draw(st.integers(x0 + 1, width))), float(draw(st.integers(y0 + 1, height)))))
        phrases[image, category, text] = Phrase(image, text, category, tuple(boxes), width, height, f"files/{image}.jpg", "test")
    return list(phrases.values())


@settings(max_examples=40, deadline=None)
@given(some_phrases())
def test_there_and_back(tmp_path_factory, phrases):
    folder = tmp_path_factory.mktemp("format")
    write_ms_cxr(folder / "a.json", phrases)
    assert read_ms_cxr(folder / "a.json") == phrases
    flat = [{"dicom_id": p.image_id, "category_name": p.category, "label_text": p.text, "path": p.path, "split": p.split, "x": x0, "y": y0,
             "w": x1 - x0, "h": y1 - y0, "image_width": p.width, "image_height": p.height} for p in phrases for x0, y0, x1, y1 in p.boxes]
    pd.DataFrame(flat).sample(frac=1, axis=1, random_state=0).to_csv(folder / "a.csv", index=False)
    assert read_ms_cxr(folder / "a.csv") == phrases


ROW = {"dicom_id": "a", "category_name": "Edema", "label_text": "secret haze", "x": 1, "y": 2, "w": 3, "h": 4, "image_width": 50, "image_height": 60}


@pytest.mark.parametrize("change, complaint", [
    ({"x": 48.5}, r"line 3 \(image a\): the box .* of Edema lies outside of its image"), ({"y": -2}, "outside"), ({"h": 59.5}, "outside"), ({"w": 0}, "no extent"),
    ({"w": -3}, "no extent"), ({"x": "left"}, "expected a number"), ({"image_width": None}, "expected a number"), ({"dicom_id": None}, "dicom_id is ''; expected a text"),
    ({"label_text": ""}, "label_text is ''; expected a text"), ({"category_name": None}, "category_name is ''; expected a text")])
def test_bad_rows_are_named(tmp_path, change, complaint):
    pd.DataFrame([ROW, {**ROW, **change}]).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ValueError, match=complaint) as told:
        read_ms_cxr(tmp_path / "a.csv")
    assert "a.csv" in str(told.value) and "secret" not in str(told.value)


@pytest.mark.parametrize("text, complaint", [("{", "not JSON"), ("[]", "lacks the lists"), ('{"images": []}', "categories, annotations"), (
    json.dumps({"images": [], "categories": [], "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "label_text": "secret"}]}),
    "annotation 1")])
def test_bad_files_are_named(tmp_path, text, complaint):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=complaint) as told:
        read_ms_cxr(tmp_path / "a.json")
    assert "a.json" in str(told.value) and "secret" not in str(told.value)
    pd.DataFrame([ROW]).drop(columns="w").to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ValueError, match="b.csv: no column 'w'; the file has"):
        read_ms_cxr(tmp_path / "b.csv")


@settings(max_examples=40, deadline=None)
@given(st.integers(64, 300), st.integers(64, 300), st.sampled_from(["pad", "stretch"]), st.data())
def test_boxes_go_where_the_pixels_go(width, height, fit, data):
    x0, y0 = data.draw(st.integers(0, width - 2)), data.draw(st.integers(0, height - 2))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    film = np.zeros((height, width), np.uint8)
    film[y0:y1, x0:x1] = 255
    mask = phrase_mask(Phrase("a", "", "", ((x0, y0, x1, y1),), width, height), 64, fit)
    told = tight_boxes(mask)[0]
    light = np.pad(to_square(film, 64, fit), 1) > 0
    grown = tight_boxes(light)[0]
    assert mask.any() and all(abs(a - b + 1) <= 1.5 for a, b in zip(told, grown)), (told, grown)


# ---------------------------------------------------------------- from file to table

class Bright(nn.Module):
    "A method whose map is the brightness of each region, whatever the phrase."

    def __init__(self, preprocessing, grid=16):
        super().__init__()
        self.preprocessing, self.sampling, self.grid = preprocessing, Sampling(), grid
        self.tokenizer, self.weight = phantom_tokenizer(20), nn.Parameter(torch.zeros(1))

    def correspondence(self, batch):
        maps = nn.functional.adaptive_avg_pool2d(batch.image[:, :1], self.grid).flatten(1)[:, :, None]
        valid = torch.ones(len(batch), 1, dtype=torch.bool)
        return Correspondence(maps, maps, valid, valid, (self.grid, self.grid))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Oblong films with one or two bright boxes each, their phrases, and Packs of them by either fit."
    root, draw, rows, phrases = tmp_path_factory.mktemp("films"), np.random.default_rng(0), [], []
    for number in range(12):
        width, height = ((300, 420), (420, 300), (350, 350))[number % 3]
        film, boxes = np.zeros((height, width), np.uint8), []
        for half in range(1 + number % 2):
            x0, y0 = int(draw.integers(60, width // 2 - 40)) + half * (width // 2 - 60), int(draw.integers(60, height - 160))
            box = (x0, y0, x0 + 40, y0 + 90)
            film[box[1]:box[3], box[0]:box[2]] = 200
            boxes.append(tuple(map(float, box)))
        path = f"files/p10/s{number}/film-{number}.png"
        (root / path).parent.mkdir(parents=True)
        Image.fromarray(film).save(root / path)
        rows.append({"image_path": path, "report": "There is an effusion here.", "patient_id": f"p{number // 2}", "study_id": f"s{number}"})
        phrases.append(Phrase(f"film-{number}", "an effusion", "Pleural Effusion", tuple(boxes), width, height, path, "test"))
    pd.DataFrame(rows).to_csv(root / "table.csv", index=False)
    packs = {fit: folder_pack(root / "table.csv", root / fit, size=128, fit=fit) for fit in ("pad", "stretch")}
    write_ms_cxr(root / "films.json", phrases)
    return packs, read_ms_cxr(root / "films.json")


@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_what_shines_is_found_again(films, fit, crop):
    packs, phrases = films
    rows = ground.ground_phrases(Bright(Preprocessing(size=112, crop=crop, channels=1), grid=28), packs[fit], phrases, batch_size=5)
    assert rows["phrase"].tolist() == list(range(12)) and rows["patient"].tolist() == [f"p{i // 2}" for i in range(12)]
    assert (rows["hit"] == 1).all() and (rows["best_dice"] > 0.8).all() and (rows["cnr"] > 3).all() and (rows["dice"] > 0.75).all()
    assert rows["other_best_dice"].mean() < 0.5 and rows["boxes"].tolist() == [1, 2] * 6
    stretched = ground.ground_phrases(Bright(Preprocessing(size=112, crop=crop, channels=1), grid=28), packs[fit],
                                      [replace(p, width=2 * p.width, height=2 * p.height, boxes=tuple(tuple(2 * v for v in b) for b in p.boxes)) for p in phrases])
    pd.testing.assert_frame_equal(stretched, rows)      # the same film at twice the resolution


def test_the_control_is_another_patients_image(films):
    packs, phrases = films
    method = Bright(Preprocessing(size=112, crop=1.0, channels=1))
    rows = ground.ground_phrases(method, packs["pad"], phrases)
    for i in range(12):
        other = phrases[(i // 2 * 2 + 2) % 12]                                                # the first film of the next patient
        image = packs["pad"].image_table["image_id"].tolist().index(other.path)
        masks = method.preprocessing.mask()(torch.from_numpy(phrase_mask(phrases[i], 128, "pad"))).numpy()
        scores, grid = ground.phrase_maps(method, packs["pad"], [phrases[i].text], [image])
        expected = ground.measure(scores, masks[None], grid).iloc[0]
        for name in ("hit", "cnr", "miou", "best_dice"):
            assert rows[f"other_{name}"].iloc[i] == pytest.approx(expected[name])
    alone = ground.ground_phrases(method, packs["pad"], phrases[:2])                          # two films of one patient
    assert alone["other_hit"].isna().all() and alone["hit"].eq(1).all()


def in_splits(pack, *splits):
    "The same Pack with its studies in these splits, in turn."
    pack = copy(pack)
    vars(pack)["studies"] = pack.studies.assign(split=np.resize(splits, len(pack.studies)))
    return pack


DOORS = {"ground": (ground.ground, "phrases"), "audit": (audit, "audit_phrases"), "recipes": (ground_recipes, "recipes")}


@pytest.mark.parametrize("door", DOORS)
def test_phrases_are_those_of_one_split(films, tmp_path, door):
    "Failed: phrases about training images were scored with the others."
    packs, phrases = films
    method, (measure, file) = Bright(Preprocessing(size=112, crop=1.0, channels=1), grid=28), DOORS[door]

    def images(pack, **split):
        measure(method, pack, phrases, tmp_path, resamples=5, **split)
        table, facts = pd.read_csv(tmp_path / f"{file}.csv"), json.loads((tmp_path / ("phrases.json" if door == "ground" else f"{door}.json")).read_text())
        counted = table["targets"][table["boxes"] == "union"].max() if door == "recipes" else len(table)
        assert counted == facts["count"] and sum(facts["given"].values()) == 12
        assert facts["recipe"] == ground.RECIPE or door == "recipes"
        assert all("recipe" in pd.read_csv(path) for path in tmp_path.glob("*.csv"))
        return counted, facts["split"]

    mixed = in_splits(packs["pad"], "train", "test", "test", "validate")
    assert images(mixed) == (6, "test") and images(mixed, split="validate") == (3, "validate") and images(mixed, split=None) == (12, None)
    for splits, expected in {("test",): (12, "test"), ("validate",): (12, None), ("validate", "test"): (6, "test")}.items():     # for its phrases alone: no training images
        assert images(in_splits(packs["pad"], *splits)) == expected
    with pytest.raises(ValueError, match="unknown split of .* 'test'; choose from train"):
        images(in_splits(packs["pad"], "train"))
    with pytest.raises(ValueError, match="unknown split of .* 'tset'; choose from"):
        images(mixed, split="tset")
    with pytest.raises(ValueError, match="of 1 phrases none is about an image of the split 'test' of .* \\(train 1\\)"):
        measure(method, mixed, phrases[:1])


@pytest.mark.parametrize("door", DOORS)
def test_phrases_that_are_left_out_are_said(films, door):
    "Failed: of a file about training images too, the others were measured without a word."
    packs, phrases = films
    method, mixed = Bright(Preprocessing(size=112, crop=1.0, channels=1)), in_splits(packs["pad"], "train", "test", "test", "validate")
    with pytest.warns(UserWarning, match="6 of 12 phrases are not about images of the split 'test' of .*train 3.*--split"):
        DOORS[door][0](method, mixed, phrases, resamples=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DOORS[door][0](method, mixed, phrases, split=None, resamples=5)
        DOORS[door][0](method, mixed, [phrases[1]], resamples=5)


@pytest.mark.parametrize("door", [*DOORS, "labels"])
def test_options_are_named(films, door):
    measure = {**DOORS, "labels": (ground_labels, "")}[door][0]
    with pytest.raises(TypeError, match="positional"):
        measure(None, films[0]["pad"], films[1], None, "test")


@pytest.mark.parametrize("door", DOORS)
def test_images_that_a_run_was_trained_on_are_refused(films, tmp_path, door):
    "Failed: split=None measured a run on its own training patients, and nobody said so."
    packs, phrases = films
    path = Path(shutil.copytree(packs["pad"].path, tmp_path / "pack"))
    table = pd.read_parquet(path / "studies.parquet").assign(split=np.repeat(["train", "test", "validate"], 4))
    table.to_parquet(path / "studies.parquet", index=False)
    content = (path / "studies.parquet").read_bytes()
    manifest = {key: value for key, value in packs["pad"].manifest.items() if key != "checksum"} | {"guard": {"against": {}, "leaks": {}}}
    manifest["files"] = manifest["files"] | {"studies.parquet": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    write_json(path / "manifest.json", manifest)
    pack, measure = Pack(path), DOORS[door][0]
    method = Bright(Preprocessing(size=112, crop=1.0, channels=1), grid=28)
    method.provenance = Provenance(tmp_path / "run", {"hash": pack.manifest["hash"], "path": str(path)})
    for split in (None, "train"):
        with pytest.raises(ValueError, match=f"4 of the {12 if split is None else 4} images to measure on are of patients .*--allow-leaks"):
            measure(method, pack, phrases, split=split, resamples=5)
        measure(method, pack, phrases, split=split, resamples=5, allow_leaks=True)
    measure(method, pack, phrases, split="validate", resamples=5)
    measure(method, pack, [phrase for phrase in phrases[4:]], split=None, resamples=5)      # all of these, which are not for training


def test_wrong_pairings_are_refused(films):
    packs, phrases = films
    method = Bright(Preprocessing(size=112, crop=1.0, channels=1))
    wrong = {
        "does not hold 1 of the 2 images": [phrases[0], replace(phrases[1], image_id="film-99")],
        "drawn on 420 x 300 pixels, but": [replace(phrases[0], width=420, height=300)],
        "has no words": [replace(phrases[0], text="?!")],
        "none has a box": [],
    }
    for complaint, given_ in wrong.items():
        with pytest.raises(ValueError, match=complaint) as told:
            ground.ground_phrases(method, packs["pad"], given_)
        assert "effusion" not in str(told.value)
    method.preprocessing = Preprocessing(size=112, crop=1.0, channels=1, fit="stretch")
    with pytest.raises(ValueError, match="fit='stretch'"):
        ground.ground_phrases(method, packs["pad"], phrases)
    corner = replace(phrases[0], boxes=((0.0, 0.0, 9.0, 9.0),))
    method.preprocessing = Preprocessing(size=96, crop=0.75, channels=1)
    assert ground.ground_phrases(method, packs["pad"], [phrases[0], corner])["phrase"].tolist() == [0]     # cropped away


def test_a_method_on_the_phantom_written_as_ms_cxr(tmp_path):
    pack = prepare_phantom(PhantomConfig(out=tmp_path / "pack", studies=40, size=64, progress=False))
    write_ms_cxr(tmp_path / "phantom.json", phantom_phrases(pack, None))
    phrases = read_ms_cxr(tmp_path / "phantom.json")
    torch.manual_seed(0)
    method = MGCA.from_preset("tiny", phantom_tokenizer(40)).train()
    state = {key: value.clone() for key, value in method.state_dict().items()}
    rows = ground.ground_phrases(method, pack, phrases)
    again = ground.ground_phrases(method, pack, phrases, batch_size=7)
    pd.testing.assert_frame_equal(rows, again, rtol=1e-4, atol=1e-4)
    assert method.training and all(torch.equal(value, state[key]) for key, value in method.state_dict().items())
    assert len(rows) == len(phrases) and rows[[*ground._MEASURES]].notna().all(axis=None)
    table = ground.grounding_table(rows, 50).set_index(["measure", "finding"])
    assert abs(table.loc[("hit", "all"), "value"] - table.loc[("chance", "all"), "value"]) < 0.15       # it has learned nothing
    assert table.loc[("miou", "all"), "low"] <= table.loc[("miou", "all"), "value"] <= table.loc[("miou", "all"), "high"]
