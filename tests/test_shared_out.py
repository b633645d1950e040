"""Weights shared out over two processes (FSDP, gloo): the same losses and, but for rounding, weights as without; files that one process reads, and a run that one process goes on with."""
import os
from pathlib import Path

import pytest
import torch
from forked import work_together

from medvis.data.pack import Pack
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.methods import METHODS
from medvis.methods.method import phantom_tokenizer
from medvis.train import Run, TrainConfig, fit, load_method
from medvis.train.checkpoint import load_checkpoint, read_weights

NAMES = ("convirt", "mgca", "supervised")


def build(name: str, words):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    changes = dict(classes=("Edema", "Pneumothorax")) if name == "supervised" else dict(hidden=32, dim=16)
    return METHODS.find(name).from_preset("tiny", words if METHODS.find(name).reads_text else None, **changes)


def train(pack: Path, run: Path, name: str, words, epochs: int, **changes) -> Run:
    method = build(name, words)
    settings = dict(epochs=epochs, batch_size=16 // int(os.environ.get("WORLD_SIZE", 1)), progress=False, device="cpu", schedule="constant", lr=1e-4)
    return fit(method, Pack(pack), TrainConfig.of(method, run, **settings | changes))


def work(pack: Path, out: Path) -> None:
    words = phantom_tokenizer(40)
    for name in NAMES:
        for way in (True, False):
            train(pack, out / f"{name}-{way}", name, words, 1, shard=way)
    train(pack, out / "convirt-True", "convirt", words, 1, shard=True)      # finished: it is read
    train(pack, out / "convirt-True", "convirt", words, 2, shard=True)      # and goes on


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("shared")
    pack = prepare_phantom(PhantomConfig(out=folder / "pack", studies=60, progress=False)).path
    assert work_together(folder / "said.txt", 2, work, pack, folder, seconds=400) == ""
    return pack, folder


@pytest.mark.parametrize("name", NAMES)
def test_the_same_run(name, made):
    shared, plain = (Run(made[1] / f"{name}-{way}") for way in (True, False))
    assert shared.config["train"]["shard"] and shared.config["method"] == name and shared.manifest["processes"] == 2
    losses = [run.metrics.query("epoch == 0 and split == 'train'").loss for run in (shared, plain)]
    torch.testing.assert_close(*(torch.tensor(one.tolist()) for one in losses), rtol=2e-3, atol=1e-4)
    if name == "convirt":       # it has gone on
        return
    weights = [read_weights(run.path / "last.safetensors") for run in (shared, plain)]
    start = build(name, phantom_tokenizer(40)).state_dict()
    assert weights[0].keys() == weights[1].keys() == start.keys()
    moved = max((weights[1][part] - value).abs().max() for part, value in start.items() if value.is_floating_point())
    apart = max((weights[1][part] - value).abs().max() for part, value in weights[0].items() if value.is_floating_point())
    assert apart < 0.05 * moved, (apart, moved)


def test_one_process_goes_on(made, monkeypatch):
    "With the checkpoint of two, which is whole."
    pack, folder = made
    run = folder / "convirt-True"
    method = load_method(run, "last")
    state = load_checkpoint(run / "checkpoints")
    assert all(torch.equal(value, state["method"][part]) for part, value in method.state_dict().items())
    shapes = [p.shape for p in method.parameters() if p.requires_grad]
    assert [state["optimizer"]["state"][i]["exp_avg"].shape for i in range(len(shapes))] == shapes
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.warns(UserWarning, match="was begun with 2 processes and goes on with 1"):
        more = train(pack, run, "convirt", phantom_tokenizer(40), 3)
    metrics = more.metrics.query("split == 'validate'")
    assert metrics.epoch.tolist() == [0, 1, 2] and metrics.loss.notna().all() and more.manifest["processes"] == 1
