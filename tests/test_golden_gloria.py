"""GLoRIA's losses against numbers that its published code computed (`golden/`), gradients included."""
import pytest
import torch
from goldens import golden, leaves, same, same_gradients

from medvis.objectives.contrastive import clip_loss, pair_loss
from medvis.objectives.tokens import gloria_attention, gloria_loss, gloria_scores


def local_case(g: dict) -> tuple[list, torch.Tensor, torch.Tensor, torch.Tensor]:
    "Leaves as stored (features first), then regions (B, N, D), words (B, W, D) and their mask."
    images, words = leaves(g, "img", "words")
    mask = torch.arange(words.shape[2]) < g["lens"][:, None]
    return [images, words], images.flatten(2).mT, words.mT, mask


@pytest.mark.parametrize("memory", [None, 1e-6, 0.1])
@pytest.mark.parametrize("prefix", ["", "mean_"])
def test_local(prefix, memory):
    g = golden("gloria_losses")
    inputs, *pair = local_case(g)
    options = dict(average=prefix == "mean_", memory=memory)
    temp1, temp2, temp3 = (float(g[f"temp{i}"]) for i in (1, 2, 3))
    scores = temp3 * gloria_scores(*pair, temp1, temp2, **options)
    same(scores, g[f"{prefix}local_scores"])
    same(pair_loss(scores, 1.0), g[f"{prefix}local_i2t"])
    same(pair_loss(scores, 0.0), g[f"{prefix}local_t2i"])
    loss = gloria_loss(*pair, temp1, temp2, temp3, **options)
    same(loss, g[f"{prefix}local_i2t"] + g[f"{prefix}local_t2i"])
    same_gradients(loss, inputs, [g[f"{prefix}grad_img"], g[f"{prefix}grad_words"]])


def test_attention():
    g = golden("gloria_losses")
    _, regions, words, mask = local_case(g)
    found = gloria_attention(words @ regions.mT, mask, float(g["temp1"]))
    same(found.view_as(g["attention"]), g["attention"])


def test_global():
    g = golden("gloria_losses")
    image, text = leaves(g, "glob_img", "glob_txt")
    temperature = 1 / float(g["temp3"])
    same(clip_loss(image, text, temperature, 1.0), g["global_i2t"])
    same(clip_loss(image, text, temperature, 0.0), g["global_t2i"])
    loss = 2 * clip_loss(image, text, temperature)
    same_gradients(loss, [image, text], [g["global_grad_img"], g["global_grad_txt"]])
