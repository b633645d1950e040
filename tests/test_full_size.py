"""The published models at their full size, on a CPU: one training step each. Random weights, since nothing is downloaded."""
import gc
import urllib.error

import huggingface_hub
import pytest
import timm
import torch

from medvis.data.pairs import Pairs, collate
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.methods import CLIP, METHODS, MGCA, ConVIRT, GlobalMI, GLoRIA, LocalMI, LoVT, MixtureMI
from medvis.methods.method import phantom_tokenizer
from medvis.train import TrainConfig, load_encoder
from medvis.train.loop import parameter_groups

FULL = {
    "MGCA with ViT-B/16": (MGCA, "paper", (14, 14)),
    "MGCA with ResNet-50": (MGCA, "paper-resnet50", (19, 19)),
    "ConVIRT with ResNet-50": (ConVIRT, "paper", (7, 7)),
    "CLIP with ResNet-50": (CLIP, "paper", (7, 7)),
    "GLoRIA with ResNet-50": (GLoRIA, "paper", (19, 19)),
    "LoVT with ResNet-50": (LoVT, "paper", (7, 7)),
    "global-mi with ResNet-256": (GlobalMI, "paper", (4, 4)),
    "local-mi with ResNet-256": (LocalMI, "paper", (4, 4)),
    "mixture-mi with ResNet-50": (MixtureMI, "full", (14, 14)),
}
BEHIND_THE_REGIONS = {LocalMI: ("layer6",), MixtureMI: ("layer4",)}  # these regions come from an earlier layer


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
    assert (body.num_hidden_layers, body.hidden_size, body.num_attention_heads) == (12, 768, 12)
    pairs = Pairs(pack, method.tokenizer, method.preprocessing, method.view, train=True)
    batch = collate([pairs[0], pairs[len(pairs) - 1]])
    assert batch.patient_id[0] != batch.patient_id[1], "two patients, since some methods contrast only these"
    side = 256 if method.config.image == "resnet256" else 224
    assert batch.image.shape[0] == 2 and batch.image.shape[2:] == (side, side)

    config = TrainConfig.of(method, "run")
    learned = {key: value for key, value in method.named_parameters() if value.requires_grad}
    groups = parameter_groups(method, config)
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


@pytest.mark.parametrize("name", [(key, preset) for key, kind in METHODS.items() for preset in kind.presets])
def test_presets_are_complete(name, tmp_path):
    "Every preset gives settings and a recipe that exist; on a machine without memory, too (no weights are made)."
    kind, preset = METHODS[name[0]], name[1]
    config, recipe = kind.presets[preset]
    with torch.device("meta"):
        method = kind(kind.Config(**{**config, "text": "bert-base", "image_weights": None}), phantom_tokenizer(5))
    method.recipe = dict(recipe)
    assert TrainConfig.of(method, tmp_path).batch_size > 1
    parameters = sum(value.numel() for value in method.parameters())
    assert parameters > (5e7 if preset != "tiny" else 2e5)
    assert len(method.text_encoder.body.encoder.layer) == (config.get("text_layers") or 12)


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
    with pytest.raises(OSError, match="imagenet.*could not be downloaded.*image_weights=.*file.*None for random") as told:
        kind.from_preset(preset, tokenizer)
    assert "\n" not in str(told.value)
    with pytest.raises(OSError, match="Bio_ClinicalBERT.*could not be loaded.*text=.*folder.*bert-base") as told:
        kind.from_preset(preset, tokenizer, image="tiny_resnet", image_weights=None, layer="layer4", upsample=None)
    assert "\n" not in str(told.value)


def test_offline_encoder(offline, tmp_path):
    with pytest.raises(OSError, match="imagenet.*could not be downloaded"):
        load_encoder("imagenet")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere"):
        load_encoder(tmp_path / "nowhere")
