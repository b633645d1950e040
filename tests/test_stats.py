"""Statistics over seeds and patients against oracles written differently: loops, enumeration, scipy."""
import inspect
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from medvis.evaluate import stats
from medvis.evaluate.metrics import Boxes, PixelCounts, dice_pooled, mean_ap
from medvis.evaluate.classify import linear_probe, paired_gain, probe_table
from medvis.evaluate.stats import auroc, bootstrap, bootstrap_auroc, bootstrap_mean, compare, compare_predictions, _corrected, interval, _paired_test, resample, _seed_interval

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
P_VALUES = st.lists(st.one_of(st.sampled_from([0.0, 0.01, 0.05, 1.0]), st.floats(0, 1), st.just(np.nan)), max_size=12)
GAPS = st.lists(st.integers(-4, 4), min_size=2, max_size=8)


# ---------------------------------------------------------------- patients

def test_bootstrap_calls_the_metric_with_whole_patients():
    groups, seen = np.array(list("abacbb")), []
    bootstrap(lambda rows: seen.append(rows) or 0.0, groups, resamples=40, seed=3)
    weights = resample(groups, 40, seed=3)
    assert seen[0].tolist() == list(range(6)) and len(seen) == 41
    for rows, weight in zip(seen, weights):
        assert np.bincount(rows, minlength=6).tolist() == weight.tolist()
        for patient in "abc":
            assert len({int((rows == row).sum()) for row in np.flatnonzero(groups == patient)}) == 1


def test_bootstrap_is_the_weighted_one():
    draw = np.random.default_rng(0)
    labels, patients = draw.integers(0, 2, 40), draw.integers(0, 15, 40)
    scores = np.round(draw.normal(size=40) + labels, 1)
    slow = bootstrap(lambda rows: auroc(scores[rows], labels[rows]), patients, 60, seed=5)
    np.testing.assert_allclose(slow, auroc(scores, labels, resample(patients, 60, seed=5)), atol=1e-12)


def test_detections_and_masks_can_be_drawn():
    draw = np.random.default_rng(1)
    low = draw.integers(0, 9, (30, 2))
    boxes = [Boxes(draw.integers(0, 6, 30), np.hstack([low, low + draw.integers(1, 9, (30, 2))]), draw.integers(0, 2, 30), draw.random(30)) for _ in range(2)]
    counts = PixelCounts(*(draw.integers(0, 5, (6, 2)) + add for add in (0, 5, 5)), 20)
    for images in ([3, 3, 0], [5], [], [4, 1, 1, 1, 2]):
        drawn = [one.draw(images) for one in boxes]
        by_hand = [pd.concat([one.table().query("image == @image").assign(image=at) for at, image in enumerate(images)] or [one.table()[:0]]) for one in boxes]
        for one, slow in zip(drawn, by_hand):
            pd.testing.assert_frame_equal(one.table(), slow.reset_index(drop=True), check_dtype=False)
        if images:
            np.testing.assert_allclose(mean_ap(*drawn), mean_ap(*map(Boxes.of, by_hand)))
            np.testing.assert_allclose(dice_pooled(counts[images]), dice_pooled(PixelCounts(counts.both[images], counts.predicted[images], counts.true[images], 20)))


def test_bootstrap_p_counts_the_far_side():
    assert stats._bootstrap_p([2, 1, 1, 1, -1]) == 2 * 2 / 5 and stats._bootstrap_p([-2, -1, -1, 1, 0]) == 1
    assert stats._bootstrap_p([0.5, np.nan, 1]) == 1 and np.isnan(stats._bootstrap_p([np.nan, 1]))
    draw = np.random.default_rng(0)
    p = [stats._bootstrap_p(bootstrap(lambda rows: x[rows].mean(), np.arange(30), 99, seed)) for seed, x in enumerate(draw.normal(size=(200, 30)))]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.11  # nothing is there


def test_predictions_compared_by_hand():
    draw = np.random.default_rng(2)
    labels, patients = draw.integers(0, 2, 50), draw.integers(0, 20, 50)
    methods = {name: draw.normal(size=50) + skill * labels for name, skill in (("a", 2), ("b", 0), ("c", 1))}
    told, metric = {name: np.stack([scores, labels], 1) for name, scores in methods.items()}, lambda told: auroc(*told.T)
    table = compare_predictions(told, patients, metric, "b", resamples=99, seed=4, correction="none").set_index("method")
    weights = resample(patients, 99, seed=4)
    for name, scores in methods.items():
        draws = auroc(scores, labels, weights)
        np.testing.assert_allclose(table.loc[name, ["value", "low", "high"]].tolist(), interval(draws))
        if name != "b":
            gain = draws - auroc(methods["b"], labels, weights)
            np.testing.assert_allclose(table.loc[name, ["gain", "gain_low", "gain_high"]].tolist(), interval(gain))
            far = min((gain[1:] <= 0).sum(), (gain[1:] >= 0).sum())
            assert np.isclose(table.loc[name, "p"], min(1, 2 * (far + 1) / 100)) and table.loc[name, "p_corrected"] == table.loc[name, "p"]
    assert table.loc["b", ["gain", "p"]].isna().all() and (table["groups"] == len(set(patients))).all() and (table["n"] == 50).all()
    one = compare_predictions(told, np.zeros(50), metric, "b", resamples=9)
    assert one["p"].isna().all(), "one patient cannot tell"
    for wrong in (dict(baseline="z"), dict(groups=patients[:9]), dict(predictions={**told, "d": np.zeros((3, 2))})):
        with pytest.raises(ValueError, match="the same (50|9) rows"):
            compare_predictions(**{"predictions": told, "groups": patients, "metric": metric, "baseline": "b", **wrong})


# ---------------------------------------------------------------- seeds

@PROPERTY
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.sampled_from([0.8, 0.95]))
def test_intervals_over_seeds(values, level):
    found = _seed_interval(values, level=level)
    mean, error = np.mean(values), scipy_stats.sem(values)
    assert found.low <= found.value + 1e-12 and found.value <= found.high + 1e-12
    if error > 1e-9:
        np.testing.assert_allclose((found.low, found.high), scipy_stats.t.interval(level, len(values) - 1, mean, error))
    half = 1.96 * error
    np.testing.assert_allclose(_seed_interval(values, "lovt"), (mean, mean - half, mean + half), atol=1e-9)


def test_few_or_broken_runs():
    assert np.isnan(_seed_interval([])).all() and _seed_interval([0.5])[0] == 0.5 and np.isnan(_seed_interval([0.5])[1:]).all()
    assert np.isnan(_seed_interval([0.5, np.nan, 0.4])).all() and _seed_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="student-t, lovt"):
        _seed_interval([1, 2], "normal")


@PROPERTY
@given(GAPS, st.floats(-3, 3))
def test_sign_flip_is_the_enumeration(gaps, shift):
    gaps, base = np.array(gaps) / 8, np.full(len(gaps), 0.0)
    flips = np.array(list(itertools.product([1, -1], repeat=len(gaps)))) * gaps
    expected = np.mean(np.abs(flips.mean(1)) >= abs(gaps.mean()) - 1e-12)
    np.testing.assert_allclose(_paired_test(gaps, base), expected)
    np.testing.assert_allclose(_paired_test(base, gaps), expected)
    assert _paired_test(gaps, base) >= 2 / 2 ** len(gaps)
    for test in stats._PAIRED_TESTS:
        one, other = _paired_test(gaps, base, test), _paired_test(base, gaps, test)
        assert one == pytest.approx(other, nan_ok=True) and (np.isnan(one) or 0 <= one <= 1)


def test_the_other_tests_are_scipys():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 9))
    assert np.isclose(_paired_test(a, b, "paired-t"), scipy_stats.ttest_rel(a, b).pvalue)
    assert np.isclose(_paired_test(a, b, "wilcoxon"), scipy_stats.wilcoxon(a, b).pvalue)
    assert 0 < _paired_test(draw.normal(size=20) + 2, np.zeros(20)) < 1e-3  # beyond 16 runs: random flips
    for wrong, told in ((dict(test="t"), "sign-flip, paired-t, wilcoxon"), (dict(second=b[:3]), r"\(9,\) and \(3,\)")):
        with pytest.raises(ValueError, match=told):
            _paired_test(**{"first": a, "second": b, **wrong})


def test_nothing_is_found_where_nothing_is():
    draw = np.random.default_rng(1)
    for test in stats._PAIRED_TESTS:
        p = np.array([_paired_test(gaps, np.zeros(7), test) for gaps in draw.normal(size=(150, 7))])
        assert (p < 0.05).mean() < 0.1, test


# ---------------------------------------------------------------- many tests

def slow_holm(p):
    known = [i for i in range(len(p)) if not np.isnan(p[i])]
    return [max([min(1, p[j] * sum(p[k] > p[j] or (p[k] == p[j] and k >= j) for k in known)) for j in known if p[j] < p[i] or (p[j] == p[i] and j <= i)])
            if i in known else np.nan for i in range(len(p))]


def slow_bh(p):
    known = [i for i in range(len(p)) if not np.isnan(p[i])]
    return [min([1.0, *(len(known) * p[j] / sum(p[k] <= p[j] for k in known) for j in known if p[j] >= p[i])]) if i in known else np.nan
            for i in range(len(p))]


@PROPERTY
@given(P_VALUES, st.integers(0, 10**6))
def test_corrections_are_their_definitions(p, seed):
    np.testing.assert_allclose(_corrected(p), slow_holm(p))
    np.testing.assert_allclose(_corrected(p, "benjamini-hochberg"), slow_bh(p))
    order = np.random.default_rng(seed).permutation(len(p))
    for rule in stats._CORRECTIONS:
        found = _corrected(p, rule)
        np.testing.assert_allclose(np.sort(_corrected(np.array(p)[order], rule)) if len(p) else [], np.sort(found))
        known = ~np.isnan(found)
        assert (found[known] >= np.array(p)[known] - 1e-12).all() and (found[known] <= 1).all() and (known == ~np.isnan(p)).all() if len(p) else True
    assert not (_corrected(p) < _corrected(p, "benjamini-hochberg") - 1e-12).any()


def test_an_unknown_correction():
    with pytest.raises(ValueError, match="holm, benjamini-hochberg, none"):
        _corrected([0.1], "bonferoni")


# ---------------------------------------------------------------- runs

def rows(**values) -> pd.DataFrame:
    "Result rows of encoders: name -> numbers by seed."
    told = [dict(encoder=name, protocol=protocol, fraction=0.1, seed=seed, metric="auroc", value=value, predictions=f"{name} {protocol} {seed}")
            for protocol in ("linear", "u-net") for name, numbers in values.items() for seed, value in enumerate(numbers)]
    return pd.DataFrame(told)


def test_duplicate_runs_are_refused_by_name():
    results = rows(mgca=[0.8, 0.9], random=[0.5, 0.6])
    stats._check_runs(results)
    with pytest.raises(ValueError, match="2 rows are duplicates.*encoder random, protocol u-net, fraction 0.1, seed 1, metric auroc"):
        stats._check_runs(pd.concat([results, results[-1:].assign(value=0.7, predictions="new")]))
    same = results.assign(predictions=results["predictions"].replace("mgca u-net 1", "mgca u-net 0"))
    with pytest.raises(ValueError, match="encoder mgca, protocol u-net, fraction 0.1, seed 0; encoder mgca, protocol u-net, fraction 0.1, seed 1") as error:
        compare(same, "random")
    assert "linear" not in str(error.value)
    stats._check_runs(same.drop(columns="predictions"))
    stats._check_runs(same.assign(predictions=None))                                              # not known: nothing to say
    with pytest.raises(ValueError, match="encoder mgca, protocol u-net, fraction 0.1, seed 1; encoder random, protocol u-net, fraction 0.1, seed 1"):
        stats._check_runs(results.assign(predictions=results["predictions"].replace("mgca u-net 1", "random u-net 1")))
    twice = pd.concat([results.assign(metric=name) for name in ("auroc", "f1")])                  # two metrics of the same runs
    stats._check_runs(twice)


def test_fingerprints_tell_tables_apart():
    table = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
    same = table.set_index(pd.Index([7, 9]))
    assert stats.fingerprint(table) == stats.fingerprint(same)
    others = [table[::-1], table.assign(a=[1.0, np.nextafter(2, 3)]), table.rename(columns={"a": "c"}), table[["b", "a"]], table[:1]]
    assert len({stats.fingerprint(one) for one in [table, *others]}) == 6
    array = np.arange(6.0)
    assert stats.fingerprint(array) == stats.fingerprint(array.copy()) != stats.fingerprint(array.reshape(2, 3))
    assert stats.fingerprint(array.reshape(2, 3).T) == stats.fingerprint(np.ascontiguousarray(array.reshape(2, 3).T))


def test_compare_by_hand():
    draw = np.random.default_rng(3)
    numbers = {name: draw.normal(skill, 0.02, count) for name, skill, count in (("random", 0.6, 5), ("mgca", 0.7, 5), ("lovt", 0.62, 3), ("new", 0.9, 1))}
    results = rows(**numbers)
    results = results[~((results["protocol"] == "u-net") & (results["encoder"] == "random"))]
    table = compare(results.sample(frac=1, random_state=0), "random", rule="lovt", test="paired-t", correction="holm")
    assert list(table.columns) == ["protocol", "fraction", "metric", "encoder", "mean", "low", "high", "std", "n", "covers", "gain", "gain_low", "gain_high", "pairs", "p",
                                   "p_least", "p_corrected"]
    found = table.set_index(["protocol", "encoder"])
    for name, values in numbers.items():
        row = found.loc[("linear", name)]
        np.testing.assert_allclose(row[["mean", "low", "high"]].tolist(), _seed_interval(values, "lovt"), rtol=1e-12)
        assert row["n"] == len(values) and row["pairs"] == (0 if name == "random" else len(values))
        if name in ("mgca", "lovt"):
            assert np.isclose(row["p"], scipy_stats.ttest_rel(values, numbers["random"][:len(values)]).pvalue)
            np.testing.assert_allclose(row["gain"], np.mean(values - numbers["random"][:len(values)]))
    assert found.loc["u-net"]["p"].isna().all() and (found.loc["u-net"]["pairs"] == 0).all() and found.loc["u-net"]["mean"].notna().all()
    np.testing.assert_allclose(table["p_corrected"], _corrected(table["p"]))
    assert found["p_corrected"].notna().sum() == 2
    plain = compare(results)
    assert list(plain.columns)[-1] == "covers" and len(plain) == 7
    assert found.loc["linear", "covers"].fillna(-1).to_dict() == {"random": 0.88, "mgca": 0.88, "lovt": 0.81, "new": -1}     # 1.96 standard errors, whatever n is
    exact = compare(results, "random").set_index(["protocol", "encoder"]).loc["linear"]
    assert exact["p_least"].fillna(-1).to_dict() == {"random": -1, "mgca": 2 / 2**5, "lovt": 2 / 2**3, "new": -1} and (exact["p"] >= exact["p_least"] - 1e-12)["mgca"]


def test_seeds_are_paired_by_number_and_not_by_place():
    results = rows(random=[0.5, 0.6, 0.7], mgca=[0.6, 0.7, 0.8])
    results = results[results["protocol"] == "linear"]
    results = pd.concat([results[results["encoder"] == "random"], results[results["encoder"] == "mgca"][::-1]])
    row = compare(results, "random").set_index("encoder").loc["mgca"]
    np.testing.assert_allclose([row["gain_low"], row["gain_high"]], [0.1, 0.1], atol=1e-12)


def test_a_failed_run_is_seen_and_wrong_tables_are_refused():
    results = rows(random=[0.5, 0.6, 0.7], mgca=[0.6, np.nan, 0.8])
    row = compare(results, "random").set_index(["protocol", "encoder"]).loc[("linear", "mgca")]
    assert np.isnan(row["mean"]) and np.isnan(row["p"]) and row["n"] == 3
    with pytest.raises(ValueError, match="columns seed; found"):
        compare(results.drop(columns="seed"))
    with pytest.raises(ValueError, match="no baseline 'imagenet' among random, mgca"):
        compare(results, "imagenet")


def test_defaults_of_intervals():
    "What a paper's methods section would say of medvis' intervals: 500 draws of patients, 95 %, seed 0."
    for function in (bootstrap_auroc, bootstrap_mean, bootstrap, compare_predictions, probe_table, paired_gain, linear_probe):
        named = {name: each.default for name, each in inspect.signature(function).parameters.items()}
        assert named["resamples"] == 500 and named.get("level", 0.95) == 0.95 and named.get("seed", 0) == 0, function.__name__
