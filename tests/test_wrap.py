"""A stranger's class of five lines goes through every door; what it lacks is said in plain words."""
import json

import numpy as np
import pytest
import torch
from torch import nn

import medvis as mv
from medvis.analyse import word_differences
from medvis.data.phrases import phantom_phrases
from medvis.data.reports import find_words
from medvis.evaluate import linear_probe
from medvis.evaluate.audit import audit, verdict
from medvis.evaluate.retrieve import retrieve, zero_shot
from medvis.exchange.wrapped import Wrapped
from medvis.testing import small_phantom
from medvis.widgets import CorrespondenceWidget, Studies


class Mine(nn.Module):
    "Patches through a random projection; texts by the letters of their words."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.asked = nn.Conv2d(1, 16, 16, stride=16), []

    def embed_regions(self, images):
        return self.patch(images).flatten(2).mT

    def embed_texts(self, texts):
        self.asked += texts
        rows = [[sum(np.cos((k + 1) * ord(c)) for c in text.lower()) + 0.1 * k for k in range(16)] for text in texts]
        return np.array(rows, np.float32)


@pytest.fixture(scope="module")
def pack():
    return small_phantom(60)


@pytest.fixture
def mine():
    return mv.wrap(Mine(), size=64, channels=1)


def test_the_widget(mine, pack, tmp_path):
    views = Studies({"mine": mine}, pack, split="test")
    view = views.view(0, ("left pleural effusion",))
    assert view.runs["mine"].grid == (4, 4) and view.runs["mine"].scores["words"].shape == (len(view.words), 16)
    assert np.isfinite(view.runs["mine"].scores["words"]).all() and view.typed == ["left pleural effusion"]
    widget = CorrespondenceWidget({"mine": mine, "other": mv.wrap(Mine(), size=32, channels=1)}, pack, split="test")
    page = widget.to_html(tmp_path / "page.html").read_text()
    assert "mine" in page and len(page) > 10_000


def test_phrases_and_the_audit(mine, pack, tmp_path):
    table = mv.ground(mine, pack, phantom_phrases(pack), resamples=50)
    assert len(table) and mine.model.asked
    before = len(mine.model.asked)
    found = audit(mine, pack, phantom_phrases(pack), tmp_path / "audit", resamples=50)
    assert "nonsense" in set(found.control) and isinstance(verdict(found), str)
    assert not [text for text in mine.model.asked[before:] if not text], "neither door leaves words out"


def test_retrieval_zero_shot_and_probe(mine, pack):
    table = retrieve(mine, pack, resamples=50)
    assert {"image to report", "report to image"} & set(table.astype(str).stack().unique()) or len(table)
    assert len(zero_shot(mine, pack, resamples=50)["findings"])
    assert linear_probe(mine, pack, fractions=(1.0,), seeds=(0,)).auroc.between(0, 1).any()


def test_the_score_is_the_cosine(mine, pack):
    view = Studies({"mine": mine}, pack, split=None)[3]
    image = torch.from_numpy(pack.image(pack.studies.image_rows[3][0]).astype(np.float32))[None, None] / 255
    regions = mine.model.embed_regions((image - 0.5) / 0.5)[0]
    texts = torch.from_numpy(mine.model.embed_texts(view.sentences))
    wanted = nn.functional.cosine_similarity(texts[:, None], regions[None], dim=-1)
    torch.testing.assert_close(torch.from_numpy(view.runs["mine"].scores["sentences"]), wanted.detach(), atol=1e-5, rtol=0)


def test_word_maps_are_those_of_leaving_out(mine, pack):
    view = Studies({"mine": mine}, pack, split=None)[3]
    image = mine.preprocessing.transform()(torch.from_numpy(pack.image(pack.studies.image_rows[3][0]))[None])[None]
    regions = nn.functional.normalize(mine.model.embed_regions(image)[0].detach(), dim=-1).numpy()

    def score(texts):
        vectors = mine.model.embed_texts([text or "" for text in texts])
        return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-8)) @ regions.T

    start = 0
    for sentence in view.sentences:
        count = len(find_words(sentence))
        maps = word_differences(score, sentence)
        np.testing.assert_allclose(view.runs["mine"].scores["words"][start:start + count], maps.words, atol=1e-5)
        assert maps.left_open > 0
        start += count
    assert start == len(view.words)


def test_a_text_is_read_once(mine, pack):
    Studies({"mine": mine}, pack, split=None).make([0, 1, 2, 0])
    assert len(mine.model.asked) == len(set(mine.model.asked))


def test_what_one_text_is(pack):
    assert mv.wrap(Mine(), size=64, channels=1).text_unit == "report"
    alone = mv.wrap(Mine(), size=64, channels=1, reads="sentence")
    assert alone.text_unit == "sentence"
    retrieve(alone, pack, resamples=20)
    sentences = {sentence for row in pack.studies.sentences for sentence in row}
    assert set(alone.model.asked) <= sentences | {"no pleural effusion", "left lower lobe opacity", ""}


def test_which_grain_is_derived(mine, pack):
    view = Studies({"mine": mine}, pack, split=None)[0]
    assert view.runs["mine"].derived == ("words",)
    only = mv.wrap(type("Whole", (), {"embed_images": lambda self, x: x.mean((2, 3)).repeat(1, 2), "embed_texts": lambda self, t: np.ones((len(t), 2))})(),
                   size=64, channels=1, squares=3)
    view = Studies({"only": only}, pack, split=None)[0]
    assert view.runs["only"].derived == ("words", "sentences") and view.runs["only"].grid == (3, 3)


def test_occlusion_by_hand():
    "What a square adds to the cosine of image and text."
    class Whole:
        def embed_images(self, images):
            return torch.stack([images.sum((1, 2, 3)), images.square().sum((1, 2, 3))], 1)

        def embed_texts(self, texts):
            return np.array([[1.0, 2.0]] * len(texts))

    method, image = mv.wrap(Whole(), size=32, channels=1, squares=2), torch.rand(1, 1, 32, 32)
    got = method.image_encoder(image).regions[0] @ (torch.tensor([1.0, 2.0]) / 5**0.5)
    text = torch.tensor([[1.0, 2.0]])
    for cell, (top, left) in enumerate(((0, 0), (0, 16), (16, 0), (16, 16))):
        covered = image.clone()
        covered[..., top:top + 16, left:left + 16] = image.mean()
        wanted = nn.functional.cosine_similarity(Whole().embed_images(image), text) - nn.functional.cosine_similarity(Whole().embed_images(covered), text)
        torch.testing.assert_close(got[cell], wanted[0], atol=1e-6, rtol=0)


def changed(**functions):
    return type("Changed", (Mine,), functions)()


@pytest.mark.parametrize("model, said", [
    (object(), "object has no embed_texts"), (changed(embed_texts=None), "Changed has no embed_texts"),
    (type("Texts", (), {"embed_texts": lambda self, texts: np.zeros((len(texts), 2))})(), "Texts has no embed_regions.* or embed_images"),
    (changed(embed_regions=lambda self, images: self.patch(images).mean((2, 3))), r"returned shape \(2, 16\); expected \(2, N, D\)"),
    (changed(embed_regions=lambda self, images: self.patch(images).flatten(2).mT[:, :15]), "15 regions, which are no square grid.*CLS"),
    (changed(embed_texts=lambda self, texts: np.zeros((len(texts), 3))), "regions in 16 dimensions and texts in 3"),
    (changed(embed_texts=lambda self, texts: np.zeros((1, 16))), r"embed_texts.list of str. returned shape \(1, 16\) for 2"),
    (changed(embed_texts=lambda self, texts: [[None]]), "embed_texts.list of str. returned list"),
    (Mine, "Mine is a class: pass a model that it makes"), (changed(embed_texts=lambda self, texts: 1 / 0), "fails on .*ZeroDivisionError"),
    (changed(embed_regions=lambda self, images: images.nothing_like_it), "Changed fails on images .*AttributeError"),
    (changed(embed_regions=lambda self, images: torch.zeros(len(images), 0, 16)), r"returned shape \(2, 0, 16\); expected"),
    (changed(embed_texts=lambda self, texts: Mine.embed_texts(self, texts) if all(texts) else int("x")), "Changed cannot read '', which is the text without its words: pass another, such as nothing="),
    (changed(embed_regions=lambda self, images: self.patch(images)), "embeds regions in 4 dimensions and texts in 16.*the dimension comes last"),
    (changed(embed_regions=lambda self, images: self.patch(images).flatten(2).mT / 0), "returned NaN or infinite"),
    (changed(embed_regions=lambda self, images: self.patch(images[:, :, :3])), "fails on images of shape .2, 1, 64, 64.*RuntimeError"),
])
def test_what_does_not_fit_is_said(model, said):
    with pytest.raises(ValueError, match=said):
        mv.wrap(model, size=64, channels=1)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="reads is 'word'; expected report or sentence"):
        mv.wrap(Mine(), size=64, channels=1, reads="word")
    with pytest.raises(TypeError, match="sizes"):
        mv.wrap(Mine(), sizes=64)


def test_it_says_what_it_is(mine):
    assert isinstance(mine, Wrapped) and json.dumps(vars(mine.config)) and mine.config.image.endswith("Mine")
    assert mine.image_encoder.pooling_gap < 1e-6, "its image is the mean of its regions"
