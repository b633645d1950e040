"""CheXpert, RSNA, SIIM, NIH and the notations of masks: what goes in comes out, the papers' draws are theirs, and no damage passes in silence."""
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from sklearn.model_selection import train_test_split

from medvis.cli.commands import main
from medvis.data.sets import chexpert, nih, rsna, siim
from medvis.data.annotations import decode_mask, _decode_rle, encode_rle, parse_shapes, _polygon_mask, _read_mask, shape_box, _shape_mask
from medvis.data.sets.chexpert import CHEXPERT, _ChexpertConfig
from medvis.data.files import DataError
from medvis.data.images import boxes_to_square
from medvis.data.sets.nih import NIH, _NihConfig
from medvis.data.pack import Pack
from medvis.data.phantom import Phantom, patient_number, tight_box
from medvis.data.sets.rsna import RSNA, _RsnaConfig
from medvis.data.sets.siim import SIIM, _SiimConfig
from medvis.data.source import BuildConfig, check_source, prepare_source
from medvis.data.tasks import pack_task
from medvis.encoders.image import image_encoder
from medvis.evaluate.classify import probe_predictions

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
PHANTOM = Phantom(64, seed=3)
SETS = {"chexpert": (CHEXPERT, _ChexpertConfig), "rsna": (RSNA, _RsnaConfig), "siim": (SIIM, _SiimConfig), "nih": (NIH, _NihConfig)}
TABLE = {"chexpert": "train.csv", "rsna": "stage_2_train_labels.csv", "siim": "train-rle.csv", "nih": "Data_Entry_2017_v2020.csv"}


def choose(name: str, follow_ups: bool) -> list:
    "Sixteen phantom studies, the first five of which show the finding; without follow-ups all of different patients"
    indices = [index for index in range(200) if follow_ups or patient_number(PHANTOM.seed, index) == index]
    ill = [index for index in indices if any(finding.name == name for finding in PHANTOM.scene(index).findings)][:5]
    return [PHANTOM[index] for index in [*ill, *[index for index in indices if index not in ill][:11]]]


FINDINGS = {"chexpert": "Edema", "rsna": "Pneumonia", "siim": "Pneumothorax", "nih": "Nodule"}
STUDIES = {name: choose(finding, SETS[name][0].follow_ups) for name, finding in FINDINGS.items()}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> dict[str, Path]:
    "The four data sets on disk; copy a folder before you change it"
    folders = {}
    for name, (data_set, _) in SETS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        data_set.simulate(folders[name], STUDIES[name])
    return folders


def tables_only(source: Path, target: Path) -> Path:
    "A copy of the tables, with the folders of images linked"
    for path in source.iterdir():
        if path.is_dir():
            (target / path.name).symlink_to(path)
        else:
            shutil.copy(path, target / path.name)
    return target


# Notations of masks

masks = array_shapes(min_dims=2, max_dims=2, max_side=17).flatmap(lambda shape: arrays(bool, shape))


@PROPERTY
@given(masks, st.booleans())
def test_a_mask_survives_its_code(mask, relative):
    height, width = mask.shape
    assert np.array_equal(_decode_rle(encode_rle(mask, relative), width, height, relative), mask)


def by_the_book(rle: str, width: int, height: int) -> np.ndarray:
    "The relative dialect as its authors decode it: a walk along the columns, one run at a time"
    flat, position, numbers = np.zeros(width * height, bool), 0, [int(word) for word in rle.split()]
    for gap, length in zip(numbers[0::2], numbers[1::2]):
        position += gap
        flat[position:position + length] = True
        position += length
    return flat.reshape(width, height).T


@PROPERTY
@given(masks)
def test_the_relative_dialect_is_theirs(mask):
    code = encode_rle(mask, relative=True)
    assert np.array_equal(by_the_book(code, mask.shape[1], mask.shape[0]), mask)


@PROPERTY
@given(st.lists(st.integers(-2, 30), max_size=9), st.booleans())
def test_any_code_is_decoded_in_full_or_refused(numbers, relative):
    "A mask has as many pixels as its runs say, and its own code says the same runs: nothing is cut, merged or overwritten"
    try:
        mask = _decode_rle(" ".join(map(str, numbers)), 6, 5, relative)
    except DataError:
        return
    assert mask.sum() == sum(numbers[1::2])
    assert np.array_equal(_decode_rle(encode_rle(mask, relative), 6, 5, relative), mask)


@PROPERTY
@given(st.text(max_size=20), st.booleans())
def test_no_text_breaks_the_decoder(text, relative):
    try:
        assert _decode_rle(text, 6, 5, relative).shape == (5, 6)
    except DataError as error:
        assert "run-length code" in str(error)


corners = st.tuples(st.floats(0, 40), st.floats(0, 30))


@PROPERTY
@given(st.tuples(corners, corners, corners))
def test_a_triangle_is_where_its_three_sides_agree(points):
    (ax, ay), (bx, by), (cx, cy) = points
    y, x = np.indices((30, 40)) + 0.5
    sides = [(q[0] - p[0]) * (y - p[1]) - (q[1] - p[1]) * (x - p[0]) for p, q in ((points[0], points[1]), (points[1], points[2]), (points[2], points[0]))]
    inside, outside = [np.all([sign * side > 1e-6 for side in sides], axis=0) for sign in (1, -1)], np.any([np.abs(side) <= 1e-6 for side in sides], axis=0)
    mask = _polygon_mask(points, 40, 30)
    truth = inside[0] | inside[1]
    if truth.any():
        assert np.array_equal(mask[~outside], truth[~outside])
    assert mask.any()


boxes = st.tuples(st.integers(0, 36), st.integers(0, 26), st.integers(1, 40), st.integers(1, 30)).map(lambda b: (b[0], b[1], min(40, b[0] + b[2]), min(30, b[1] + b[3])))


@PROPERTY
@given(boxes)
def test_a_shape_fills_its_box(box):
    x0, y0, x1, y1 = box
    rectangle = np.zeros((30, 40), bool)
    rectangle[y0:y1, x0:x1] = True
    assert np.array_equal(_shape_mask([0, *box], 40, 30), rectangle)
    assert np.array_equal(_polygon_mask([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], 40, 30), rectangle)
    ellipse = _shape_mask([1, *box], 40, 30)
    assert not (ellipse & ~rectangle).any() and np.abs(np.subtract(tight_box(ellipse), box)).max() <= 1 + 0.02 * max(x1 - x0, y1 - y0)


def test_shapes_in_words():
    shapes = parse_shapes("0 5 5 9 8;1 10 10 20 16;2 1 1 4 1 4 4")
    assert [shape_box(shape) for shape in shapes] == [(5, 5, 9, 8), (10, 10, 20, 16), (1, 1, 4, 4)]
    united = decode_mask({"shapes": shapes}, ".", 40, 30)
    assert united.sum() == sum(_shape_mask(shape, 40, 30).sum() for shape in shapes)


@pytest.mark.parametrize("spec, message", [
    ({"rle": "1 2 3", "relative": True}, "expected pairs"), ({"rle": "150 100", "relative": False}, "ends at pixel"), ({"rle": "1 -2"}, "whole numbers"),
    ({"polygons": [[[1, 1], [2, 2]]]}, "at least 3"), ({"polygons": [[[1, 1], [2, 2], [99, 3]]]}, "outside of the picture"), ({"polygons": [[[1, 1], [2], [3, 3]]]}, "pairs of numbers"),
    ({"shapes": [[0, 1, 1, 300, 3]]}, "outside of the picture"), ({"file": "../secret.png"}, "does not lead"), ({"file": "soft.png"}, "values 0, 3"), ({"file": "rgb.png"}, "3 channels"),
    ({"file": "small.png"}, "mask of 4 x 4 pixels for an image of 20 x 10"), ({"file": "lost.png"}, "file not found"), ({"file": "cut.png"}, "cannot be decoded"),
    ({"union": [{"rle": "1 2"}, {"rle": "x y"}]}, "whole numbers"), ({}, "expected a dict"), ({"rle": "1 2", "file": "a"}, "expected a dict"), (None, "expected a dict")])
def test_damaged_masks_are_refused(tmp_path, spec, message):
    Image.fromarray(np.uint8([[0, 3, 255]] * 3)).save(tmp_path / "soft.png")
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "rgb.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "small.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:40])
    width, height = (3, 3) if spec and spec.get("file") == "soft.png" else (20, 10)
    with pytest.raises(ValueError, match=message):
        decode_mask(spec, tmp_path, width, height)


def test_mask_files_of_both_kinds(tmp_path):
    mask = np.random.default_rng(0).random((9, 7)) > 0.5
    for name, pixels in {"a.png": mask, "b.png": mask.astype(np.uint8), "c.png": mask * np.uint8(255), "d.gif": mask * np.uint8(255)}.items():
        Image.fromarray(pixels).save(tmp_path / name)
        assert np.array_equal(_read_mask(tmp_path / name, 7, 9), mask)


# From a simulated copy to the Pack

def prepared(name: str, root: Path, out: Path, **options):
    data_set, config = SETS[name]
    return prepare_source(data_set, config(root, **({"recipe": "patients"} if name == "nih" else {}), **options), BuildConfig(out, size=64, progress=False))


def index_of(pack, place: int, studies: list) -> int:
    "Which study an image shows: the one that it differs least from"
    wanted = pack.image(place).astype(int)
    return int(np.argmin([np.abs(wanted - study.image.astype(int)).mean() for study in studies]))


@pytest.mark.parametrize("name, finding", [("rsna", "Pneumonia"), ("siim", "Pneumothorax")])
def test_dicom_boxes_and_masks_come_out_as_they_went_in(simulated, tmp_path, name, finding):
    pack, studies = prepared(name, simulated[name], tmp_path / "pack"), STUDIES[name]
    assert len(pack) == len(studies) and pack.rejects.empty
    seen = set()
    for place in range(len(pack)):
        index = index_of(pack, place, studies)
        seen.add(index)
        study = studies[index]
        assert np.abs(pack.image(place).astype(int) - study.image.astype(int)).max() <= 1
        assert pack.labels[finding][place] == study.truth[finding]
        found = [one for one in study.findings if one.name == finding]
        if name == "rsna":
            corners = pack.boxes.loc[pack.boxes["image"] == place, ["x0", "y0", "x1", "y1"]].to_numpy()
            assert boxes_to_square(corners, 1024, 1024, 64).tolist() == [list(one.box) for one in found]
        else:
            assert np.array_equal(pack.mask(place)[0], np.any([one.mask for one in found] or [np.zeros((64, 64))], axis=0))
    assert seen == set(range(len(studies))) and sum(study.truth[finding] for study in studies) >= 5


@pytest.mark.parametrize("name", SETS)
def test_what_to_get_is_told_where_nothing_is(tmp_path, name):
    data_set, config = SETS[name]
    facts, problems = check_source(data_set, config(tmp_path))
    assert facts == {} and TABLE[name] in "".join(problems)
    for word in ("http", "Terms", TABLE[name]):
        assert word.lower() in data_set.get.lower()


def test_nih_of_both_years_and_layouts(simulated, tmp_path):
    expected = NIH.plan(_NihConfig(simulated["nih"])).items
    root = tables_only(simulated["nih"], tmp_path)
    entries = root / "Data_Entry_2017_v2020.csv"
    (root / "Data_Entry_2017.csv").write_text("".join(f"{line},\n" for line in entries.read_text().splitlines()))
    entries.unlink()
    assert NIH.plan(_NihConfig(root)).items == expected
    for link in root.glob("images_*"):
        link.unlink()
    (root / "images").mkdir()
    for path in simulated["nih"].glob("images_*/images/*.png"):
        (root / "images" / path.name).symlink_to(path)
    items = NIH.plan(_NihConfig(root)).items
    assert [item["images"][0]["path"] for item in items] == [f"images/{item['study']}.png" for item in expected]


def test_only_images_that_were_looked_at_have_boxes(simulated):
    items = NIH.plan(_NihConfig(simulated["nih"])).items
    boxed = [item for item in items if item["images"][0]["boxes"] is not None]
    assert 0 < len(boxed) < len(items) and all(item["split"] == "test" and item["images"][0]["boxes"] for item in boxed)
    lovt = NIH.plan(_NihConfig(simulated["nih"], "lovt", no_findings=0)).items
    assert {item["study"] for item in lovt} == {item["study"] for item in boxed}


def test_a_part_of_nih_with_boxes_of_both_readers(simulated, tmp_path):
    "Some of the pictures in one folder, their rows in images.csv, boxes in pixels of the stored pictures, NIH's and RSNA's."
    whole = {item["study"]: item for item in NIH.plan(_NihConfig(simulated["nih"])).items}
    kept = [*sorted(name for name, item in whole.items() if item["images"][0]["boxes"])[:2], *list(whole)[:3]]
    (tmp_path / "images").mkdir()
    rows = []
    for place, name in enumerate(dict.fromkeys(kept)):
        picture = Image.open(simulated["nih"] / whole[name]["images"][0]["path"]).convert("L")
        picture.resize((256, 256)).save(tmp_path / f"images/{name}.{('jpg', 'jpeg', 'png')[place % 3]}")
        rows += [(f"{name}.jpg", label, *(corner / 4 for corner in corners), "NIH BBox_List_2017") for label, *corners in whole[name]["images"][0]["boxes"] or []]
    rows.append((f"{kept[0]}.jpg", "Lung Opacity", 10, 20, 30.5, 40, "RSNA stage_2_train (mapped)"))
    table = (simulated["nih"] / "Data_Entry_2017_v2020.csv").read_text().splitlines()
    (tmp_path / "images.csv").write_text("\n".join([table[0] + ",stored_side", *(line + ",256" for line in table[1:])]) + "\n")
    pd.DataFrame(rows, columns=["image", "label", "x1", "y1", "x2", "y2", "source"]).to_csv(tmp_path / "boxes.csv", index=False)
    config = _NihConfig(tmp_path, "patients", partial=True)
    source, count = NIH.plan(config), len(set(kept))
    assert {item["study"] for item in source.items} == set(kept) and source.dropped == {"picture is not there": len(whole) - count}
    assert check_source(NIH, config)[1] == []
    pack = prepare_source(NIH, config, BuildConfig(tmp_path / "pack", size=64, progress=False))
    assert len(pack) == count and pack.rejects.empty and set(pack.boxes["name"]) >= {"Lung Opacity"}
    for place, name in enumerate(pack.image_table["image_id"]):
        drawn = pack.boxes[(pack.boxes["image"] == place) & (pack.boxes["name"] != "Lung Opacity")]
        expected = [(label, *(corner / 4 for corner in corners)) for label, *corners in whole[name]["images"][0]["boxes"] or []]
        assert [(row.name, row.x0, row.y0, row.x1, row.y1) for row in drawn.drop(columns="image").itertuples(index=False)] == expected
        assert pack.image_table["boxed"][place] == any(row[0].startswith(name) for row in rows)
        assert pack.labels.iloc[place].to_dict() == whole[name]["labels"]
    with pytest.raises(DataError, match="get the published lists, or use --recipe patients"):
        NIH.plan(_NihConfig(tmp_path, partial=True))
    for file in ("train_val_list.txt", "test_list.txt", "BBox_List_2017.csv"):      # the full public files beside the part
        shutil.copy(simulated["nih"] / file, tmp_path / file)
    (tmp_path / "images.csv").write_text("\n".join([table[0], *(line for line in table[1:] if line.split(",")[0][:-4] in kept)]) + "\n")
    official = NIH.plan(_NihConfig(tmp_path, partial=True))
    assert {item["study"]: item["split"] for item in official.items} == {name: whole[name]["split"] for name in kept}
    with pytest.raises(DataError, match="of train_val_list.txt are not in Data_Entry_2017 .*--partial"):
        NIH.plan(_NihConfig(tmp_path))


# The papers' draws

def test_mgca_draws_rsna_images_as_grouped_by_pandas(tmp_path):
    draw = np.random.default_rng(0)
    names = [f"{number:08x}" for number in draw.permutation(300)]
    rows = [f"{name},{10 * k},5,20,30,1" for name in names[:60] for k in range(2)] + [f"{name},,,,,0" for name in names[60:]]
    (tmp_path / "stage_2_train_labels.csv").write_text("\n".join(["patientId,x,y,width,height,Target", *draw.permutation(rows)]))
    frame = pd.read_csv(tmp_path / "stage_2_train_labels.csv", dtype={"patientId": str})
    groups = frame.groupby("patientId").agg(list).reset_index()
    for recipe, size in (("mgca", 0.15 * 2), ("mgca-boxes", 2 * 40)):
        train, rest = train_test_split(groups, test_size=size, random_state=0)
        test, valid = train_test_split(rest, test_size=0.5, random_state=0)
        splits = {item["study"]: item["split"] for item in RSNA.plan(_RsnaConfig(tmp_path, recipe, held_out=40)).items}
        for split, part in (("train", train), ("validate", valid), ("test", test)):
            assert {name for name in splits if splits[name] == split} == set(part["patientId"])


def test_mgca_draws_siim_lines_and_healthy_images(tmp_path):
    rows = [(f"1.2.{number}", "-1") if number % 4 else (f"1.2.{number}", f"{100 + number} 5 1000 3") for number in range(400)]
    (tmp_path / "train-rle.csv").write_text("\n".join(["ImageId, EncodedPixels", *(f"{name}, {code}" for name, code in rows)]))
    train, rest = train_test_split(pd.DataFrame(rows, columns=["name", "code"]), test_size=0.15 * 2, random_state=0)
    test, valid = train_test_split(rest, test_size=0.5, random_state=0)
    ill, healthy = train.loc[train["code"] != "-1", "name"], train.loc[train["code"] == "-1", "name"].unique()
    np.random.seed(42)
    kept = set(np.random.choice(healthy, size=ill.nunique(), replace=False)) | set(ill)
    source = SIIM.plan(_SiimConfig(tmp_path, "mgca"))
    splits = {item["study"]: item["split"] for item in source.items}
    for split, part in (("train", kept), ("validate", set(valid["name"])), ("test", set(test["name"]))):
        assert {name for name in splits if splits[name] == split} == part
    assert source.dropped == {"more images of train without than with pneumothorax": len(healthy) - ill.nunique()}


def chexpert_folder(root: Path, rows: int = 400, normal: bool = False) -> Path:
    draw = np.random.default_rng(1)
    root.mkdir(exist_ok=True)
    kinds = draw.choice([*chexpert._COMPETITION, "Fracture", "", *["No Finding"] * normal], rows // 2)
    for part, count in (("train", rows), ("valid", 10)):
        lines = [",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *chexpert._LABELS])]
        for index in range(count):
            study, side = index // 2, ("frontal", "lateral")[index % 2 and index % 3 == 0]
            labels = ["1.0" if name == kinds[study] else "-1.0" if name == "Lung Opacity" and study % 9 == 0 and not normal else "" for name in chexpert._LABELS]
            path = f"CheXpert-v1.0-small/{part}/patient{(part == 'valid') * 60000 + study // 2 + 1:05d}/study{study % 2 + 1}/view{index % 2 + 1}_{side}.jpg"
            lines.append(",".join([path, "Male", "60", side.capitalize(), "AP" if side == "frontal" else "", *labels]))
        (root / f"{part}.csv").write_text("\n".join(lines))
    return root


def test_mgca_draws_chexpert_with_pandas_and_numpy(tmp_path):
    root, count, size = chexpert_folder(tmp_path), 7, 60
    frame = pd.read_csv(root / "train.csv")
    filled = frame.fillna(dict.fromkeys(chexpert._LABELS, 0))
    filled = filled[filled["Frontal/Lateral"] == "Frontal"]
    others = [name for name in chexpert._LABELS if name != "No Finding"]
    taken = pd.concat([filled[np.logical_and.reduce([filled[other] == (other == name) for other in others])].sample(n=count, random_state=0) for name in chexpert._COMPETITION])
    left = frame[~frame["Path"].isin(taken["Path"])]
    np.random.seed(0)
    valid = set(left.iloc[np.random.choice(len(left), size=size, replace=False)]["Path"])
    frontal = left[left["Frontal/Lateral"] == "Frontal"]
    source = CHEXPERT.plan(_ChexpertConfig(root, "mgca", retrieval=count, validation=size))
    paths = {f"CheXpert-v1.0-small/{item['images'][0]['path']}": item["split"] for item in source.items}
    assert {path for path in paths if paths[path] == "validate"} == valid & set(frontal["Path"])
    assert {path for path in paths if paths[path] == "train"} == set(frontal["Path"]) - valid
    assert sum(split == "test" for split in paths.values()) == 8 and source.dropped["in the 5x200 retrieval set"] == 5 * count
    retrieval = CHEXPERT.plan(_ChexpertConfig(root, "mgca-5x200", retrieval=count))
    assert [f"CheXpert-v1.0-small/{item['images'][0]['path']}" for item in retrieval.items] == taken["Path"].tolist()


def test_lovt_validates_chexpert_on_its_first_patients(tmp_path):
    items = CHEXPERT.plan(_ChexpertConfig(chexpert_folder(tmp_path), "lovt", validation=50)).items
    images = {split: sum(len(item["images"]) for item in items if item["split"] == split) for split in ("train", "validate", "test")}
    patients = {split: {item["patient"] for item in items if item["split"] == split} for split in images}
    assert 50 <= images["validate"] < 54 and max(patients["validate"]) < min(patients["train"]) and images["test"] == 8


@pytest.mark.parametrize("name", ["rsna", "siim", "nih"])
def test_lists_are_followed_in_their_order(simulated, tmp_path, name):
    data_set, config = SETS[name]
    items = data_set.plan(config(simulated[name])).items
    names = [item["study"] for item in items][::-1]
    for part, some in {"train": names[:8], "validation": names[8:10], "test": names[10:13]}.items():
        (tmp_path / f"{part}.csv").write_text("ID,boxes\n" + "".join(f"{one},\n" for one in some))
    source = data_set.plan(config(simulated[name], "lovt", split_files=tmp_path))
    assert [item["study"] for item in source.items] == names[:13] and [item["split"] for item in source.items][7:11] == ["train", "validate", "validate", "test"]
    assert list(source.dropped.values()) == [3]
    (tmp_path / "test.csv").write_text("ID\nsomebody-else\n")
    with pytest.raises(DataError, match="name 1 images that .* does not have"):
        data_set.plan(config(simulated[name], "lovt", split_files=tmp_path))


# Damage

def damaged(root: Path, file: str, old: str, new: str) -> None:
    "Change the first place in a table that says `old`, in its header only if nowhere else"
    header, rest = (root / file).read_text().split("\n", 1)
    assert old in rest or old in header
    header, rest = (header, rest.replace(old, new, 1)) if old in rest else (header.replace(old, new, 1), rest)
    (root / file).write_text(f"{header}\n{rest}")


@pytest.mark.parametrize("name, file, old", [
    ("rsna", "stage_2_detailed_class_info.csv", "00000006-aaaa-4000-8000-000000000006,"),
    ("nih", "Data_Entry_2017_v2020.csv", "00000001_000.png,"), ("chexpert", "train.csv", "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,")])
def test_a_row_without_a_name_is_named_by_its_line(simulated, tmp_path, name, file, old):
    "And what the other table tells of the image that is now missing is not used either"
    data_set, config = SETS[name]
    recipe = "patients" if name == "nih" else "medvis"
    clean = len(data_set.plan(config(simulated[name], recipe)).items)
    damaged(tables_only(simulated[name], tmp_path), file, old, ",")
    items = data_set.plan(config(tmp_path, recipe)).items
    assert sum("rejects" not in item for item in items) == clean - (name != "chexpert") and any("rejects" in item and "line" in str(item) or "not in it" in str(item) for item in items)


def test_a_lost_and_a_cut_image_are_named(simulated, tmp_path):
    shutil.copytree(simulated["rsna"], tmp_path / "copy")
    files = sorted((tmp_path / "copy" / "stage_2_train_images").iterdir())
    files[4].unlink()
    files[5].write_bytes(files[5].read_bytes()[:500_000])
    files[6].write_bytes(b"")
    pack = prepared("rsna", tmp_path / "copy", tmp_path / "pack")
    reasons = dict(zip(pack.rejects["item"], pack.rejects["reason"]))
    assert sorted(reasons) == [path.stem for path in files[4:7]] and "not found" in reasons[files[4].stem] and "empty" in reasons[files[6].stem]


def test_the_same_file_name_twice_is_refused(simulated, tmp_path):
    shutil.copytree(simulated["siim"], tmp_path / "copy")
    film = next((tmp_path / "copy").glob("dicom-images-train/*/*/*.dcm"))
    (film.parents[1] / "again").mkdir()
    shutil.copy(film, film.parents[1] / "again" / film.name)
    with pytest.raises(DataError, match="have the same name"):
        siim._plan_siim(_SiimConfig(tmp_path / "copy"))


def test_an_image_of_other_proportions_than_its_frame_is_refused(simulated, tmp_path):
    shutil.copytree(simulated["nih"], tmp_path / "copy")
    item = next(item for item in nih._plan_nih(_NihConfig(tmp_path / "copy")).items if item["images"][0]["boxes"])
    Image.fromarray(np.zeros((512, 400), np.uint8)).save(tmp_path / "copy" / item["images"][0]["path"])
    pack = prepared("nih", tmp_path / "copy", tmp_path / "pack")
    assert pack.rejects["item"].tolist() == [item["study"]] and "drawn on 1024 x 1024" in pack.rejects["reason"][0]


def test_mgca_needs_more_rows_than_it_holds_out(simulated):
    for plan in (lambda: rsna._plan_rsna(_RsnaConfig(simulated["rsna"], "mgca-boxes")), lambda: chexpert._plan_chexpert(_ChexpertConfig(simulated["chexpert"], "mgca"))):
        with pytest.raises(DataError, match="choose fewer|the retrieval set needs"):
            plan()


def test_chexpert_comes_out_as_it_went_in_and_row_wise_splits_are_refused(simulated, tmp_path):
    root, studies = simulated["chexpert"], STUDIES["chexpert"]
    pack = prepared("chexpert", root, tmp_path / "pack")
    assert len(pack.studies) == len(studies) and pack.rejects.empty
    for place in np.flatnonzero(pack.image_table["view"] != "LATERAL"):
        study = min(studies, key=lambda one: np.abs(one.image.astype(int) - pack.image(place)).mean())
        assert np.abs(study.image.astype(int) - pack.image(place)).mean() < 3      # JPEG
        labels = pack.labels.iloc[pack.image_table["study"][place]]
        for name, value in labels.items():
            assert value == study.labels.get(name) or (np.isnan(value) and study.labels.get(name) is None)
    rows = _ChexpertConfig(root, "mgca", retrieval=0, validation=8)
    with pytest.raises(DataError, match="leak"):
        prepare_source(CHEXPERT, rows, BuildConfig(tmp_path / "rows", size=64, progress=False))
    leaky = prepare_source(CHEXPERT, rows, BuildConfig(tmp_path / "rows", size=64, progress=False, allow_leaks=True))
    assert leaky.manifest["guard"]["leaks"]["patient"] > 0 and tuple(leaky.labels) == chexpert._LABELS


@pytest.mark.parametrize("recipe", ["lovt", "mgca"])
def test_a_normal_radiograph_is_a_negative_of_the_five(tmp_path, recipe):
    "Most normal ones have no label but No Finding, and the recipes count blanks as absent"
    root = chexpert_folder(tmp_path / "files", normal=True)
    small = {"validation": 50} | ({"retrieval": 3} if recipe == "mgca" else {})
    for part in ("train", "valid"):
        for seed, path in enumerate(pd.read_csv(root / f"{part}.csv")["Path"]):
            place = root / path.partition("/")[2]
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng([seed, part == "train"]).integers(0, 255, (32, 32), dtype=np.uint8)).save(place)
    pack = prepare_source(CHEXPERT, _ChexpertConfig(root, recipe, **small), BuildConfig(tmp_path / "pack", size=32, progress=False, allow_leaks=True))
    task = pack_task(pack)
    assert task.classes == chexpert._COMPETITION
    labels = pack.labels.iloc[pack.image_table["study"]].reset_index(drop=True)
    normal, unknown = labels["No Finding"] == 1, labels.isna().all(axis=1)
    assert normal.sum() > 20 < unknown.sum() and labels[normal].drop(columns="No Finding").isna().all(axis=None)
    assert set(task.images["image"]) == set(np.flatnonzero(~unknown)) and (task.targets[np.isin(task.images["image"], np.flatnonzero(normal))] == 0).all()
    torch.manual_seed(0)
    encoder = {"encoder": image_encoder("tiny_resnet", size=32)}
    recipe = pack.manifest["source"]["recipe"]
    said = probe_predictions(encoder, pack, (1.0,), (0,), list(recipe["classes"]), None, recipe["uncertain"], recipe["blank"])
    tested = pack.studies[["study_id", "split"]].assign(labelled=pack.labels.notna().any(axis=1))
    assert (said.groupby("finding", observed=True)["label"].count() == tested.query("split == 'test' and labelled").shape[0]).all()


def test_the_retrieval_set_is_asked_for_its_five(tmp_path):
    root = chexpert_folder(tmp_path)
    source = CHEXPERT.plan(_ChexpertConfig(root, "mgca-5x200", retrieval=3))
    assert source.labels == chexpert._LABELS and CHEXPERT.recipes["mgca-5x200"].classes == chexpert._COMPETITION
    assert [[item["labels"][name] for name in chexpert._COMPETITION].count(1.0) for item in source.items] == 15 * [1]


def test_nih_without_its_boxes_is_prepared(simulated, tmp_path, capsys):
    root = tmp_path / "nih"
    root.mkdir()
    tables_only(simulated["nih"], root)
    (root / "BBox_List_2017.csv").unlink()
    assert main(f"prepare nih --root {root} --out {tmp_path}/pack --size 64 --no-progress".split()) == 0, capsys.readouterr().err
    assert set(pd.read_csv(tmp_path / "pack" / "subsets.csv")["task"]) == {"labels"}
    with pytest.raises(ValueError, match="holds nothing for a task of kind boxes"):
        pack_task(Pack(tmp_path / "pack"), "boxes")
