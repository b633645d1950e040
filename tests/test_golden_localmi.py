"""local-mi against numbers that its published code computed (`golden/`): bounds, discriminator, image network; gradients included."""
import pytest
import torch
from goldens import FOLDER, golden, leaves, same, same_gradients

from medvis.encoders.image import LOCAL_GRIDS, ResNet256, image_encoder, load_weights
from medvis.objectives.contrastive import valid_pairs
from medvis.objectives.mutual_information import Discriminator, cpc_bound, dv_bound, released_cpc

BOUNDS = {"dv": dv_bound, "infonce": released_cpc}
ROUNDED = dict(rtol=1e-7, atol=1e-6)  # the published code takes log |N| in single precision


def cases(g: dict) -> list[str]:
    return sorted(name.removesuffix("_study") for name in g if name.endswith("_study"))


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name):
    g = golden("localmi_bounds")
    assert len(cases(g)) >= 2
    for case in cases(g):
        scores, = leaves(g, f"{case}_scores")
        valid, bound = valid_pairs(g[f"{case}_study"]), BOUNDS[name]
        kept = torch.zeros_like(valid)
        kept[g[f"{case}_pair_img"], g[f"{case}_pair_txt"]] = True
        assert torch.equal(kept, valid)
        same(-bound(scores, valid), g[f"{case}_{name}"].reshape(()), **ROUNDED)
        same_gradients(-bound(scores, valid), [scores], [g[f"{case}_{name}_grad_scores"]])
        listed = g[f"{case}_{name}_grad_logits"][:, 0]
        gradient, = torch.autograd.grad(-bound(scores, valid), scores)
        same(gradient[g[f"{case}_pair_img"], g[f"{case}_pair_txt"]], listed)
        same(scores[g[f"{case}_pair_img"], g[f"{case}_pair_txt"]], g[f"{case}_logits"][:, 0])
        assert (gradient[~valid] == 0).all()


def test_paper_cpc_is_another():
    "Eq. 4 goes image by image; the released flat sum is something else."
    g = golden("localmi_bounds")
    for case in cases(g):
        scores = g[f"{case}_scores"]
        assert abs(cpc_bound(scores) + g[f"{case}_infonce"]) > 0.1
        rows = scores.diagonal() - scores.exp().mean(1).log()
        same(cpc_bound(scores), rows.mean())


@pytest.mark.parametrize("memory", [None, 1e-6, 1.0, 1000.0])
def test_discriminator(memory):
    g = golden("localmi_discriminator")
    image, text = leaves(g, "img", "txt")
    judge = Discriminator(image.shape[1], text.shape[1], hidden=(len(g["W1"]), len(g["W2"]))).double()
    layers = [layer for layer in judge.layers if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(layers, 1):
        layer.load_state_dict({"weight": g[f"W{i}"], "bias": g[f"b{i}"]})
    scores, valid, listed = judge.scores(image, text, memory), valid_pairs(g["study"]), (g["pair_img"], g["pair_txt"])
    same(scores, g["scores"])
    same(scores[listed], g["pair_logits"])
    same(torch.cat([image[listed[0]], text[listed[1]]], 1).sum(1), g["pair_inputs_sum"])
    same(judge(image[listed[0]], text[listed[1]]), g["pair_logits"])
    weights = [part for layer in layers for part in (layer.weight, layer.bias)]
    names = ["img", "txt"] + [f"{kind}{i}" for i in range(1, len(layers) + 1) for kind in "Wb"]
    for name, bound in BOUNDS.items():
        loss = -bound(scores, valid)
        same(loss, g[name].reshape(()), **ROUNDED)
        stored = [(of, g[f"{name}_grad_{to}"]) for of, to in zip([image, text, *weights], names) if f"{name}_grad_{to}" in g]
        assert len(stored) >= 2
        for (of, wanted), found in zip(stored, torch.autograd.grad(loss, [of for of, _ in stored], retain_graph=True)):
            same(found, wanted)


@pytest.mark.skipif(not (FOLDER / "localmi_resnet256.npz").exists(),
                    reason="localmi_resnet256.npz is 4 MB of weights and not among our golden files; name a folder with it in MEDVIS_GOLDEN")
@pytest.mark.parametrize("local_grid", LOCAL_GRIDS)
def test_image_network(local_grid):
    g = golden("localmi_resnet256")
    state = {f"image_model.{key.removeprefix('w.')}": value for key, value in g.items() if key.startswith("w.")}
    layer, merge = LOCAL_GRIDS[local_grid]
    for dtype, suffix, tolerance in ((torch.float64, "", dict(rtol=1e-9, atol=1e-9)), (torch.float32, "_f32", dict(rtol=1e-4, atol=1e-3))):
        encoder = image_encoder("resnet256", local_grid=local_grid).to(dtype).eval()
        load_weights(encoder.body, state)
        with torch.no_grad():
            features = encoder(g["image"].to(dtype))
        same(features.whole, g[f"z_global{suffix}"], **tolerance)
        if layer == "layer5":
            local = torch.nn.functional.pixel_unshuffle(g[f"z_local{suffix}"], merge).flatten(2).mT
            same(features.regions, local, **tolerance)
        if dtype == torch.float64:
            logits = features.whole @ g["w.fc1.weight"].double().T + g["w.fc1.bias"].double()
            same(logits, g["logits"], **tolerance)
            same(logits.softmax(1), g["softmax"], **tolerance)


def test_image_network_has_the_published_names_and_size():
    body = ResNet256()
    state = body.state_dict()
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norms = ["bn1"] + [f"layer{i}.{j}.bn{k}" for i in range(1, 7) for j in (0, 1) for k in (1, 2)]
    norms += [f"layer{i}.0.downsample.1" for i in range(1, 7)]
    convolutions = ["conv1"] + [f"layer{i}.{j}.conv{k}" for i in range(1, 7) for j in (0, 1) for k in (1, 2)]
    convolutions += [f"layer{i}.0.downsample.0" for i in range(1, 7)]
    assert set(state) == {f"{name}.{kind}" for name in norms for kind in kinds} | {f"{name}.weight" for name in convolutions}
    assert sum(key.rpartition(".")[2] != "num_batches_tracked" for key in state) + 2 == 157  # with the classifier's two
    assert sum(value.numel() for value in body.parameters()) + 769 == 1_945_033
