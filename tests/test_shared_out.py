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
from medvis.train import Run, TrainConfig, fit, load_method, loop
from medvis.train.checkpoint import load_checkpoint, read_weights
from medvis.train.large_batches import on_small_memory
from medvis.train.processes import make_accelerator, share_out, whole_state
from test_gathered import make as in_evaluation, some_rows

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


STEPS = {"convirt": {}, "mgca": dict(chunk=2), "byol": {}, "byol, in chunks": dict(chunk=2), "pixelpro": dict(chunk=2), "gloria": dict(chunk=2, recompute=True)}


def three_steps(case: str, words, accelerator, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    "Losses, weights and what the optimiser keeps after three steps in double precision; of one process, of all pairs at once."
    method, way = in_evaluation(case.split(",")[0], words), STEPS[case] if world > 1 else {}
    sizes = (9, 8, 9)
    batches = [some_rows(method, samples, rank, world) for samples in sizes]
    shares = [None if method.contrasts and world > 1 else len(batch.image) * world / samples for batch, samples in zip(batches, sizes, strict=True)]
    if world > 1:
        share_out(method, accelerator)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    network, optimizer, found = accelerator.prepare_model(method, evaluation_mode=world > 1), accelerator.prepare(optimizer), {}
    for step, (batch, share) in enumerate(zip(batches, shares, strict=True)):
        with on_small_memory(method, **way):
            losses = loop._optimise(network, optimizer, [batch], accelerator, [step], None, [share])
        found |= {f"{part}, step {step}": torch.tensor(value) for part, value in losses.items()}
    kept = {f"{name} of {i}": value for i, state in whole_state(optimizer.state_dict())["state"].items() for name, value in state.items()}
    return found | whole_state(method.state_dict()) | kept


def in_double_precision(out: Path) -> None:
    words, accelerator = phantom_tokenizer(60), make_accelerator(TrainConfig(run=out, device="cpu"), unused_parameters=True)
    found = {case: three_steps(case, words, accelerator, int(os.environ["RANK"]), 2) for case in STEPS}
    if accelerator.is_main_process:
        torch.save(found, out / "found.pt")


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("exact")
    assert work_together(out / "said.txt", 2, in_double_precision, out, seconds=400) == ""
    return torch.load(out / "found.pt")


@pytest.mark.parametrize("case", STEPS)
def test_three_steps_are_those_of_one_process(case, exact):
    "In double precision, of batches that do not divide evenly, also where encoders read in chunks, and where a momentum copy follows: losses (fetched in single precision), weights, moments. A weight whose gradient is nought moves by the rounding of it over Adam's 1e-8: less than 1e-8, of steps of 1e-3."
    words = phantom_tokenizer(60)
    wanted = three_steps(case, words, make_accelerator(TrainConfig(run=Path("run"), device="cpu")))
    start = in_evaluation(case.split(",")[0], words).state_dict()
    assert exact[case].keys() == wanted.keys() and sum(not torch.allclose(wanted[name], value) for name, value in start.items()) > 20
    for name, value in wanted.items():
        loose = dict(rtol=1e-6, atol=1e-6) if ", step " in name else dict(rtol=1e-9, atol=1e-8 if name in start else 1e-10)
        torch.testing.assert_close(exact[case][name].double(), value.double(), **loose, msg=lambda text, name=name: f"{name}: {text}")


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
    """In single precision, whole runs. Adam's first steps divide a gradient by its own size, also where it is rounding and nothing else, so that
    weights whose gradient is nought move by noise: 5 % of what moves most. What is exact is held in double precision above."""
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
