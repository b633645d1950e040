"""The published models at their full size, on a CPU: one training step each. Random weights, since nothing is downloaded."""
import gc
import urllib.error
from dataclasses import replace

import huggingface_hub
import pytest
import timm
import torch

from medvis.data.pairs import Pairs, collate
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders.image import image_encoder
from medvis.evaluate.detect import YoloV3
from medvis.evaluate.segment import LinearSegmenter, SetrDecoder, SmpUNet, UNet
from medvis.methods import CLIP, DSVE, METHODS, MGCA, VSE, CaptionLSTM, CaptionTransformer, ContrastiveBinary, ConVIRT, GlobalMI, GLoRIA, LocalMI, LoVT, MixtureMI
from medvis.methods.method import phantom_tokenizer
from medvis.train import TrainConfig, load_encoder
from medvis.train.loop import _parameter_groups

FULL = {
    "MGCA with ViT-B/16": (MGCA, "paper", (14, 14)),
    "MGCA with ResNet-50": (MGCA, "paper-resnet50", (19, 19)),
    "ConVIRT with ResNet-50": (ConVIRT, "paper", (7, 7)),
    "CLIP with ResNet-50": (CLIP, "paper", (7, 7)),
    "VSE++ with ResNet-50": (VSE, "paper", (7, 7)),
    "DSVE with ResNet-50": (DSVE, "paper", (7, 7)),
    "Contrastive-Binary with ResNet-50": (ContrastiveBinary, "paper", (7, 7)),
    "Caption-LSTM with ResNet-50": (CaptionLSTM, "paper", (7, 7)),
    "Caption-Transformer with ResNet-50": (CaptionTransformer, "paper", (7, 7)),
    "GLoRIA with ResNet-50": (GLoRIA, "paper", (19, 19)),
    "LoVT with ResNet-50": (LoVT, "paper", (7, 7)),
    "global-mi with ResNet-256": (GlobalMI, "paper", (4, 4)),
    "local-mi with ResNet-256": (LocalMI, "paper", (4, 4)),
    "mixture-mi with ResNet-50": (MixtureMI, "full", (14, 14)),
}
BEHIND_THE_REGIONS = {LocalMI: ("layer6",), MixtureMI: ("layer4",)}  # these regions come from an earlier layer
TEXT_LAYERS = {CaptionLSTM: 0, CaptionTransformer: 0}    # words alone: a decoder must not have read ahead


@pytest.fixture(scope="module")
def tokenizer():
    return phantom_tokenizer(60)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("data") / "pack", studies=8, size=256, progress=False))


@pytest.mark.parametrize("name", FULL)
def test_one_step(name, pack, tokenizer):
    "Batch 2 at 224 pixels, ViT-B/16 or ResNet-50, 12 layers of BERT-base: loss and gradients finite, all weights moved."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, preset, grid = FULL[name]
    method = kind.from_preset(preset, tokenizer, text="bert-base", image_weights=None)
    body = method.text_encoder.body.config
    assert (body.num_hidden_layers, body.hidden_size, body.num_attention_heads) == (TEXT_LAYERS.get(kind, 12), 768, 12)
    pairs = Pairs(pack, method.tokenizer, method.preprocessing, replace(method.sampling, max_tokens=32), train=True)     # a long text takes longer, through the same layers
    batch = collate([pairs[0], pairs[len(pairs) - 1]])
    assert batch.patient_id[0] != batch.patient_id[1], "two patients, since some methods contrast only these"
    side = 256 if method.config.image == "resnet256" else 224
    assert batch.image.shape[0] == 2 and batch.image.shape[2:] == (side, side)

    config = TrainConfig.of(method, "run")
    learned = {key: value for key, value in method.named_parameters() if value.requires_grad}
    groups = _parameter_groups(method, config)
    rates = [group.pop("config").lr for group in groups]
    made = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = made([{**group, "lr": lr} for group, lr in zip(groups, rates, strict=True)], betas=config.betas)
    method.train()
    losses = method(batch)
    losses.total.backward()
    assert torch.isfinite(losses.total) and losses.total != 0
    assert torch.isclose(sum(losses.parts.values()), losses.total.detach())
    unused = {key for key, value in learned.items() if value.grad is None}
    behind = (".body.fc.", *(f".body.{layer}." for layer in BEHIND_THE_REGIONS.get(kind, ())))
    assert unused == {key for key in learned if any(part in key for part in behind)}, "these parts take no part in the loss"
    assert all(torch.isfinite(value.grad).all() for key, value in learned.items() if key not in unused)

    before = {key: value.detach().clone() for key, value in method.named_parameters()}
    optimizer.step()
    method.after_step()
    assert all(torch.isfinite(value).all() for value in learned.values())
    moved = {key for key, value in method.named_parameters() if not torch.equal(value, before[key])}
    still = learned.keys() - unused - moved
    assert moved <= learned.keys() and still <= {"discriminator.layers.4.bias"}, "a bound does not feel a constant"

    method.eval()
    with torch.no_grad():
        found = method.correspondence(batch)
    assert found.grid == grid and found.words.shape[:2] == (2, grid[0] * grid[1]) and torch.isfinite(found.words).all()
    del method, optimizer, learned, losses, before, found
    gc.collect()


def conv(width_in, width, side, norm=False, bias=True):
    "Weights of a convolution, with bias, and with the two numbers a channel of a batch normalisation."
    return width_in * width * side**2 + (bias + 2 * norm) * width


def yolo_scale(width_in, width, classes=1):
    there, back, wide = conv(width_in, width, 1, True, False), conv(2 * width, width, 1, True, False), conv(width, 2 * width, 3, True, False)
    return there + 2 * back + 3 * wide + conv(2 * width, 3 * (5 + classes), 1)


UP = ((2048, 1024, 1024), (1024, 512, 512), (512, 256, 256), (256, 64, 128), (128, 3, 64))  # from, skip, to (systems.md 4)
SMP = ((2048, 1024, 256), (256, 512, 128), (128, 256, 64), (64, 64, 32), (32, 0, 16))
HEADS = {  # head, encoder, what of it is trained, its weights counted by hand
    "LoVT's linear": (LinearSegmenter, "resnet50", False, 2048 + 1),
    "LoVT's U-Net": (UNet, "resnet50", True, 2 * conv(2048, 2048, 3, True) + conv(64, 1, 1) + sum(
        conv(before, to, 2) + conv(to + skip, to, 3, True) + conv(to, to, 3, True) for before, skip, to in UP)),
    "MGCA's U-Net": (SmpUNet, "resnet50", False, conv(16, 1, 3) + sum(
        conv(before + skip, to, 3, True, False) + conv(to, to, 3, True, False) for before, skip, to in SMP)),
    "MGCA's SETR": (SetrDecoder, "vit_base_patch16_224", False, conv(768, 768, 1) + conv(64, 1, 3) + sum(
        conv(before, to, 3, True) for before, to in ((768, 512), (512, 256), (256, 128), (128, 64)))),
    "YOLOv3": (YoloV3, "resnet50", True, conv(512, 256, 1, True, False) + conv(256, 128, 1, True, False)
               + yolo_scale(2048, 512) + yolo_scale(1024 + 256, 256) + yolo_scale(512 + 128, 128)),
}


@pytest.mark.parametrize("name", HEADS)
def test_one_step_of_a_head(name):
    "One image at 224 pixels, one step of training and one of evaluation: sizes and shapes are the papers'."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, encoder, tuned, weights = HEADS[name]
    encoder, images = image_encoder(encoder), torch.rand(1, 3, 224, 224)
    head = kind(encoder, ("finding",))
    assert sum(value.numel() for value in head.parameters()) == weights
    target = [[[60.0, 80, 120, 150, 0]]] if kind is YoloV3 else torch.zeros(1, 1, 224, 224).index_fill_(2, torch.arange(60, 90), 1)
    seen = lambda: encoder(images).regions if head.needs == "regions" else encoder.pyramid(images)
    encoder.train(tuned).requires_grad_(tuned)
    learned = {**dict(head.named_parameters()), **{f"encoder.{key}": value for key, value in encoder.named_parameters() if tuned}}
    before = {key: value.detach().clone() for key, value in learned.items()}
    raw = head(seen())
    loss = head.loss(raw, target)
    loss.total.backward()
    torch.optim.AdamW(learned.values(), 1e-3).step()
    assert loss.total.isfinite() and loss.total > 0
    assert {key for key, value in learned.items() if torch.equal(value, before[key])} <= {"encoder.body.fc.weight", "encoder.body.fc.bias"}
    if kind is YoloV3:
        assert [tuple(part.shape) for part in raw] == [(1, 18, side, side) for side in (7, 14, 28)]
    else:
        assert raw.shape == (1, 1, 224, 224)

    encoder.eval(), head.eval()
    with torch.no_grad():
        maps = seen()
        if kind is UNet:
            x, sides = head.bridge(maps[-1]), []
            for step, skip in zip(head.steps, maps[-2::-1], strict=True):
                x = step(x, skip)
                sides.append(tuple(x.shape[1:]))
            assert sides == [(1024, 14, 14), (512, 28, 28), (256, 56, 56), (128, 112, 112), (64, 224, 224)]
        said = head.predict(head(maps))
    assert set(said.image) <= {0} if kind is YoloV3 else said.shape == (1, 1, 224, 224) and ((said >= 0) & (said <= 1)).all()


@pytest.mark.parametrize("name", [(key, preset) for key, kind in METHODS.items() for preset in kind.presets])
def test_presets_are_complete(name, tmp_path):
    "Every preset gives settings and a recipe that exist; on a machine without memory, too (no weights are made)."
    kind, preset = METHODS[name[0]], name[1]
    config, recipe = kind.presets[preset]
    with torch.device("meta"):
        text = {"text": "bert-base"} if kind.reads_text else {}
        method = kind(kind.Config(**{**config, **text, "image_weights": None}), phantom_tokenizer(5))
    method.training_settings = dict(recipe)
    assert TrainConfig.of(method, tmp_path).batch_size > 1
    parameters = sum(value.numel() for value in method.parameters())
    least = {"tiny_resnet": 2e5, "resnet256": 1.9e6, "efficientnet_lite0_frozen": 3e6}.get(method.config.image, 2e7)
    encodes_text = kind.reads_text and kind not in TEXT_LAYERS
    assert parameters > (2e5 if preset == "tiny" else 5e7 if encodes_text else least)
    wanted = config.get("text_layers", TEXT_LAYERS.get(kind))
    assert not kind.reads_text or len(method.text_encoder.body.encoder.layer) == (12 if wanted is None else wanted)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "No network, and nothing in any cache."
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", no_network)


@pytest.mark.parametrize("kind, preset", [(MGCA, "paper"), (MGCA, "paper-resnet50"), (MGCA, "released"), (ConVIRT, "paper")])
def test_offline_says_what_to_pass(kind, preset, offline, tokenizer):
    with pytest.raises(OSError, match="imagenet.*could not be downloaded.*image_weights=.*file.*None for random") as caught:
        kind.from_preset(preset, tokenizer)
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="Bio_ClinicalBERT.*could not be loaded.*text=.*folder.*bert-base") as caught:
        kind.from_preset(preset, tokenizer, image="tiny_resnet", image_weights=None, layer="layer4", upsample=None)
    assert "\n" not in str(caught.value)


def test_offline_encoder(offline, tmp_path):
    with pytest.raises(OSError, match="imagenet.*could not be downloaded"):
        load_encoder("imagenet")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere"):
        load_encoder(tmp_path / "nowhere")
