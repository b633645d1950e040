"""Evaluation against oracles written differently, on degenerate input, and on a packed phantom."""
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from medvis.data.preprocessing import Preprocessing
from medvis.data.pairs import Pairs, Sampling, collate
from medvis.data.phantom import Phantom
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders.image import image_encoder
from medvis.evaluate import classify, ground
from medvis.evaluate.encoder import encode, random_like
from medvis.evaluate.stats import auroc, bootstrap_auroc, bootstrap_mean, interval, _paired_difference, resample
from medvis.methods.method import Correspondence, phantom_tokenizer
from medvis.train import checkpoint


# ---------------------------------------------------------------- statistics

def pairwise_auroc(scores, labels, weights):
    won = total = 0.0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            total += weights[i] * weights[j]
            won += weights[i] * weights[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    return won / total if total else np.nan


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0, 1, -1, None]), st.integers(0, 3)), max_size=25))
def test_auroc_is_the_pairwise_count(rows):
    scores, weights = np.array([row[0] for row in rows], float), np.array([row[2] for row in rows], float)
    labels = np.array([np.nan if row[1] is None else row[1] for row in rows], float)
    np.testing.assert_allclose(auroc(scores, labels, weights), pairwise_auroc(scores, labels, weights), atol=1e-12)
    np.testing.assert_allclose(auroc(scores, labels, np.stack([weights, 2 * weights])), [auroc(scores, labels, weights)] * 2, atol=1e-12)


def test_auroc_is_scikit_learns_on_every_draw():
    draw = np.random.default_rng(1)
    for decimals in (0, 1, 6):
        labels = draw.integers(0, 2, 500)
        scores = np.round(draw.normal(size=500) + 0.5 * labels, decimals)
        weights = resample(draw.integers(0, 200, 500), 40, seed=3)
        expected = [roc_auc_score(labels, scores, sample_weight=row) for row in weights]
        np.testing.assert_allclose(auroc(scores, labels, weights), expected, atol=1e-12)
    infinite = np.where(labels == 1, np.inf, -np.inf)
    assert auroc(infinite, labels) == 1 and auroc(-infinite, labels) == 0


def test_degenerate_input_gives_nan_or_a_clear_error():
    assert np.isnan(auroc([1.0], [1])) and np.isnan(auroc([], []))
    assert np.isnan(auroc([1, 2], [1, 1], np.ones((3, 2)))).all()
    for wrong in (lambda: auroc([1, 2], [1]), lambda: auroc([1, np.nan], [0, 1]), lambda: _paired_difference(np.ones(3), np.ones(4))):
        with pytest.raises(ValueError):
            wrong()
    assert auroc([1, np.nan, 2], [0, np.nan, 1]) == 1          # an unlabelled row may have no score
    one = bootstrap_auroc([0.1, 0.9], [0, 1], ["a", "a"])      # one patient: every draw is the sample
    assert tuple(one) == (1, 1, 1)
    assert np.isnan(bootstrap_auroc([0.1, 0.9], [1, 1], ["a", "b"])).all()
    assert bootstrap_auroc([0.1, 0.9], [0, 1], ["a", "b"], resamples=0).value == 1
    assert np.isnan(bootstrap_mean([], [])).all() and np.isnan(interval([np.nan] * 3)).all()


def test_intervals_cover_the_truth():
    """Of 200 experiments with 2 rows a patient, about 95 % of the patient-level intervals hold the true AUROC; row-level ones fewer."""
    draw, held, held_rows = np.random.default_rng(0), 0, 0
    truth = 0.76                                                   # two unit normals one apart
    for _ in range(200):
        labels = np.repeat(draw.integers(0, 2, 120), 2).astype(float)
        scores = np.repeat(draw.normal(size=120), 2) + labels + 1e-3 * draw.normal(size=240)
        patients = np.repeat(np.arange(120), 2)
        found, rows = (bootstrap_auroc(scores, labels, of, resamples=200) for of in (patients, np.arange(240)))
        held += found.low <= truth <= found.high
        held_rows += rows.low <= truth <= rows.high
    assert 180 <= held <= 200 and held_rows < held - 15


def test_a_large_probe_is_quick():
    """660 probes, 500 draws, 1000 studies: a fortieth of it is timed."""
    draw, weights, labels = np.random.default_rng(0), resample(np.arange(1000), 500), None
    started = time.perf_counter()
    for _ in range(16):
        labels = (draw.random(1000) < 0.3).astype(float)
        auroc(draw.normal(size=1000), labels, weights)
    assert (time.perf_counter() - started) * 660 / 16 < 30


# ---------------------------------------------------------------- the probe

@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("phantom") / "pack", studies=300, size=64))


def small(name="tiny_resnet"):
    torch.manual_seed(0)
    return image_encoder(name)


def test_probe_of_the_phantom(pack, tmp_path):
    encoder = small().train()
    table = classify.linear_probe(encoder, pack, fractions=(1.0, 0.1), seeds=(0, 1), resamples=50, out=tmp_path / "out", cache=tmp_path / "kept")
    assert encoder.training and list(table.columns[:7]) == ["encoder", "finding", "fraction", "auroc", "low", "high", "n"]
    assert len(table) == 2 * 2 * 12 and set(table["encoder"]) == {"encoder", "random-init"}
    scored = table.dropna(subset="auroc")
    assert ((scored["low"] <= scored["auroc"]) & (scored["auroc"] <= scored["high"])).all()
    macro = table[table["finding"] == "macro"].set_index(["encoder", "fraction"])
    for key, row in macro.iterrows():
        of = table[(table["encoder"] == key[0]) & (table["fraction"] == key[1]) & (table["finding"] != "macro")]
        assert np.isclose(row["auroc"], of["auroc"].mean()) and row["constant"] == of.dropna(subset="auroc")["constant"].sum()
        assert row["probes"] == 2 * of["auroc"].notna().sum() and (of["probes"] == 2).all()
    assert macro.loc[("encoder", 1.0), "auroc"] > 0.6                                   # raw edges already tell a large heart
    assert macro["constant"].xs(0.1, level="fraction").min() > 0                       # 1 of 24 studies: some findings were never seen
    predictions = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    pd.testing.assert_frame_equal(classify.probe_table(predictions, 50), table)
    assert len(list((tmp_path / "kept").iterdir())) == 3                                # an encoder and two random ones


def test_auroc_in_the_table_is_scikit_learns(pack):
    predictions = classify.probe_predictions(small(), pack, fractions=(1.0,), seeds=(0,), baseline=None)
    table = classify.probe_table(predictions, 10).set_index("finding")
    for finding, rows in predictions.groupby("finding", observed=True):
        rows = rows.dropna(subset="label")
        if rows["label"].nunique() == 2:
            assert np.isclose(table.loc[finding, "auroc"], roc_auc_score(rows["label"], rows["score"]))
    assert set(pack.studies["study_id"][pack.studies["split"] == "test"]) == set(predictions["study_id"])


def test_features_are_computed_once(pack, tmp_path):
    encoder, calls = small(), []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    first = encode(encoder, pack, rows=range(10), cache=tmp_path)
    seen = len(calls)
    again = encode(encoder, pack, rows=range(9, -1, -1), cache=tmp_path)
    assert len(calls) == seen and np.array_equal(first, again[::-1])
    encoder.preprocessing = Preprocessing(size=48, crop=0.75, channels=1)              # looks at something else: must not be read from the cache
    assert not np.allclose(encode(encoder, pack, rows=range(10), cache=tmp_path), first) and len(calls) > seen


def test_a_failed_write_leaves_nothing(tmp_path):
    def fails(file):
        file.write(b"half")
        raise OSError("no space left on device")
    with pytest.raises(OSError):
        checkpoint.write_atomic(tmp_path / "probe.csv", fails)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_vit", "resnet50"])
def test_random_like_draws_everything_anew(name):
    encoder = small(name)
    with torch.no_grad():
        for value in (*encoder.parameters(), *(b for b in encoder.buffers() if b.is_floating_point())):
            value.add_(0.01 * torch.rand_like(value))                                   # as if it had been trained
    fresh, same, other = (random_like(encoder, seed) for seed in (0, 0, 1))
    for (key, new), old, twin in zip(fresh.named_parameters(), encoder.parameters(), same.parameters()):
        assert not torch.equal(new, old) and torch.equal(new, twin), key
        assert new.std() == 0 or not torch.equal(new, dict(other.named_parameters())[key]), key
    for key, value in fresh.named_buffers():
        if "running_mean" in key:
            assert (value == 0).all(), key


class Columns:
    """A pack of three classes in one-hot columns, one image a study, as Kermany's."""

    def __init__(self, studies=90):
        kind = np.arange(studies) % 3
        self.labels = pd.DataFrame(np.eye(3)[kind], columns=["normal", "bacterial", "viral"])
        self.studies = pd.DataFrame({"study_id": [f"k{i}" for i in range(studies)], "patient_id": [f"p{i}" for i in range(studies)],
                                     "split": np.where(np.arange(studies) < 60, "train", "test"), "image_rows": [[i] for i in range(studies)]})
        self.pixels = np.random.default_rng(0).integers(0, 60, (studies, 64, 64)).astype(np.uint8)
        self.pixels[:, :32] += (60 * kind)[:, None, None].astype(np.uint8)
        self.path, self.size, self.manifest = "columns", 64, {"hash": "columns", "source": {}, "labels": list(self.labels)}
        self.recipe = {}

    def image(self, row):
        return self.pixels[row]


def test_one_hot_classes_are_findings():
    table = classify.linear_probe({"a": small(), "b": small("tiny_vit")}, Columns(), fractions=(1.0,), seeds=(0,), resamples=20)
    assert set(table["encoder"]) == {"a", "b", "random-init"} and set(table["finding"]) == {"normal", "bacterial", "viral", "macro"}
    assert table.set_index(["encoder", "finding"]).loc[("a", "normal"), "auroc"] > 0.95


def test_wrong_data_is_refused_by_name():
    pack = Columns()
    pack.studies.loc[3, "patient_id"] = pack.studies.loc[70, "patient_id"]
    with pytest.raises(ValueError, match="p70"):
        classify.linear_probe(small(), pack)
    pack = Columns()
    pack.studies["split"] = "train"
    with pytest.raises(ValueError, match="'test'"):
        classify.linear_probe(small(), pack)
    pack = Columns()
    pack.studies.at[5, "image_rows"] = []
    with pytest.raises(ValueError, match="k5"):
        encode(small(), pack)
    pack.labels.loc[4, "viral"] = 7
    with pytest.raises(ValueError, match="'viral'.*7"):
        classify.linear_probe(small(), pack)


# ---------------------------------------------------------------- grounding

def slow_point(scores, mask, grid):
    h, w = grid
    best = [n for n in range(h * w) if scores[n] == max(scores)]
    inside = [mask[int((n // w + 0.5) * mask.shape[0] / h), int((n % w + 0.5) * mask.shape[1] / w)] for n in best]
    return sum(map(float, inside)) / len(best)


def test_point_is_the_slow_loop():
    draw = np.random.default_rng(0)
    for grid, shape in (((2, 3), (17, 23)), ((8, 8), (64, 64)), ((7, 5), (14, 10)), ((4, 4), (3, 3))):
        scores, masks = draw.integers(0, 4, (30, grid[0] * grid[1])), draw.random((30, *shape)) < 0.4
        hits, chance = ground.pointing_hits(scores, masks, grid)
        np.testing.assert_allclose(hits, [slow_point(s, m, grid) for s, m in zip(scores, masks)])
        np.testing.assert_allclose(chance, masks.mean((1, 2)))


def test_a_blind_map_is_at_chance():
    draw = np.random.default_rng(0)
    masks = np.zeros((4000, 32, 32), bool)
    for mask in masks:
        top, left, height, width = draw.integers(0, 24), draw.integers(0, 24), draw.integers(2, 9), draw.integers(2, 9)
        mask[top:top + height, left:left + width] = True
    hits, chance = ground.pointing_hits(draw.random((4000, 64)), masks, (8, 8))
    assert abs(hits.mean() - chance.mean()) < 0.006
    constant, _ = ground.pointing_hits(np.zeros((4000, 64)), masks, (8, 8))
    assert abs(constant.mean() - chance.mean()) < 0.002


@pytest.fixture(scope="module")
def pairs(pack):
    return Pairs(pack, phantom_tokenizer(100), Preprocessing(size=64, crop=1.0, channels=1))


def test_phantom_targets_are_the_phantoms_masks(pack, pairs):
    targets, phantom = ground.phantom_targets(pairs, range(60)), Phantom(64, 0)
    written = 0
    for item in range(60):
        study = phantom[int(pack.studies["study_id"].iloc[pairs.items[item][0]][8:])]
        spoken = [(sentence.text[a:b], index) for sentence in study.sentences for a, b, index in sentence.words if index is not None]
        found = [target for target in targets if target.item == item]
        assert sorted((t.text, t.finding) for t in found) == sorted((text, study.findings[i].name) for text, i in spoken)
        for target in found:
            assert any(target.finding == f.name and np.array_equal(target.mask, f.mask) for f in study.findings)
        written += len(found)
    assert written > 300


def test_targets_of_shortened_and_single_sentence_reports(pack, pairs):
    short = Pairs(pack, pairs.tokenizer, pairs.preprocessing, Sampling(max_tokens=24))
    for target in ground.phantom_targets(short, range(40)):
        assert short.report(target.item).words[target.word] == target.text
    one = Pairs(pack, pairs.tokenizer, pairs.preprocessing, Sampling(sentences="one"))
    assert all(one.report(t.item).words[t.word] == t.text for t in ground.phantom_targets(one, range(40)))


def test_targets_need_a_phantom_without_augmentation(pack, pairs):
    with pytest.raises(ValueError, match="train=True"):
        ground.phantom_targets(Pairs(pack, pairs.tokenizer, pairs.preprocessing, train=True), [0])
    folder = SimpleNamespace(pack=SimpleNamespace(manifest={"source": {"kind": "folder"}}), train=False)
    with pytest.raises(ValueError, match="'folder'"):
        ground.phantom_targets(folder, [0])


class Told(torch.nn.Module):
    """Knows the masks if `honest`, else points away from them."""

    def __init__(self, pairs, honest=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        rows = {item: row for item, (row, _) in enumerate(pairs.items)}
        self.sign = 1 if honest else -1
        self.masks = {(rows[t.item], t.word): torch.from_numpy(t.mask) for t in ground.phantom_targets(pairs)}

    def correspondence(self, batch):
        words = int(batch.word_index.max()) + 1
        scores = torch.zeros(len(batch), 16 * 16, words)
        for row, study in enumerate(batch.study_id.tolist()):
            for word in range(words):
                if (study, word) in self.masks:
                    scores[row, :, word] = self.sign * self.masks[study, word].view(16, 4, 16, 4)[:, 2, :, 2].flatten().float()
        mask = torch.arange(words) <= batch.word_index.max(1).values[:, None]
        return Correspondence(scores, scores[..., :1], mask, mask[:, :1], (16, 16))


def test_the_pointing_game_of_one_who_knows(pairs):
    best, worst = (ground.phantom_pointing(Told(pairs, honest), pairs, range(80), batch_size=13) for honest in (True, False))
    assert best.rate(None).targets == len(ground.phantom_targets(pairs, range(80)))
    assert best.rate().gain.low > 0.5 and worst.rate().hit_rate.value < 0.05 and worst.rate().gain.high < 0.05
    assert best.rate().chance == worst.rate().chance
    by = best.by_finding()
    assert by["finding"].iloc[-1] == "all" and by["targets"].iloc[:-1].sum() == by["targets"].iloc[-1]
    assert best.rate(finding="no such thing").targets == 0


def test_pointing_game_door(pairs):
    player, batch = Told(pairs), collate([pairs[i] for i in range(8)])
    told = player.correspondence(batch)
    masks = {(t.item, t.word): t.mask for t in ground.phantom_targets(pairs, range(8))}
    found = ground.pointing_game(told, masks, groups=batch.patient_id.tolist())
    table = ground.phantom_pointing(player, pairs, range(8)).select(role=None)
    assert np.isclose(found.hit_rate.value, table["hit"].mean()) and found.groups == table["patient"].nunique()
