"""Metrics, boxes and segmentation losses against slow oracles written differently, on random and on degenerate input."""
import contextlib
import io
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torchvision.ops import sigmoid_focal_loss

from medvis.evaluate import detect, ground, metrics, segment
from medvis.methods.method import Correspondence
from medvis.evaluate.detect import _YOLO_RULES, Targets, YoloRules
from medvis.evaluate.metrics import _IOUS, MAP_RULES, Boxes, MapRules, mean_ap

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10**6)


def some_boxes(rng, count, images=4, classes=2, size=20, whole=True, scores=5) -> Boxes:
    "Boxes that overlap a lot; whole numbers and few scores give ties of every kind."
    draw = (lambda low, high, shape: rng.integers(low, high, shape)) if whole else rng.uniform
    low = draw(0, size, (count, 2))
    score = rng.integers(1, scores + 1, count) / scores if scores else rng.permutation(count) / max(count, 1)
    return Boxes(rng.integers(0, images, count), np.hstack([low, low + draw(1, size, (count, 2))]), rng.integers(0, classes, count), score)


# ---------------------------------------------------------------- Dice

def slow_dice(p: set, t: set) -> float:
    return 2 * len(p & t) / (len(p) + len(t)) if p or t else 1.0


@PROPERTY
@given(SEEDS, st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.9]))
def test_dice_is_that_of_sets(seed, images, filled):
    rng = np.random.default_rng(seed)
    probability, truth = rng.random((images, 4, 5)), rng.random((images, 4, 5)) < filled * rng.integers(0, 2, (images, 1, 1))
    batches = np.sort(rng.integers(0, 3, images))
    counts = metrics.count_pixels(probability, truth)
    p, t = ([set(np.flatnonzero(x)) for x in array] for array in (probability > 0.5, truth))
    each = [slow_dice(*pair) for pair in zip(p, t)]
    np.testing.assert_allclose(metrics._dice_of_images(counts), each)
    table = metrics.dice_table(counts, batches).set_index("reported_by")["value"]
    np.testing.assert_allclose(table["MGCA"], np.mean([np.mean([e for e, b in zip(each, batches) if b == at]) for at in sorted(set(batches))]))
    flat = truth.ravel(), probability.ravel() > 0.5
    f1 = [f1_score(*(x == of for x in flat), zero_division=np.nan) for of in (True, False)]
    np.testing.assert_allclose(table["LoVT"], f1[0])
    np.testing.assert_allclose(table["BenchX"], np.mean(f1))
    order = rng.permutation(images)
    moved = metrics.dice_table(metrics.count_pixels(probability[order], truth[order]), batches[order])["value"]
    np.testing.assert_allclose(moved, metrics.dice_table(counts, batches)["value"])


def test_dice_of_nothing_and_of_everything():
    empty, full = np.zeros((3, 4, 4)), np.ones((3, 4, 4))
    for p, t, pooled, images, two in ((empty, empty, np.nan, 1, np.nan), (full, full, 1, 1, np.nan), (full, empty, 0, 0, 0), (empty, full, 0, 0, 0)):
        table = metrics.dice_table(metrics.count_pixels(p, t)).set_index("reported_by")["value"]
        np.testing.assert_array_equal(table[["LoVT", "usual", "BenchX"]], [pooled, images, two])
    assert metrics.count_pixels(np.full((1, 2, 2), 0.5), full[:1, :2, :2]).predicted == 0


def test_dice_of_classes_is_the_mean_of_theirs():
    rng = np.random.default_rng(0)
    p, t = rng.random((5, 3, 6, 6)), rng.random((5, 3, 6, 6)) < [[[0.2]], [[0.5]], [[0.8]]]
    each = [metrics.dice_table(metrics.count_pixels(p[:, c], t[:, c]), [0, 0, 1, 1, 1])["value"] for c in range(3)]
    np.testing.assert_allclose(metrics.dice_table(metrics.count_pixels(p, t), [0, 0, 1, 1, 1])["value"], np.mean(each, 0))


def test_masks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and \(2, 1, 4, 4\)"):
        metrics.count_pixels(np.zeros((2, 4, 4)), np.zeros((2, 1, 4, 4)))


# ---------------------------------------------------------------- mean average precision

def slow_iou(a, b, side):
    left, top, right, bottom = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]) + side, min(a[3], b[3]) + side
    both = (right - left) * (bottom - top) if right > left and bottom > top else 0.0
    area = [(x[2] + side - x[0]) * (x[3] + side - x[1]) for x in (a, b)]
    return both / (sum(area) - both) if sum(area) > both else 0.0


def slow_ap(detections: Boxes, truth: Boxes, kind: int, threshold: float, rules: MapRules) -> float:
    "One class, one threshold, one detection after the other."
    rows = [k for k in range(len(detections)) if detections.classes[k] == kind]
    free = {g for g in range(len(truth)) if truth.classes[g] == kind}
    if rules.skip_empty:
        both = set(detections.image) & set(truth.image)
        rows, free = [k for k in rows if detections.image[k] in both], {g for g in free if truth.image[g] in both}
    if not free:
        return rules.absent
    total, seen, found, curve = len(free), {}, 0, []
    for k in sorted(rows, key=lambda k: (-detections.scores[k], k)):
        seen[detections.image[k]] = seen.get(detections.image[k], 0) + 1
        if rules.limit is not None and seen[detections.image[k]] > rules.limit:
            continue
        best, at = -1.0, None
        for g in sorted(free):
            if truth.image[g] == detections.image[k] and (iou := slow_iou(detections.corners[k], truth.corners[g], rules.side)) > best:
                best, at = iou, g
        if at is not None and (best > threshold if rules.strict else best >= threshold):
            free.remove(at)
            found += 1
        curve.append((found / total, found / (len(curve) + 1)))
    return float(np.mean([max([precision for recall, precision in curve if recall >= point], default=0.0) for point in np.linspace(0, 1, 101)]))


@PROPERTY
@given(SEEDS, st.booleans(), st.sampled_from([0.0, 1.0]))
def test_overlap_of_boxes(seed, whole, side):
    rng = np.random.default_rng(seed)
    first, second = (some_boxes(rng, 12, whole=whole).corners for _ in range(2))
    wanted = [[slow_iou(a, b, side) for b in second] for a in first]
    np.testing.assert_allclose(metrics._box_iou(first[:, None], second, side), wanted, atol=1e-12)


RULES = {"coco": MAP_RULES["coco"], "lovt": MAP_RULES["lovt"], "mgca": MapRules(skip_empty=True), "short": MapRules(limit=2), "strict": MapRules(strict=True)}


@pytest.mark.parametrize("name", RULES)
@PROPERTY
@given(SEEDS, st.integers(0, 9), st.integers(0, 25), st.booleans())
def test_average_precision_is_the_slow_loop(name, seed, true, called, whole):
    rng = np.random.default_rng(seed)
    truth, called = some_boxes(rng, true, whole=whole), some_boxes(rng, called, whole=whole)
    thresholds = (0.25, 0.5, 0.75)
    ap = metrics._average_precisions(called, truth, thresholds, 3, RULES[name]).to_numpy()
    slow = [[slow_ap(called, truth, kind, threshold, RULES[name]) for kind in range(3)] for threshold in thresholds]
    np.testing.assert_allclose(ap, slow, atol=1e-12)
    wanted = np.nan if np.isnan(slow).all() else np.nanmean(slow)
    np.testing.assert_allclose(mean_ap(called, truth, thresholds, 3, RULES[name]), wanted, atol=1e-12)


def coco_map(detections: Boxes, truth: Boxes, images: int, classes: int) -> float:
    "pycocotools with the papers' thresholds."
    coco = pytest.importorskip("pycocotools.coco").COCO
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval
    rows = lambda boxes: [
        {"id": k + 1, "image_id": int(i), "category_id": int(c) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0, "score": float(s)}
        for k, (i, (x0, y0, x1, y1), c, s) in enumerate(zip(boxes.image, boxes.corners.tolist(), boxes.classes, boxes.scores))]
    with contextlib.redirect_stdout(io.StringIO()):
        real = coco()
        real.dataset = {"info": {}, "images": [{"id": i} for i in range(images)], "categories": [{"id": c + 1} for c in range(classes)], "annotations": rows(truth)}
        real.createIndex()
        found = evaluation(real, real.loadRes(rows(detections)), "bbox")
        found.params.iouThrs, found.params.maxDets, found.params.areaRng, found.params.areaRngLbl = np.array(_IOUS), [100], [[0, 1e10]], ["all"]
        found.evaluate()
        found.accumulate()
    precision = found.eval["precision"][:, :, :, 0, 0]
    return precision[precision > -1].mean()


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_is_pycocotools(seed):
    rng = np.random.default_rng(seed)
    truth, called = some_boxes(rng, 30, 12, 3, 40, whole=False, scores=0), some_boxes(rng, 150, 14, 3, 40, whole=False, scores=0)
    hurt = truth.corners + rng.normal(0, 2, truth.corners.shape)
    near = Boxes(np.r_[called.image, truth.image], np.vstack([called.corners, np.sort(hurt.reshape(-1, 2, 2), 1).reshape(-1, 4)]),
                 np.r_[called.classes, truth.classes], rng.permutation(180) / 180)
    truth = truth[truth.classes != 1] if seed % 3 == 0 else truth      # a class that nobody has
    assert np.isclose(mean_ap(near, truth, classes=3), coco_map(near, truth, 14, 3), atol=1e-9)


@PROPERTY
@given(SEEDS)
def test_order_and_numbering_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    truth, called = some_boxes(rng, 8, whole=False), some_boxes(rng, 20, whole=False, scores=0)
    names, mix = rng.permutation(50)[:4], rng.permutation
    shuffled = [boxes[mix(len(boxes))] for boxes in (called, truth)]
    for boxes in shuffled:
        boxes.image = names[boxes.image]
    for rules in RULES.values():
        np.testing.assert_allclose(mean_ap(*shuffled, rules=rules), mean_ap(called, truth, rules=rules))
    for recorded in (True, False):
        np.testing.assert_allclose(*(metrics.froc(*pair, 50, recorded=recorded).score for pair in (shuffled, (called, truth))))
    rescored = Boxes(called.image, called.corners, called.classes, called.scores**3 - 7)
    assert mean_ap(rescored, truth) == mean_ap(called, truth)


def test_degenerate_boxes():
    none, one = Boxes([], []), Boxes([0], [[0, 0, 4, 4]])
    assert mean_ap(one, one) == 1 and mean_ap(none, one) == 0
    assert np.isnan(mean_ap(one, none)) and np.isnan(mean_ap(none, none)) and mean_ap(one, none, rules=MAP_RULES["lovt"]) == 0
    assert np.isnan(mean_ap(none, one, rules=MAP_RULES["mgca"]))           # no image counts
    for found, truth in ((none, none), (none, one), (one, none), (one, one)):
        table = metrics.detection_table(found, truth, 1)
        assert len(table) == 6 and table["name"].is_unique
    with pytest.raises(ValueError, match="image 3, but there are 3"):
        metrics.detection_table(Boxes([3], [[0, 0, 1, 1]]), one, 3)
    point = Boxes([0], [[2, 2, 2, 2]])
    assert mean_ap(point, point) == 0 and mean_ap(point, point, rules=MAP_RULES["lovt"]) == 1   # a point has no area; one pixel has


def test_exactly_on_the_line():
    whole, half, taken = [[0, 0, 10, 10]], [[0, 0, 10, 5]], Boxes([0, 0], [[0, 0, 10, 10]] * 2, scores=[0.9, 0.8])
    assert metrics.match(Boxes([0], half), Boxes([0], whole), (0.5,)).item() == 1
    assert metrics.match(Boxes([0], half), Boxes([0], whole), (0.5,), MapRules(strict=True)).item() == 0
    assert metrics.match(taken, Boxes([0], whole), (0.0,)).ravel().tolist() == [1, 0]     # what is taken overlaps less than nothing
    for corner in ((0, 0), (10, 10), (0, 10), (10, 5)):                                  # centres on the border are inside
        assert metrics.froc(Boxes([0], [[*(c - 1 for c in corner), *(c + 1 for c in corner)]]), Boxes([0], whole), 1).score == 1
    for corner in ((-1, 5), (5, 10.5)):
        assert metrics.froc(Boxes([0], [[*corner, *corner]]), Boxes([0], whole), 1).score == 0


def test_tables_are_read_back():
    boxes = some_boxes(np.random.default_rng(0), 9)
    again = Boxes.of(boxes.table())
    for name in ("image", "corners", "classes", "scores"):
        np.testing.assert_array_equal(getattr(again, name), getattr(boxes, name))


def test_a_large_split_is_quick():
    """LoVT's code takes minutes on RSNA's test split: 5337 images, some 10 detections each."""
    rng = np.random.default_rng(0)
    truth, called = some_boxes(rng, 3000, 5337, 1, 200, False, 0), some_boxes(rng, 50_000, 5337, 1, 200, False, 0)
    started = time.perf_counter()
    metrics.detection_table(called, truth, 5337)
    assert time.perf_counter() - started < 20


# ---------------------------------------------------------------- FROC

def slow_froc(detections: Boxes, truth: Boxes, images: int, recorded: bool):
    hit, false, curve = set(), 0, []
    for k in sorted(range(len(detections)), key=lambda k: (-detections.scores[k], k)):
        x, y = (detections.corners[k, 0] + detections.corners[k, 2]) / 2, (detections.corners[k, 1] + detections.corners[k, 3]) / 2
        inside = {g for g in range(len(truth)) if truth.image[g] == detections.image[k]
                  and truth.corners[g, 0] <= x <= truth.corners[g, 2] and truth.corners[g, 1] <= y <= truth.corners[g, 3]}
        hit |= inside
        false += not inside
        curve.append((false / images, len(hit) / len(truth)))
    if not recorded:
        return [max([s for f, s in curve if f <= point], default=0.0) for point in metrics._FROC_POINTS]
    noted, todo = [], list(metrics._FROC_POINTS)
    for rate, sensitivity in curve:
        if todo and rate >= todo[0]:
            noted.append(sensitivity)
            todo.pop(0)
    return noted + noted[-1:] * len(todo) if noted else [curve[-1][1] if curve else 0.0] * len(metrics._FROC_POINTS)


@PROPERTY
@given(SEEDS, st.integers(1, 8), st.integers(0, 60), st.sampled_from([1, 3, 12]))
def test_froc_is_the_slow_walk(seed, true, called, images):
    rng = np.random.default_rng(seed)
    truth, called = some_boxes(rng, true, images), some_boxes(rng, called, images)
    for recorded in (True, False):
        found, slow = metrics.froc(called, truth, images, recorded=recorded), slow_froc(called, truth, images, recorded)
        np.testing.assert_allclose(found.score, np.mean(slow))
        if len(found.sensitivity):
            np.testing.assert_allclose(found.sensitivity, slow)


def test_froc_without_ground_truth():
    none, calls = Boxes([], []), Boxes([0, 0], [[0, 0, 1, 1]] * 2)
    assert metrics.froc(none, none, 3).score == 0 and metrics.froc(calls, none, 3).false_positives == 2
    assert metrics.froc(none, none, 3, recorded=True).score == 1 and np.isnan(metrics.froc(calls, none, 1, recorded=True).score)


# ---------------------------------------------------------------- detection

def some_targets(rng, count, batch=3, size=64, classes=3) -> Targets:
    sides = rng.uniform(2, size, (count, 2))
    places = np.hstack([rng.uniform(0, size, (count, 2)), sides])
    places[: count // 4, 0] = size                          # on the right border
    return Targets(torch.tensor(rng.integers(0, batch, count)), torch.tensor(places), torch.tensor(rng.integers(0, classes, count)))


def slow_yolo(raw, targets: Targets, anchors, size, rules: YoloRules) -> float:
    "Cell by cell, in plain numbers."
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    bce = lambda v, t: -(t * np.log(sigmoid(v)) + (1 - t) * np.log(1 - sigmoid(v)))
    b, channels, h, w = raw.shape
    a = len(anchors)
    classes = channels // a - 5
    x = raw.reshape(b, a, 5 + classes, h, w)
    jobs, spared = {}, set()
    for image, (cx, cy, bw, bh), kind in zip(targets.image.tolist(), targets.boxes.tolist(), targets.classes.tolist()):
        gx, gy, gw, gh = cx * w / size, cy * h / size, bw * w / size, bh * h / size
        column, row = min(int(gx), w - 1), min(int(gy), h - 1)
        ious = []
        for aw, ah in anchors:
            aw, ah = aw * w / size, ah * h / size
            both = (min(gw, aw) + rules.side) * (min(gh, ah) + rules.side)
            ious.append(both / ((gw + rules.side) * (gh + rules.side) + (aw + rules.side) * (ah + rules.side) - both))
        best = int(np.argmax(ious))
        cell = (image, best, row, column)
        told = jobs.setdefault(cell, {"kinds": set()})
        told["kinds"].add(kind)
        told["place"] = (gx - column, gy - row, np.log(bw / anchors[best][0]), np.log(bh / anchors[best][1]))
        spared |= {(image, k, row, column) for k, iou in enumerate(ious) if iou > rules.ignore}
    total = 0.0
    for cell in np.ndindex(b, a, h, w):
        image, k, row, column = cell
        v = x[image, k, :, row, column]
        if cell in jobs:
            tx, ty, tw, th = jobs[cell]["place"]
            total += 2.5 * (bce(v[0], tx) + bce(v[1], ty) + (v[2] - tw) ** 2 + (v[3] - th) ** 2) + bce(v[4], 1)
            if classes > 1 or rules.one_class:
                total += sum(bce(v[5 + c], c in jobs[cell]["kinds"]) for c in range(classes)) / classes
        if cell not in spared and (rules.both_ways or cell not in jobs):
            total += 0.5 * bce(v[4], 0)
    return total / (b * a * h * w)


@pytest.mark.parametrize("name", _YOLO_RULES)
@PROPERTY
@given(SEEDS, st.integers(0, 14), st.sampled_from([1, 3]))
def test_yolo_loss_is_the_slow_loop(name, seed, count, classes):
    rng = np.random.default_rng(seed)
    anchors, raw = torch.tensor(rng.uniform(4, 40, (3, 2))), torch.tensor(rng.normal(size=(3, 3 * (5 + classes), 4, 6)))
    targets = some_targets(rng, count, classes=classes)
    loss = detect._scale_loss(raw, targets, anchors, 64, _YOLO_RULES[name])
    np.testing.assert_allclose(float(loss.total), slow_yolo(raw.numpy(), targets, anchors.tolist(), 64, _YOLO_RULES[name]), rtol=1e-9)


def test_only_the_responsible_cell_is_pulled():
    rng = np.random.default_rng(0)
    raw = torch.zeros(2, 3 * 7, 4, 4, dtype=torch.float64, requires_grad=True)
    targets, anchors = Targets(torch.tensor([1]), torch.tensor([[20.0, 40, 10, 12]]).double(), torch.tensor([1])), torch.tensor(rng.uniform(4, 40, (3, 2)))
    gradient, = torch.autograd.grad(detect._scale_loss(raw, targets, anchors, 64).total, raw)
    gradient = gradient.view(2, 3, 7, 4, 4)
    role = detect.assign(targets, anchors, (2, 3, 4, 4, 2), 64)
    assert ((gradient[:, :, :4].abs().sum(2) > 0) <= role.positive).all() and role.positive.sum() == 1
    present = gradient[:, :, 4]
    assert (present[role.positive] < 0).all() and (present[role.background] > 0).all()
    assert (present[~role.positive & ~role.background] == 0).all()


def test_the_later_box_sets_the_place_and_both_their_class():
    targets = Targets(torch.tensor([0, 0]), torch.tensor([[20.0, 20, 10, 10], [22, 22, 10, 10]]), torch.tensor([0, 2]))
    role = detect.assign(targets, torch.tensor([[10.0, 10]]), (1, 1, 2, 2, 3), 64)
    assert role.labels[role.positive].tolist() == [[1, 0, 1]] and torch.allclose(role.offsets[role.positive][0, :2], torch.tensor([22 / 32] * 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [-6e4, 6e4])
def test_yolo_loss_in_half_precision(dtype, value):
    targets, anchors = some_targets(np.random.default_rng(1), 6), detect._anchor_boxes(size=64)
    raws = [torch.full((3, 24, cells, cells), value, dtype=dtype, requires_grad=True) for cells in (2, 4, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = detect.yolo_loss(raws, targets, anchors, 64)
    assert loss.total.isfinite() and loss.total.dtype == torch.float32
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss.total, raws))
    assert len(detect._detect(raws, anchors, 64)) >= 0       # boxes are finite, or Boxes would complain


def slow_suppress(predictions, objectness, overlap, side):
    kept = []
    for image, rows in enumerate(predictions.tolist()):
        for kind in range(len(rows[0]) - 5 if rows else 0):
            mine = [k for k, r in enumerate(rows) if r[4] >= objectness and int(np.argmax(r[5:])) == kind]
            corner = lambda k: [rows[k][0] - rows[k][2] / 2, rows[k][1] - rows[k][3] / 2, rows[k][0] + rows[k][2] / 2, rows[k][1] + rows[k][3] / 2]
            mine.sort(key=lambda k: -rows[k][4])
            while mine:
                kept.append((image, mine[0], kind))
                mine = [k for k in mine[1:] if slow_iou(corner(k), corner(kept[-1][1]), side) < overlap]
    return kept


@PROPERTY
@given(SEEDS, st.integers(0, 30), st.sampled_from([0.0, 1.0]))
def test_suppression_is_the_slow_loop(seed, count, side):
    rng = np.random.default_rng(seed)
    predictions = torch.tensor(np.concatenate([rng.uniform(-20, 30, (3, count, 2)), rng.uniform(2, 25, (3, count, 2)), rng.random((3, count, 3))], -1))
    kept = torch.stack(detect.suppress(predictions, 0.3, 0.4, side), 1)
    assert [tuple(row) for row in kept.tolist()] == slow_suppress(predictions, 0.3, 0.4, side)
    fine = torch.tensor([[[5.0, 5, 10, 10, 0.9, 1], [5, 2.5, 10, 5, 0.8, 1]]])      # an overlap of exactly one half is too much
    assert len(detect.suppress(fine, overlap=0.5)[0]) == 1 and len(detect.suppress(fine, overlap=0.5 + 1e-9)[0]) == 2


def test_detections_are_numbered_by_their_split():
    torch.manual_seed(0)
    raws, anchors = [torch.randn(2, 18, cells, cells) for cells in (2, 4, 8)], detect._anchor_boxes(size=64)
    boxes, later = (detect._detect(raws, anchors, 64, first) for first in (0, 10))
    assert set(boxes.image) == {0, 1} and (later.image == boxes.image + 10).all() and (later.corners == boxes.corners).all()


def test_anchors():
    assert torch.allclose(detect._anchor_boxes() * 416 / 224, torch.tensor(detect._COCO_ANCHORS).float())
    typo, mended = detect._anchor_boxes("lovt"), detect._anchor_boxes("lovt-corrected")
    assert (typo != mended).sum() == 1 and torch.isclose(typo[0, 0, 0] - mended[0, 0, 0], torch.tensor(2.0))
    with pytest.raises(ValueError, match="coco"):
        detect._anchor_boxes("coca")
    with pytest.raises(ValueError, match="16 channels for 3 anchors"):
        detect._decode_boxes(torch.zeros(1, 16, 2, 2), torch.ones(3, 2), 64)


# ---------------------------------------------------------------- segmentation losses

@PROPERTY
@given(SEEDS, st.integers(1, 4), st.integers(1, 3))
def test_segmentation_losses_pixel_by_pixel(seed, images, classes):
    rng = np.random.default_rng(seed)
    logits, target = rng.normal(0, 3, (images, classes, 3, 4)), rng.random((images, classes, 3, 4)) * rng.integers(0, 2, (1, classes, 1, 1))
    x, t = torch.tensor(logits), torch.tensor(target)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    pt, ps, ts, focal = np.zeros(classes), np.zeros(classes), np.zeros(classes), []
    for at in np.ndindex(logits.shape):
        p, y = sigmoid(logits[at]), target[at]
        pt[at[1]] += p * y
        ps[at[1]] += p
        ts[at[1]] += y
        focal.append(sigmoid(-logits[at] * (2 * y - 1)) ** 2 * -(y * np.log(p) + (1 - y) * np.log(1 - p)))
    joint = 1 - 2 * pt.sum() / (ps.sum() + ts.sum()) if ts.sum() else 0
    each = [1 - 2 * pt[c] / (ps[c] + ts[c]) if ts[c] else 0 for c in range(classes)]
    np.testing.assert_allclose(float(segment.dice_loss(x, t)), joint, atol=1e-12)
    np.testing.assert_allclose(float(segment.dice_loss(x, t, per_class=True)), np.mean(each), atol=1e-12)
    wanted = 10 * np.mean(focal) - np.log((2 * pt.sum() + 1) / (ps.sum() + ts.sum() + 1))
    np.testing.assert_allclose(float(segment.mixed_loss(x, t).total), wanted, rtol=1e-10)
    order = rng.permutation(images)
    assert np.isclose(float(segment.mixed_loss(x[order], t[order]).total), wanted)


def test_hard_masks_give_torchvisions_focal_loss():
    torch.manual_seed(0)
    x, t = torch.randn(50).double(), (torch.rand(50) < 0.3).double()
    assert torch.isclose(segment._focal_loss(x, t, 3), sigmoid_focal_loss(x, t, alpha=-1, gamma=3, reduction="mean"))
    assert not torch.isclose(segment._focal_loss(x, 0.8 * t), sigmoid_focal_loss(x, 0.8 * t, alpha=-1, gamma=2, reduction="mean"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [-6e4, 0.0, 6e4])
def test_segmentation_losses_stay_finite(dtype, value):
    for target in (torch.zeros(2, 1, 32, 32), torch.ones(2, 1, 32, 32)):
        x = torch.full(target.shape, value, dtype=dtype, requires_grad=True)
        for loss in (segment.dice_loss(x, target), segment.dice_loss(x, target, per_class=True), segment.mixed_loss(x, target).total):
            assert loss.dtype == torch.float32 and loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_autocast_changes_nothing():
    torch.manual_seed(0)
    x, t = torch.randn(2, 1, 32, 32), (torch.rand(2, 1, 32, 32) < 0.1).float()
    plain = segment.dice_loss(x, t), segment.mixed_loss(x, t).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, wanted in zip((segment.dice_loss(x, t), segment.mixed_loss(x, t).total), plain):
            assert torch.equal(found, wanted)
    half = x.half().requires_grad_()
    torch.testing.assert_close(segment.dice_loss(half, t), segment.dice_loss(half.float(), t))


# ---------------------------------------------------------------- contrast, and pointing without looking

def slow_upsample(scores, h, w, height, width):
    "Bilinear, pixel by pixel, scores at region centres, edges held."
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            r, c = np.clip((y + 0.5) * h / height - 0.5, 0, h - 1), np.clip((x + 0.5) * w / width - 0.5, 0, w - 1)
            r0, c0 = min(int(r), max(h - 2, 0)), min(int(c), max(w - 2, 0))
            r1, c1, a, b = min(r0 + 1, h - 1), min(c0 + 1, w - 1), r - r0, c - c0
            m = scores.reshape(h, w)
            out[y, x] = (1 - a) * ((1 - b) * m[r0, c0] + b * m[r0, c1]) + a * ((1 - b) * m[r1, c0] + b * m[r1, c1])
    return out


@PROPERTY
@given(SEEDS, st.sampled_from([(2, 3), (1, 4), (5, 2), (4, 4)]), st.sampled_from([(7, 9), (8, 8)]))
def test_contrast_is_the_slow_one(seed, grid, size):
    rng = np.random.default_rng(seed)
    scores, masks = rng.normal(size=(3, grid[0] * grid[1])), rng.random((3, *size)) < 0.4
    wanted = []
    for score, mask in zip(scores, masks):
        drawn = slow_upsample(score, *grid, *size)
        inside, outside = [v for v, m in zip(drawn.flat, mask.flat) if m], [v for v, m in zip(drawn.flat, mask.flat) if not m]
        wanted.append((np.mean(inside) - np.mean(outside)) / np.sqrt(np.var(inside) + np.var(outside)))
    found = ground.contrast_to_noise(scores, masks, grid)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    np.testing.assert_allclose(ground.contrast_to_noise(3 * scores + 7, masks, grid), wanted, rtol=1e-7)
    np.testing.assert_allclose(ground.contrast_to_noise(-scores, masks, grid), -found, rtol=1e-9)
    np.testing.assert_allclose(ground.contrast_to_noise(scores, ~masks, grid), -found, rtol=1e-9)


def test_contrast_of_flat_maps_and_whole_masks():
    mask = np.zeros((1, 6, 6), bool)
    mask[0, :2] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for level in (0.0, 0.1, 1 / 3, -7e5):
            assert ground.contrast_to_noise(np.full((1, 9), level), mask, (3, 3))[0] == 0
        for whole in (np.ones_like(mask), np.zeros_like(mask)):
            assert np.isnan(ground.contrast_to_noise(np.full((1, 9), 0.1), whole, (3, 3))[0])
    with pytest.raises(ValueError, match="not numbers"):
        ground.contrast_to_noise(np.full((1, 9), np.nan), mask, (3, 3))


@PROPERTY
@given(SEEDS, st.integers(1, 12))
def test_no_fixed_point_is_better(seed, count):
    rng = np.random.default_rng(seed)
    cells, kinds = rng.random((count, 6)) < 0.3, rng.integers(0, 3, count)
    best = ground._best_fixed_point(cells, kinds)
    tried = [np.mean([cells[k, choice[kind]] for k, kind in enumerate(kinds)]) for choice in np.ndindex(6, 6, 6)]
    assert np.isclose(best, max(tried)) and ground._best_fixed_point(cells, np.zeros(count)) <= best + 1e-12


def test_table_of_pointing_sums_up_its_rows():
    rng = np.random.default_rng(0)
    n = 60
    table = pd.DataFrame({"patient": rng.integers(0, 9, n), "grain": rng.choice(["word", "sentence"], n), "finding": rng.choice(["Edema", "Nodule"], n),
                          "side": rng.choice(["left", "right"], n), "role": rng.choice(["name", "place"], n), "hit": rng.random(n), "chance": rng.random(n), "cnr": rng.normal(size=n), **{name: rng.random(n) for name in ("miou", "dice", "best_dice")}})
    table.loc[3, "cnr"] = np.nan
    found = ground.PhantomPointing(table, rng.random((n, 4)) < 0.5)
    for grain in ground._GRAINS:
        rows = found.by_finding(grain=grain).set_index("finding")
        for finding in ("Edema", "Nodule", "all"):
            t = table[(table["grain"] == grain) & (table["role"] == "name") & ((table["finding"] == finding) | (finding == "all"))]
            row = rows.loc[finding]
            np.testing.assert_allclose(row[["hit_rate", "chance", "cnr", "absolute_cnr"]].astype(float), [t["hit"].mean(), t["chance"].mean(), t["cnr"].mean(), t["cnr"].abs().mean()])
            np.testing.assert_allclose(row[["miou", "dice", "best_dice"]].astype(float), t[["miou", "dice", "best_dice"]].mean())
            assert row["targets"] == len(t) and row["low"] <= row["hit_rate"] <= row["high"] and row["cnr_low"] <= row["cnr"] <= row["cnr_high"]
            assert np.isclose(row["best_fixed_point"], ground._best_fixed_point(found.cells[t.index], t["finding"]))
            assert np.isclose(row["best_fixed_side"], ground._best_fixed_point(found.cells[t.index], t["finding"] + t["side"]))


def test_words_and_sentences_have_maps_of_their_own():
    rng = np.random.default_rng(0)
    told = Correspondence(torch.tensor(rng.normal(size=(2, 6, 4))), torch.tensor(rng.normal(size=(2, 6, 3))),
                          torch.tensor([[True] * 4, [True] * 2 + [False] * 2]), torch.tensor([[True] * 3, [True, False, False]]), (2, 3))
    masks, targets = rng.random((20, 8, 9)) < 0.4, []
    for mask, (item, word, sentence) in zip(masks, [(7, 3, 1), (7, None, 2), (9, 1, 0), (9, 2, 0), (9, None, 0), (9, None, 1), (7, 4, 0), (7, None, 3)]):
        targets.append(ground.Target(item, word, sentence, "text", "Edema", "left", "none", "name", mask))
    table, cells = ground._target_rows(told, targets, {7: 0, 9: 1}, {7: 70, 9: 90})
    kept = [(7, "word", 3), (7, "sentence", 2), (9, "word", 1), (9, "sentence", 0)]        # the others are padding or beyond it
    assert list(zip(table["item"], table["grain"], table["position"])) == kept and table["patient"].tolist() == [70, 70, 90, 90]
    maps = np.stack([getattr(told, grain + "s")[{7: 0, 9: 1}[item], :, at].numpy() for item, grain, at in kept])
    hits, chance = ground.pointing_hits(maps, masks[[0, 1, 2, 4]], (2, 3))
    for name, wanted in (("hit", hits), ("chance", chance), ("cnr", ground.contrast_to_noise(maps, masks[[0, 1, 2, 4]], (2, 3)))):
        np.testing.assert_allclose(table[name], wanted, rtol=1e-4)
    np.testing.assert_array_equal(cells, ground.on_target(masks[[0, 1, 2, 4]], (2, 3)))


def test_a_sentence_has_the_best_role_of_its_words():
    sentence = "Opacity at the left lower lobe, or the right"
    spans = [(0, (at := sentence.index(word)), at + len(word)) for word in ("Opacity", "lower", "right")]
    finding = lambda side: SimpleNamespace(name="Lung Opacity", side=side, zone="lower", mask=np.ones((4, 4), bool))
    study = SimpleNamespace(findings=[finding("left"), finding("right")],
                            sentences=[SimpleNamespace(text=sentence, words=[(a, b, about) for (_, a, b), about in zip(spans, (0, 0, 1))])])
    report = SimpleNamespace(sentences=[sentence], word_spans=spans, words=[sentence[a:b] for _, a, b in spans])
    told = ground._phantom_report_targets(3, report, study, lambda mask: mask)
    assert [(t.position, t.side, t.role) for t in told if t.grain == "word"] == [(0, "left", "name"), (1, "left", "place"), (2, "right", "place")]
    assert [(t.position, t.side, t.role) for t in told if t.grain == "sentence"] == [(0, "left", "name"), (0, "right", "place")]


def test_released_rules_are_what_they_say():
    assert MAP_RULES["coco"] == MapRules() and MAP_RULES["coco"].limit == 100
    assert MAP_RULES["lovt"] == MapRules(side=1, strict=True, limit=None, absent=0)
    assert _YOLO_RULES["corrected"] == YoloRules()
    assert replace(MAP_RULES["mgca"], recall="float64", points="float64") == MapRules(skip_empty=True)
    assert _YOLO_RULES["mgca"] == replace(_YOLO_RULES["lovt"], one_class=True)
