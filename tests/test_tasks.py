"""Tasks: answers beside images, whatever order they come in; shares of labels; geometry; every wrong pairing refused by name."""
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvis.cli.commands import main
from medvis.data import tasks
from medvis.data.build import ImageRecord, StudyRecord, write_pack
from medvis.data.pack import Pack
from medvis.data.sets.registry import DATASETS, simulate
from medvis.data.preprocessing import Preprocessing
from medvis.data.phantom import FINDINGS, Phantom
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.source import BuildConfig, prepare_source
from medvis.evaluate.finetune import Protocol
from medvis.evaluate.protocol import PROTOCOLS, find_protocol, protocol_task, share_rule, _split_rows

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
SIZE = 64


def study(index: int) -> StudyRecord:
    images = [ImageRecord(f"im{index}-{k}", np.full((SIZE, SIZE), 10 * index + k, np.uint8)) for k in range(1 + index % 3)]
    return StudyRecord(f"st{index}", f"p{index // 2}", ("train", "train", "validate", "test")[index // 2 % 4], images,
                       labels={"a": [1, 0, -1, None][index % 4], "b": float(index % 2)})


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("tasks") / "pack", range(16), study, SIZE, {}, labels=("a", "b"), require_report=False, progress=False)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return prepare_phantom(PhantomConfig(tmp_path_factory.mktemp("tasks") / "phantom", studies=25, seed=3, progress=False))


def test_the_order_of_the_answers_does_not_matter(pack):
    draw = np.random.default_rng(0)
    ids = pack.image_table["image_id"].tolist()
    masks = {name: (draw.random((2, SIZE, SIZE)) > 0.8) for name in ids[:9]}
    boxes = pd.DataFrame({"image_id": ids[:9], "x0": 1, "y0": 2, "x1": 3 + np.arange(9), "y1": 9, "class": ["u", "v", "w"] * 3})
    grades = pd.Series(np.arange(9) % 4, index=ids[:9])
    for build, given in ((lambda x: tasks.mask_task(pack, x, "ab"), masks), (lambda x: tasks.box_task(pack, x), boxes),
                         (lambda x: tasks.ordinal_task(pack, x), grades)):
        order = draw.permutation(9)
        moved = {name: given[name] for name in np.array(ids[:9])[order]} if isinstance(given, dict) else given.iloc[order]
        one, other = build(given), build(moved)
        assert one.hash == other.hash and one.images.equals(other.images)
        assert all(np.array_equal(a, b) for a, b in zip(one.targets, other.targets, strict=True))


def test_each_image_has_the_answer_of_its_study(pack):
    task = tasks.label_task(pack, blank="ignore")
    assert task.classes == ("a", "b") and len(task) == len(pack)
    for row, target in zip(task.images.itertuples(), task.targets):
        index = int(row.study_id[2:])
        assert row.image_id.startswith(f"im{index}-") and pack.image(row.image)[0, 0] == 10 * index + int(row.image_id[-1])
        expected = study(index).labels
        assert target[1] == expected["b"] and (target[0] == expected["a"] or (np.isnan(target[0]) and expected["a"] in (-1, None)))


@PROPERTY
@given(st.integers(0, 50), st.floats(0.01, 1), st.floats(0.01, 1))
def test_shares_are_nested_by_patient_and_within_the_split(pack, seed, one, other):
    task = tasks.label_task(pack)
    small, large = sorted((one, other))
    for how in ("patients", "first"):
        few, many = (task.rows("train", share, seed, how) for share in (small, large))
        assert 0 < len(few) <= len(many) and set(few) <= set(many) and set(task.images["split"].iloc[many]) == {"train"}
        assert np.array_equal(many, np.sort(many))
    patients = task.images["patient_id"].iloc[task.rows("train", small, seed)]
    every = task.images["patient_id"].iloc[task.rows("train")]
    assert (every.isin(patients)).sum() == len(patients)  # all images of a chosen patient, no others


def test_the_hash_tells_tasks_apart(pack, phantom):
    ids = pack.image_table["image_id"]
    mask = np.zeros((SIZE, SIZE), bool)
    dotted = mask.copy()
    dotted[5, 6] = True
    box = pd.DataFrame({"image_id": [ids[0]], "x0": [1.0], "y0": [1.0], "x1": [5.0], "y1": [5.0]})
    every = [
        tasks.mask_task(pack, {ids[0]: mask}), tasks.mask_task(pack, {ids[0]: dotted}), tasks.mask_task(pack, {ids[1]: dotted}),
        tasks.mask_task(pack, {ids[0]: mask}, ["other"]), tasks.mask_task(pack, {ids[0]: mask, ids[1]: mask}),
        tasks.box_task(pack, box), tasks.box_task(pack, box, images=ids[:3]), tasks.box_task(pack, box.assign(x1=6.0)),
        tasks.label_task(pack), tasks.label_task(pack, ["b", "a"]), tasks.label_task(pack, uncertain="positive"), tasks.label_task(phantom, FINDINGS[:2]),
        tasks.ordinal_task(pack, pd.Series({"st0": 1})), tasks.ordinal_task(pack, pd.Series({"st0": 0})),
    ]
    assert len({task.hash for task in every}) == len(every)
    moved = [tasks.box_task(pack, pd.DataFrame({"image_id": list(of), "x0": 1.0, "y0": 1.0, "x1": 5.0, "y1": 5.0}), images=ids[:3])
             for of in ((ids[0], ids[0]), (ids[0], ids[1]))]  # as many boxes, shared out otherwise
    assert moved[0].hash != moved[1].hash


def test_phantom_answers_are_those_of_the_pictures(phantom):
    drawn = [Phantom(64, 3)[index] for index in range(25)]
    labels = tasks.phantom_task(phantom, progress=False)
    assert labels.targets.tolist() == [[float(found.truth[name]) for name in FINDINGS] for found in drawn]
    masks = tasks.phantom_task(phantom, "masks", progress=False)
    boxes = tasks.phantom_task(phantom, "boxes", progress=False)
    for c, name in enumerate(FINDINGS):
        union = np.stack([np.any([np.zeros((64, 64), bool)] + [f.mask for f in found.findings if f.name == name], axis=0) for found in drawn])
        assert np.array_equal(masks.targets[:, c].astype(bool), union)
    for name in ("Edema", "Nodule"):
        severity = tasks.phantom_task(phantom, "ordinal", [name], progress=False).targets
        assert severity.tolist() == [max([f.severity for f in found.findings if f.name == name], default=0) for found in drawn]
    assert [sorted(map(tuple, rows)) for rows in boxes.targets] == [sorted((*map(float, f.box), float(FINDINGS.index(f.name))) for f in found.findings) for found in drawn]


def test_another_phantom_is_noticed(phantom):
    wrong = SimpleNamespace(path=phantom.path, manifest={**phantom.manifest, "source": {**phantom.manifest["source"], "seed": 4}}, image=phantom.image,
                            image_table=phantom.image_table, studies=phantom.studies)
    with pytest.raises(ValueError, match="phantom-0000000 .* another picture"):
        tasks.phantom_task(wrong, "masks", progress=False)


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from([(64, 1.0), (48, 0.75), (96, 1.0), (56, 0.875), (30, 0.5), (33, 0.6)]))
def test_boxes_go_where_masks_go(seed, geometry):
    draw, view = np.random.default_rng(seed), Preprocessing(*geometry)
    low = draw.integers(0, SIZE - 12, (4, 2))
    boxes = np.hstack([low, low + draw.integers(4, 12, (4, 2)), [[0], [1], [2], [3]]]).astype(float)
    masks = torch.zeros(4, SIZE, SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1, _) in zip(masks, boxes.astype(int)):
        mask[y0:y1, x0:x1] = True
    seen = view.mask()(masks)
    moved = {int(box[4]): box[:4] for box in tasks.boxes_in_view(boxes, SIZE, view)}
    scale = round(view.size / view.crop) / SIZE
    for kind, mask in enumerate(seen):
        if kind not in moved:  # less than a pixel of it is left
            assert min(mask.any(0).sum(), mask.any(1).sum()) <= 1 + scale
            continue
        x0, y0, x1, y1 = moved[kind]
        assert 0 <= x0 < x1 <= view.size and 0 <= y0 < y1 <= view.size
        assert abs(float(mask.any(0).sum()) - (x1 - x0)) <= 1.01 and abs(float(mask.any(1).sum()) - (y1 - y0)) <= 1.01
        rows, columns = mask.nonzero(as_tuple=True)
        assert abs(columns.float().mean() + 0.5 - (x0 + x1) / 2) <= 1 and abs(rows.float().mean() + 0.5 - (y0 + y1) / 2) <= 1


def test_numbers_as_ids_and_empty_answers(pack):
    numbered = write_pack(pack.path.parent / "numbered", range(3), lambda i: StudyRecord(str(i), str(i), "train", [ImageRecord(str(10 + i), np.zeros((8, 8), np.uint8))]),
                          8, {}, require_report=False, progress=False)
    assert tasks.ordinal_task(numbered, pd.Series({11: 1, 12: 0})).images["image_id"].tolist() == ["11", "12"]  # ids that pandas took for numbers
    with pytest.raises(ValueError, match="0 images and 0 targets"):
        tasks.mask_task(numbered, {})
    with pytest.raises(ValueError, match="0 images"):
        tasks.label_task(pack, ["a"], table=pd.DataFrame({"a": [np.nan]}, index=["st0"]), blank="ignore")


# ---------------------------------------------------------------- what a recipe asks for

def held(path, labels=(), grades=(), boxes=(), masks=(), recipe=None, count=12):
    "A Pack of images on which somebody looked for all but the last mask on odd images"
    def make(index):
        half = np.tile(np.arange(8) < 4, (8, 1))
        marks = {"boxes": [(boxes[0], 0, 0, 4, 8)] if index % 2 else []} if boxes else {}
        marks |= {"masks": {name: None if index % 2 and name == masks[-1] else half for name in masks}} if masks else {}
        image = ImageRecord(f"i{index}", np.full((8, 8), index, np.uint8), **marks)
        return StudyRecord(f"s{index}", f"p{index}", ("train", "validate", "test")[index // (count // 2) + (index == count - 1)], [image],
                           labels=dict(zip(labels, (float(index % len(labels) == c) for c in range(len(labels))))), grades={name: index % 3 for name in grades})
    return write_pack(path, range(count), make, 8, {"kind": "held", "recipe": recipe or {}}, labels=labels, grades=grades, boxes=boxes, masks=masks, require_report=False, progress=False)


def test_a_recipe_says_which_masks_and_boxes_are_asked_for(tmp_path):
    rural = held(tmp_path / "rural", masks=("opacity", "lung"), recipe={"classes": ["opacity"]})
    task = tasks.pack_task(rural, "masks")
    assert task.classes == ("opacity",) and len(task) == 12 and task.targets.shape == (12, 1, 8, 8)         # half of them have no lung
    assert tasks.pack_task(rural, "masks", ["lung", "opacity"]).classes == ("lung", "opacity") and len(tasks.pack_task(rural, "masks", ["lung"])) == 6
    assert (tasks.store_subsets(rural).query("task == 'masks' and fraction == 1")["images"] == 6).all()     # all six training images
    plain = held(tmp_path / "plain", masks=("opacity", "lung"))
    assert tasks.pack_task(plain, "masks").classes == ("opacity", "lung") and len(tasks.pack_task(plain, "masks")) == 6
    named = held(tmp_path / "named", labels=("ill", "well"), boxes=("cloud", "knot"), recipe={"classes": ["ill"]})      # a label, not a box
    assert tasks.pack_task(named, "boxes").classes == ("cloud", "knot") and tasks.pack_task(named, "masks").classes == ("cloud", "knot")
    assert tasks.pack_task(named, "labels").classes == ("ill",)
    part = held(tmp_path / "part", labels=("cloud", "well"), boxes=("cloud", "knot"), recipe={"classes": ["cloud"]})
    assert tasks.pack_task(part, "boxes").classes == ("cloud",) and tasks.pack_task(part, "masks").kind == "masks"


def test_exclusive_classes_need_no_list(tmp_path):
    pack = held(tmp_path / "three", labels=("normal", "pneumonia", "COVID-19"), recipe={"classes": []})
    task = tasks.pack_task(pack, "classes")
    assert task.classes == ("normal", "pneumonia", "COVID-19") and task.targets.tolist() == [0, 1, 2] * 4
    with pytest.raises(ValueError, match="holds no classes flu; its classes are normal, pneumonia"):
        tasks.class_task(pack, ["flu", "normal"])
    with pytest.raises(ValueError, match="no labels are asked for"):
        tasks.label_task(pack, [])


def test_a_task_that_nobody_answered_is_no_subset(tmp_path):
    make = lambda index: StudyRecord(f"s{index}", f"p{index}", "train", [ImageRecord(f"i{index}", np.zeros((8, 8), np.uint8))], labels={"ill": index % 2})
    pack = write_pack(tmp_path / "pack", range(6), make, 8, {}, labels=("ill",), grades=("edema",), boxes=("mass",), masks=("mass",), require_report=False, progress=False)
    assert set(tasks.store_subsets(pack)["task"]) == {"labels"} and (pack.path / "subsets.csv").exists()
    blank = write_pack(tmp_path / "blank", range(6), lambda index: StudyRecord(f"s{index}", f"p{index}", "train", [ImageRecord(f"i{index}", np.zeros((8, 8), np.uint8))]), 8, {}, labels=("ill",),
                       require_report=False, progress=False)
    assert tasks.store_subsets(blank).empty
    with pytest.raises(tasks._EmptyTask, match="0 images"):
        tasks.pack_task(blank)


def test_what_else_a_pack_holds_is_told(tmp_path):
    graded = held(tmp_path / "graded", grades=("edema",))
    with pytest.raises(ValueError, match=r"asks for labels, and .*graded holds none.*grades of edema \(--kind ordinal\)"):
        protocol_task(graded, "localmi_frozen")
    assert protocol_task(graded, "localmi_frozen", kind="ordinal").classes == ("0", "1", "2")
    with pytest.raises(ValueError, match=r"asks for masks.*edema \(another protocol, such as tiny-linear\)"):
        protocol_task(graded, "covid_seg_linear")
    with pytest.raises(ValueError, match=r"holds nothing for a task of kind labels; it holds edema \(kind ordinal\)"):
        tasks.pack_task(graded)
    boxed = held(tmp_path / "boxed", boxes=("mass",))
    with pytest.raises(ValueError, match=r"holds none.*masks of mass .*tiny-seg-linear.*boxes of mass .*tiny-detect"):
        protocol_task(boxed, "tiny-linear")


def test_covidx_is_asked_for_classes_unless_told_otherwise(tmp_path, capsys):
    assert PROTOCOLS["mgca_covidx"].kind == "classes" and {one.kind for name, one in PROTOCOLS.items() if name != "mgca_covidx"} == {None}
    simulate("covidx", tmp_path / "files", studies=60)
    assert main(f"prepare covidx --root {tmp_path}/files --out {tmp_path}/pack --size 64 --no-progress".split()) == 0
    capsys.readouterr()
    command = f"evaluate mgca_covidx --data {tmp_path}/pack --encoder random --image tiny_resnet --out {tmp_path}/out --seeds 0 --fractions 1 --epochs 1 --device cpu --no-progress"
    for more in ([], ["--kind", "classes"]):
        assert main([*command.split(), *more]) == 0
        printed = capsys.readouterr().out
        assert "classes of normal, pneumonia, COVID-19" in printed and "accuracy, all 0." in printed
    assert protocol_task(Pack(tmp_path / "pack"), "mgca_covidx", kind="labels").kind == "labels"


def test_the_recipe_says_how_small_shares_are_drawn(tmp_path, capsys):
    first, plain = held(tmp_path / "first", labels=("a", "b"), recipe={"subset": "first"}, count=80), held(tmp_path / "plain", labels=("a", "b"), count=80)
    mine = Protocol(fractions=(0.1, 1.0))
    rows = {name: _split_rows(tasks.pack_task(pack), mine, 0.1, 0)["train"].tolist() for name, pack in (("first", first), ("plain", plain))}
    assert rows["first"] == [0, 1, 2, 3] and rows["plain"] != rows["first"]
    task = tasks.pack_task(first)
    assert _split_rows(task, Protocol(subset="patients"), 0.1, 0)["train"].tolist() == rows["plain"]         # what is said outright wins
    assert share_rule(task, find_protocol("rsna_frozen_10", released=True)) == "first" and share_rule(tasks.pack_task(plain), find_protocol("rsna_frozen_10", released=True)) == "first"
    command = f"evaluate tiny-linear --data {tmp_path}/first --encoder random --image tiny_resnet --size 8 --out {tmp_path}/out --seeds 0 --fractions 0.1 --lrs 0.01 --epochs 1 --device cpu --no-progress"
    for more, sentence, rule in ([], "the first rows", "first"), (["--subset", "patients"], "drawn by patient", "patients"):
        assert main([*command.split(), *more]) == 0
        assert f"Shares of the training images, {sentence}: 10 %" in capsys.readouterr().out
        assert any(json.loads(path.read_text())["recipe"]["subset"] == rule for path in (tmp_path / "out" / "runs").glob("*/manifest.json"))


def test_lovts_covid_rural_is_about_opacities(tmp_path):
    simulate("covid-rural", tmp_path / "files", studies=42)
    data_set = DATASETS["covid-rural"]
    lost = sorted((tmp_path / "files" / "covid_rural_annot" / "jpgs" / "jsons").glob("*.json"))[0]
    lost.unlink()                                                       # an opacity without lungs
    pack = prepare_source(data_set, data_set.config(tmp_path / "files", "lovt"), BuildConfig(tmp_path / "pack", size=64, progress=False))
    task = tasks.pack_task(pack, "masks")
    assert task.classes == ("opacity",) and len(task) == len(pack) == 36 and lost.stem in set(task.images["image_id"])
    assert len(tasks.pack_task(pack, "masks", ["opacity", "right_lung"])) == 35
    assert tasks.store_subsets(pack).query("task == 'masks' and fraction == 1 and how == 'first'")["images"].item() == len(task.rows("train"))
