"""Channels last and torch.compile change how the image encoder is computed, and nothing else: gradients, files and runs stay what they are."""
from functools import partial

import pytest
import torch

from medvis.encoders.image import image_encoder
from medvis.testing import small_phantom
from medvis.train import Run, TrainConfig, create_method, fit
from medvis.train.checkpoint import read_weights
from medvis.train.loop import _follow_layout, _speed_up

CPU = torch.device("cpu")
WAYS = {"channels last": dict(channels_last=True), "compiled": dict(compile=True), "both": dict(channels_last=True, compile=True)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "The compiler that makes no machine code: what it traces and differentiates is what the others make code of."
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def gradients(encoder, image) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    features = encoder(image)
    (features.regions.square().mean() + features.whole.sin().mean()).backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_vit", "resnet256"])
def test_same_features_and_gradients(name, way, monkeypatch):
    torch.manual_seed(0)
    encoder = image_encoder(name, None).double().train()
    image = torch.rand(3, encoder.preprocessing.channels, 64, 64).double()
    wanted, keys, calls, compiled = gradients(encoder, image), list(encoder.state_dict()), [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda work: calls.append(work) or compiled(work))
    undo = _speed_up(encoder, TrainConfig(run="run", **WAYS[way]), CPU)
    found = gradients(encoder, image)
    assert len(calls) == ("compile" in WAYS[way]) and list(encoder.state_dict()) == keys
    for part, gradient in wanted.items():
        assert torch.allclose(found[part], gradient, rtol=1e-8, atol=1e-10 * float(gradient.abs().max())), part
    undo()
    assert "forward" not in vars(encoder) and all(p.is_contiguous() for p in encoder.parameters())


@pytest.mark.parametrize(("asked", "device", "last"), [(None, "cpu", False), (None, "cuda", True), (False, "cuda", False), (True, "cpu", True)])
def test_channels_last_where_it_pays(asked, device, last):
    encoder = image_encoder("tiny_resnet", None)
    _speed_up(encoder, TrainConfig(run="run", channels_last=asked), torch.device(device))
    assert encoder.body.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) == last


def test_what_the_optimiser_keeps_follows():
    weight = torch.nn.Parameter(torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer, mean = torch.optim.AdamW([weight]), torch.rand(4, 3, 2, 2)
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": mean.clone(), "exp_avg_sq": mean.to(memory_format=torch.channels_last)}
    _follow_layout(optimizer)
    kept = optimizer.state[weight]
    assert kept["exp_avg"].stride() == kept["exp_avg_sq"].stride() == weight.stride() and torch.equal(kept["exp_avg"], mean) and kept["step"] == 3


def test_a_run_goes_on_in_another_way(tmp_path):
    "Begun in one way, stopped, gone on in another: the weights of a run in one way, but for rounding; and its files have the same names in them."
    data = small_phantom(32)

    def train(folder: str, epochs: int, **changes) -> Run:
        torch.set_num_threads(1)
        method = create_method("convirt", data=data)
        return fit(method, data, tmp_path / folder, epochs=epochs, batch_size=8, schedule="constant", lr=1e-4, progress=False, device="cpu", **changes)

    plain = read_weights(train("plain", 3).path / "last.safetensors")
    for epochs, way in enumerate(("channels last", "compiled", "both"), 1):
        mixed = train("mixed", epochs, **WAYS[way])
    mixed = read_weights(mixed.path / "last.safetensors")
    assert mixed.keys() == plain.keys()
    for name, value in plain.items():
        if value.is_floating_point():
            assert (mixed[name] - value).abs().max() < 2e-3, name
    start = create_method("convirt", data=data).state_dict()
    assert max((value - start[name]).abs().max() for name, value in plain.items() if value.is_floating_point()) > 1e-2
