"""What must hold of LoVT's heads and losses for any batch: order, padding, masks, stop-gradients, precision."""
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medvis.data.pairs import tokens_kept
from medvis.encoders.heads import AttentionPool, ProjectionHead
from medvis.objectives.regions import (
    CrossModalAttention, local_image_loss, local_report_loss, positiveness, share_weights)

easy = settings(deadline=None, max_examples=20, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
D = 8


class Case:
    "A random batch in double precision: features, sentence lengths (none at all among them), weights."

    def __init__(self, seed: int, batch: int, grid: tuple[int, int], longest: int):
        g = torch.Generator().manual_seed(seed)
        self.grid, n = grid, grid[0] * grid[1]
        self.seed, self.lengths = seed, torch.randint(0, longest + 1, (batch,), generator=g)
        self.lengths[0] = longest
        self.mask = torch.arange(longest) < self.lengths[:, None]
        self.regions, self.sentences = (torch.randn(batch, k, D, generator=g, dtype=torch.float64) for k in (n, longest))
        self.region_weights, self.sentence_weights = (
            torch.rand(batch, k, generator=g, dtype=torch.float64) for k in (n, longest))

    def padded(self, extra: int, fill: float) -> "Case":
        "The same batch with more padding, and other values in all of it."
        other = Case.__new__(Case)
        other.__dict__.update(self.__dict__)
        pad = torch.nn.functional.pad
        other.mask = pad(self.mask, (0, extra))
        other.sentences = pad(self.sentences, (0, 0, 0, extra)).masked_fill(~other.mask[..., None], fill)
        other.sentence_weights = pad(self.sentence_weights, (0, extra)).masked_fill(~other.mask, 1.0)
        return other

    def permuted(self, order: torch.Tensor) -> "Case":
        other = Case.__new__(Case)
        other.__dict__.update(self.__dict__)
        for name in ("mask", "regions", "sentences", "region_weights", "sentence_weights"):
            setattr(other, name, getattr(self, name)[order])
        return other

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.regions.clone().requires_grad_(), self.sentences.clone().requires_grad_()


cases = st.builds(
    Case, st.integers(0, 10**6), st.integers(2, 4), st.tuples(st.integers(1, 4), st.integers(2, 4)), st.integers(2, 4))


def modules(seed: int, padded: bool = False) -> tuple[torch.nn.Module, ...]:
    torch.manual_seed(seed)
    pool = AttentionPool(D, 2, "padded" if padded else "masked")
    made = CrossModalAttention(D, padded), pool, ProjectionHead(D, 16, D, "hidden")
    with torch.no_grad():
        for module in made:
            for parameter in module.parameters():  # no zero biases, which would hide what they do
                parameter.add_(0.3 * torch.randn_like(parameter))
    return tuple(module.double().train() for module in made)


def local_losses(case: Case, regions, sentences, padded=False) -> tuple[torch.Tensor, torch.Tensor]:
    "Head, pooling, alignment and both local losses in training mode, as the method joins them."
    align, pool, head = modules(case.seed, padded)
    z = head(sentences, None if padded else case.mask)
    to_region, to_sentence, *_ = align(regions, z, case.mask)
    weights = case.region_weights * case.mask.any(1, keepdim=True)
    p = positiveness(case.grid, dtype=torch.float64)
    image = local_image_loss(regions, to_region, p, weights=weights)
    pooled, sentence_weights = pool(sentences, case.mask)
    report = local_report_loss(z, to_sentence, case.mask, weights=sentence_weights * case.sentence_weights)
    return image, report + pooled.square().mean(0).sum()


def result(case: Case, padded=False):
    "Losses, and the gradients of regions and sentences."
    regions, sentences = case.leaves()
    losses = local_losses(case, regions, sentences, padded)
    return torch.stack(losses).detach(), *torch.autograd.grad(sum(losses), (regions, sentences))


@given(cases, st.integers(0, 5))
@easy
def test_batch_order_does_not_matter(case, seed):
    order = torch.randperm(len(case.mask), generator=torch.Generator().manual_seed(seed))
    losses, *grads = result(case)
    again, *others = result(case.permuted(order))
    torch.testing.assert_close(again, losses)
    for grad, other in zip(grads, others):
        torch.testing.assert_close(other, grad[order], rtol=1e-6, atol=1e-10)


@given(cases)
@easy
def test_sentence_order_does_not_matter(case):
    other = Case.__new__(Case)
    other.__dict__.update(case.__dict__)
    for name in ("mask", "sentences", "sentence_weights"):
        setattr(other, name, getattr(case, name).flip(1))
    (losses, of_regions, of_sentences), (again, *grads) = result(case), result(other)
    torch.testing.assert_close(again, losses)
    torch.testing.assert_close(grads[0], of_regions, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(grads[1].flip(1), of_sentences, rtol=1e-6, atol=1e-10)


@given(cases, st.integers(0, 3), st.sampled_from([0.0, -7.0, 1e9, torch.inf, torch.nan]))
@easy
def test_padding_does_not_matter(case, extra, fill):
    longest = case.mask.shape[1]
    (losses, of_regions, of_sentences), (again, *grads) = result(case), result(case.padded(extra, fill))
    torch.testing.assert_close(again, losses)
    torch.testing.assert_close(grads[0], of_regions, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(grads[1][:, :longest], of_sentences, rtol=1e-6, atol=1e-10)
    assert (grads[1][~case.padded(extra, fill).mask] == 0).all() and (of_sentences[~case.mask] == 0).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fill", [1e9, torch.inf, torch.nan])
def test_what_stands_in_the_padding_does_not_matter(padded, fill):
    "Not even in the compatibility switch, nor where no head has cleared it away."
    case = Case(2, 3, (2, 3), 4)
    for make in (lambda c, z: modules(0, padded)[0](c.regions, z, c.mask), lambda c, z: modules(0, padded)[1](z, c.mask),
                 lambda c, z: [local_report_loss(z, z.flip(2), c.mask)]):
        one, other = (x.sentences.clone().requires_grad_() for x in (case, case.padded(0, fill)))
        found, again = make(case, one), make(case, other)
        for x, y in zip(found, again, strict=True):
            torch.testing.assert_close(x, y)
        grads = [torch.autograd.grad(sum(x.square().sum() for x in out), leaf)[0] for out, leaf in ((found, one), (again, other))]
        torch.testing.assert_close(*grads)
        assert (grads[0][~case.mask] == 0).all() and (grads[0][case.mask] != 0).any()


def test_alignment_starts_as_published():
    "Normal numbers of variance 1/d, zero biases."
    torch.manual_seed(0)
    for layer in (getattr(CrossModalAttention(300), name) for name in ("match", "value", "out")):
        weight = layer.weight.detach()
        assert abs(weight.var() * 300 - 1) < 0.02 and weight.abs().max() > 4 / 300**0.5 and not layer.bias.any()


def test_padding_matters_as_released():
    case = Case(0, 3, (3, 3), 3)
    case.mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    assert not torch.allclose(result(case, padded=True)[0], result(case.padded(2, 0.0), padded=True)[0])
    align = modules(0, padded=True)[0]
    outside = align(case.regions, case.sentences, case.mask)[1][~case.mask]
    torch.testing.assert_close(outside, outside[:1].expand_as(outside))
    assert outside.abs().sum() > 0  # BN of the output map's bias
    pool = modules(0, padded=True)[1]
    wider = case.padded(2, 0.0)
    assert not torch.allclose(pool(case.sentences, case.mask)[0], pool(wider.sentences, wider.mask)[0])


@given(cases)
@easy
def test_a_batch_is_the_mean_of_its_pairs_in_evaluation(case):
    align, *_ = modules(case.seed)
    align.eval()
    p = positiveness(case.grid, dtype=torch.float64)

    def losses(rows):
        regions, sentences, mask = case.regions[rows], case.sentences[rows], case.mask[rows]
        to_region, to_sentence, region_maps, sentence_maps = align(regions, sentences, mask)
        torch.testing.assert_close(region_maps.sum(2), mask.any(1, keepdim=True).double().expand(regions.shape[:2]))
        torch.testing.assert_close(sentence_maps.sum(2), mask.double())
        assert (region_maps.mT[~mask] == 0).all() and (sentence_maps[~mask] == 0).all()
        weights = case.region_weights[rows] * mask.any(1, keepdim=True)
        return torch.stack([local_image_loss(regions, to_region, p, weights=weights),
                            local_report_loss(sentences, to_sentence, mask, weights=case.sentence_weights[rows])])

    one_by_one = torch.stack([losses(slice(i, i + 1)) for i in range(len(case.mask))])
    torch.testing.assert_close(losses(slice(None)), one_by_one.mean(0))
    for i, length in enumerate(case.lengths):
        assert length > 1 or one_by_one[i, 1] == 0
        assert length > 0 or one_by_one[i, 0] == 0


def test_reports_without_sentences_are_harmless():
    case = Case(1, 3, (2, 3), 3)
    case.mask = torch.zeros(3, 3, dtype=torch.bool)
    losses, *grads = result(case)
    assert (losses == 0).all() and all((grad == 0).all() for grad in grads)
    for padded in (False, True):
        align, pool, head = modules(0, padded)
        read, pooled = align(case.regions, case.sentences, case.mask), pool(case.sentences, case.mask)
        found = [*read, *pooled, head(case.sentences, case.mask)]
        assert all(x.isfinite().all() for x in found)
        case.mask[0, 0] = True  # beside one that has something to say, weights learn as usual
        z = head(case.sentences, case.mask)
        to_region, to_sentence, *_ = align(case.regions, z, case.mask)
        total = to_region.square().sum() + to_sentence.square().sum() + pool(case.sentences, case.mask)[0].square().sum()
        total.backward()
        assert all(p.grad.isfinite().all() for module in (align, pool, head) for p in module.parameters())
        case.mask[0, 0] = False
    before = torch.zeros(D, dtype=torch.float64)
    align = modules(0)[0]
    align(case.regions, case.sentences, case.mask)
    torch.testing.assert_close(align.norm.running_mean, before)


@given(cases)
@easy
def test_statistics_move_twice_regions_first(case):
    align, *_ = modules(case.seed)
    some = case.mask.any(1)
    region_maps, sentence_maps = align(case.regions, case.sentences, case.mask)[2:]
    gathered = [
        align.out(region_maps @ align.value(case.sentences))[some].flatten(0, 1),
        align.out(sentence_maps @ align.value(case.regions))[case.mask]]
    mean, var = torch.zeros(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64)
    for rows in gathered:
        mean, var = 0.9 * mean + 0.1 * rows.mean(0), 0.9 * var + 0.1 * rows.var(0)
    torch.testing.assert_close(align.norm.running_mean, mean)
    torch.testing.assert_close(align.norm.running_var, var)
    assert align.norm.num_batches_tracked == 2


@given(cases)
@easy
def test_scores_are_symmetric_and_scaled(case):
    align, *_ = modules(case.seed)
    one, two = case.regions, case.sentences
    torch.testing.assert_close(align.scores(one, two), align.scores(two, one).mT)
    a, b = (x @ align.match.weight.T + align.match.bias for x in (one, two))
    torch.testing.assert_close(align.scores(one, two), torch.einsum("bnd,bmd->bnm", a, b) / D**0.5)


@given(cases)
@easy
def test_no_gradient_flows_into_weights(case):
    weights = [w.clone().requires_grad_() for w in (case.region_weights, case.sentence_weights)]
    regions, sentences = case.leaves()
    p = positiveness(case.grid, dtype=torch.float64)
    total = (local_image_loss(regions, regions.flip(1), p, weights=weights[0])
             + local_report_loss(sentences, sentences.flip(2), case.mask, weights=weights[1]))
    assert torch.autograd.grad(total, weights, allow_unused=True) == (None, None)
    torch.testing.assert_close(total, (local_image_loss(regions, regions.flip(1), p, weights=3 * weights[0])
                                       + local_report_loss(sentences, sentences.flip(2), case.mask, weights=5 * weights[1])))


@given(cases)
@easy
def test_gradients_reach_both_sides_of_the_alignment(case):
    "No other gradient is stopped: those of analysis and of finite differences agree in every input and weight."
    regions, sentences = case.leaves()
    align, *_ = modules(case.seed)
    align.eval()
    p = positiveness(case.grid, dtype=torch.float64)

    def total(regions, sentences):
        to_region, to_sentence, *_ = align(regions, sentences, case.mask)
        return (local_image_loss(regions, to_region, p, weights=case.region_weights)
                + local_report_loss(sentences, to_sentence, case.mask, weights=case.sentence_weights))

    assert torch.autograd.gradcheck(total, (regions, sentences), fast_mode=True)


@given(cases)
@easy
def test_losses_from_their_definition(case):
    regions, aligned = case.regions, case.regions.roll(1, 1) + 0.5 * case.regions
    p, tau = positiveness(case.grid, dtype=torch.float64), 0.3
    want = 0
    for z, g, w in zip(regions, aligned, case.region_weights):
        s = torch.nn.functional.cosine_similarity(z[:, None], g[None], dim=-1) / tau
        for k in range(len(s)):
            want += w[k] / w.sum() * -(p[k] @ s[k].log_softmax(0) + p[k] @ s[:, k].log_softmax(0)) / 2
    torch.testing.assert_close(local_image_loss(regions, aligned, p, tau, case.region_weights), want / len(regions))

    sentences, gathered, want = case.sentences, case.sentences.roll(1, 1) + 0.5 * case.sentences, 0
    for z, g, w, n in zip(sentences, gathered, case.sentence_weights, case.lengths):
        s = torch.nn.functional.cosine_similarity(z[:n, None], g[None, :n], dim=-1) / tau
        for m in range(n):
            want -= w[m] / w[:n].sum() * (s[m].log_softmax(0)[m] + s[:, m].log_softmax(0)[m]) / 2
    found = local_report_loss(sentences, gathered, case.mask, tau, case.sentence_weights)
    torch.testing.assert_close(found, torch.as_tensor(want, dtype=torch.float64) / len(sentences))


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 1.0]),
       st.sampled_from([0.0, 0.5, 1.0, 3.0]))
@easy
def test_positives(h, w, threshold, beta):
    "Against distances in exact fractions, cell by cell."
    p = positiveness((h, w), beta, threshold, dtype=torch.float64)
    limit = Fraction(str(threshold)) ** 2
    for k in range(h * w):
        squared = [Fraction((k // w - l // w) ** 2 + (k % w - l % w) ** 2, h * h + w * w) for l in range(h * w)]
        row = torch.tensor([math.exp(-beta * float(d) ** 0.5) if d <= limit else 0.0 for d in squared], dtype=torch.float64)
        torch.testing.assert_close(p[k], row / row.sum())
    assert torch.equal(p > 0, (p > 0).T)
    assert torch.equal(positiveness((h, w), beta, threshold, smooth=False), positiveness((h, w), 0.0, threshold))


@pytest.mark.parametrize("side", [4, 8, 14])
def test_ties_are_positives(side):
    "On even square grids two cells may be exactly T apart: half the side in both directions."
    p = positiveness((side, side))
    assert p[0, (side // 2) * (side + 1)] > 0 and p[0, (side // 2) * (side + 1) + 1] == 0
    assert positiveness((6, 8), threshold=0.3)[0, 3] > 0  # 3 of a diagonal of 10, though 0.3 is no binary fraction


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@given(case=cases, scale=st.sampled_from([1e-4, 1.0, 6e4]))
@easy
def test_half_precision_is_safe(kind, autocast, case, scale):
    align, pool, head = (module.float() for module in modules(case.seed))
    regions, sentences = ((x / x.abs().max() * scale).to(kind).requires_grad_() for x in (case.regions, case.sentences))
    with torch.autocast("cpu", kind, enabled=autocast):
        pooled, weights = pool(sentences, case.mask)
        to_region, to_sentence, *_ = align(regions, sentences, case.mask)
        image = local_image_loss(regions, to_region, positiveness(case.grid), 0.01, case.region_weights.to(kind))
        report = local_report_loss(sentences, to_sentence, case.mask, 0.01, weights)
    assert image.dtype == report.dtype == torch.float32 and image.isfinite() and report.isfinite()
    assert pooled.isfinite().all() and to_region.isfinite().all()
    plain = align(regions.float(), sentences.float(), case.mask)[0]
    torch.testing.assert_close(to_region, plain, rtol=1e-3, atol=1e-3)
    grads = torch.autograd.grad(image + report, (regions, sentences), allow_unused=True)
    assert scale < 1 or all(grad is None or grad.isfinite().all() for grad in grads)  # of tiny vectors they may exceed 65504


def test_padding_enters_an_alignment_only_when_asked():
    "Statistics after a step: without the switch as if the padding were not there."
    case = Case(3, 3, (2, 2), 4)
    case.mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    for padded in (False, True):
        means = []
        for one in (case, case.padded(3, 5.0)):
            align = modules(3, padded)[0]
            align(one.regions, one.sentences, one.mask)
            means.append(align.norm.running_mean)
        assert torch.allclose(*means) != padded


@given(cases)
@easy
def test_weights_are_shares(case):
    share = share_weights(case.sentence_weights, case.mask, torch.float64)
    torch.testing.assert_close(share.sum(1), case.mask.any(1).double())
    assert (share[~case.mask] == 0).all() and not share_weights(case.sentence_weights.requires_grad_(), case.mask).requires_grad
    even = share_weights(None, case.mask, torch.float64)
    torch.testing.assert_close(even * case.lengths[:, None], case.mask.double())


@given(cases, st.sampled_from(["masked", "padded"]))
@easy
def test_attention_pooling(case, query_mean):
    torch.manual_seed(case.seed)
    pool = AttentionPool(D, 4, query_mean).double()
    pooled, weights = pool(case.sentences, case.mask)
    torch.testing.assert_close(weights.sum(1), case.mask.any(1).double())
    assert (weights[~case.mask] == 0).all() and (pooled[case.lengths == 0] == 0).all()
    again = pool(case.sentences.flip(1), case.mask.flip(1))
    torch.testing.assert_close(again[0], pooled)
    torch.testing.assert_close(again[1].flip(1), weights)
    torch.testing.assert_close(pool.pool_each(case.regions)[1, 0], pool(case.regions[1:2, :1])[0][0])


@given(st.lists(st.integers(1, 12), max_size=8), st.integers(1, 30))
@easy
def test_sentences_are_dropped_whole(lengths, room):
    "Against the published rule, one sentence at a time."
    total = 0
    for i, length in enumerate(lengths):
        if total + length > room:
            total = room if i == 0 else total
            break
        total += length
    assert tokens_kept(lengths, room, "drop") == total <= tokens_kept(lengths, room) == min(sum(lengths), room)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="unknown overflow 'wrap'"):
        tokens_kept([3], 2, "wrap")
    with pytest.raises(ValueError, match="unknown query_mean 'median'"):
        AttentionPool(8, 2, "median")
