"""COVIDx, Object-CXR, COVID Rural, and folders with boxes, masks or a folder per class: what the phantom puts in comes out; damage is named."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro
from folders import folder_pack, picture_pack
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import train_test_split

from medvis.data.sets.class_folder import CLASS_FOLDER, _ClassFolderConfig
from medvis.data.sets.covid_rural import COVID_RURAL, _CovidRuralConfig, _simulate_lungs, _simulate_opacity
from medvis.data.sets.covidx import COVIDX, _CovidxConfig, _covidx_class, _parse_line
from medvis.data.files import DataError
from medvis.data.images import boxes_to_square
from medvis.data.sets.object_cxr import _CLASS, OBJECT_CXR, _ObjectCxrConfig, _simulate_shapes
from medvis.data.pack import Pack
from medvis.data.phantom import Phantom, patient_number, tight_box
from medvis.data.sets.plans import deal_splits
from medvis.data.source import BuildConfig, check_source, prepare_source, read_study

STUDIES = [Phantom(64)[number] for number in range(40)]
SINGLE = [Phantom(64)[number] for number in range(120) if patient_number(0, number) == number][:40]     # each of another patient


def simulated(data_set, folder: Path, studies=STUDIES) -> Path:
    data_set.simulate(folder / "data", studies)
    return folder / "data"


@pytest.fixture(scope="module")
def covidx(tmp_path_factory) -> Path:
    return simulated(COVIDX, tmp_path_factory.mktemp("covidx"))


@pytest.fixture(scope="module")
def object_cxr(tmp_path_factory) -> Path:
    return simulated(OBJECT_CXR, tmp_path_factory.mktemp("object"), SINGLE)


@pytest.fixture(scope="module")
def rural(tmp_path_factory) -> Path:
    return simulated(COVID_RURAL, tmp_path_factory.mktemp("rural"))


@pytest.fixture
def own(tmp_path):
    "A copy of a data set that a test may spoil"
    return lambda root: Path(shutil.copytree(root, tmp_path / "own"))


def build(folder: Path, **changes) -> BuildConfig:
    return BuildConfig(folder / "pack", progress=False, **changes)


def splits_of(source) -> dict[str, str]:
    return {item["study"]: item["split"] for item in source.items if "images" in item}


def rejects_of(source) -> dict[str, str]:
    return {name: reason for item in source.items for name, reason, _ in item.get("rejects", ())}


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# COVIDx

@pytest.mark.parametrize("version", ["5", "6", "9A"])
def test_covidx(version, covidx, tmp_path):
    pack = prepare_source(COVIDX, _CovidxConfig(covidx, version=version), build(tmp_path, size=64))
    pack.verify()
    number = pack.studies.study_id.str.extract(r"\((\d+)\)")[0].astype(int)
    kinds = [_covidx_class(STUDIES[one]) for one in number]
    if version == "6":
        kinds = ["positive" if kind == "COVID-19" else "negative" for kind in kinds]
    assert (pack.labels.sum(axis=1) == 1).all() and pack.labels.idxmax(1).tolist() == kinds and len(pack.rejects) == 0
    assert all((pack.image(row) == STUDIES[one].image).all() for row, one in enumerate(number))
    assert [patient.replace(" ", "-") for patient in pack.studies.patient_id] == [STUDIES[one].patient_id for one in number]
    assert ((pack.studies.split == "test") == pack.studies.study_id.str.startswith("test/")).all()
    assert len(pack) + pack.manifest["source"]["dropped"]["training image of a patient of the test list"] == len(STUDIES)


def test_covidx_split_of_mgca(covidx, tmp_path):
    "Row for row what their pandas and scikit-learn calls give, and refused, for it leaks"
    config = _CovidxConfig(covidx, "mgca")
    table = pd.read_csv(covidx / "train_COVIDx6.txt", sep=r"\s(?=\S+ \S+ \S+$|\S+ \S+$|\S+$)", header=None, engine="python")
    learned, validated = train_test_split(table, train_size=0.8, random_state=0)
    splits = splits_of(COVIDX.plan(config))
    assert {name.split("/")[1] for name, split in splits.items() if split == "validate"} == set(validated[1])
    assert {name.split("/")[1] for name, split in splits.items() if split == "train"} == set(learned[1])
    with pytest.raises(ValueError, match="leak|more than one split"):
        prepare_source(COVIDX, config, build(tmp_path, size=64))
    prepare_source(COVIDX, config, build(tmp_path, size=64, allow_leaks=True))


@pytest.mark.parametrize("recipe", ["medvis", "mgca-paper"])
def test_covidx_splits_by_patient(recipe, covidx):
    items = [item for item in COVIDX.plan(_CovidxConfig(covidx, recipe)).items]
    assert pd.DataFrame(items).groupby("patient").split.nunique().max() == 1


def test_covidx_patient_in_both_lists(covidx, own):
    root = own(covidx)
    patient = _parse_line((root / "test_COVIDx9A.txt").read_text().splitlines()[0])[0]
    line = next(line for line in (root / "train_COVIDx9A.txt").read_text().splitlines())
    name = _parse_line(line)[1]
    replace_in(root / "train_COVIDx9A.txt", line, f"{patient} {name} normal sirm")
    source = COVIDX.plan(_CovidxConfig(root))
    assert source.dropped == {"training image of a patient of the test list": 1} and f"train/{name}" not in splits_of(source)
    assert f"train/{name}" in splits_of(COVIDX.plan(_CovidxConfig(root, "mgca")))


word = st.text(st.characters(codec="ascii", exclude_characters=" /\\:.", categories=("L", "N", "P")), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(st.lists(word, min_size=1, max_size=4), word, st.sampled_from(["normal", "pneumonia", "COVID-19", "positive", "level2"]),
       st.sampled_from(["", "rsna", "rnsa", "sirm", "bimcv"]), st.sampled_from([" ", "  ", "\t"]))
def test_covidx_lines_from_the_right(patient, name, kind, source, gap):
    line = gap.join([*patient, f"{name}.png", kind, *source.split()])
    assert _parse_line(line) == (" ".join("rsna" if part == "rnsa" else part for part in patient), f"{name}.png", kind, source.replace("rnsa", "rsna"))


COVIDX_LINES = [
    ("x.png normal rsna", "expected patient, file and class"), ("1 x.png rsna", "expected patient, file and class"), ("1 x.png", "expected patient"),
    ("1 x.png healthy rsna", "class 'healthy'"), ("1 x.png NORMAL rsna", "class 'NORMAL'"), ("1 x.png nowhere rsna", "class 'nowhere'"),
    ("1 x.png positive rsna", "class positive in a list of normal"), ("1 ../../x.png normal rsna", "does not lead to a file below"),
    ("1 /etc/passwd normal rsna", "does not lead to a file below"), ("\N{THAI CHARACTER KO KAI}", "expected patient"),
]


@pytest.mark.parametrize(("line", "message"), COVIDX_LINES)
def test_covidx_damaged_line(line, message, covidx, own):
    "One line costs one image; the others stay"
    root = own(covidx)
    before = splits_of(COVIDX.plan(_CovidxConfig(root)))
    with open(root / "test_COVIDx9A.txt", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    source = COVIDX.plan(_CovidxConfig(root))
    assert splits_of(source) == before and len(rejects_of(source)) == 1 and message in [*rejects_of(source).values()][0]


def test_covidx_source_of_a_later_release(covidx, own):
    root = own(covidx)
    with open(root / "test_COVIDx9A.txt", "a", encoding="utf-8") as file:
        file.write("a patient x.png normal nowhere\n")
    [item] = [item for item in COVIDX.plan(_CovidxConfig(root)).items if item["study"] == "test/x.png"]
    assert item["patient"] == "a patient" and item["labels"]["normal"] == 1


def test_covidx_twice(covidx, own):
    root = own(covidx)
    first = (root / "test_COVIDx9A.txt").read_text().splitlines()[0]
    with open(root / "test_COVIDx9A.txt", "a") as file:
        file.write(first + "\n")
    rejects = rejects_of(COVIDX.plan(_CovidxConfig(root)))
    assert len(rejects) == 1 and "listed more than once: lines 1, " in [*rejects.values()][0]


def test_covidx_lost_files(covidx, own, tmp_path):
    root = own(covidx)
    before = splits_of(COVIDX.plan(_CovidxConfig(root)))
    lost, short = list(before)[:2]
    (root / lost).unlink()
    (root / short).write_bytes((root / short).read_bytes()[:200])
    assert any(problem.startswith(f"1 of {len(before)} files are not there: {lost}") for problem in check_source(COVIDX, _CovidxConfig(root))[1])
    pack = prepare_source(COVIDX, _CovidxConfig(root), build(tmp_path, size=64))
    assert pack.rejects.item.tolist() == [lost, short] and len(pack) == len(before) - 2


def test_wrong_recipe_and_version(covidx):
    with pytest.raises(DataError, match="choose from medvis, mgca, mgca-paper"):
        COVIDX.plan(_CovidxConfig(covidx, "lovt"))
    with pytest.raises(DataError, match="there is no train_COVIDx10C.txt"):
        COVIDX.plan(_CovidxConfig(covidx, version="10C"))


# Object-CXR

def drawn_mask(shape: list[int], side: int) -> np.ndarray:
    "A shape of the simulated copy, computed in another way than the reader's"
    y, x = (np.indices((side, side)) + 0.5)
    kind, *numbers = shape
    xs, ys = numbers[0::2], numbers[1::2]
    x0, y0, x1, y1 = min(xs), min(ys), max(xs), max(ys)
    if kind == 0:
        return (x > x0) & (x < x1) & (y > y0) & (y < y1)
    u, v = (x - (x0 + x1) / 2) / ((x1 - x0) / 2), (y - (y0 + y1) / 2) / ((y1 - y0) / 2)
    return u**2 + v**2 <= 1 if kind == 1 else abs(u) + abs(v) <= 1


@pytest.mark.parametrize("fit", ["pad", "stretch", "pad-first"])
def test_object_cxr(fit, object_cxr, tmp_path):
    pack = prepare_source(OBJECT_CXR, _ObjectCxrConfig(object_cxr), build(tmp_path, size=128, fit=fit))
    pack.verify()
    assert len(pack) == len(SINGLE) and pack.manifest["masks"] == [_CLASS] and pack.image_table.boxed.all() and len(pack.rejects) == 0
    number = pack.studies.study_id.astype(int) - 1
    for row, study in enumerate(SINGLE[one] for one in number):
        shapes = _simulate_shapes(study, 2)
        boxes = pack.boxes[pack.boxes["image"] == row][["x0", "y0", "x1", "y1"]].to_numpy().tolist()
        assert boxes == [[min(s[1::2]), min(s[2::2]), max(s[1::2]), max(s[2::2])] for s in shapes]
        assert pack.labels[_CLASS][row] == bool(shapes)
        expected = np.any([np.zeros((128, 128), bool), *(drawn_mask(shape, 128) for shape in shapes)], axis=0)
        edge = sum((drawn_mask(s, 128) ^ np.roll(drawn_mask(s, 128), 1, axis)).sum() for s in shapes if s[0] == 2 for axis in (0, 1))
        assert (pack.mask(row)[0] ^ expected).sum() <= edge       # the two differ on the border of rhombs at most: its pixels' centres lie on it
        assert not shapes or any(s[0] == 2 for s in shapes) or (pack.mask(row)[0] == expected).all()
        assert np.abs(pack.image(row)[::2, ::2].astype(int) - study.image).mean() < 4       # JPEG
    assert (pack.studies.split == "test").tolist() == (number % 5 == 4).tolist()


@pytest.mark.parametrize("fit", ["pad", "pad-first", "stretch"])
@pytest.mark.parametrize("shape", [(128, 200), (170, 128), (128, 128)])
def test_boxes_and_masks_move_with_the_image(fit, shape, object_cxr, own, tmp_path):
    "The box of the moved mask is the moved box, within a pixel"
    root = own(object_cxr)
    for path in root.rglob("*.jpg"):
        picture = np.zeros(shape, np.uint8)
        picture[:128, :128] = np.array(Image.open(path).convert("L"))
        Image.fromarray(picture).save(path)
    for path in root.glob("*.csv"):
        path.write_text(re.sub(r"([,;])1 (\d)", r"\g<1>0 \2", path.read_text()))        # ellipses as rectangles
    pack = prepare_source(OBJECT_CXR, _ObjectCxrConfig(root), build(tmp_path, size=90, fit=fit))
    seen = 0
    for row, boxes in pack.boxes.groupby("image"):
        if "2 " not in " ".join(str(shape[0]) + " " for shape in _simulate_shapes(SINGLE[int(pack.studies.study_id[row]) - 1], 2)):
            moved = boxes_to_square(boxes[["x0", "y0", "x1", "y1"]], *shape, 90, fit)
            whole = [*moved[:, :2].min(0), *moved[:, 2:].max(0)]
            assert np.abs(np.subtract(tight_box(pack.mask(row)[0]), whole)).max() <= 1
            seen += 1
    assert seen >= 4


def test_object_cxr_released_defects(object_cxr):
    true, released = (OBJECT_CXR.plan(_ObjectCxrConfig(object_cxr, released_defects=defects)) for defects in (False, True))
    for good, bad in zip(true.items, released.items, strict=True):
        for (_, x0, y0, x1, y1), box in zip(good["images"][0]["boxes"], bad["images"][0]["boxes"], strict=True):
            assert box[1:] == [x0, y0, x0 + (y1 - y0), y0 + (x1 - x0)]
        for one, other in zip(good["images"][0]["masks"][_CLASS]["shapes"], bad["images"][0]["masks"][_CLASS]["shapes"], strict=True):
            swapped = [number for x, y in zip(one[1::2], one[2::2]) for number in (y, x)]
            assert other == ([0, *one[1:]] if one[0] < 2 else [2, *swapped])
    for plan in (true, released):
        for item in plan.items:
            assert read_study(item, object_cxr, 64, "pad").rejects == []        # also boxes that stand out of the image
    assert {shape[0] for item in true.items for shape in item["images"][0]["masks"][_CLASS]["shapes"]} == {0, 1, 2}, "rectangles, ellipses and polygons were compared"


def test_object_cxr_splits(object_cxr, tmp_path):
    table = pd.read_csv(object_cxr / "train.csv")
    _, validated = train_test_split(table, test_size=0.1, random_state=0)       # as MGCA calls it
    splits = splits_of(OBJECT_CXR.plan(_ObjectCxrConfig(object_cxr, "mgca")))
    assert {f"{name}.jpg" for name, split in splits.items() if split == "validate"} == set(validated.image_name)
    lists = {"train": ["00003", "00001"], "validation": ["00010"], "test": ["00005"]}
    for name, ids in lists.items():
        pd.DataFrame({"ID": ids, "boxes": "", "classes": ""}).to_csv(tmp_path / f"{name}.csv", index=False)
    source = OBJECT_CXR.plan(_ObjectCxrConfig(object_cxr, "lovt", split_files=tmp_path))
    assert splits_of(source) == {"00003": "train", "00001": "train", "00010": "validate", "00005": "test"}
    assert [item["study"] for item in source.items] == ["00003", "00001", "00010", "00005"] and source.dropped == {"in none of the split files": 36}
    (tmp_path / "test.csv").write_text("ID\n99999\n")
    with pytest.raises(DataError, match="name 1 images that train.csv and dev.csv does not have .99999."):
        OBJECT_CXR.plan(_ObjectCxrConfig(object_cxr, split_files=tmp_path))


def test_object_cxr_in_the_layout_of_lovt(object_cxr, own):
    root = own(object_cxr)
    before = OBJECT_CXR.plan(_ObjectCxrConfig(root)).items
    (root / "input").mkdir()
    for name in ("train.csv", "dev.csv", "train", "dev"):
        (root / name).rename(root / "input" / name)
    (root / "train.csv").write_text("ID,boxes,classes\n00001,1;2;3;4,1\n")       # LoVT's own list, which is no annotation
    after = OBJECT_CXR.plan(_ObjectCxrConfig(root)).items
    assert all((root / item["images"][0]["path"]).exists() for item in after)
    assert [{**item, "images": [{**item["images"][0], "path": item["images"][0]["path"].removeprefix("input/")}]} for item in after] == before


@pytest.mark.parametrize(("annotation", "message"), [
    ("3 1 1 2 2", "expected it to start with 0"), ("0 1 1 2", "3 coordinates"), ("0 1 1 2 x", "is 'x'"), ("0 1 1 2 nan", "'nan'"), ("0 1 1 2 inf", "'inf'"),
    ("0 5 1 2 9", "another order"), ("1 1 9 2 3", "another order"), ("0 3 3 3 9", "without extent"), ("2 1 1 5 5 3 3 7", "coordinates"), ("2 1 1 9 9", "six or more"),
    ("2 4 1 4 5 4 9", "without extent"), ("0 1 1 9 9;", "start with"), (";", "start with"), ("0 1 1 9 9;0 1 1 9", "3 coordinates"), ("none", "is 'none'"),
    ("0 1 1 9 999", "outside of its image"), ("1 -9 1 9 9", "outside"), ("2 1 1 900 1 9 9", "outside"),
])
def test_object_cxr_damaged_annotation(annotation, message, object_cxr, own):
    "An image with one shape that cannot be right is rejected as a whole; the others stay"
    root = own(object_cxr)
    text = (root / "train.csv").read_text()
    (root / "train.csv").write_text(re.sub(r"00001\.jpg,.*", f"00001.jpg,{annotation}", text))
    items = OBJECT_CXR.plan(_ObjectCxrConfig(root)).items
    record = read_study(items[0], root, 64, "pad")
    assert record.images == [] and len(record.rejects) == 1 and record.rejects[0][0] == "00001" and message in record.rejects[0][1]
    assert sum("images" in item for item in items) >= len(SINGLE) - 1


# COVID Rural

def test_covid_rural(rural, tmp_path):
    pack = prepare_source(COVID_RURAL, _CovidRuralConfig(rural), build(tmp_path, size=128))
    pack.verify()
    names = pack.manifest["masks"]
    assert names == ["opacity", "right_lung", "left_lung"] and len(pack) == len(STUDIES) and len(pack.rejects) == 0
    wanted: dict[str, list] = {}
    for number, study in enumerate(STUDIES):
        mask = None if number % 7 == 6 else np.kron(_simulate_opacity(study), np.ones((2, 2), bool))
        wanted.setdefault(f"COVID-19-AR-{int(study.patient_id[-7:]):08d}", []).append((study, mask))
    for patient, rows in pack.studies.groupby("patient_id").indices.items():
        for row, (study, mask) in zip(rows, wanted[patient], strict=True):
            assert np.abs(pack.image(row)[::2, ::2].astype(int) - study.image).mean() < 4
            assert [*pack.image_table.masked[row]] == ([] if mask is None else names)
            if mask is not None:
                assert (pack.mask(row)[0] == mask).all()
                for place, lung in enumerate(("right_lung", "left_lung"), 1):
                    corners = np.array(_simulate_lungs(128)[lung])
                    assert np.abs(np.subtract(tight_box(pack.mask(row)[place]), [*corners.min(0), *corners.max(0)])).max() <= 1
    assert pd.DataFrame({"p": pack.studies.patient_id, "s": pack.studies.split}).groupby("p").s.nunique().max() == 1


def test_covid_rural_of_lovt(rural, tmp_path):
    plain = COVID_RURAL.plan(_CovidRuralConfig(rural, "lovt"))
    assert plain.dropped == {"no opacity mask": sum(number % 7 == 6 for number in range(len(STUDIES)))}
    names = [item["study"] for item in plain.items]
    for part, ids in {"train": names[5:0:-1], "validation": names[6:8], "test": names[8:9]}.items():
        pd.DataFrame({"ID": ids}).to_csv(tmp_path / f"{part}.csv", index=False)
    listed = COVID_RURAL.plan(_CovidRuralConfig(rural, "lovt", split_files=tmp_path))
    assert [item["study"] for item in listed.items] == names[5:0:-1] + names[6:9] and [*splits_of(listed).values()][-1] == "test"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=120), st.integers(0, 5))
def test_dealt_splits(patients, seed):
    "By patient, and each of the two is filled as far as its last patient goes over, or all patients are used up"
    dealt = deal_splits(range(len(patients)), patients, seed)
    splits = pd.DataFrame({"p": patients, "s": [dealt[row] for row in range(len(patients))]})
    assert splits.groupby("p").s.nunique().max() == 1
    want, most = round(0.2 * len(patients)), splits.p.value_counts().max()
    assert (splits.s == "test").sum() < want + most and (splits.s == "validate").sum() < want + most
    assert (splits.s == "test").sum() >= want
    assert (splits.s == "validate").sum() >= want or not (splits.s == "train").any()
    assert {*deal_splits("abcde", ["one"] * 5, seed).values()} == {"test"}        # served first


def test_every_image_has_its_patient():
    with pytest.raises(ValueError, match="shorter"):
        deal_splits("abc", ["one", "two"], 0)


def some_image(root: Path) -> tuple[Path, str]:
    folder = root / "covid_rural_annot"
    return folder, sorted(path.stem for path in (folder / "pngs_masks").glob("*.png"))[0]


def spoil_labelme(change):
    def spoil(folder: Path, name: str) -> None:
        path = folder / "jpgs" / "jsons" / f"{name}.json"
        labelme = json.loads(path.read_text())
        change(labelme)
        path.write_text(json.dumps(labelme))
    return spoil


@pytest.mark.parametrize(("spoil", "message"), [
    (spoil_labelme(lambda labelme: labelme["shapes"][0].update(label="heart")), "expected polygons of right_lung"),
    (spoil_labelme(lambda labelme: labelme["shapes"][0].update(shape_type="circle")), "expected polygons"),
    (spoil_labelme(lambda labelme: labelme["shapes"][0].update(points=[[1, 1], [2, 2]])), "three corners"),
    (spoil_labelme(lambda labelme: labelme["shapes"][0].update(points=[[1, 1], [2, 2], [3, "x"]])), "not pairs of numbers"),
    (spoil_labelme(lambda labelme: labelme["shapes"][0].update(points=[[1, 1], [2, 2], [3, 999]])), "outside of the picture"),
    (spoil_labelme(lambda labelme: labelme.pop("shapes")), "not a labelme file: KeyError"),
    (lambda folder, name: (folder / "jpgs/jsons" / f"{name}.json").write_text('{"shapes": ['), "not a labelme file"),
    (lambda folder, name: (folder / "jpgs/jsons" / f"{name}.json").write_text("[" * 100000), "not a labelme file"),
    (lambda folder, name: (folder / "jpgs/jsons" / f"{name}.json").write_bytes(b""), "is empty"),
    (lambda folder, name: (folder / "jpgs/jsons" / f"{name}.json").write_bytes(b'{"shapes": "\xff"}'), "not UTF-8"),
    (lambda folder, name: Image.new("L", (7, 7)).save(folder / "pngs_masks" / f"{name}.png"), "expected the same size"),
    (lambda folder, name: Image.new("L", (128, 128), 7).save(folder / "pngs_masks" / f"{name}.png"), "expected only 0 and 1"),
    (lambda folder, name: (folder / "pngs_masks" / f"{name}.png").write_bytes(b"\x89PNG"), "cannot be decoded"),
    (lambda folder, name: (folder / "jpgs" / f"{name}.jpg").write_bytes(b""), "file is empty"),
    (lambda folder, name: (folder / "jpgs" / f"{name}.jpg").rename(folder / "jpgs" / "scan.jpg"), "whose image is it"),
])
def test_covid_rural_damage(spoil, message, rural, own, tmp_path):
    root = own(rural)
    spoil(*some_image(root))
    pack = prepare_source(COVID_RURAL, _CovidRuralConfig(root), build(tmp_path, size=32))
    assert len(pack) == len(STUDIES) - 1 and message in pack.rejects.reason[0] and str(tmp_path) not in pack.rejects.reason[0]
    assert len(pack.rejects) == 1 + message.startswith("whose")     # and its masks, which have no image any more


def test_covid_rural_knows_what_was_looked_for(rural, own, tmp_path):
    root = own(rural)
    folder, name = some_image(root)
    (folder / "jpgs" / "jsons" / f"{name}.json").unlink()
    other = sorted((folder / "pngs_masks").glob("*.png"))[1]
    other.unlink()
    pack = prepare_source(COVID_RURAL, _CovidRuralConfig(root), build(tmp_path, size=32))
    looked = dict(zip(pack.image_table.image_id, map(list, pack.image_table.masked)))
    assert looked[name] == ["opacity"] and looked[other.stem] == ["right_lung", "left_lung"]


def test_covid_rural_without_folders(tmp_path):
    with pytest.raises(DataError, match="there is no jpgs or covid_rural_annot/jpgs"):
        COVID_RURAL.plan(_CovidRuralConfig(tmp_path))
    with pytest.raises(DataError, match="no such folder. COVID Rural: git clone"):
        prepare_source(COVID_RURAL, _CovidRuralConfig(tmp_path / "x"), build(tmp_path))


# folders with boxes and masks

@pytest.fixture
def folder(tmp_path) -> Path:
    "Four images of 64 x 40 with a table, boxes and masks: a has two boxes and two masks, b one of each, c and d none"
    for name in "abcd":
        Image.fromarray(np.arange(64 * 40, dtype=np.uint8).reshape(40, 64)).save(tmp_path / f"{name}.png")
    for number, (x, y) in enumerate([(4, 8), (30, 10), (40, 20)]):
        mask = np.zeros((40, 64), bool)
        mask[y:y + 12, x:x + 16] = True
        Image.fromarray(mask).save(tmp_path / f"mask{number}.png")
    pd.DataFrame({"image_path": [f"{name}.png" for name in "abcd"], "view": ["PA", "AP", "PA", None]}).to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "boxes.csv").write_text("image_path,label,x1,y1,x2,y2,source\na.png,Mass,4,8,20,20,me\na.png,Nodule,30.5,10,46,22,me\nb.png,Mass,40,20,56,32,me\n")
    (tmp_path / "masks.csv").write_text("image_path,mask_path,label\na.png,mask0.png,Mass\na.png,mask1.png,Mass\nb.png,mask2.png,Nodule\n")
    return tmp_path


def drawn_pack(folder: Path, **changes) -> Pack:
    return folder_pack(folder / "table.csv", folder / "pack", size=64, require_report=False, boxes=folder / "boxes.csv", masks=folder / "masks.csv", max_rejects=0.8, allow_leaks=True, **changes)


@pytest.mark.parametrize("annotated", ["listed", "rows", "all"])
def test_folder_with_boxes_and_masks(annotated, folder):
    pack = drawn_pack(folder, annotated=annotated)
    pack.verify()
    assert pack.boxes.to_numpy().tolist() == [[0, "Mass", 4, 8, 20, 20], [0, "Nodule", 30.5, 10, 46, 22], [1, "Mass", 40, 20, 56, 32]]
    assert pack.image_table.view.tolist() == ["PA", "AP", "PA", ""]
    assert pack.image_table.boxed.tolist() == [True, True, *[annotated == "all"] * 2]
    both = ["Mass", "Nodule"]
    looked = {"listed": [both, both, [], []], "rows": [["Mass"], ["Nodule"], [], []], "all": [both] * 4}[annotated]
    assert [list(names) for names in pack.image_table.masked] == looked
    mass, nodule = pack.mask(0)
    assert mass.sum() == 2 * 12 * 16 and tight_box(mass) == (4, 20, 46, 34) and not nodule.any()
    assert tight_box(pack.mask(1)[1]) == (40, 32, 56, 44)


@pytest.mark.parametrize(("name", "old", "new", "message"), [
    ("boxes", "a.png,Mass", "z.png,Mass", "boxes.csv, line 2: the data set's table has no image 'z.png'"),
    ("boxes", ",4,8", ",x,8", "boxes.csv, line 2: x1 is 'x'; expected a number"), ("boxes", ",4,8", ",,8", "line 2: x1 is ''"), ("boxes", "4,8", "nan,8", "x1 is 'nan'"),
    ("boxes", "a.png,Mass", "a.png,", "line 2: the label is blank"), ("boxes", "x1,", "left,", "no column 'x1'"),
    ("boxes", "a.png,Mass", "../a.png,Mass", "leads out of the folder"), ("boxes", ",me\n", "\n", "line 2: 6 fields, expected 7"),
    ("masks", "mask0.png", "../mask0.png", "leads out of the folder"), ("masks", "mask0.png", "", "line 2: the mask_path is blank"),
    ("masks", "a.png,mask0", "z.png,mask0", "masks.csv, line 2: the data set's table has no image"), ("masks", "mask_path", "path", "no column 'mask_path'"),
])
def test_folder_with_wrong_tables(name, old, new, message, folder):
    replace_in(folder / f"{name}.csv", old, new)
    with pytest.raises(ValueError, match=message):
        drawn_pack(folder)
    assert not (folder / "pack").exists() and not (folder / "pack.partial").exists()


@pytest.mark.parametrize(("name", "old", "new", "message"), [
    ("boxes", "4,8,20,20", "4,8,66,20", "lies outside of its image of 64 x 40"), ("boxes", "4,8,20,20", "20,8,4,20", "has no extent"),
    ("masks", "mask0.png", "table.csv", "cannot be decoded"), ("masks", "mask0.png", "lost.png", "file not found"), ("masks", "mask0.png", "a.png", "expected only 0 and 1"),
])
def test_folder_with_wrong_rows(name, old, new, message, folder):
    "An image of which one box or mask is wrong is rejected as a whole"
    replace_in(folder / f"{name}.csv", old, new)
    pack = drawn_pack(folder)
    assert pack.rejects.item.tolist() == ["a.png"] and message in pack.rejects.reason[0] and len(pack) == 3 and len(pack.boxes) == 1


def test_folder_where_leaves_marks_of_others_out(folder):
    pack = drawn_pack(folder, where="view == 'AP'")
    assert len(pack) == 1 and pack.boxes["name"].tolist() == ["Mass"] and pack.mask(0)[1].any()


# a folder per class

NAMES = ["train/NORMAL/IM-0033-0001.jpeg", "train/NORMAL/IM-0033-0001-0002.jpeg", "val/NORMAL/NORMAL2-IM-0374-0001.jpeg", "train/PNEUMONIA/person12_bacteria_34.jpeg",
         "train/PNEUMONIA/person12_virus_5.jpeg", "test/PNEUMONIA/person7_virus_5.jpeg"]


def tree(folder: Path, names: list[str]) -> _ClassFolderConfig:
    for number, name in enumerate(names):
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(STUDIES[number].image).save(folder / "tree" / name, format="png")
    return _ClassFolderConfig(folder / "tree", patients="kermany")


def class_pack(config: _ClassFolderConfig) -> Pack:
    return picture_pack(CLASS_FOLDER, config, config.root.parent / "pack", size=64)


def test_class_folder(tmp_path):
    pack = class_pack(tree(tmp_path, NAMES))
    assert pack.studies.study_id.tolist() == sorted(NAMES) and pack.labels.columns.tolist() == ["NORMAL", "PNEUMONIA"]
    for row, name in enumerate(pack.studies.study_id):
        split, kind, _ = name.split("/")
        assert pack.labels.iloc[row].to_dict() == {"NORMAL": kind == "NORMAL", "PNEUMONIA": kind == "PNEUMONIA"}
        assert pack.studies.split[row] == split.replace("val", "validate") and (pack.image(row) == STUDIES[NAMES.index(name)].image).all()
    assert sorted(set(pack.studies.patient_id)) == ["IM-0033", "NORMAL2-IM-0374", "person12", "person7"]


def test_class_folder_without_splits_or_rule(tmp_path):
    config = tree(tmp_path, [name.partition("/")[2] for name in NAMES])
    config.patients = ""
    pack = class_pack(config)
    assert pack.studies.patient_id.nunique() == 6 and set(pack.studies.split) <= {"train", "validate", "test"} and pack.labels.to_numpy().sum() == 6


def test_class_folder_with_recurring_persons(tmp_path):
    config = tree(tmp_path, [*NAMES, "test/PNEUMONIA/person12_virus_9.jpeg"])
    with pytest.raises(DataError, match=r"1 x patient\): patient person12 \(train\) = person12 \(test\)"):
        class_pack(config)
    config.keep_splits = False
    pack = class_pack(config)
    assert pack.studies.groupby("patient_id").split.nunique().max() == 1 and len(pack) == 7


def test_class_folder_leaves_out_by_rule_and_rejects_by_name(tmp_path):
    config = tree(tmp_path, [*NAMES, "train/NORMAL/._IM-0001-0001.jpeg", "__MACOSX/train/NORMAL/IM-0001-0001.jpeg", "train/scan.jpeg", "train/NORMAL/scan.jpeg"])
    (tmp_path / "tree" / "train" / "NORMAL" / "notes.txt").write_text("x")
    (tmp_path / "tree" / "train" / "loop").symlink_to(tmp_path / "tree")
    pack = class_pack(config)
    assert pack.manifest["source"]["dropped"] == {"not an image by its name": 3, "outside of the folders train, validate and test": 1, "not in a folder of a class": 1}
    assert pack.rejects.item.tolist() == ["train/NORMAL/scan.jpeg"] and "does not tell the patient" in pack.rejects.reason[0] and len(pack) == 6


def test_class_folder_command_line(tmp_path):
    parsed = tyro.cli(_ClassFolderConfig, args="--root r --patients kermany --no-keep-splits".split())
    assert parsed == _ClassFolderConfig(Path("r"), patients="kermany", keep_splits=False)
    with pytest.raises(DataError, match="no such folder"):
        class_pack(_ClassFolderConfig(tmp_path / "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no study is left"):
        class_pack(_ClassFolderConfig(tmp_path / "empty"))
