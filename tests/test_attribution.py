"""Integrated gradients through the doors: of a linear model by hand, of an imported run whose cells nothing has trained, in words in the widget."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import medvis as mv
from medvis.analyse.attribution import integrated_gradients
from medvis.exchange.importing import import_checkpoint
from medvis.methods.method import phantom_tokenizer
from medvis.testing import small_phantom
from medvis.train.run import load_method
from medvis.widgets import CorrespondenceWidget, Studies

needs_captum = pytest.mark.skipif(not __import__("importlib").util.find_spec("captum"), reason="captum is not installed: pip install 'medvis[attribution]'")


class Linear:
    "An image is the weighted sum of its pixels, in a direction that does not turn: the cosine is linear in the pixels where they are few."

    weight = torch.linspace(-1, 1, 32 * 32).reshape(32, 32)

    def embed_images(self, images):
        amount = (images[:, 0] * self.weight).sum((1, 2)) * 1e-4
        return torch.stack([amount, (1 - amount**2).clamp_min(0).sqrt()], 1)              # a unit vector, whose first number is linear

    def embed_texts(self, texts):
        return np.array([[1.0, 0.0]] * len(texts))


@needs_captum
def test_a_linear_model_by_hand():
    "Weight times distance from the blank image, added up over squares; and these add up to the gain."
    method, image = mv.wrap(Linear(), size=32, channels=1, attribution="gradients", squares=4), torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    score, grid = method._scorer(image)
    maps, left = score(torch.tensor([[[1.0, 0.0]]] * 2))
    owed = (image - image.mean((-2, -1), keepdim=True))[:, 0] * Linear.weight * 1e-4
    torch.testing.assert_close(maps[..., 0], owed.reshape(2, 4, 8, 4, 8).sum((2, 4)).flatten(1), atol=1e-6, rtol=1e-3)
    assert grid == (4, 4) and left.max() < 1e-3


@needs_captum
def test_completeness_of_a_network():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 5, stride=2), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(8 * 14 * 14, 6))
    image, texts, unit = torch.randn(3, 1, 32, 32), F.normalize(torch.randn(3, 5, 6), dim=-1), lambda images: F.normalize(network(images), dim=-1)
    found = integrated_gradients(unit, image, texts, squares=3, steps=64)
    blank = image.mean((-2, -1), keepdim=True).expand_as(image)
    with torch.no_grad():
        gain = ((unit(image) - unit(blank))[:, None] * texts).sum(-1)
    torch.testing.assert_close(found.maps.sum(1), gain, atol=2e-3, rtol=0)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@needs_captum
def test_occlusion_is_that_of_captum():
    "One pass for all texts says what captum says text by text."
    from captum.attr import Occlusion
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 5, stride=2), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(8 * 14 * 14, 6))
    whole = type("Whole", (), {"embed_images": lambda self, images: network(images), "embed_texts": lambda self, texts: np.ones((len(texts), 6))})()
    method, image, texts = mv.wrap(whole, size=32, channels=1, squares=4), torch.randn(2, 1, 32, 32), F.normalize(torch.randn(2, 3, 6), dim=-1)
    with torch.no_grad():
        ours = method._scorer(image)[0](texts)[0]
        for number, text in enumerate(texts.unbind(1)):
            score = lambda images, text=text: (F.normalize(network(images), dim=-1) * text).sum(-1)
            theirs = Occlusion(score).attribute(image, (1, 8, 8), strides=(1, 8, 8), baselines=image.mean((-2, -1), keepdim=True).expand_as(image))
            torch.testing.assert_close(ours[..., number], theirs[:, 0, ::8, ::8].flatten(1), atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    home, words = tmp_path_factory.mktemp("clip"), phantom_tokenizer(60)
    side = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
    text = dict(side, vocab_size=len(words), max_position_embeddings=48, eos_token_id=words.sep_token_id, bos_token_id=words.cls_token_id)
    CLIPModel(CLIPConfig(text_config=text, vision_config=dict(side, image_size=32, patch_size=8), projection_dim=16)).save_pretrained(home / "files")
    words.save_pretrained(home / "files")
    return import_checkpoint(home / "files", home / "clip")


@needs_captum
def test_an_imported_run_in_three_ways_in_one_widget(run, tmp_path):
    "Cells, occlusion and gradients of the same weights stand beside each other; the page says of each how it is derived and what that leaves open."
    ways = {"cells": run.path} | {way: mv.wrap(load_method(run.path), attribution=way, squares=4, steps=8) for way in ("occlusion", "gradients")}
    pack = small_phantom(20, size=64)
    widget = CorrespondenceWidget(ways, pack, split=None)
    view = widget.studies[0]
    for name, scores in view.runs.items():
        assert scores.grid == (4, 4) and scores.derived == ("words", "sentences") and np.isfinite(scores.scores["words"]).all(), name
        assert np.isfinite(scores.left_open["words"]).all() and "leaving it out" in scores.how["words"]
    assert view.runs["gradients"].left_open["sentences"].max() < 0.05 < np.median(view.runs["cells"].left_open["sentences"])
    page = widget.to_html(tmp_path / "page.html", [0]).read_text()
    for said in ("projected one by one (leaves", "(occlusion)", "(integrated gradients) (leaves", "by leaving it out (leaves"):
        assert said in page, said


def test_the_leak_guard_knows_what_is_wrapped(run):
    wrapped = mv.wrap(load_method(run.path), attribution="occlusion")
    assert wrapped.provenance == load_method(run.path).provenance and wrapped.preprocessing == load_method(run.path).preprocessing


def test_what_cannot_be_is_said(run, monkeypatch):
    with pytest.raises(ValueError, match="attribution.*shap"):
        mv.wrap(Linear(), size=32, channels=1, attribution="shap")
    regions = type("Regions", (), {"embed_regions": lambda self, x: x, "embed_texts": lambda self, t: t})
    with pytest.raises(ValueError, match="Regions has no embed_images"):
        mv.wrap(regions(), attribution="gradients")
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"medvis\[attribution\]"):
        Studies({"it": mv.wrap(Linear(), size=32, channels=1, attribution="gradients")}, small_phantom(4), split=None)[0]
