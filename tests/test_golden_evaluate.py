"""Losses, boxes and metrics of the evaluation against numbers that the published code of LoVT and MGCA computed (`golden/`)."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import golden, leaves, same, same_gradients
from torchvision.ops import box_convert

from medvis.evaluate.detect import _YOLO_RULES, Targets, assign, _decode_boxes, _detect, _scale_loss, suppress
from medvis.evaluate.metrics import (
    MAP_RULES, Boxes, _average_precisions, count_pixels, _dice_of_batches, _dice_of_images, dice_pooled, dice_table, froc, mean_ap)
from medvis.evaluate.segment import dice_loss, _focal_loss, mixed_loss, _soft_dice

SINGLE = dict(rtol=1e-6, atol=1e-7)   # the published code rounds to single precision somewhere


def cases(name: str, ending: str) -> list[str]:
    return sorted(key.removesuffix(ending) for key in golden(name) if key.endswith(ending))


def near(found, wanted, **tolerance) -> None:
    same(torch.tensor(np.array(found)), wanted, **tolerance)


def boxes(g: dict, name: str) -> Boxes:
    "Boxes that are stored as x, y, w, h."
    corners = box_convert(g[f"{name}_boxes"].reshape(-1, 4), "xywh", "xyxy")
    return Boxes(g[f"{name}_image"], corners, g.get(f"{name}_classes"), g.get(f"{name}_scores"))


# ---------------------------------------------------------------- the YOLO loss

def yolo_targets(g: dict, case: str) -> Targets:
    if f"{case}_labels" in g:
        return Targets.of(g[f"{case}_labels"], int(g["img_size"]))
    return Targets(g[f"{case}_gt_image"], box_convert(g[f"{case}_gt_boxes"], "xywh", "cxcywh"), g[f"{case}_gt_classes"])


@pytest.mark.parametrize("case", ["one", "multi"])
@pytest.mark.parametrize("system", ["lovt", "mgca"])
def test_yolo_loss(system, case):
    g = golden(f"{system}_yolo_loss")
    raw, = leaves(g, f"{case}_raw")
    size, anchors, rules, targets = int(g["img_size"]), g[f"{case}_anchors"], _YOLO_RULES[system], yolo_targets(g, case)
    exact = SINGLE if raw.dtype == torch.float32 else {}
    loss = _scale_loss(raw, targets, anchors, size, rules)
    same(loss.total, g[f"{case}_loss"], **exact)
    same(sum(loss.parts.values()), g[f"{case}_loss"], **exact)
    for part in "xywh":
        same(loss.parts[part] / rules.place, g[f"{case}_l_{part}"], **exact)
    same(loss.parts["present"] + loss.parts["absent"], g[f"{case}_l_conf"], **exact)
    same(loss.parts["class"], g[f"{case}_l_cls"], **exact)
    same_gradients(loss.total, [raw], [g[f"{case}_grad"]], **({"rtol": 1e-5, "atol": 1e-8} if exact else {}))
    same(_decode_boxes(raw, anchors, size), g[f"{case}_pred"], rtol=1e-6, atol=3e-4)   # published in float32, boxes of hundreds of pixels
    if f"{case}_obj_mask" in g:
        a = len(anchors)
        shape = (len(raw), a, *raw.shape[2:], raw.shape[1] // a - 5)
        role = assign(targets, anchors, shape, size, rules)
        same(role.positive, g[f"{case}_obj_mask"])
        same(role.background, g[f"{case}_noobj_mask"])


# ---------------------------------------------------------------- non-maximum suppression

@pytest.mark.parametrize("case", ["one", "multi"])
def test_suppression(case):
    g = golden("lovt_nms")
    predictions = g[f"{case}_pred"]
    image, row, kind = suppress(predictions, float(g["conf_thres"]), float(g["nms_thres"]), side=1)
    kept = predictions[image, row]
    assert torch.equal(image, g[f"{case}_image"]) and torch.equal(kind, g[f"{case}_classes"])
    same(box_convert(kept[:, :4], "cxcywh", "xywh"), g[f"{case}_boxes"])
    same(kept[:, 4], g[f"{case}_conf"])
    confidence = kept[:, 5:].amax(1) if kept.shape[1] > 6 else torch.ones(len(kept))   # of one class LoVT says 1
    same(confidence, g[f"{case}_cls_conf"], **SINGLE)


# ---------------------------------------------------------------- mean average precision

@pytest.mark.parametrize("case", ["one", "multi"])
def test_lovt_map(case):
    g = golden("metrics_map")
    found, truth, classes = boxes(g, f"{case}_pred"), boxes(g, f"{case}_gt"), int(g[f"{case}_n_classes"])
    thresholds = g["iou_thresholds"].tolist()
    ap = _average_precisions(found, truth, thresholds, classes, MAP_RULES["lovt"])
    near(ap, g[f"{case}_ap"], **SINGLE)
    near(ap.mean(axis=0), g[f"{case}_class_mAP"], **SINGLE)
    for percent in (50, 75):
        near(ap[np.isclose(ap.index, percent / 100)].to_numpy().mean(), g[f"{case}_mAP{percent}"], **SINGLE)
    near(mean_ap(found, truth, thresholds, classes, MAP_RULES["lovt"]), g[f"{case}_mAP"], **SINGLE)
    near(mean_ap(found, truth, thresholds, classes), g[f"{case}_standard_map_f64grid"], **SINGLE)
    newer = replace(MAP_RULES["coco"], points="float32")
    near(mean_ap(found, truth, thresholds, classes, newer), g[f"{case}_standard_map"], **SINGLE)


@pytest.mark.parametrize("ending, precision", [("", ("float32", "float32")), ("_newer", ("float64", "float32")), ("_f64grid", ("float64", "float64"))])
@pytest.mark.parametrize("counted", ["released", "standard"])
def test_mgca_map(counted, ending, precision):
    g = golden("mgca_map_convention")
    found, truth, recall = boxes_of_mgca(g), Targets.of(g["labels"], size_of_mgca(g)).corners(), dict(zip(("recall", "points"), precision))
    rules = replace(MAP_RULES["mgca"], skip_empty=counted == "released", **recall)
    near(mean_ap(found, truth, g["iou_thresholds"].tolist(), rules=rules), g[f"{counted}_map{ending}"], **SINGLE)


def size_of_mgca(g: dict) -> int:
    "Side of the image: the coarsest grid has a stride of 32."
    return 32 * g["raw0"].shape[-1]


def boxes_of_mgca(g: dict) -> Boxes:
    raws = [g[f"raw{scale}"] for scale in range(len(g["anchors"]))]
    return _detect(raws, g["anchors"], size_of_mgca(g), objectness=float(g["conf_thres"]), overlap=float(g["nms_thres"]), side=1)


def test_mgca_detections_and_counted_images():
    g = golden("mgca_map_convention")
    found, truth = boxes_of_mgca(g), Targets.of(g["labels"], size_of_mgca(g)).corners()
    assert found.image.tolist() == g["pred_image"].tolist() and truth.image.tolist() == g["gt_image"].tolist()
    near(found.corners, g["pred_boxes"], rtol=1e-6, atol=5e-5)
    near(found.scores, g["pred_scores"], **SINGLE)
    near(truth.corners, g["gt_boxes"], rtol=1e-6, atol=5e-5)
    assert np.intersect1d(found.image, truth.image).tolist() == g["counted_images"].tolist()
    assert MAP_RULES["mgca"].skip_empty and MAP_RULES["mgca"].recall == MAP_RULES["mgca"].points == "float32"


# ---------------------------------------------------------------- FROC

@pytest.mark.parametrize("case", cases("metrics_froc", "_froc"))
def test_froc(case):
    g = golden("metrics_froc")
    found, truth, images, points = boxes(g, f"{case}_pred"), boxes(g, f"{case}_gt"), int(g[f"{case}_n_images"]), tuple(g["fps"].tolist())
    recorded, textbook = (froc(found, truth, images, points, recorded=switch) for switch in (True, False))
    near(recorded.score, g[f"{case}_froc"], **SINGLE)
    near(recorded.sensitivity, g[f"{case}_sensitivity"], **SINGLE)
    assert recorded.false_positives == int(g[f"{case}_n_fp_seen"])
    near(textbook.sensitivity, g[f"{case}_standard_sensitivity"], **SINGLE)
    assert np.isclose(textbook.score, g[f"{case}_standard_sensitivity"].mean())


# ---------------------------------------------------------------- segmentation

@pytest.mark.parametrize("case", cases("metrics_smp_dice", "_loss"))
def test_dice_loss(case):
    g = golden("metrics_smp_dice")
    logits, = leaves(g, f"{case}_logits")
    loss = dice_loss(logits, g[f"{case}_target"])
    same(loss, g[f"{case}_loss"])
    same_gradients(loss, [logits], [g[f"{case}_grad"]])


@pytest.mark.parametrize("case", cases("mgca_mixed_loss", "_loss"))
def test_mixed_loss(case):
    g = golden("mgca_mixed_loss")
    logits, = leaves(g, f"{case}_logits")
    target, alpha, gamma, smooth = g[f"{case}_target"], float(g["alpha"]), float(g["gamma"]), float(g["smooth"])
    loss = mixed_loss(logits, target, alpha, gamma, smooth)
    same(loss.total, g[f"{case}_loss"], atol=1e-10)
    same(_focal_loss(logits, target, gamma), g[f"{case}_focal"], atol=1e-10)
    same(_soft_dice(logits, target, smooth), g[f"{case}_dice"], atol=1e-10)
    same_gradients(loss.total, [logits], [g[f"{case}_grad"]], rtol=1e-8, atol=1e-10)
    same(mixed_loss(logits, target).total, g[f"{case}_loss"], atol=1e-10)   # the defaults are MGCA's


def test_dice_metrics():
    g = golden("metrics_dice")
    counts = count_pixels(g["prob"], g["truth"], float(g["threshold"]))
    near(_dice_of_images(counts), g["standard_per_image"], **SINGLE)
    near(_dice_of_batches(counts, g["batch"]), g["batch_dice"], **SINGLE)
    near(dice_pooled(counts), g["micro_dice"], **SINGLE)
    table = dice_table(counts, g["batch"]).set_index("reported_by")["value"]
    for who, name in (("LoVT", "micro_dice"), ("MGCA", "epoch_dice"), ("usual", "standard_mean_per_image")):
        near(table[who], g[name], **SINGLE)
