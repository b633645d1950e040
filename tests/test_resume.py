"""A run that is killed (SIGKILL, a real process) and started again ends with the very weights of one never killed."""
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from medvis.data.pack import Pack
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.methods import BYOL, DSVE, MGCA, CaptionLSTM, CaptionTransformer, ContrastiveBinary, ConVIRT, GLoRIA, LoVT, PixelPro, SimCLR, Supervised
from medvis.methods.method import phantom_tokenizer
from medvis.train import Run, TrainConfig, checkpoint, loop

FORK = multiprocessing.get_context("fork")
SIZES = {Supervised: {}, GLoRIA: {"dim": 16}, ContrastiveBinary: {}, DSVE: {"dim": 16}}  # of those without a projection of their own


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("data") / "pack", studies=60, progress=False)).path


@pytest.fixture(scope="module")
def tokenizer():
    return phantom_tokenizer(60)


def train(pack: Path, tokenizer, run: Path, sabotage=None, kind=MGCA, **changes) -> None:
    "Three epochs of 6 batches of a small method with every kind of randomness: crops, swapped sentences, dropout."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = kind.from_preset("tiny", tokenizer, **SIZES.get(kind, {"hidden": 32, "dim": 16}))
    settings = dict(epochs=3, batch_size=8, save_every=4, augment="lovt", swap=0.4, progress=False, device="cpu")
    if sabotage:
        sabotage()
    loop.fit(method, Pack(pack), TrainConfig.of(method, run, **{**settings, **changes}))


def in_process(*args, **kwargs) -> int:
    "Train in a process of its own; its exit code."
    process = FORK.Process(target=train, args=args, kwargs=kwargs)
    process.start()
    process.join(300)
    return process.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(owner, name: str, call: int):
    "Replace a function so that its nth call kills the process before doing anything."
    def sabotage():
        real, calls = getattr(owner, name), [0]

        def deadly(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call:
                die()
            return real(*args, **kwargs)
        setattr(owner, name, deadly)
    return sabotage


def ask_at_step(number: int, call: int):
    "A signal that asks the run to stop, in the middle of its nth step."
    def sabotage():
        real, calls = loop._optimise, [0]

        def asked(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)
        loop._optimise = asked
    return sabotage


def die_in_write(call: int, steps: int = 0):
    "Kill the process when half of the nth checkpoint's bytes are in the file, and training has gone on for so many steps."
    def sabotage():
        real, calls, learn, taken = torch.save, [0], loop._optimise, [0]

        def counted(*args, **kwargs):
            answer = learn(*args, **kwargs)
            taken[0] += 1
            return answer

        def half(state, file):
            calls[0] += 1
            if calls[0] < call:
                return real(state, file)
            real(state, file)
            file.flush()
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
            last = taken[0] + steps
            while taken[0] < last:
                time.sleep(0.01)
            die()
        checkpoint.torch.save, loop._optimise = half, counted
    return sabotage


def same_run(run: Path, wanted: Path) -> None:
    for name in ("last.safetensors", "weights.safetensors"):
        assert (run / name).read_bytes() == (wanted / name).read_bytes(), f"{name} differs"
    pd.testing.assert_frame_equal(Run(run).metrics, Run(wanted).metrics)
    assert not list(run.rglob("*.partial"))


@pytest.fixture(scope="module")
def undisturbed(pack, tokenizer, tmp_path_factory):
    "The run never killed, for each setting that changes what is computed."
    made = {}

    def of(**changes) -> Path:
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed") / "run"
            assert in_process(pack, tokenizer, made[key], **changes) == 0
        return made[key]
    return of


POINTS = {
    "before the first step": (die_at_call(loop._Trainer, "take_step", 1), {}),
    "in the middle of an epoch": (die_at_call(loop._Trainer, "take_step", 9), {}),
    "between forward and optimiser step": (die_at_call(torch.nn.utils, "clip_grad_norm_", 8), {}),
    "in the middle of an accumulation": (die_at_call(MGCA, "forward", 11), {"accumulate": 2}),
    "in mixed precision": (die_at_call(loop._Trainer, "take_step", 9), {"precision": "bf16"}),
    "while workers load": (die_at_call(loop._Trainer, "take_step", 9), {"workers": 2}),
    "in validation": (die_at_call(loop, "validate", 2), {}),
    "before the best weights": (die_at_call(loop._Trainer, "save", 5), {}),
    "between the best weights and the checkpoint": (die_at_call(loop, "save_checkpoint", 5), {}),
    "steps after a checkpoint that is still being written": (die_in_write(3, steps=2), {}),
    "while the best weights are written in the background": (die_at_call(checkpoint, "save", 1), {}),
    "in a checkpoint write": (die_in_write(3), {}),
    "before a checkpoint's rename": (die_at_call(os, "replace", 6), {}),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_run_resumes_exactly(point, pack, tokenizer, tmp_path, undisturbed):
    sabotage, changes = POINTS[point]
    wanted = undisturbed(**{key: value for key, value in changes.items() if key != "workers"})
    run = tmp_path / "run"
    assert in_process(pack, tokenizer, run, sabotage, **changes) == -signal.SIGKILL, "the run was to be killed"
    assert not (run / "last.safetensors").exists()
    assert in_process(pack, tokenizer, run, **changes) == 0
    same_run(run, wanted)


@pytest.mark.parametrize("number, call, code, workers", [(signal.SIGTERM, 9, 128 + signal.SIGTERM, 2), (signal.SIGINT, 6, 1, 0)])
def test_who_is_asked_to_stop_loses_no_step(number, call, code, workers, pack, tokenizer, tmp_path, undisturbed, capfd):
    "A cluster's SIGTERM within an epoch, while workers load; Ctrl-C in an epoch's last step."
    wanted, run = undisturbed(), tmp_path / "run"
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job, such as CI, is started without
    assert in_process(pack, tokenizer, run, ask_at_step(number, call), workers=workers) == code
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("medvis: stopped after")]
    assert line == f"medvis: stopped after step {call}, with a checkpoint; to go on: call fit once more with the same settings"
    assert checkpoint.load_checkpoint(run / "checkpoints")["step"] == call == Run(run).metrics.query("split == 'train'").step.max()
    assert in_process(pack, tokenizer, run) == 0
    same_run(run, wanted)


def test_checkpoints_by_the_clock(pack, tokenizer, tmp_path, undisturbed):
    "After each step, if every instant is too long without one; and the settings that say when are free."
    run = tmp_path / "run"
    assert in_process(pack, tokenizer, run, die_at_call(loop._Trainer, "take_step", 4), save_every=10**6, save_minutes=1e-9) == -signal.SIGKILL
    assert checkpoint.load_checkpoint(run / "checkpoints")["step"] in (2, 3)
    assert in_process(pack, tokenizer, run, die_at_call(loop._Trainer, "take_step", 2), save_every=10**6, save_minutes=None) == -signal.SIGKILL
    assert checkpoint.load_checkpoint(run / "checkpoints")["step"] in (2, 3)
    assert in_process(pack, tokenizer, run) == 0
    same_run(run, undisturbed())


@pytest.mark.parametrize("kind", [CaptionLSTM, CaptionTransformer, ContrastiveBinary, DSVE], ids=lambda kind: kind.__name__)
def test_baselines_resume_exactly(kind, pack, tokenizer, tmp_path, undisturbed):
    "Dropout in every step of a decoder, random sentences, other reports drawn as negatives: the same words in the end."
    wanted, run = undisturbed(kind=kind), tmp_path / "run"
    assert in_process(pack, tokenizer, run, die_at_call(loop._Trainer, "take_step", 9), kind=kind) == -signal.SIGKILL, "the run was to be killed"
    assert not (run / "last.safetensors").exists() and in_process(pack, tokenizer, run, kind=kind) == 0
    same_run(run, wanted)


@pytest.mark.parametrize("kind, point", [(SimCLR, "take_step"), (BYOL, "after_step"), (PixelPro, "after_step")], ids=lambda value: getattr(value, "__name__", value))
def test_views_and_slow_copies_resume_exactly(kind, point, pack, tokenizer, tmp_path, undisturbed):
    "Killed between two checkpoints, once between the optimiser's step and the slow copy's: the same copies and steps in the end."
    changes, run = dict(kind=kind, augment="pixelpro"), tmp_path / "run"
    wanted = undisturbed(**changes)
    sabotage = die_at_call(loop._Trainer, point, 9) if point == "take_step" else die_at_call(kind, point, 9)
    assert in_process(pack, tokenizer, run, sabotage, **changes) == -signal.SIGKILL, "the run was to be killed"
    assert not (run / "last.safetensors").exists() and in_process(pack, tokenizer, run, **changes) == 0
    same_run(run, wanted)
    if kind is not SimCLR:
        copy = Run(run).method("last").copy
        assert copy.step == Run(run).metrics.query("split == 'train'").step.max() > 9
        assert not torch.equal(*(network.state_dict()["body.conv1.weight"] for network in (copy.networks[0], Run(run).method("last").image_encoder)))


@pytest.mark.parametrize("point, call", [("take_step", 9), ("take_step", 14), ("save", 5), ("diagnose_epoch", 2)])
def test_what_is_monitored_is_resumed_exactly(point, call, pack, tokenizer, tmp_path, undisturbed):
    "Of a run judged by its AUROC: rate, best weights and log, killed in an epoch, after its validation, or before the checkpoint that tells of it."
    changes, run = dict(kind=Supervised, schedule="plateau", plateau_patience=0, patience=2, augment="lovt", lr=5e-3, epochs=4), tmp_path / "run"
    wanted = undisturbed(**changes)
    assert in_process(pack, tokenizer, run, die_at_call(loop._Trainer, point, call), **changes) == -signal.SIGKILL, "the run was to be killed"
    assert not (run / "last.safetensors").exists() and in_process(pack, tokenizer, run, **changes) == 0
    same_run(run, wanted)
    seen = Run(run).metrics
    judged = seen[seen["split"] == "validate"].auroc
    assert judged.notna().all() and judged.nunique() > 1 and seen.lr.nunique() > 1, "the AUROC changes, and the rate with it"


def test_killed_from_outside_and_again(pack, tokenizer, tmp_path, undisturbed):
    "Killed by another process whenever ten more lines are in the log, until it gets to the end."
    run, log, kills = tmp_path / "run", tmp_path / "run" / "metrics.jsonl", 0
    for _ in range(10):
        process = FORK.Process(target=train, args=(pack, tokenizer, run))
        process.start()
        before = log.read_text().count("\n") if log.exists() else 0
        while process.is_alive() and (log.read_text().count("\n") if log.exists() else 0) < before + 10:
            time.sleep(0.01)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join(60)
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and kills >= 1
    same_run(run, undisturbed())


EXTENDED = {
    "constant rate": dict(schedule="constant", save_every=100),
    "a wave of two epochs": dict(kind=ConVIRT, schedule="cyclic-cosine"),
    "by the losses so far": dict(kind=Supervised, schedule="plateau", plateau_patience=0, augment="lovt", lr=5e-3),
}


@pytest.mark.parametrize("case", EXTENDED)
def test_a_finished_run_is_given_more_epochs(case, pack, tokenizer, tmp_path, undisturbed):
    "It ends with the very weights of a run that had them from the start, also if it is killed on the way; and then is such a run."
    changes, run = EXTENDED[case], tmp_path / "run"
    wanted = undisturbed(**changes)
    assert in_process(pack, tokenizer, run, **changes, epochs=2) == 0 and (run / "last.safetensors").exists()
    assert in_process(pack, tokenizer, run, die_at_call(loop._Trainer, "take_step", 2), **changes) == -signal.SIGKILL
    assert not (run / "last.safetensors").exists() and in_process(pack, tokenizer, run, **changes) == 0
    same_run(run, wanted)
    assert (run / "config.json").read_bytes() == (wanted / "config.json").read_bytes()
    assert in_process(pack, tokenizer, run, **changes, epochs=2) == 1, "it has more than two epochs now"


@pytest.mark.parametrize("kind, changes, reason", [
    (MGCA, dict(schedule="warmup-cosine"), "under schedule 'warmup-cosine' each learning rate so far depends"), (MGCA, dict(schedule="constant", text_schedule="warmup-linear"), "under schedule 'warmup-linear'"),
    (BYOL, dict(schedule="constant", augment="pixelpro"), "each step of BYOL so far depends on the number of steps"), (ConVIRT, dict(schedule="constant", lr=1.0), "train differs in lr. Choose another")],
    ids=lambda value: getattr(value, "__name__", None))
def test_what_cannot_be_longer_says_why(kind, changes, reason, pack, tokenizer, tmp_path, capfd):
    run, before = tmp_path / "run", changes | (dict(lr=1e-3) if "lr" in changes else {})
    assert in_process(pack, tokenizer, run, kind=kind, **before, epochs=1) == 0
    held = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert in_process(pack, tokenizer, run, kind=kind, **changes, epochs=2) == 1
    assert held == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = capfd.readouterr().err
    assert reason in said and "Choose another run folder" in said


FORMER = {      # method -> name of a setting today -> in runs of older versions
    LoVT: {"direction_weight": "image_weight", "local_image_weight": "weight_image", "local_report_weight": "weight_report", "global_weight": "weight_global"},
    MGCA: {"instance_weight": "weight_instance", "token_weight": "weight_token", "prototype_weight": "weight_prototype"},
    GLoRIA: {"global_weight": "weight_global", "local_weight": "weight_local"},
}


@pytest.mark.parametrize("kind", FORMER, ids=lambda kind: kind.__name__)
def test_a_run_of_an_older_version_is_read_and_goes_on(kind, pack, tokenizer, tmp_path, undisturbed):
    "Its config.json has the names of that version, and is not rewritten."
    wanted, run = undisturbed(kind=kind), tmp_path / "run"
    assert in_process(pack, tokenizer, run, die_at_call(loop._Trainer, "take_step", 9), kind=kind) == -signal.SIGKILL
    settings = checkpoint.read_settings(run / "config.json")
    config = {FORMER[kind].get(name, name): value for name, value in settings["config"].items()}
    assert set(FORMER[kind].values()) < set(config)
    checkpoint.write_settings(run / "config.json", settings | {"config": config})
    before = (run / "config.json").read_bytes()
    assert in_process(pack, tokenizer, run, kind=kind) == 0
    same_run(run, wanted)
    assert (run / "config.json").read_bytes() == before and Run(run).config == settings
    method, other = Run(run).method(), Run(wanted).method()
    assert method.config == other.config
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in method.state_dict().items())
    assert in_process(pack, tokenizer, run, kind=kind, lr=1.0) == 1, "other settings are still refused"


def test_the_committed_run_is_read():
    run = Run(Path(__file__).parents[1] / "nbs/widgets/run")
    method, written = run.method(), json.loads((run.path / "config.json").read_text())
    assert {name: getattr(method.config, name) for name in written["config"]} == written["config"] == run.config["config"]
    assert sum(value.numel() for value in method.state_dict().values()) > 100_000
