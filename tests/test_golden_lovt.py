"""LoVT's objectives, heads and bookkeeping against numbers that its published code computed (`golden/`), gradients included."""
import numpy as np
import pytest
import torch
from goldens import golden, leaves, same, same_gradients
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from medvis.data.pairs import Sample, collate, _draw_swaps, _swapped, tokenise
from medvis.encoders.features import group_matrix, pool_tokens
from medvis.encoders.heads import AttentionPool, ProjectionHead
from medvis.objectives.contrastive import clip_loss, l2_normalize
from medvis.objectives.regions import (
    CrossModalAttention, local_image_loss, local_report_loss, positiveness, share_weights, soft_cross_entropy)
from medvis.train.schedules import cyclic_cosine


def test_global_loss():
    g = golden("lovt_global_nce")
    image, report = leaves(g, "zg_image", "zg_report")
    tau, lam = float(g["tau"]), float(g["lam"])
    loss = clip_loss(image, report, tau, lam)
    same(loss, g["loss"])
    same(clip_loss(image, report, tau, 1.0), g["l_i2r"])
    same(clip_loss(image, report, tau, 0.0), g["l_r2i"])
    same_gradients(loss, [image, report], [g["grad_image"], g["grad_report"]])


def test_global_loss_with_negatives_of_the_same_side():
    "An option that no published configuration uses: the same loss over [the other side, own side without oneself]."
    g = golden("lovt_global_nce")
    image, report = leaves(g, "zg_image", "zg_report")
    v, t, tau, lam = l2_normalize(image), l2_normalize(report), float(g["tau"]), float(g["lam"])
    alone, target = torch.eye(len(v), dtype=torch.bool), torch.arange(len(v))

    def one_way(a, b):
        rivals = torch.cat([a @ b.T, (a @ a.T).masked_fill(alone, -torch.inf)], 1) / tau
        return nn.functional.cross_entropy(rivals, target)

    there, back = one_way(v, t), one_way(t, v)
    same(there, g["same_l_i2r"])
    same(back, g["same_l_r2i"])
    same(lam * there + (1 - lam) * back, g["same_loss"])
    same_gradients(lam * there + (1 - lam) * back, [image, report], [g["same_grad_image"], g["same_grad_report"]])


@pytest.mark.parametrize("case", ["big", "small", "hard", "uniform"])
def test_local_image(case):
    g = golden("lovt_local_image")
    tau, grid = float(g["tau"]), tuple(g["grid_small" if case == "small" else "grid_big"].tolist())
    z, gathered = leaves(g, f"{case}_z", f"{case}_zatt")
    weights = g.get(f"{case}_w")
    p = positiveness(grid, float(g["beta"]), float(g["threshold"]), smooth=case != "hard", dtype=torch.float64)
    rounded = grid[0] * grid[1] > 25 and case != "hard"  # there the published distances are single-precision matrix products
    same(p, g[f"{case}_p"], atol=1e-5 if rounded else 1e-8)
    for table, slack in ((g[f"{case}_p"], 1e-9), (p, 6e-7 if rounded else 1e-8)):
        loss = local_image_loss(z, gathered, table, tau, weights)
        same(loss, g[f"{case}_loss"], atol=slack)
        same_gradients(loss, [z, gathered], [g[f"{case}_grad_z"], g[f"{case}_grad_zatt"]], atol=slack)
        mask = torch.ones(z.shape[:2], dtype=torch.bool)
        scores, share = l2_normalize(z) @ l2_normalize(gathered).mT / tau, share_weights(weights, mask, z.dtype)
        same(soft_cross_entropy(scores, table, share, mask), g[f"{case}_l_a"], atol=slack)
        same(soft_cross_entropy(scores.mT, table, share, mask), g[f"{case}_l_b"], atol=slack)


@pytest.mark.parametrize("case", ["weighted", "uniform", "nomask"])
def test_local_report(case):
    g = golden("lovt_local_report")
    tau = float(g["tau"])
    z, gathered = leaves(g, "z", "zatt")
    mask = torch.ones_like(g["mask"], dtype=torch.bool) if case == "nomask" else g["mask"] > 0
    weights = None if case == "uniform" else g["w"]
    loss = local_report_loss(z, gathered, mask, tau, weights)
    same(loss, g[f"{case}_loss"])
    same_gradients(loss, [z, gathered], [g[f"{case}_grad_z"], g[f"{case}_grad_zatt"]])
    share = share_weights(weights, mask, z.dtype)
    same(share, g[f"{case}_w_used"])
    alone = positiveness((1, mask.shape[1]), threshold=0.0, dtype=torch.float64)
    same(alone * mask[:, None], g[f"{case}_p"])
    scores = l2_normalize(z) @ l2_normalize(gathered).mT / tau
    same(soft_cross_entropy(scores, alone, share, mask), g[f"{case}_l_a"])
    same(soft_cross_entropy(scores.mT, alone, share, mask), g[f"{case}_l_b"])


def alignment(g: dict, padded: bool = True) -> CrossModalAttention:
    "The published alignment model with the stored weights."
    model = CrossModalAttention(len(g["A_b"]), padded).double()
    model.load_state_dict({
        **{f"{ours}.{kind}": g[f"{theirs}_{kind[0]}"] for kind in ("weight", "bias")
           for ours, theirs in (("match", "A"), ("value", "V"), ("out", "O"), ("norm", "bn"))},
        "norm.running_mean": g["bn_mean"], "norm.running_var": g["bn_var"], "norm.num_batches_tracked": torch.tensor(0)})
    assert model.norm.eps == float(g["bn_eps"]) and model.norm.momentum == float(g.get("bn_momentum", 0.1))
    return model


@pytest.mark.parametrize("case", ["train", "eval", "nomask"])
def test_cross_attention(case):
    g = golden("lovt_cross_attention")
    model = alignment(g).train(case != "eval")
    regions, sentences = leaves(g, "z_image", "z_report")
    mask = torch.ones_like(g["mask"], dtype=torch.bool) if case == "nomask" else g["mask"] > 0
    to_region, to_sentence, region_maps, sentence_maps = model(regions, sentences, mask)
    for found, name in ((to_region, "r2i"), (to_sentence, "i2r"), (region_maps, "alpha"), (sentence_maps, "beta")):
        same(found, g[f"{case}_{name}"])
    total = (to_region * g["cot_r2i"]).sum() + (to_sentence * g["cot_i2r"]).sum()
    same_gradients(total, [regions, sentences], [g[f"{case}_grad_image"], g[f"{case}_grad_report"]], atol=1e-10)
    if case == "train":
        same(model.scores(regions, sentences), g["train_scores"])
        same(model.norm.running_mean, g["train_bn_mean_after"])
        same(model.norm.running_var, g["train_bn_var_after"])
        of = [model.match.weight, model.value.weight, model.out.weight, model.norm.weight]
        same_gradients(total, of, [g[f"train_grad_{name}_w"] for name in ("A", "V", "O", "bn")], atol=1e-10)


def test_cross_attention_without_padding_effects():
    "Where nothing is padded, our default and the published behaviour are one."
    g = golden("lovt_cross_attention")
    for found, name in zip(alignment(g, padded=False)(g["z_image"], g["z_report"], torch.ones_like(g["mask"], dtype=torch.bool)),
                           ("r2i", "i2r", "alpha", "beta"), strict=True):
        same(found, g[f"nomask_{name}"])


def pool_of(g: dict, query_mean: str = "padded") -> AttentionPool:
    pool = AttentionPool(len(g["out_b"]), int(g["heads"]), query_mean).double()
    names = {"in_proj_weight": "in_w", "in_proj_bias": "in_b", "out_proj.weight": "out_w", "out_proj.bias": "out_b"}
    pool.attention.load_state_dict({ours: g[theirs] for ours, theirs in names.items()})
    return pool


@pytest.mark.parametrize("case", ["nomask", "mask", "pad3"])
def test_attention_pool(case):
    g = golden("lovt_attention_pool")
    x, = leaves(g, "x")
    mask, more = g["mask"] > 0, g[f"{case}_w"].shape[1] - x.shape[1]
    local = nn.functional.pad(x, (0, 0, 0, more))
    mask = None if case == "nomask" else nn.functional.pad(mask, (0, more))
    pooled, weights = pool_of(g)(local, mask)
    same(pooled, g[f"{case}_pooled"])
    same(weights, g[f"{case}_w"])
    wanted, cot = g[f"{case}_grad_x"], g["cot"]
    if mask is None:
        return same_gradients((pooled * cot).sum(), [x], [wanted])
    # Published padding rows are part of the query's sum and so have a gradient, which the zeros they come from never use.
    found, = torch.autograd.grad((pooled * cot).sum(), x)
    real = g["mask"] > 0
    same(found[real], wanted[:, : x.shape[1]][real])
    assert (found[~real] == 0).all()


def test_attention_pool_without_padding_effects():
    g = golden("lovt_attention_pool")
    x, mask = g["x"], g["mask"] > 0
    pooled, weights = pool_of(g, "masked")(x, mask)
    for i, n in enumerate(mask.sum(1)):
        alone = pool_of(g)(x[i : i + 1, mask[i]])
        same(pooled[i], alone[0][0])
        same(weights[i, mask[i]], alone[1][0])
        assert weights[i].sum() > 0.999 and n > 0


@pytest.mark.parametrize("case", ["global", "local", "nonorm"])
def test_projection_heads(case):
    g = golden("lovt_projection_heads")
    hidden, dim = g[f"{case}_W1"].shape
    head = ProjectionHead(dim, hidden, len(g[f"{case}_b2"]), "none" if case == "nonorm" else "hidden", "kaiming").double()
    linear = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(linear, 1):
        layer.load_state_dict({"weight": g[f"{case}_W{i}"], "bias": g[f"{case}_b{i}"]})
    norms = [layer for layer in head.layers if isinstance(layer, nn.BatchNorm1d)]
    for norm in norms:
        norm.load_state_dict({"weight": g[f"{case}_bn_w"], "bias": g[f"{case}_bn_b"], "running_mean": g[f"{case}_bn_mean"],
                              "running_var": g[f"{case}_bn_var"], "num_batches_tracked": torch.tensor(0)})
        assert norm.eps == float(g["bn_eps"]) and norm.momentum == float(g["bn_momentum"])
    x, = leaves(g, f"{case}_x")
    same(head.eval()(x), g[f"{case}_eval"])
    out = head.train()(x)
    same(out, g[f"{case}_train"])
    same_gradients((out * g[f"{case}_cot"]).sum(), [x], [g[f"{case}_grad_x"]], atol=1e-10)
    for norm in norms:
        same(norm.running_mean, g[f"{case}_bn_mean_after"])
        same(norm.running_var, g[f"{case}_bn_var_after"])


def test_padding_safe_head():
    "With the mask, the padded rows of the local case have no part in the statistics."
    g = golden("lovt_projection_heads")
    mask, x = g["mask"] > 0, g["local_x"]
    head = ProjectionHead(x.shape[-1], 20, 8, "hidden").double()
    same(head(x, mask)[mask], head(x[mask]))


def test_schedule():
    g = golden("lovt_schedule")
    steps = -(-int(g["batches_per_epoch"]) // int(g["accumulate"]))
    assert steps == int(g["steps_per_epoch"]) and len(g["lr"]) == steps * int(g["epochs"])
    rates = torch.tensor([cyclic_cosine(t, steps, float(g["lr0"])) for t in range(len(g["lr"]))], dtype=torch.float64)
    same(rates, g["lr"], atol=1e-17)


@pytest.fixture
def report_batch():
    "The stored reports as words of a tokenizer that gives each number to its own word, put through `tokenise` and `collate`."
    g = golden("lovt_sentences")
    special = {"[PAD]": int(g["pad_id"]), "[CLS]": int(g["cls_id"]), "[SEP]": int(g["sep_id"]), "[UNK]": 10**6}
    vocabulary = {**special, **{f"t{i}": i for i in g["token_ids"].tolist()}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{name[1:4].lower()}_token": name for name in special})
    numbers, lengths = iter(g["token_ids"].tolist()), iter(g["sentence_lengths"].tolist())
    texts = [[" ".join(f"t{next(numbers)}" for _ in range(next(lengths))) for _ in range(n)] for n in g["sentences_per_report"]]
    reports = [tokenise(text, tokenizer, int(g["max_length"]), overflow="drop") for text in texts]
    return g, collate([Sample(i, i, torch.zeros(1, 1, 1), report) for i, report in enumerate(reports)])


def test_sentence_collation(report_batch):
    g, batch = report_batch
    wide = g["input_ids"].shape[1]
    more = (0, wide - batch.input_ids.shape[1])
    same(nn.functional.pad(batch.input_ids, more, value=int(g["pad_id"])), g["input_ids"], rtol=0)
    same(nn.functional.pad(batch.attention_mask, more), g["attention_mask"], rtol=0)
    index = nn.functional.pad(batch.sentence_index, more, value=-1)
    same(index < 0, g["special_tokens_mask"] > 0, rtol=0)
    member = group_matrix(index)
    same(member.any(-1), g["sentence_mask"], rtol=0)
    same(((index[:, None] == index[..., None]) & (index >= 0)[:, None])[:, 1:-1, 1:-1], g["same_sentence"], rtol=0)
    room = g["gather_index"].shape[2]
    for b, report in enumerate(member):
        for m, tokens in enumerate(report):
            places = (b * wide + tokens.nonzero()[:, 0]).tolist()
            assert places + [-1] * (room - len(places)) == g["gather_index"][b, m].tolist()
            assert len(places) == g["sentence_token_mask"][b, m].sum()


def test_sentence_pooling(report_batch):
    g, batch = report_batch
    features, = leaves(g, "features")
    index = nn.functional.pad(batch.sentence_index, (0, features.shape[1] - batch.sentence_index.shape[1]), value=-1)
    sentences, mask = pool_tokens(features, index, "max")
    whole, weights = pool_of(g)(sentences, mask)
    same(sentences, g["sentence_features"])
    same(whole, g["report_feature"])
    same(weights, g["sentence_weights"])
    total = (sentences * g["cot_local"]).sum() + (whole * g["cot_global"]).sum()
    same_gradients(total, [features], [g["grad_features"]], atol=1e-10)


def test_swaps():
    g = golden("lovt_sentences")
    assert _swapped(range(int(g["swap_n"])), g["swap_pairs"].tolist()) == g["swap_result"].tolist()
    theirs, again = g["swap_count_hist"].numpy(), float(g["swap_p"])
    rng, draws = np.random.default_rng(0), 40_000
    counts = np.array([len(_draw_swaps(5, 1 - again, rng)) for _ in range(draws)])
    ours = np.bincount(counts.clip(max=len(theirs) - 1), minlength=len(theirs))
    p = (1 - again) * again ** np.arange(len(theirs))
    p[-1] = again ** (len(theirs) - 1)
    for hist, n in ((theirs, theirs.sum()), (ours, draws)):
        assert (abs(hist - n * p) < 6 * np.sqrt(n * p * (1 - p))).all()


def test_total_loss():
    g = golden("lovt_total_loss")
    model, mask, grid = alignment(g), g["mask"] > 0, tuple(g["grid"].tolist())
    regions, sentences, v, t = leaves(g, "z_image", "z_report", "zg_image", "zg_report")
    region_weights, sentence_weights = leaves(g, "w_image", "w_report")
    to_region, to_sentence, *_ = model(regions, sentences, mask)
    p = positiveness(grid, dtype=torch.float64)
    every = torch.ones(regions.shape[:2], dtype=torch.bool)
    slack = dict(rtol=1e-6, atol=3e-6 if grid[0] * grid[1] > 25 else 1e-7)
    for name, z, gathered, target, weights, valid in (
            ("a", regions, to_region, p, region_weights, every),
            ("b", sentences, to_sentence, torch.eye(mask.shape[1]).double(), sentence_weights, mask)):
        scores, share = l2_normalize(z) @ l2_normalize(gathered).mT / 0.3, share_weights(weights, valid, z.dtype)
        same(soft_cross_entropy(scores, target, share, valid), g[f"l_local_{name}_l2att"], **slack)
        same(soft_cross_entropy(scores.mT, target, share, valid), g[f"l_local_{name}_att2l"], **slack)
    same(clip_loss(v, t, 0.1, 1.0), g["l_global_a2b"])
    same(clip_loss(v, t, 0.1, 0.0), g["l_global_b2a"])
    loss = (clip_loss(v, t, 0.1, 0.75) + 0.75 * local_image_loss(regions, to_region, p, weights=region_weights)
            + 0.75 * local_report_loss(sentences, to_sentence, mask, weights=sentence_weights))
    same(loss, g["loss"], **slack)
    names = ("z_image", "z_report", "zg_image", "zg_report", "A_w", "V_w", "O_w")
    of = [regions, sentences, v, t, model.match.weight, model.value.weight, model.out.weight]
    same_gradients(loss, of, [g[f"grad_{name}"] for name in names], **slack)
    assert torch.autograd.grad(loss, [region_weights, sentence_weights], allow_unused=True) == (None, None)
