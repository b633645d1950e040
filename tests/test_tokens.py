"""What must hold of contrast, tokens and prototypes, and of MGCA and GLoRIA built on them, whatever the numbers are."""
import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medvis.data.pairs import Batch, Sample, collate, tokenise
from medvis.encoders.heads import ProjectionHead
from medvis.encoders.text import encode_sentences, text_encoder
from medvis.methods.gloria import GLoRIA, _cls_and_words
from medvis.methods.method import phantom_tokenizer
from medvis.methods.mgca import MGCA, _token_loss
from medvis.objectives.contrastive import clip_loss, pair_loss, l2_normalize, valid_pairs
from medvis.objectives.prototypes import prototype_loss, sinkhorn
from medvis.objectives.tokens import (
    clip_weights, gather_context, gloria_attention, gloria_loss, gloria_scores, matching_scores, recognition_loss,
    token_alignment_loss)

small = settings(max_examples=25, deadline=None)
few = settings(max_examples=6, deadline=None)
seeds, sizes, few_words = st.integers(0, 2**31), st.integers(2, 7), st.lists(st.integers(1, 5), min_size=2, max_size=5)
HALVES = (torch.float16, torch.bfloat16)
close = torch.testing.assert_close


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(seed: int, n: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def token_batch(seed: int, lengths: list[int], regions: int, d: int = 6):
    "Regions (B, N, d), words (B, W, d) with arbitrary numbers in the padding, and the mask of words."
    lengths = torch.tensor(lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return draw(seed, len(lengths), regions, d), draw(seed + 1, *mask.shape, d), mask


def more_padding(seed: int, words: torch.Tensor, mask: torch.Tensor, extra: int):
    "The same words with other numbers in the padding, and more of it."
    other = torch.where(mask[..., None], words, 30 * draw(seed, *words.shape))
    return torch.cat([other, 30 * draw(seed + 1, len(words), extra, words.shape[-1])], 1), F.pad(mask, (0, extra))


def gradients(loss: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, of)


def same_under(make, of: tuple[torch.Tensor, ...], changed: tuple[torch.Tensor, ...], back) -> None:
    "Loss and gradients of `make` agree for two inputs; `back` undoes the change in the second's gradients."
    of, changed = ([x.clone().requires_grad_() for x in xs] for xs in (of, changed))
    first, second = make(*of), make(*changed)
    close(first, second)
    for one, two in zip(gradients(first, *of), back(*gradients(second, *changed)), strict=True):
        close(one, two)


# Image against report


@small
@given(seeds, sizes, st.floats(0.02, 2), st.floats(0, 1), st.booleans())
def test_contrast_ignores_order(seed, n, temperature, weight, drop):
    v, t, shuffle = draw(seed, n, 5), draw(seed + 1, n, 5), order(seed, n)
    valid = valid_pairs(torch.arange(n) // 2) if drop else torch.ones(n, n, dtype=torch.bool)
    valid_then = iter((valid, valid[shuffle][:, shuffle]))
    same_under(lambda a, b: clip_loss(a, b, temperature, weight, next(valid_then)), (v, t), (v[shuffle], t[shuffle]),
               lambda a, b: (a[shuffle.argsort()], b[shuffle.argsort()]))


@small
@given(seeds, sizes, st.floats(0.1, 2), st.floats(0, 1))
def test_contrast_is_what_it_says(seed, n, temperature, weight):
    v, t = draw(seed, n, 5), draw(seed + 1, n, 5)
    score = [[float(v[i] @ t[j] / v[i].norm() / t[j].norm() / temperature) for j in range(n)] for i in range(n)]
    rows = sum(math.log(sum(math.exp(s) for s in score[i])) - score[i][i] for i in range(n)) / n
    columns = sum(math.log(sum(math.exp(score[j][i]) for j in range(n))) - score[i][i] for i in range(n)) / n
    assert math.isclose(clip_loss(v, t, temperature, weight), weight * rows + (1 - weight) * columns, rel_tol=1e-9)


@small
@given(seeds, st.integers(3, 7))
def test_invalid_pairs_have_no_say(seed, n):
    scores, owner = draw(seed, n, n).requires_grad_(), torch.arange(n) // 2
    valid = valid_pairs(owner)
    grad = gradients(pair_loss(scores, 0.3, valid), scores)[0]
    assert (grad[~valid] == 0).all() and (grad[valid] != 0).all() and (valid.diagonal()).all()
    other = torch.where(valid, scores.detach(), torch.tensor(1e6, dtype=scores.dtype))
    close(pair_loss(other, 0.3, valid), pair_loss(scores, 0.3, valid).detach())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("largest", [1e-4, 1.0, 2e4])
def test_half_precision_is_safe(dtype, largest):
    "Finite values and gradients in half precision, with the most extreme logits, also under autocast."
    x, y = (largest * draw(seed, 6, 9, 16).clamp(-1, 1).to(dtype) for seed in (1, 2))
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 3, 0, 2])[:, None]
    weights, prototypes = draw(3, 6, 9).abs().to(dtype), (largest * draw(4, 7, 16)).clamp(-6e4, 6e4).to(dtype)
    losses = {
        "clip": lambda a, b: clip_loss(a[:, 0], b[:, 0], 0.001),
        "tokens": lambda a, b: token_alignment_loss(a, b, mask, 0.001, clip_weights(weights), clip_weights(weights * mask)),
        "gloria": lambda a, b: gloria_loss(a, b, mask),
        "prototypes": lambda a, b: prototype_loss(a[:, 0], b[:, 0], prototypes, 0.001, 0.001),
    }
    for (name, loss), against in itertools.product(losses.items(), (y, x, -x)):
        for autocast in (False, True):
            a, b = x.clone().requires_grad_(), against.clone().requires_grad_()
            with torch.autocast("cpu", dtype, enabled=autocast):
                value = loss(a, b)
            assert value.dtype == torch.float32 and value.isfinite(), name
            found = torch.autograd.grad(value, (a, b))
            # the gradient of a cosine grows as one over the length, which float16 cannot always hold
            assert all(g.isfinite().all() for g in found) or (dtype == torch.float16 and largest < 1e-3), name


def test_autocast_changes_nothing():
    "Under autocast the losses of single-precision features are as exact as outside."
    x, y, mask = draw(1, 4, 9, 16), draw(2, 4, 5, 16), torch.ones(4, 5, dtype=torch.bool)
    for loss in (lambda x, y: clip_loss(x[:, 0], y[:, 0], 0.1), lambda x, y: token_alignment_loss(x, y, mask, 0.1),
                 lambda x, y: gloria_loss(x, y, mask), lambda x, y: prototype_loss(x[:, 0], y[:, 0], x[:, 1])):
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(x.float(), y.float())
        close(inside.double(), loss(x, y), rtol=1e-5, atol=0)


# MGCA's tokens


def learned(seed: int, d: int = 6) -> list[torch.nn.MultiheadAttention]:
    torch.manual_seed(seed)
    return [torch.nn.MultiheadAttention(d, 1, batch_first=True, dtype=torch.float64) for _ in range(2)]


def token_options(seed: int, kind: str) -> dict:
    return dict(zip(("word_attention", "region_attention"), learned(seed))) if kind == "learned" else {}


@pytest.mark.parametrize("kind", ["cosines", "learned"])
@small
@given(seed=seeds, lengths=few_words, regions=sizes, extra=st.integers(0, 4))
def test_padding_does_not_matter_to_tokens(kind, seed, lengths, regions, extra):
    r, z, mask = token_batch(seed, lengths, regions)
    z2, mask2 = more_padding(seed, z, mask, extra)
    weights, options = draw(seed + 3, *mask.shape).abs(), token_options(seed, kind)  # also where there is no word
    cases = iter(((mask, weights * mask), (mask2, F.pad(weights, (0, extra), value=2.0))))

    def loss(r, z):
        valid, w = next(cases)
        return token_alignment_loss(r, z, valid, 0.1, word_weights=w, **options)

    same_under(loss, (r, z), (r, z2), lambda a, b: (a, b[:, :z.shape[1]]))
    z2.requires_grad_()
    grad = gradients(token_alignment_loss(r, z2, mask2, 0.1, **options), z2)[0]
    assert (grad[~mask2] == 0).all() and (grad[mask2] != 0).any()


@small
@given(seeds, few_words, sizes, st.integers(1, 4))
def test_released_padding_does_matter(seed, lengths, regions, extra):
    r, z, mask = token_batch(seed, lengths, regions)
    z2, mask2 = more_padding(seed, z, mask, extra)
    wide = token_alignment_loss(r, z2, mask2, 0.1, mask_padding=False)
    assert wide > token_alignment_loss(r, z2, mask2, 0.1)
    assert wide > token_alignment_loss(r, z2[:, :-1], mask2[:, :-1], 0.1, mask_padding=False)


@pytest.mark.parametrize("kind", ["cosines", "learned"])
@small
@given(seed=seeds, lengths=few_words, regions=sizes)
def test_order_does_not_matter_to_tokens(kind, seed, lengths, regions):
    r, z, mask = token_batch(seed, lengths, regions)
    options, word_weights, region_weights = token_options(seed, kind), draw(seed, *mask.shape).abs() * mask, draw(seed, *r.shape[:2]).abs()
    b, w, n = order(seed, len(r)), order(seed + 1, z.shape[1]), order(seed + 2, regions)
    cases = iter(((mask, word_weights, region_weights), (mask[b][:, w], word_weights[b][:, w], region_weights[b][:, n])))

    def loss(r, z):
        valid, by_word, by_region = next(cases)
        return token_alignment_loss(r, z, valid, 0.1, by_region, by_word, **options)

    same_under(loss, (r, z), (r[b][:, n], z[b][:, w]),
               lambda x, y: (x[b.argsort()][:, n.argsort()], y[b.argsort()][:, w.argsort()]))


@small
@given(seeds, few_words, sizes, st.floats(0.05, 1))
def test_tokens_are_what_they_say(seed, lengths, regions, tau):
    "One report at a time, without padding, from the equations (MGCA Eq. 4-6 without learned maps, and a weighted mean)."
    r, z, mask = token_batch(seed, lengths, regions)
    word_weights, region_weights = draw(seed + 5, *mask.shape).abs() * mask, draw(seed + 6, *r.shape[:2]).abs()
    total = 0.0
    for x, y, u, w in zip(r, (z[i, :n] for i, n in enumerate(lengths)), region_weights, (word_weights[i, :n] for i, n in enumerate(lengths))):
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        for asking, asked, share in ((y, x, w), (x, y, u)):
            gathered = (asking @ asked.T / tau).exp()
            gathered = gathered / gathered.sum(1, keepdim=True) @ asked
            scores = (asking @ (gathered / gathered.norm(dim=1, keepdim=True)).T / tau).exp()
            hit = scores.diagonal()
            total = total - (share * ((hit / scores.sum(1)).log() + (hit / scores.sum(0)).log())).sum() / 2
    close(token_alignment_loss(r, z, mask, tau, region_weights, word_weights), total / len(r))


@small
@given(seeds, few_words, sizes)
def test_unnormalised_region_context_is_the_released_vit(seed, lengths, regions):
    r, z, mask = token_batch(seed, lengths, regions)
    x, y = l2_normalize(r), l2_normalize(z)
    read = gather_context(x, y, mask, 0.1)[0]
    even = torch.full(r.shape[:2], 1 / regions, dtype=r.dtype)
    by_words = token_alignment_loss(r, z, mask, 0.1, region_weights=0 * even)
    for normalise, context in ((True, l2_normalize(read)), (False, read)):
        want = by_words + recognition_loss(x, context, even, 0.1)
        close(token_alignment_loss(r, z, mask, 0.1, unit_region_context=normalise), want)


@small
@given(seeds, few_words, sizes)
def test_weights_are_constants(seed, lengths, regions):
    r, z, mask = token_batch(seed, lengths, regions)
    source, source2 = draw(seed, *mask.shape).requires_grad_(), draw(seed, *r.shape[:2]).requires_grad_()
    by_word, by_region = source.abs() * mask, source2.abs()
    loss = token_alignment_loss(r.requires_grad_(), z, mask, 0.1, by_region, by_word)
    assert torch.autograd.grad(loss, [source, source2], allow_unused=True) == (None, None)
    clipped = clip_weights(by_word)
    assert not clipped.requires_grad
    close(clipped.sum(1), torch.ones(len(r), dtype=r.dtype))
    assert ((clipped > 0) == mask).all()


@small
@given(seeds, few_words, st.floats(0.0, 0.4))
def test_clipped_weights(seed, lengths, share):
    "Each report's own quantiles over the entries that are not zero, its order kept; a share of 0 only normalises."
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    weights = draw(seed, *mask.shape).abs() * mask
    for row, n, found in zip(weights, lengths, clip_weights(weights, share, 1 - share)):
        low, high = torch.quantile(row[:n], torch.tensor([share, 1 - share], dtype=row.dtype))
        clipped = row[:n].clamp(low, high)
        close(found[:n], clipped / clipped.sum())
    close(clip_weights(weights, 0.0, 1.0), weights / weights.sum(1, keepdim=True))


@small
@given(seeds, few_words, sizes)
def test_gathering_and_matching(seed, lengths, regions):
    r, z, mask = token_batch(seed, lengths, regions)
    r, z = l2_normalize(r), l2_normalize(z)
    context, maps = gather_context(r, z, mask, 0.1)
    close(maps.sum(-1), torch.ones(r.shape[:2], dtype=r.dtype))
    assert (maps[~mask[:, None].expand_as(maps)] == 0).all()
    close(context, maps @ z)
    close((matching_scores(r, z) / 0.1).masked_fill(~mask[:, None], -torch.inf).softmax(-1), maps)
    layer = learned(seed)[0]
    torch.nn.init.normal_(layer.in_proj_bias)
    logits = matching_scores(r, z, layer).masked_fill(~mask[:, None], -torch.inf)
    close(logits.softmax(-1), gather_context(r, z, mask, 0.1, layer)[1])
    (ask, answer, _), (ask_bias, answer_bias, _) = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    close(matching_scores(r, z, layer), F.linear(r, ask, ask_bias) @ F.linear(z, answer, answer_bias).mT / 6 ** 0.5)


# GLoRIA's words


@small
@given(seeds, few_words, sizes, st.integers(0, 4), st.booleans())
def test_padding_does_not_matter_to_gloria(seed, lengths, regions, extra, average):
    r, z, mask = token_batch(seed, lengths, regions)
    z2, mask2 = more_padding(seed, z, mask, extra)
    masks = iter((mask, mask2))
    same_under(lambda a, b: gloria_loss(a, b, next(masks), average=average), (r, z), (r, z2), lambda a, b: (a, b[:, :z.shape[1]]))
    z2.requires_grad_()
    grad = gradients(gloria_loss(r, z2, mask2), z2)[0]
    assert (grad[~mask2] == 0).all() and (grad[mask2] != 0).any()
    maps = gloria_attention(z2 @ r.mT, mask2)
    assert (maps[~mask2] == 0).all()
    close(maps[mask2].sum(-1), torch.ones(sum(lengths), dtype=r.dtype))


@small
@given(seeds, few_words, sizes)
def test_order_does_not_matter_to_gloria(seed, lengths, regions):
    r, z, mask = token_batch(seed, lengths, regions)
    b, w, n = order(seed, len(r)), order(seed + 1, z.shape[1]), order(seed + 2, regions)
    cases = iter(((mask, valid_pairs(torch.arange(len(r)) // 2)), (mask[b][:, w], valid_pairs(b // 2))))

    def loss(r, z):
        words, valid = next(cases)
        return gloria_loss(r, z, words, valid=valid)

    same_under(loss, (r, z), (r[b][:, n], z[b][:, w]),
               lambda x, y: (x[b.argsort()][:, n.argsort()], y[b.argsort()][:, w.argsort()]))


@small
@given(seeds, few_words, sizes, st.tuples(*[st.floats(0.5, 6)] * 3), st.booleans(), st.booleans())
def test_gloria_is_what_it_says(seed, lengths, regions, gammas, average, drop):
    "One pair at a time, contexts written out, three different scales, with pairs left out."
    r, z, mask = token_batch(seed, lengths, regions)
    scores = torch.zeros(len(r), len(r), dtype=r.dtype)
    for i, t in itertools.product(range(len(r)), repeat=2):
        c, q = r[i], z[t, :lengths[t]]
        chosen = (c @ q.T).exp()
        looked = (gammas[0] * chosen / chosen.sum(1, keepdim=True)).exp()
        context = (looked / looked.sum(0, keepdim=True)).T @ c
        agree = (gammas[1] * F.cosine_similarity(context, q, dim=1)).exp()
        scores[i, t] = (agree.mean() if average else agree.sum()).log()
    close(gloria_scores(r, z, mask, *gammas[:2], average), scores)
    valid = valid_pairs(torch.arange(len(r)) // 2) if drop else None
    table = gammas[2] * scores if valid is None else (gammas[2] * scores).masked_fill(~valid, -torch.inf)
    want = -(table.log_softmax(1).diagonal().mean() + table.log_softmax(0).diagonal().mean())
    close(gloria_loss(r, z, mask, *gammas, average, valid), want)


@small
@given(seeds, few_words, sizes, st.floats(1e-6, 0.1))
def test_tiles_change_nothing(seed, lengths, regions, memory):
    r, z, mask = token_batch(seed, lengths, regions)
    rooms = iter((None, memory))
    same_under(lambda a, b: gloria_loss(a, b, mask, memory=next(rooms)), (r, z), (r, z), lambda *g: g)


def test_gloria_of_nothing():
    "Images of zeros, words of zeros, texts without words: finite everywhere, and no say for the latter."
    r, z, mask = token_batch(3, [3, 2, 4], 5)
    r[0], z[1] = 0, 0
    mask[2] = False
    r, z = r.requires_grad_(), z.requires_grad_()
    scores = gloria_scores(r, z, mask)
    assert scores.isfinite().all() and (scores[:, 2] == 0).all()
    found = gradients(gloria_loss(r, z, mask), r, z)
    assert all(g.isfinite().all() for g in found) and (found[1][2] == 0).all()


# Prototypes


@small
@given(seeds, st.integers(2, 20), st.integers(2, 9), st.floats(0.05, 1), st.integers(1, 5))
def test_codes(seed, samples, prototypes, epsilon, iterations):
    scores = draw(seed, samples, prototypes).clamp(-1, 1).requires_grad_()
    codes = sinkhorn(scores, epsilon, iterations)
    assert not codes.requires_grad and (codes >= 0).all()
    close(codes.sum(1), torch.ones(samples, dtype=codes.dtype))
    plain = (scores.detach() / epsilon).exp()
    for _ in range(iterations):
        plain = plain / plain.sum(0) / prototypes
        plain = plain / plain.sum(1, keepdim=True) / samples
    close(codes, plain * samples)


@small
@given(seeds, st.integers(2, 20), st.integers(2, 9))
def test_balance_improves(seed, samples, prototypes):
    "The share of every prototype tends to B / K."
    scores = draw(seed, samples, prototypes).clamp(-1, 1)
    wrong = [(sinkhorn(scores, 0.5, n).sum(0) - samples / prototypes).abs().max() for n in (1, 3, 10, 300)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(wrong)) and wrong[-1] < 1e-3


@small
@given(seeds, sizes, st.integers(2, 6))
def test_prototypes_ignore_order_and_length(seed, n, k):
    v, t, c = draw(seed, n, 5), draw(seed + 1, n, 5), draw(seed + 2, k, 5)
    b, p = order(seed, n), order(seed + 1, k)
    same_under(prototype_loss, (v, t, c), (v[b], t[b], c[p]), lambda x, y, z: (x[b.argsort()], y[b.argsort()], z[p.argsort()]))
    close(prototype_loss(v, 2 * t, 3 * c), prototype_loss(v, t, c))


@small
@given(seeds, sizes, st.integers(2, 6), st.floats(0.1, 1), st.floats(0.05, 1))
def test_prototypes_are_what_they_say(seed, n, k, tau, epsilon):
    "Each side predicts the other's codes; codes and the prototypes' lengths are constants."
    v, t, c = (x.requires_grad_() for x in (draw(seed, n, 5), draw(seed + 1, n, 5), draw(seed + 2, k, 5)))
    fixed = c / c.detach().norm(dim=1, keepdim=True)
    scores = [l2_normalize(x) @ fixed.T for x in (v, t)]
    codes = [sinkhorn(s, epsilon, 2) for s in scores]
    want = -sum((q * (s / tau).log_softmax(1)).sum() for q, s in zip(codes, reversed(scores))) / (2 * n)
    loss = prototype_loss(v, t, c, tau, epsilon, 2)
    close(loss, want)
    for found, wanted in zip(gradients(loss, v, t, c), gradients(want, v, t, c)):
        close(found, wanted)


# The text encoder, sentence by sentence


TEXTS = ["No pleural effusion.", "The heart is mildly enlarged.", "Left pneumothorax.", "Œdème 肺 discret.", "Normal.",
         "Patchy opacity in the right upper zone, likely pneumonia.", "A 3 mm nodule."]


@pytest.fixture(scope="module")
def tokenizer():
    return phantom_tokenizer(60)


def text_batch(reports: list[list[str]], tokenizer, seed: int = 0, side: int = 32) -> Batch:
    images = draw(seed, len(reports), 1, side, side).float()
    return collate([Sample(i, i // 2, image, tokenise(text, tokenizer)) for i, (image, text) in enumerate(zip(images, reports))])


def text_of(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.input_ids, batch.attention_mask, batch.word_index, batch.sentence_index


def widen(batch: Batch, extra: int, fill: int = 0) -> Batch:
    "More padding, other ids in it."
    batch = copy.copy(batch)
    ids = batch.input_ids.masked_fill(batch.attention_mask == 0, fill)
    batch.input_ids, batch.attention_mask = F.pad(ids, (0, extra), value=fill), F.pad(batch.attention_mask, (0, extra))
    batch.word_index, batch.sentence_index = (F.pad(x, (0, extra), value=-1) for x in (batch.word_index, batch.sentence_index))
    return batch


reports_drawn = st.lists(st.lists(st.sampled_from(TEXTS), max_size=4), min_size=1, max_size=4)
options_drawn = st.fixed_dictionaries(dict(summed_layers=st.integers(1, 2), word_weights=st.booleans()))


@pytest.mark.parametrize("whole", ["cls", "pooler", "max", "mean", "mean-all"])
@few
@given(reports=reports_drawn, options=options_drawn, extra=st.integers(0, 3))
def test_sentences_alone(tokenizer, whole, reports, options, extra):
    torch.manual_seed(0)
    encoder = text_encoder("tiny-bert", tokenizer, whole=whole, **options).eval().double()
    batch = text_batch(reports, tokenizer)
    out = encode_sentences(encoder, *text_of(widen(batch, extra, 7)))
    assert out.sentence_mask.sum(1).tolist() == [len(report) for report in reports]
    for i, report in enumerate(reports):
        first = 0
        wholes = []
        for number, sentence in enumerate(report):
            alone = encoder(*text_of(text_batch([[sentence]], tokenizer)))
            n = alone.words.shape[1]
            close(out.words[i, first:first + n], alone.words[0])
            if options["word_weights"]:
                close(out.word_weights[i, first:first + n], alone.word_weights[0])
            close(out.tokens[i, :batch.input_ids.shape[1]][batch.sentence_index[i] == number], alone.tokens[0, 1:-1])
            close(out.sentences[i, number], alone.whole[0])
            wholes.append(alone.whole[0])
            first += n
        assert out.word_mask[i].sum() == first and (out.words[i, first:] == 0).all()
        close(out.whole[i], torch.stack(wholes).mean(0) if wholes else torch.zeros_like(out.whole[i]))


# The methods


def quiet(method: torch.nn.Module) -> torch.nn.Module:
    "In training mode, so that batch statistics count, but without dropout."
    for module in method.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return method.train().double()


@pytest.fixture(scope="module")
def mgca(tokenizer):
    torch.manual_seed(0)
    return quiet(MGCA.from_preset("tiny", tokenizer, hidden=16, dim=8, prototypes=5, learned_attention=True))


@pytest.fixture(scope="module")
def gloria(tokenizer):
    torch.manual_seed(0)
    return quiet(GLoRIA.from_preset("tiny", tokenizer))


def losses_and_gradients(method, batch) -> tuple[dict, dict]:
    method.zero_grad()
    losses = method(batch)
    losses.total.backward()
    close(sum(losses.parts.values()), losses.total.detach())
    return losses.parts, {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def doubled(batch: Batch) -> Batch:
    batch.image = batch.image.double()
    return batch


REPORTS = [TEXTS[:3], TEXTS[3:4], [], TEXTS[2:]]


@pytest.mark.parametrize("name", ["mgca", "gloria"])
@few
@given(extra=st.integers(1, 9), fill=st.integers(0, 30), seed=seeds)
def test_methods_do_not_see_padding(name, request, extra, fill, seed):
    "In training, batch statistics of the heads included; and the order of the batch does not matter."
    method = request.getfixturevalue(name)
    batch = doubled(text_batch(REPORTS, method.tokenizer))
    parts, grads = losses_and_gradients(method, batch)
    shuffle = order(seed, len(REPORTS))
    shuffled = Batch(*[getattr(batch, key)[shuffle] for key in (
        "image", "input_ids", "attention_mask", "word_index", "sentence_index", "study_id", "patient_id")])
    for other in (widen(batch, extra, fill), shuffled):
        parts2, grads2 = losses_and_gradients(method, other)
        assert parts.keys() == parts2.keys() and grads.keys() == grads2.keys()
        for key in parts:
            close(parts[key], parts2[key])
        scale = max(float(g.abs().max()) for g in grads.values())
        for key in grads:
            close(grads[key], grads2[key], rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.parametrize("tau, part", [("tau_instance", "instance"), ("tau_token", "token"), ("tau_prototype", "prototype")])
def test_mgca_wiring(mgca, tau, part):
    "Every part from its own head, at its own temperature, with its own weight."
    batch = doubled(text_batch(REPORTS, mgca.tokenizer))
    method = MGCA.from_preset(
        "tiny", mgca.tokenizer, hidden=16, dim=8, prototypes=5, tau_instance=0.3, tau_token=0.5, tau_prototype=0.9, epsilon=0.4,
        sinkhorn_iterations=2, instance_weight=1.5, token_weight=0.7, prototype_weight=0.4, clip_share=0.2, negatives="other-patient")
    quiet(method)
    found = method(batch).parts[part]
    c, (image, text) = method.config, method.encode(batch)
    v, t = method.global_image(image.whole), method.global_text(text.whole)
    regions, words = method.local_image(image.regions), method.local_text(text.words, text.word_mask)
    weights = clip_weights(text.word_weights, 0.2, 0.8)
    want = {
        "instance": lambda: 1.5 * clip_loss(v, t, 0.3, valid=valid_pairs(batch.patient_id)),
        "token": lambda: 0.7 * token_alignment_loss(regions, words, text.word_mask, 0.5, None, weights) / 2,
        "prototype": lambda: 0.4 * prototype_loss(v, t, method.prototypes, 0.9, 0.4, 2),
    }[part]()
    close(found, want.detach())
    assert c.directions == "mean" and getattr(c, tau) > 0.2


def test_mgca_learned_attention(mgca):
    "Words ask with one set of maps, regions with the other."
    batch = doubled(text_batch(REPORTS, mgca.tokenizer))
    image, text = mgca.encode(batch)
    want = token_alignment_loss(
        mgca.local_image(image.regions), mgca.local_text(text.words, text.word_mask), text.word_mask, mgca.config.tau_token, None,
        clip_weights(text.word_weights), word_attention=mgca.word_attention, region_attention=mgca.region_attention)
    close(_token_loss(mgca, image, text), want)


def test_mgca_regions_weigh_by_attention(tokenizer):
    "With a ViT, patches weigh by the attention that CLS pays them, clipped as the words' is."
    torch.manual_seed(0)
    method = quiet(MGCA.from_preset("tiny", tokenizer, image="tiny_vit", hidden=16, dim=8, prototypes=5, unit_region_context=False))
    batch = doubled(text_batch(REPORTS, tokenizer, side=64))
    image, text = method.encode(batch)
    regions, words = method.local_image(image.regions), method.local_text(text.words, text.word_mask)
    assert image.weights is not None
    want = token_alignment_loss(regions, words, text.word_mask, method.config.tau_token, clip_weights(image.weights),
                                clip_weights(text.word_weights), unit_region_context=False)
    close(_token_loss(method, image, text), want)
    silent = copy.copy(text)
    silent.word_weights = text.word_weights * 0  # the patches alone are left
    image.weights = draw(5, *image.weights.shape).abs().requires_grad_()
    loss = _token_loss(method, image, silent)
    assert torch.autograd.grad(loss, image.weights, allow_unused=True)[0] is None


def test_mgca_prototypes_rest_in_the_first_epoch(mgca):
    batch, method = doubled(text_batch(REPORTS, mgca.tokenizer)), copy.deepcopy(mgca)
    for epoch, moves in enumerate((False, True, True)):
        method.start_epoch(epoch)
        method.zero_grad()
        method(batch).total.backward()
        assert (method.prototypes.grad is not None and bool(method.prototypes.grad.any())) == moves
    with torch.no_grad():
        method.prototypes *= torch.linspace(0.5, 2, 5)[:, None]
    method.after_step()
    close(method.prototypes.detach().norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_mgca_as_released(mgca):
    "Padding is rival and statistic; the sum of both directions; words and weights with their slips."
    small = dict(hidden=16, dim=8, prototypes=5, directions="sum", learned_attention=False, mask_padding=False,
                 unit_region_context=False, clip_share=0.1)
    release, proper = (quiet(MGCA.from_preset("tiny", mgca.tokenizer, **small, released_words=n)) for n in (112, None))
    proper.load_state_dict(release.state_dict())
    batch = doubled(text_batch(REPORTS, mgca.tokenizer))
    image, text = release.encode(batch)
    assert text.words.shape[1] == 111 and text.word_mask[2].sum() == 1  # the empty report has its [SEP]
    words = release.local_text(text.words)
    close(words.reshape(-1, 8).mean(0), torch.zeros(8, dtype=torch.float64))  # statistics over all 111, padding included
    want = token_alignment_loss(release.local_image(image.regions), words, text.word_mask, release.config.tau_token, None,
                                clip_weights(text.word_weights), mask_padding=False, unit_region_context=False)
    parts = release(batch).parts
    close(parts["token"], want.detach())
    close(parts["instance"], 2 * clip_loss(
        release.global_image(image.whole), release.global_text(text.whole), release.config.tau_instance,
        valid=valid_pairs(batch.patient_id)).detach())
    assert not torch.isclose(parts["token"], proper(batch).parts["token"], rtol=1e-3)
    close(release(widen(batch, 5)).parts["token"], parts["token"])  # always 112, whatever the batch
    found = release.correspondence(batch)  # of the report's words alone
    assert found.words.shape[2] == batch.word_index.max() + 1 and found.word_mask.sum(1).tolist() == [
        int(row.max()) + 1 for row in batch.word_index]
    with pytest.raises(ValueError, match="max_tokens=112"):
        release(widen(batch, 112))


@pytest.mark.parametrize("token, prototype", [(0, 0), (1, 0), (0, 1)])
def test_mgca_ablations(mgca, token, prototype):
    "Parts of weight 0 have no parameters, and all that are left are trained."
    method = quiet(MGCA.from_preset(
        "tiny", mgca.tokenizer, layer="layer4", token_weight=float(token), prototype_weight=float(prototype)))
    parts, grads = losses_and_gradients(method, doubled(text_batch(REPORTS, mgca.tokenizer)))
    assert list(parts) == ["instance"] + ["token"] * token + ["prototype"] * prototype
    untrained = {name for name, _ in method.named_parameters()} - grads.keys()
    assert not untrained
    found = method.eval().correspondence(doubled(text_batch(REPORTS, mgca.tokenizer)))
    assert found.words.shape[1] == math.prod(found.grid) and found.words.isfinite().all()


@pytest.mark.parametrize("average", [False, True])
def test_gloria_wiring(gloria, average):
    "Both parts from their own maps, with their own scales and weights."
    batch = doubled(text_batch(REPORTS, gloria.tokenizer))
    method = quiet(GLoRIA.from_preset("tiny", gloria.tokenizer, attention_scale=3.0, word_scale=2.0, scale=7.0, average=average,
                                      global_weight=0.6, local_weight=1.7))
    (image, text), valid = method.encode(batch), valid_pairs(batch.patient_id)
    words, mask = torch.cat([text.tokens[:, :1], text.words], 1), F.pad(text.word_mask, (1, 0), value=True)
    found = method(batch).parts
    whole = clip_loss(method.global_image(image.whole), text.whole, 1 / 7, valid=valid)
    close(found["global"], 0.6 * 2 * whole.detach())
    close(found["local"], 1.7 * gloria_loss(
        method.local_image(image.regions), words, mask, 3.0, 2.0, 7.0, average, valid).detach())


def test_gloria_texts(gloria):
    "Both layers summed, [CLS] first, no [SEP]; the text vector is the mean of all tokens that are there."
    batch = doubled(text_batch(REPORTS, gloria.tokenizer))
    text = gloria.encode(batch)[1]
    body = gloria.text_encoder.body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    tokens = body.hidden_states[-1] + body.hidden_states[-2]
    words, mask = _cls_and_words(text)
    close(words[:, 0], tokens[:, 0])
    close(words[0, 1], tokens[0, batch.word_index[0] == 0].sum(0))
    assert mask[:, 0].all() and mask.sum(1).tolist() == [int(row.max()) + 2 for row in batch.word_index]
    close(text.whole, (tokens * batch.attention_mask[..., None]).sum(1) / batch.attention_mask.sum(1, keepdim=True))


def test_gloria_reads_sentence_by_sentence(gloria):
    method = copy.deepcopy(gloria).eval()
    batch, one = (doubled(text_batch(reports, method.tokenizer)) for reports in (REPORTS, [TEXTS[1:2]] * 4))
    one.image = batch.image
    found, alone = method.correspondence(batch), method.correspondence(one)
    n = alone.words.shape[2]
    before = int(found.word_mask[0].sum()) - n - len(tokenise(TEXTS[2:3], method.tokenizer).words)
    close(found.words[0, :, before:before + n], alone.words[0])
    close(found.sentences[0, :, 1], alone.sentences[0, :, 0])
    assert found.grid[0] * found.grid[1] == found.words.shape[1] and not found.word_mask[2].any()


def test_heads_see_only_what_is_there():
    "Masked rows are zero, give nothing to the statistics, and have no gradient."
    torch.manual_seed(0)
    head = ProjectionHead(6, 16, 8).double()
    x, mask = draw(1, 4, 5, 6).requires_grad_(), torch.arange(5) < torch.tensor([5, 1, 3, 0])[:, None]
    out = head(x, mask)
    assert (out[~mask] == 0).all()
    close(out[mask].mean(0), torch.zeros(8, dtype=torch.float64))
    assert (gradients((out * draw(2, 4, 5, 8)).sum(), x)[0][~mask] == 0).all()
