"""Classification metrics against slow oracles, scikit-learn and torchmetrics, on random and on degenerate input; nothing may even warn."""
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from medvis.evaluate import metrics
from medvis.evaluate.metrics import _binary_metrics, _calibration_error, classification_table

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
ROWS = st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, 1, 0, 1, np.nan])), max_size=12)


def values(table: pd.DataFrame) -> pd.Series:
    return table.set_index(["name", "of"])["value"]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---------------------------------------------------------------- one finding

def slow_binary(scores, labels):
    "The eight numbers from loops over images and thresholds."
    rows = [(s, y) for s, y in zip(scores, labels) if y in (0, 1)]
    up, down = [s for s, y in rows if y], [s for s, y in rows if not y]
    pairs = [(a > b) + (a == b) / 2 for a in up for b in down]
    found = {t: [y for s, y in rows if s >= t] for t in sorted({s for s, _ in rows}, reverse=True)}
    precision, last = 0.0, 0
    for got in found.values():
        precision, last = precision + (sum(got) - last) * sum(got) / len(got), sum(got)
    yes = [y for s, y in rows if s > 0.5]
    f1 = lambda got: 2 * sum(got) / (len(got) + len(up))
    bins = {}
    for s, y in rows:
        bins.setdefault(max(1, int(np.ceil(s * 15))), []).append((s, y))
    right = [(s > 0.5) == (y == 1) for s, y in rows]
    none = np.nan
    return [
        np.mean(pairs) if pairs else none, precision / len(up) if up else none, np.mean(right) if rows else none,
        (np.mean([s > 0.5 for s in up]) + np.mean([s <= 0.5 for s in down])) / 2 if pairs else none,
        f1(yes) if up else none, max(map(f1, found.values())) if up else none,
        sum(abs(sum(s - y for s, y in of)) for of in bins.values()) / len(rows) if rows else none,
        np.mean([(s - y) ** 2 for s, y in rows]) if rows else none]


@PROPERTY
@given(ROWS, st.integers(0, 10**6))
def test_one_finding_is_the_slow_loop(rows, seed):
    scores, labels = np.array([s / 6 for s, _ in rows]), np.array([y for _, y in rows], dtype=float)
    found = _binary_metrics(scores, labels)["value"]
    np.testing.assert_allclose(found, slow_binary(scores, labels), atol=1e-12)
    order = np.random.default_rng(seed).permutation(len(rows))
    np.testing.assert_allclose(_binary_metrics(scores[order], labels[order])["value"], found, atol=1e-12)
    squashed = _binary_metrics(np.tanh(scores - 3), labels)["value"]
    np.testing.assert_allclose(squashed[["AUROC", "average precision"]], found[["AUROC", "average precision"]], atol=1e-12)


@PROPERTY
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=12))
def test_chance_is_what_a_constant_gets(labels):
    labels, share = np.array(labels), np.mean(labels)
    table = _binary_metrics(np.full(len(labels), share), labels)
    for name in ("AUROC", "average precision", "Brier score", "expected calibration error", "F1, best threshold in hindsight"):
        value, chance = table.loc[name]
        assert np.isnan(value) or np.isclose(value, chance), name
    yes, no = (_binary_metrics(np.full(len(labels), constant), labels)["value"] for constant in (1.0, 0.0))
    assert np.isclose(max(yes["accuracy"], no["accuracy"]), table.loc["accuracy", "chance"])
    assert share == 0 or np.isclose(yes["F1"], table.loc["F1", "chance"])


def test_calibration_is_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    import torch
    draw = np.random.default_rng(0)
    for n in (1, 7, 400):
        p, y = draw.random(n), draw.integers(0, 2, n)
        for bins in (1, 5, 15):
            expected = torchmetrics.binary_calibration_error(torch.tensor(p), torch.tensor(y), n_bins=bins)
            np.testing.assert_allclose(_calibration_error(p, y, bins), expected, atol=1e-6)


def test_a_calibrated_forecaster_is_calibrated():
    draw = np.random.default_rng(1)
    p = draw.random(40_000)
    y = draw.random(40_000) < p
    assert _calibration_error(p, y) < 0.012 < 0.2 < _calibration_error(p**3, y) + 0.05


# ---------------------------------------------------------------- many findings

def test_many_findings_are_scikit_learns():
    draw = np.random.default_rng(2)
    labels = (draw.random((80, 4)) < [0.5, 0.3, 0.1, 0.6]).astype(float)
    scores = np.round(draw.random((80, 4)) * 0.5 + 0.4 * labels, 2)
    found = values(classification_table(scores, labels, "abcd"))
    for average in ("macro", "micro"):
        assert np.isclose(found["AUROC", average], sk.roc_auc_score(labels, scores, average=average))
        assert np.isclose(found["average precision", average], sk.average_precision_score(labels, scores, average=average))
        assert np.isclose(found["F1", average], sk.f1_score(labels, scores > 0.5, average=average))
    assert np.isclose(found["accuracy", "micro"], np.mean((scores > 0.5) == labels))
    for c, name in enumerate("abcd"):
        assert np.isclose(found["balanced accuracy", name], sk.balanced_accuracy_score(labels[:, c], scores[:, c] > 0.5))
        assert np.isclose(found["Brier score", name], sk.brier_score_loss(labels[:, c], scores[:, c]))
    holes = np.where(draw.random(labels.shape) < 0.3, np.nan, labels)
    table = classification_table(scores, holes, "abcd")
    for c, name in enumerate("abcd"):
        kept = ~np.isnan(holes[:, c])
        assert np.isclose(values(table)["AUROC", name], sk.roc_auc_score(holes[kept, c], scores[kept, c]))
        assert table.query("of == @name")["n"].unique() == [kept.sum()] and table.query("of == @name")["positives"].unique() == [(holes[:, c] == 1).sum()]


def test_absent_findings_count_as_torchmetrics_counts_them():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    import torch
    draw = np.random.default_rng(3)
    scores, labels = draw.random((30, 3)), draw.integers(0, 2, (30, 3))
    for fill in (0, 1):
        labels[:, 1] = fill
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = torchmetrics.multilabel_auroc(torch.tensor(scores), torch.tensor(labels), 3, average="macro")
        found = values(classification_table(scores, labels, "abc"))
        assert np.isclose(found["AUROC", "macro, absent 0"], expected, atol=1e-6)
        assert np.isclose(found["AUROC", "macro"], 1.5 * float(expected), atol=1e-6) and np.isnan(found["AUROC", "b"])


def test_a_diverged_finding_is_not_hidden():
    draw = np.random.default_rng(4)
    scores, labels = draw.random((20, 2)), np.tile([[0, 1], [1, 0]], (10, 1)).astype(float)
    scores[3, 0] = np.nan
    found = values(classification_table(scores, labels, "ab"))
    assert found[:, "a"].isna().all() and found[:, "macro"].isna().all() and found[:, "micro"].isna().all() and found[:, "b"].notna().all()
    labels[3, 0] = np.nan                                                      # the image is not labelled: its score does not matter
    assert values(classification_table(scores, labels, "ab")).notna().all()


# ---------------------------------------------------------------- exclusive classes and grades

def test_classes_are_scikit_learns():
    draw = np.random.default_rng(5)
    truth = draw.integers(0, 4, 90)
    scores = draw.random((90, 4)) + 0.6 * np.eye(4)[truth]
    scores /= scores.sum(1, keepdims=True)
    found = values(classification_table(scores, truth, "abcd", "classes"))
    said = scores.argmax(1)
    assert np.isclose(found["accuracy", "all"], sk.accuracy_score(truth, said)) and found["F1", "micro"] == found["accuracy", "all"]
    assert np.isclose(found["balanced accuracy", "all"], sk.balanced_accuracy_score(truth, said))
    np.testing.assert_allclose(found["F1"][list("abcd")], sk.f1_score(truth, said, average=None))
    assert np.isclose(found["F1", "macro"], sk.f1_score(truth, said, average="macro"))
    assert np.isclose(found["AUROC", "macro"], sk.roc_auc_score(truth, scores, multi_class="ovr"))
    assert np.isclose(found["AUROC", "micro"], sk.roc_auc_score(np.eye(4)[truth], scores, average="micro"))
    assert np.isclose(found["Brier score", "all"], ((scores - np.eye(4)[truth]) ** 2).sum(1).mean())
    few = np.where(truth < 2, truth, -1)                                       # -1: not labelled; two classes never occur
    kept, found = few >= 0, values(classification_table(scores, few, "abcd", "classes"))
    assert np.isclose(found["accuracy", "all"], sk.accuracy_score(truth[kept], said[kept])) and np.isnan(found["AUROC", "c"])
    assert np.isclose(found["F1", "macro"], np.mean(sk.f1_score(truth[kept], said[kept], average=None, labels=[0, 1])))
    assert np.isclose(found["balanced accuracy", "all"], np.mean(sk.recall_score(truth[kept], said[kept], average=None, labels=[0, 1])))


def test_top_calibration_is_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    import torch
    draw = np.random.default_rng(6)
    truth, scores = draw.integers(0, 3, 60), draw.dirichlet(np.ones(3), 60)
    expected = torchmetrics.multiclass_calibration_error(torch.tensor(scores), torch.tensor(truth), 3, n_bins=15)
    assert np.isclose(values(classification_table(scores, truth, "abc", "classes"))["expected calibration error", "all"], expected, atol=1e-6)


def test_grades_are_cut_at_every_place():
    draw = np.random.default_rng(7)
    truth, scores = draw.integers(0, 4, 70), draw.dirichlet(np.ones(4), 70)
    table = classification_table(scores, truth, ["none", "congestion", "interstitial", "alveolar"], "ordinal")
    found = values(table)
    cuts = {"0 vs 1-3": 1, "0-1 vs 2-3": 2, "0-2 vs 3": 3}
    for name, cut in cuts.items():
        assert np.isclose(found["AUROC", name], sk.roc_auc_score(truth >= cut, scores[:, cut:].sum(1)))
    assert np.isclose(found["AUROC", "macro"], np.mean([found["AUROC", name] for name in cuts]))
    said = scores.argmax(1)
    assert np.isclose(found["quadratic kappa", "all"], sk.cohen_kappa_score(truth, said, weights="quadratic"))
    assert np.isclose(found["mean absolute error", "all"], np.abs(truth - said).mean())
    assert np.isclose(found["F1", "macro"], sk.f1_score(truth, said, average="macro"))
    assert (table.query("name == 'AUROC'")["reported_by"] == "local-mi").all()
    constants = [np.abs(truth - grade).mean() for grade in range(4)]
    assert np.isclose(table.set_index(["name", "of"]).loc[("mean absolute error", "all"), "chance"], min(constants))


# ---------------------------------------------------------------- anything at all

@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from(metrics._LABEL_KINDS), st.integers(0, 6), st.integers(1, 4), st.sampled_from(["random", "tied", "nan", "some nan", "inf", "logits"]),
       st.sampled_from(["random", "one", "none"]))
def test_degenerate_input_never_raises_and_never_flatters(seed, kind, n, classes, score, label):
    draw = np.random.default_rng(seed)
    scores = draw.random((n, classes))
    scores = {"tied": np.full_like(scores, 0.5), "nan": np.full_like(scores, np.nan), "some nan": np.where(scores < 0.3, np.nan, scores),
              "inf": np.where(scores < 0.3, np.inf, -np.inf), "logits": 10 * scores - 5}.get(score, scores)
    shape, high = ((n, classes), 2) if kind == "labels" else ((n,), classes)
    labels = {"one": np.zeros(shape), "none": np.full(shape, np.nan)}.get(label, draw.integers(0, high, shape).astype(float))
    table = classification_table(scores, labels, [f"c{c}" for c in range(classes)], kind)
    told = table[~table["name"].isin(["mean absolute error", "Brier score", "quadratic kappa"])]["value"]
    assert told.dropna().between(0, 1).all() and list(table.columns) == ["name", "of", "value", "chance", "n", "positives", "classes", "reported_by"]
    if score == "nan" or label == "none" or n == 0:
        assert table["value"].isna().all()
    if score in ("inf", "logits") and kind != "ordinal" and n and label != "none" and (np.abs(scores) > 1).all():
        assert table[table["name"].isin(["expected calibration error", "Brier score"])]["value"].isna().all()


def test_wrong_shapes_are_refused():
    good = np.zeros((5, 2))
    for scores, labels, kind, told in ((good, good[:4], "labels", r"\(5, 2\) and \(4, 2\)"), (good, good, "classes", r"for each row; got \(5, 2\) and \(5, 2\)"),
                                       (good[:, 0], np.zeros(5), "ordinal", r"\(n, 2\)"), (good, good, "masks", "labels, classes, ordinal")):
        with pytest.raises(ValueError, match=told):
            classification_table(scores, labels, "ab", kind)
