"""The figures' numbers against oracles that are slow and obvious, the run's diagnostics, and their words."""
import itertools
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from medvis.analyse.alignment import alignment_distances, alignment_numbers, draw_alignment
from medvis.analyse.embed import embedding_table, neighbour_purity, separability, tsne, write_embedding
from medvis.analyse.information import draw_information
from medvis.analyse.live import LiveDiagnostics, draw_diagnostics
from medvis.analyse.prototypes import cluster_agreement, draw_usage, nearest_prototype, prototype_usage
from medvis.analyse.regions import choice_numbers, draw_mean_weights, mirror_symmetry, region_overlap, share_inside
from medvis.analyse.represent import aligned_studies, image_features
from medvis.analyse.spread import draw_spread, spread_table
from medvis.data.pairs import Pairs, read_batch
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders.features import ImageFeatures
from medvis.methods import METHODS, ConVIRT, LoVT
from medvis.methods.method import Aligned, add_up, phantom_tokenizer
from medvis.objectives.contrastive import l2_normalize
from medvis.objectives.regions import local_image_loss, local_report_loss, positiveness
from medvis.train import TrainConfig, fit
from medvis.train.diagnostics import (
    MEANING, CollapseWarning, alignment, _attention_entropy, collapse, diagnose, _effective_rank, spread, _uniformity)

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def words():
    return phantom_tokenizer(60)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("pack") / "p", studies=120, size=64, seed=5, progress=False))


def pairs_of(method, data):
    return Pairs(data, method.tokenizer if method.reads_text else None, method.preprocessing)


# Geometry, by loops.
@pytest.mark.parametrize("shape", [(7, 5, 6), (2, 2, 3), (30, 9, 8)])
def test_spread_is_that_of_loops(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) + 0.5
    vectors = np.stack([[v / np.linalg.norm(v) for v in sample] for sample in x.double().numpy()])
    B, N, D = shape
    total, within, between = [], [], []
    for c in range(D):
        flat = vectors[:, :, c].ravel()
        centres = [vectors[i, :, c].mean() for i in range(B)]
        variances = [sum((value - centres[i]) ** 2 for value in vectors[i, :, c]) / (N - 1) for i in range(B)]
        spread_of_centres = sum((m - np.mean(centres)) ** 2 for m in centres) / (B - 1)
        total.append(math.sqrt(spread_of_centres + np.mean([v * (N - 1) / N for v in variances])))
        within.append([math.sqrt(v) for v in variances])
        between.append(math.sqrt(spread_of_centres))
        inside = np.mean([v * (N - 1) / N for v in variances])
        assert flat.var() == pytest.approx(inside + spread_of_centres * (B - 1) / B)     # the law of total variance
    found = spread(x)
    assert found["total"] == pytest.approx(np.mean(total) * D**0.5, rel=1e-4)
    assert found["per_sample"] == pytest.approx(np.mean(within) * D**0.5, rel=1e-4)
    assert found["centroids"] == pytest.approx(np.mean(between) * D**0.5, rel=1e-4)
    assert spread(x[:, 0])["total"] == pytest.approx(vectors[:, 0].std(0, ddof=1).mean() * D**0.5, rel=1e-4)


def test_spread_leaves_padding_out():
    x, mask = torch.randn(6, 5, 4), torch.rand(6, 5) < 0.6
    mask[:, :2] = True
    mask[0] = False
    filled = x.masked_fill(~mask[..., None], 1e3)
    assert spread(x, mask) == pytest.approx(spread(filled, mask), rel=1e-5)
    counts = mask[1:].sum(1)
    by_hand = [l2_normalize(x[i])[mask[i]].std(0).mean() * 2 for i in range(1, 6)]
    assert spread(x, mask)["per_sample"] == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-4) and len(counts) == 5


def test_wang_and_isola_by_pairs():
    x, y = torch.randn(9, 5), torch.randn(9, 5)
    u, v = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (x.numpy(), y.numpy()))
    potential = [math.exp(-2 * sum((a - b) ** 2)) for a, b in itertools.combinations(u, 2)]
    assert float(_uniformity(x)) == pytest.approx(math.log(np.mean(potential)), rel=1e-5)
    assert float(alignment(x, y)) == pytest.approx(np.mean([sum((a - b) ** 2) for a, b in zip(u, v)]), rel=1e-5)


def test_effective_rank_by_eigenvalues():
    x = torch.randn(40, 6) * torch.tensor([9.0, 5, 1, 1, 0.1, 0])
    u = l2_normalize(x).double().numpy()
    values = np.sqrt(np.clip(np.linalg.eigvalsh((u - u.mean(0)).T @ (u - u.mean(0))), 0, None))
    share = values[values > 1e-9] / values.sum()
    assert float(_effective_rank(x)) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-3)


def test_entropy_by_sum():
    maps = torch.rand(4, 3, 7).softmax(-1)
    by_hand = [-sum(p * math.log(p) for p in row) / math.log(7) for row in maps.reshape(-1, 7).tolist()]
    assert _attention_entropy(maps).flatten().tolist() == pytest.approx(by_hand, rel=1e-5)


# What methods show.
def test_lovt_is_shown_in_the_space_of_its_losses(words, data):
    torch.manual_seed(0)
    method = LoVT.from_preset("tiny", words).eval()
    with torch.no_grad():
        batch = read_batch(pairs_of(method, data), range(6))
        met, parts = method.align(batch), method(batch).parts
        weights = method.pool_image(method.image_encoder(batch.image))[1]
        text = method.read(batch)
        sentence_weights = method.text_pool(text.sentences, text.sentence_mask)[1]
        image = 0.75 * local_image_loss(met.regions, met.from_text, positiveness(met.grid), 0.3, weights)
        report = 0.75 * local_report_loss(met.texts, met.from_image, met.mask, 0.3, sentence_weights)
    torch.testing.assert_close(image, parts["local_image"])
    torch.testing.assert_close(report, parts["local_report"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_diagnosed_and_drawn(name, words, data):
    torch.manual_seed(0)
    method = METHODS[name].from_preset("tiny", words).train()
    kept = {key: value.clone() for key, value in method.state_dict().items()}
    pairs, random = pairs_of(method, data), torch.random.get_rng_state()
    numbers = diagnose(method, [read_batch(pairs, range(8)), read_batch(pairs, range(8, 16))])
    assert set(numbers) <= set(MEANING) and all(math.isfinite(value) for value in numbers.values()) and method.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, kept[key]) for key, value in method.state_dict().items())
    assert isinstance(draw_diagnostics(pd.DataFrame([{"step": 1, "epoch": 0, **numbers}])), Figure)
    if not method.reads_text or name in ("global-mi", "local-mi", "contrastive-binary", "caption-lstm", "caption-transformer"):
        with pytest.raises(TypeError, match="no space"):
            aligned_studies(method, pairs, range(4))
    else:
        table = alignment_distances(aligned_studies(method, pairs, range(6), batch_size=4))
        assert table.distance.between(0, 2.0001).all() and set(table.direction) == {"report to image", "image to report"}


def test_wholes_are_those_the_loss_sees(words, data):
    for kind in (LoVT, ConVIRT):
        method = kind.from_preset("tiny", words).eval()
        seen = image_features(method, pairs_of(method, data), range(5))
        head = method.global_image if kind is LoVT else method.image_head
        with torch.no_grad():
            batch = read_batch(pairs_of(method, data), range(5))
            torch.testing.assert_close(head(seen.whole), method.embed_image(batch.image))


# Numbers beside pictures.
def test_distances_by_loops():
    regions, gathered, texts, seen = (torch.randn(5, 4, 3) for _ in range(4))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    table = alignment_distances(Aligned(regions, gathered, texts, seen, mask, (2, 2)))
    by_hand = [float((l2_normalize(a[i, k]) - l2_normalize(b[i, k])).norm()) for a, b, m in ((regions, gathered, torch.ones(5, 4)), (texts, seen, mask))
               for i in range(5) for k in range(4) if m[i, k]]
    assert table.distance.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert len(alignment_numbers({"a": table})) == 2


def test_purity_by_loops():
    x, kinds, groups = RNG.normal(size=(40, 5)), RNG.integers(3, size=40), RNG.integers(8, size=40)
    found = neighbour_purity(x, kinds, groups, k=4).set_index("kind")
    unit_x = [v / math.sqrt(sum(v * v)) for v in x]
    for kind in range(3):
        shares = []
        for i in (i for i in range(40) if kinds[i] == kind):
            others = sorted((j for j in range(40) if groups[j] != groups[i]), key=lambda j: -sum(unit_x[i] * unit_x[j]))[:4]
            shares.append(sum(kinds[j] == kind for j in others) / 4)
        assert found.purity[kind] == pytest.approx(np.mean(shares))
    with pytest.raises(ValueError, match="others of another group"):
        neighbour_purity(x, kinds, np.zeros(40))


def test_separability_never_sees_the_tested_groups():
    owner = np.repeat(np.arange(40), 5)
    marked = np.repeat(RNG.normal(size=(40, 60)), 5, axis=0)       # knows its study by heart, and nothing else
    blind = [separability(marked, RNG.permutation(40)[owner] % 2 == 0, owner) for _ in range(6)]
    assert abs(np.mean(blind) - 0.5) < 0.12
    hinted = RNG.normal(size=(200, 10)) + np.eye(10)[0] * 3 * (np.arange(200) % 5 == 0)[:, None]
    assert separability(hinted, np.arange(200) % 5 == 0, owner) > 0.9


def test_mutual_information_by_counting():
    labels, clusters = RNG.integers(3, size=200), RNG.integers(5, size=200)
    joint = np.array([[np.mean((labels == a) & (clusters == b)) for b in range(5)] for a in range(3)])
    pa, pb = joint.sum(1), joint.sum(0)
    information = sum(joint[a, b] * math.log(joint[a, b] / (pa[a] * pb[b])) for a in range(3) for b in range(5) if joint[a, b])
    entropy = [-sum(p * math.log(p) for p in one) for one in (pa, pb)]
    assert cluster_agreement(labels, clusters)["nmi"] == pytest.approx(information / np.mean(entropy))


def test_prototypes_by_loops():
    images, texts, points = RNG.normal(size=(30, 4)), RNG.normal(size=(30, 4)), RNG.normal(size=(12, 4))
    def nearest(v):
        return max(range(12), key=lambda k: v @ points[k] / np.linalg.norm(points[k]))
    assert nearest_prototype(images, points).tolist() == [nearest(v) for v in images]
    table, numbers = prototype_usage(images, texts, points)
    used = {nearest(v) for v in [*images, *texts]}
    assert numbers["dead"] == pytest.approx(1 - len(used) / 12) and table.images.sum() == table.reports.sum() == 30
    assert numbers["same"] == pytest.approx(np.mean([nearest(a) == nearest(b) for a, b in zip(images, texts)]))


def test_shares_by_pixels():
    masks, weights = RNG.random((3, 12, 12)) < 0.4, RNG.random((3, 16))
    inside, area = share_inside(weights, masks, (4, 4))
    for s in range(3):
        heat = np.kron((weights[s] / weights[s].sum()).reshape(4, 4), np.ones((3, 3)) / 9)
        assert inside[s] == pytest.approx(heat[masks[s]].sum()) and area[s] == pytest.approx(masks[s].mean())
    assert region_overlap(masks, (4, 4))[1].reshape(4, 4)[2, 3] == pytest.approx(masks[1, 6:9, 9:12].mean())
    assert mirror_symmetry(weights[0], (4, 4)) == pytest.approx(
        1 - 0.5 * np.abs(weights[0].reshape(4, 4) - weights[0].reshape(4, 4)[:, ::-1]).sum() / weights[0].sum())


def test_choices_by_counting():
    masks = np.zeros((4, 8, 8), bool)
    masks[:, :4, :4] = True
    numbers = choice_numbers([0, 0, 1, 3], (2, 2), masks)
    assert numbers["hit"] == 0.5 and numbers["fixed"] == 1 and numbers["chance"] == 0.25
    assert numbers["in_use"] == pytest.approx(math.exp(0.5 * math.log(2) + 2 * 0.25 * math.log(4)))


# t-SNE is the same for the same seed, and comes back from its file.
def test_tsne_is_the_same_for_the_same_seed(tmp_path):
    x = RNG.normal(size=(60, 10))
    places = tsne(x, seed=3)
    assert np.array_equal(places, tsne(x, seed=3)) and np.isfinite(places).all()
    write_embedding(tmp_path / "a.parquet", embedding_table(places, study=np.arange(60)))
    write_embedding(tmp_path / "b.parquet", embedding_table(tsne(x, seed=3), study=np.arange(60)))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    with pytest.raises(ValueError, match="at least 8"):
        tsne(x[:5])


# Training diagnostics.
class PulledTogether(ConVIRT):
    "Partners attract, nothing repels: made to collapse."

    def forward(self, batch):
        v, t = l2_normalize(self.embed_image(batch.image)), l2_normalize(self.embed_text(batch))
        return add_up(distance=4 * (v - t).square().sum(1).mean())


def trained(kind, words, data, folder, lr=3e-3):
    torch.manual_seed(0)
    method, live = kind.from_preset("tiny", words), LiveDiagnostics()
    config = TrainConfig.of(method, folder, epochs=3, batch_size=24, lr=lr, progress=False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        run = fit(method, data, config, each_epoch=live)
    return run, [str(one.message) for one in heard if issubclass(one.category, CollapseWarning)], live


@pytest.mark.trains
def test_a_collapsing_run_warns_and_a_healthy_one_does_not(words, data, tmp_path):
    well, silence, live = trained(ConVIRT, words, data, tmp_path / "well", lr=1e-3)  # far from the line, whatever the kernel
    ill, heard, _ = trained(PulledTogether, words, data, tmp_path / "ill")
    assert silence == [] and collapse(well.diagnostics.iloc[-1].to_dict()) == []
    assert heard and "images look alike" in " ".join(heard) and heard[-1].startswith("ill, epoch 2")
    assert all("phantom-" not in one for one in heard)
    assert bytes(live.value)[:4] == b"\x89PNG" and well.diagnostics.epoch.tolist() == [0, 1, 2]
    assert "look alike" in draw_diagnostics(ill.diagnostics).get_suptitle()
    lines = [json.loads(line) for line in (ill.path / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == ill.metrics[ill.metrics.split == "validate"].step.tolist()


def test_collapse_in_words():
    assert collapse({"image_std": 0.01, "text_std": 0.5, "image_rank": 30.0, "text_rank": 1.0}) != []
    assert len(collapse({"image_std": 0.01, "text_std": 0.5, "image_rank": 30.0, "text_rank": 1.0})) == 2
    assert collapse({"dead_prototypes": 0.95, "dead_by_chance": 0.97}) == []


# Every figure can be drawn and saved for print.
def test_figures_are_vector_graphics(tmp_path):
    seen = ImageFeatures(torch.randn(20, 4, 8), torch.randn(20, 8), (2, 2))
    made = Aligned(*(torch.randn(20, 4, 8) for _ in range(4)), torch.ones(20, 4, dtype=torch.bool), (2, 2))
    curve = pd.DataFrame({"step": [1, 2, 2], "split": ["train", "train", "validate"], "nats": [0.1, 0.2, 0.1]})
    figures = [draw_spread(spread_table({"one": seen})), draw_alignment({"one": alignment_distances(made)}),
               draw_information({"one": curve}, 64), draw_usage(*prototype_usage(RNG.normal(size=(9, 3)), RNG.normal(size=(9, 3)), np.eye(3))),
               draw_mean_weights(np.ones(4), (2, 2), np.zeros((8, 8)), np.ones((8, 8)))]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.pdf")
        assert (tmp_path / f"{number}.pdf").read_bytes().startswith(b"%PDF") and figure.get_size_inches()[0] < 8.5
