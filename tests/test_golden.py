"""The objectives against numbers that the published code of MGCA computed (`golden/`), gradients included."""
import pytest
import torch
from goldens import golden, leaves, same, same_gradients

from medvis.encoders.heads import ProjectionHead
from medvis.encoders.text import TextEncoder, released_word_index, released_words
from medvis.objectives.contrastive import clip_loss, l2_normalize
from medvis.objectives.prototypes import prototype_loss, sinkhorn
from medvis.objectives.tokens import clip_weights, gather_context, token_alignment_loss


def test_instance():
    g = golden("mgca_ita")
    image, report = leaves(g, "img", "rep")
    loss = 2 * clip_loss(image, report, float(g["tau1"]))  # released: the sum of the directions
    same(loss, g["loss"])
    same(clip_loss(image, report, float(g["tau1"]), direction_weight=1.0), g["l_img2txt"])
    same(clip_loss(image, report, float(g["tau1"]), direction_weight=0.0), g["l_txt2img"])
    same_gradients(loss, [image, report], [g["grad_img"], g["grad_rep"]])


@pytest.mark.parametrize("case", "abc")
def test_sinkhorn(case):
    g = golden("mgca_sinkhorn")
    codes = sinkhorn(g[f"{case}_scores"], float(g["epsilon"]), int(g[f"{case}_iterations"]))
    same(codes, g[f"{case}_codes"], atol=1e-7)  # stored in single precision


def test_prototypes():
    g = golden("mgca_cpa")
    image, report, prototypes = leaves(g, "img", "rep", "proto_normalised")
    settings = (float(g["tau3"]), float(g["epsilon"]), int(g["iterations"]))
    loss = prototype_loss(image, report, prototypes, *settings)
    same(loss, g["loss"], atol=1e-7)  # the published codes are rounded to single precision
    same(prototype_loss(image, report, g["proto"], *settings), g["loss"], atol=1e-7)
    same_gradients(loss, [image, report, prototypes], [g["grad_img"], g["grad_rep"], g["grad_proto"]], atol=1e-7)

    scores = {side: l2_normalize(g[side]) @ l2_normalize(g["proto"]).T for side in ("img", "rep")}
    same(l2_normalize(g["proto"]), g["proto_normalised"])
    for side, other, name in (("img", "rep", "l_imgcode_repprob"), ("rep", "img", "l_repcode_imgprob")):
        same(scores[side], g[f"scores_{side}"])
        codes = sinkhorn(scores[side], *settings[1:])
        same(codes, g[f"code_{side}"], atol=1e-7)
        same(-(codes * (scores[other] / settings[0]).log_softmax(1)).sum(1).mean(), g[name], atol=1e-7)


def both_ways(scores: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Weighted cross-entropy with the diagonal as label, along rows and down columns, by torch's own function."
    target = torch.arange(scores.shape[1]).expand(len(scores), -1)
    cost = [torch.nn.functional.cross_entropy(table, target, reduction="none") for table in (scores.mT, scores)]  # classes first
    return tuple((weights * one).sum(1).mean() for one in cost)


def token_case(g: dict, resnet: bool, by_word=None, by_patch=None) -> tuple[list, tuple[torch.Tensor, ...], dict]:
    "Leaves, the whole loss and that of words and of patches alone, and the contexts, of a fixture of token alignment."
    patches, words = leaves(g, "patch", "word")
    tau, valid = float(g["tau2"]), g["pad"] == 0
    patch_weights = torch.full(patches.shape[:2], 1 / patches.shape[1], dtype=torch.float64) if resnet else clip_weights(g["cls_attention"].mean(1))
    word_weights = clip_weights(g["word_attn"])

    def loss(patch_share: float, word_share: float) -> torch.Tensor:
        return token_alignment_loss(
            patches, words, valid, tau, patch_share * patch_weights, word_share * word_weights, mask_padding=False,
            unit_region_context=resnet, word_attention=by_word, region_attention=by_patch)

    z, r = l2_normalize(g["word"]), l2_normalize(g["patch"])
    seen = l2_normalize(gather_context(z, r, torch.ones(r.shape[:2], dtype=torch.bool), tau, by_word)[0])
    read = gather_context(r, z, valid, tau, by_patch)[0]
    read = l2_normalize(read) if resnet else read
    contexts = {"word_context": seen, "patch_context": read, "word_sim": z @ seen.mT / tau, "patch_sim": r @ read.mT / tau,
                "word_weights": word_weights, "patch_weights": patch_weights}
    return [patches, words], (loss(1, 1), loss(0, 1), loss(1, 0)), contexts


@pytest.mark.parametrize("name", ["mgca_cta_resnet", "mgca_cta_vit"])
def test_tokens(name):
    g = golden(name)
    inputs, (loss, by_words, by_patches), found = token_case(g, name.endswith("resnet"))
    for key, value in found.items():
        same(value, g[key])
    for grain, part in (("word", by_words), ("patch", by_patches)):
        same(part, g[f"loss_{grain}"])
        same_gradients(part, inputs, [g[f"{grain}_only_grad_patch"], g[f"{grain}_only_grad_word"]])
        rows, columns = both_ways(found[f"{grain}_sim"], found[f"{grain}_weights"])
        same(rows, g[f"l_{grain}_rows"], rtol=1e-7)
        same(columns, g[f"l_{grain}_cols"], rtol=1e-7)
    same(loss, g["loss"])
    same_gradients(loss, inputs, [g["grad_patch"], g["grad_word"]])


def attention(g: dict, name: str) -> torch.nn.MultiheadAttention:
    layer = torch.nn.MultiheadAttention(g[f"{name}_out_w"].shape[0], 1, batch_first=True, dtype=torch.float64)
    layer.load_state_dict({
        "in_proj_weight": g[f"{name}_in_w"], "in_proj_bias": g[f"{name}_in_b"],
        "out_proj.weight": g[f"{name}_out_w"], "out_proj.bias": g[f"{name}_out_b"]})
    return layer


@pytest.mark.parametrize("case", ["resnet", "vit"])
def test_tokens_with_learned_attention(case):
    g = golden("mgca_cta_mha")
    by_word, by_patch = attention(g, "wordq"), attention(g, "patchq")
    inputs, (loss, by_words, by_patches), found = token_case(g, case == "resnet", by_word, by_patch)
    same(loss, g[f"{case}_loss"])
    same(by_words, g[f"{case}_loss_word"])
    same(by_patches, g[f"{case}_loss_patch"])
    for key in ("word_context", "patch_context"):
        same(found[key], g[f"{case}_{key}"])
    same_gradients(
        loss, [*inputs, by_word.in_proj_weight, by_patch.in_proj_weight],
        [g[f"{case}_grad_{name}"] for name in ("patch", "word", "wordq_in_w", "patchq_in_w")])


def as_indexed(g: dict) -> tuple[torch.Tensor, torch.Tensor]:
    "Word index and attention mask of the fixture's pieces, as `medvis.data.pairs` writes them."
    kind = g["piece_kind"][g["piece_ids"]]  # 0 start, 1 continuation, 2 [CLS], 3 [SEP], 4 [PAD]
    return ((kind == 0).cumsum(1) - 1).masked_fill(kind > 1, -1), (kind != 4).long()


def test_released_words():
    g = golden("mgca_aggregate_tokens")
    embeddings, = leaves(g, "emb")
    (word_index, attention_mask), length = as_indexed(g), g["piece_ids"].shape[1]
    attention = torch.nn.functional.pad(g["attn"], (1, 0))  # of [CLS] to itself: never used
    words, mask, weights = released_words(embeddings, attention, word_index, attention_mask, length)
    same(words, g["word_emb"])
    same(weights, g["word_attn"])
    assert mask.sum(1).tolist() == g["n_words"].tolist()
    same_gradients((words * g["cot"]).sum(), [embeddings], [g["grad_emb"]])

    index = released_word_index(word_index, attention_mask, length)
    for ids, numbers, wanted in zip(g["piece_ids"], index, g["word_pieces"]):
        merged = [ids[numbers == word].tolist() for word in range(length)]
        assert merged == [row[row >= 0].tolist() for row in wanted]


class Replay(torch.nn.Module):
    "A text body that answers with the fixture's embeddings and attention."

    def __init__(self, g: dict):
        super().__init__()
        self.config = type("Config", (), {"hidden_size": g["emb"].shape[-1], "num_hidden_layers": 1})
        last = torch.nn.functional.pad(g["attn"], (1, 0))[:, None, None, :].repeat(1, 2, 1, 1)  # (B, heads, 1, T): [CLS] alone
        self.out = type("Out", (), {"last_hidden_state": g["emb"], "attentions": [None, last]})

    def forward(self, **inputs):
        return self.out


def test_released_words_are_what_the_encoder_gives():
    "The preset's own path: [CLS] is the report and no word, everything else as in the fixture."
    g = golden("mgca_aggregate_tokens")
    word_index, attention_mask = as_indexed(g)
    encoder = TextEncoder(Replay(g), None, released_words=g["piece_ids"].shape[1])
    out = encoder(g["piece_ids"], attention_mask, word_index, word_index.clamp(max=0))
    same(out.words, g["word_emb"][:, 1:])
    same(out.word_weights, g["word_attn"][:, 1:])
    same(out.whole, g["word_emb"][:, 0])
    assert out.word_mask.sum(1).tolist() == (g["n_words"] - 1).tolist()


@pytest.mark.parametrize("case", ["global", "local"])
def test_heads(case):
    g = golden("mgca_embed_heads")
    head = ProjectionHead(g[f"{case}_x"].shape[-1], *g[f"{case}_W1"].shape[:1], g[f"{case}_W2"].shape[0], norm="both").double()
    first, norm1, _, second, norm2 = head.layers
    first.load_state_dict({"weight": g[f"{case}_W1"], "bias": g[f"{case}_b1"]})
    second.load_state_dict({"weight": g[f"{case}_W2"], "bias": g[f"{case}_b2"]})
    norm1.weight.data, norm1.bias.data = g[f"{case}_bn1_w"].clone(), g[f"{case}_bn1_b"].clone()
    for layer, name in ((norm1, "bn1"), (norm2, "bn2")):
        layer.running_mean.copy_(g[f"{case}_{name}_mean"])
        layer.running_var.copy_(g[f"{case}_{name}_var"])
        assert layer.eps == float(g["bn_eps"]) and layer.momentum == float(g["bn_momentum"])
    x, = leaves(g, f"{case}_x")
    same(head.eval()(x), g[f"{case}_eval"])
    out = head.train()(x)
    same(out, g[f"{case}_train"])
    same_gradients((out * g[f"{case}_cot"]).sum(), [x], [g[f"{case}_grad_x"]], rtol=1e-7)
    for layer, name in ((norm1, "bn1"), (norm2, "bn2")):
        same(layer.running_mean, g[f"{case}_{name}_mean_after"])
        same(layer.running_var, g[f"{case}_{name}_var_after"])
