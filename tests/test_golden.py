"""The objectives against numbers that the published code of MGCA computed (`golden/`), gradients included."""
import pytest
import torch
from goldens import golden, leaves, same, same_gradients

from medvis.encoders.heads import ProjectionHead
from medvis.objectives.contrastive import clip_loss
from medvis.objectives.prototypes import prototype_loss, sinkhorn
from medvis.objectives.tokens import clip_weights, gather_context, token_alignment_loss, unit


def test_instance():
    g = golden("mgca_ita")
    image, report = leaves(g, "img", "rep")
    loss = 2 * clip_loss(image, report, float(g["tau1"]))  # released: the sum of the directions
    same(loss, g["loss"])
    same(clip_loss(image, report, float(g["tau1"]), image_weight=1.0), g["l_img2txt"])
    same(clip_loss(image, report, float(g["tau1"]), image_weight=0.0), g["l_txt2img"])
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


@pytest.mark.parametrize("name", ["mgca_cta_resnet", "mgca_cta_vit"])
def test_tokens(name):
    g, resnet = golden(name), name.endswith("resnet")
    patches, words = leaves(g, "patch", "word")
    word_weights = clip_weights(g["word_attn"])
    patch_weights = None if resnet else clip_weights(g["cls_attention"].mean(1))
    same(word_weights, g["word_weights"])
    if not resnet:
        same(patch_weights, g["patch_weights"])
    tau = float(g["tau2"])
    every = torch.ones(g["patch"].shape[:2], dtype=torch.bool)
    same(unit(gather_context(unit(words), unit(patches), every, tau)[0]), g["word_context"])
    loss = token_alignment_loss(
        patches, words, g["pad"] == 0, tau, patch_weights, word_weights, mask_padding=False, unit_region_context=resnet)
    same(loss, g["loss"])
    same_gradients(loss, [patches, words], [g["grad_patch"], g["grad_word"]])


def attention(g: dict, name: str) -> torch.nn.MultiheadAttention:
    layer = torch.nn.MultiheadAttention(g[f"{name}_out_w"].shape[0], 1, batch_first=True, dtype=torch.float64)
    layer.load_state_dict({
        "in_proj_weight": g[f"{name}_in_w"], "in_proj_bias": g[f"{name}_in_b"],
        "out_proj.weight": g[f"{name}_out_w"], "out_proj.bias": g[f"{name}_out_b"]})
    return layer


@pytest.mark.parametrize("case", ["resnet", "vit"])
def test_tokens_with_learned_attention(case):
    g = golden("mgca_cta_mha")
    patches, words = leaves(g, "patch", "word")
    by_word, by_patch = attention(g, "wordq"), attention(g, "patchq")
    weights = None if case == "resnet" else clip_weights(g["cls_attention"].mean(1))
    loss = token_alignment_loss(
        patches, words, g["pad"] == 0, float(g["tau2"]), weights, clip_weights(g["word_attn"]), mask_padding=False,
        unit_region_context=case == "resnet", word_attention=by_word, region_attention=by_patch)
    same(loss, g[f"{case}_loss"])
    same_gradients(
        loss, [patches, words, by_word.in_proj_weight, by_patch.in_proj_weight],
        [g[f"{case}_grad_{name}"] for name in ("patch", "word", "wordq_in_w", "patchq_in_w")])


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
    same(norm1.running_var, g[f"{case}_bn1_var_after"])
    same(norm2.running_mean, g[f"{case}_bn2_mean_after"])
