"""Tasks: answers beside images, whatever order they come in; shares of labels; geometry; every wrong pairing refused by name."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvis.data import tasks
from medvis.data.preprocessing import Preprocessing
from medvis.data.pack import ImageRecord, StudyRecord, write_pack
from medvis.data.phantom import FINDINGS, Phantom
from medvis.data.prepare import PhantomConfig, prepare_phantom

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
