"""Two real processes (gloo, torchrun's launcher): they end as one does, stop together, and write into no folder that another one holds."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import work_together
from medvis.core.files import lock_folder
from medvis.data.pack import Pack
from medvis.data.pairs import Pairs, collate, epoch_batches
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.methods import ConVIRT
from medvis.methods.method import Losses, phantom_tokenizer
from medvis.train import Run, TrainConfig, fit, load_method
from medvis.train.checkpoint import load_checkpoint

class Sick(Pack):
    "A Pack that does one process harm."
    fault, left = "", 40

    def image(self, index):
        self.left -= 1
        if self.fault == "killed" and os.environ["RANK"] == "0" and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "asked" and os.environ["RANK"] == "1" and self.left == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.fault == "unreadable" and os.environ["RANK"] == "1" and self.studies["split"].iloc[index] == "train":
            raise OSError("input/output error")
        return super().image(index)


def work(pack: Path, *runs: Path) -> None:
    "What each of two processes does: these runs one after the other, each with the fault it is named for."
    def spoil(module, args, losses):
        bad = os.environ["RANK"] == "1" and data.fault == ("nan" if module.training else "nan in validation")
        return Losses(losses.total * torch.nan, losses.parts) if bad else losses

    for run in runs:
        torch.manual_seed(0)
        method = ConVIRT.from_preset("tiny", phantom_tokenizer(40), hidden=32, dim=16)
        method.register_forward_hook(spoil)
        data = Sick(run.parent / "pack" if (run.parent / "pack").exists() else pack)
        data.fault = run.name
        try:
            fit(method, data, TrainConfig.of(method, run, epochs=2, batch_size=16 // int(os.environ["WORLD_SIZE"]), progress=False, device="cpu", max_rejects=0.2))
        except (ValueError, RuntimeError, OSError) as error:
            os.write(1, f"{run.name} stopped: {error}\n".encode())     # at once: lines of two processes do not mix


FAULTS = {"nan": "is not finite", "nan in validation": "validation after step", "unreadable": "samples could not be read"}


def prepared(out: Path, studies: int) -> Path:
    return prepare_phantom(PhantomConfig(out=out, studies=studies, progress=False)).path


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "pack", 60)


def together(pack: Path, *runs: Path, ends: bool = True) -> str:
    "What two processes print that make these runs one after the other, each with the fault it is named for; both end by themselves, and soon."
    said = runs[0].with_name(f"said-{runs[0].name}.txt")
    return work_together(said, 2, work, pack, *runs, ends=ends)


@pytest.fixture(scope="module")
def made(pack, tmp_path_factory) -> tuple[Path, str]:
    "A folder of runs of two processes, and what they said: one undisturbed, one of a Pack with one study to validate on, one with each fault."
    folder = tmp_path_factory.mktemp("made")
    prepared(folder / "small" / "pack", 40)
    return folder, together(pack, folder / "undisturbed", folder / "small" / "run", *(folder / fault for fault in FAULTS))


@pytest.fixture(scope="module")
def undisturbed(made) -> Path:
    return made[0] / "undisturbed"


def test_they_end_and_go_on_only_as_many(pack, undisturbed):
    metrics, manifest = Run(undisturbed).metrics, Run(undisturbed).manifest
    assert manifest["processes"] == 2 and not metrics.duplicated(["step", "epoch", "split"]).any()
    assert np.isfinite(metrics.loss).all() and not Path(f"{undisturbed}.lock").exists()
    method = ConVIRT.from_preset("tiny", phantom_tokenizer(40), hidden=32, dim=16)
    with pytest.raises(ValueError, match="train differs in processes"):
        fit(method, Pack(pack), TrainConfig.of(method, undisturbed, epochs=2, batch_size=8, progress=False, device="cpu", max_rejects=0.2))


@torch.no_grad()
def test_validation_is_a_mean_over_samples(pack, undisturbed):
    "Of the weights that are kept: what one process makes of the batch that both share, 3 samples and 2."
    method = load_method(undisturbed, "last")
    view = TrainConfig.of(method, undisturbed)
    pairs = Pairs(Pack(pack), method.tokenizer, method.preprocessing, view, "validate")
    shares = [batch for rank in range(2) for batch in epoch_batches(len(pairs), 8, 0, 0, rank, 2)]
    assert len(pairs) == 5 and sorted(map(len, shares)) == [2, 3]
    wanted = float(method(collate([pairs[0, i] for i in sum(shares, [])])).total)
    assert Run(undisturbed).metrics.query("split == 'validate'").loss.iloc[-1] == pytest.approx(wanted, rel=1e-3)


def test_the_command_starts_them_itself(pack, tmp_path):
    room = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "medvis", "pretrain", "convirt", "--data", pack, "--run", tmp_path / "run", "--processes", "2", "--epochs", "1", "--batch-size", "8",
               "--hidden", "32", "--dim", "16", "--device", "cpu", "--no-progress"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=room)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = Run(tmp_path / "run").manifest
    assert done.stdout.count("Run: ") == 1 and manifest["processes"] == 2 and json.loads((tmp_path / "run" / "config.json").read_text())["train"]["negatives_of"] == "all processes"


@pytest.mark.parametrize("how", ["killed", "asked"])
def test_stopped_and_started_again_on_two(how, pack, undisturbed, tmp_path):
    "One is killed in the middle of a step; or one of them is asked to end, and both end after the same step."
    run = tmp_path / how
    together(pack, run, ends=False)
    assert not (run / "last.safetensors").exists() and (tmp_path / f"{how}.lock").exists() == (how == "killed")
    if how == "asked":
        assert load_checkpoint(run / "checkpoints")["step"] == Run(run).metrics.query("split == 'train'").step.max() > 0
    again = run.rename(tmp_path / "again")
    if how == "killed":
        (tmp_path / "killed.lock").rename(tmp_path / "again.lock")
    assert together(pack, again) == ""
    for name in ("last.safetensors", "weights.safetensors", "metrics.jsonl"):
        assert (again / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not (tmp_path / "again.lock").exists()


def test_killed_on_two_and_started_again_on_four(pack, undisturbed, tmp_path):
    "Each step takes the same samples as on two; the losses are much the same, not to the last bit, and the folder says so."
    run = tmp_path / "killed"
    together(pack, run, ends=False)
    again, done = run.rename(tmp_path / "again"), load_checkpoint(run.with_name("again") / "checkpoints")["step"]
    (tmp_path / "killed.lock").rename(tmp_path / "again.lock")
    assert work_together(tmp_path / "said.txt", 4, work, pack, again) == ""
    manifest, two, four = Run(again).manifest, *(Run(one).metrics.query("split == 'train'").set_index("step").loss for one in (undisturbed, again))
    assert (manifest["processes"], manifest["processes_before"], Run(again).config["train"]["batch_size"]) == (4, [2], 4)
    assert two.index.equals(four.index) and (two == four)[two.index <= done].all()
    later = (four / two)[two.index > done]
    assert len(later) and (later != 1).any() and ((later > 0.75) & (later < 1.33)).all(), later


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stops_one_stops_both(fault, pack, made):
    "In the same words, which name the studies of the one at fault."
    folder, out = made
    [line, again] = [line for line in out.splitlines() if line.startswith(f"{fault} stopped: ")]
    assert line == again and FAULTS[fault] in line and not (folder / fault / "last.safetensors").exists()
    studies = Pack(pack).studies
    if fault == "unreadable":
        metrics = Run(folder / fault).metrics.query("split == 'reject'")
        assert len(metrics) == int(line.split()[2]) >= 8 and set(metrics.study_id) <= set(studies.study_id[studies.split == "train"])
    if fault == "nan in validation":
        names = studies.study_id[studies.split == "validate"].iloc[epoch_batches(5, 8, 0, 0, 1, 2)[0]]
        assert ", ".join(names) in line and sum(name in line for name in studies.study_id) == len(names)


def test_fewer_validation_samples_than_processes(made):
    folder, out = made
    assert (Pack(folder / "small" / "pack").studies["split"] == "validate").sum() == 1
    assert "undisturbed stopped" not in out and "run stopped" not in out
    validated = Run(folder / "small" / "run").metrics.query("split == 'validate'")
    assert len(validated) == 2 and np.isfinite(validated.loss).all()


SLURM = {      # commands of a cluster, as far as the script needs them
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" >> said; fi',
    "srun": 'shift; exec "$@"',
    "torchrun": 'echo "$@" >> said; trap "echo checkpoint >> said; exit 1" TERM; touch begun; for i in $(seq 100); do [ -e end ] && exit 0; sleep 0.1; done',
}


@pytest.mark.parametrize("asked", [False, True])
def test_the_script_for_a_cluster(asked, tmp_path):
    "It starts as many processes as there are GPUs; asked to stop, it passes that on, waits for the checkpoint, and queues itself again."
    for name, lines in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    room = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "77"}
    script = Path(__file__).parents[1] / "tools" / "pretrain.slurm"
    job = subprocess.Popen(["bash", script, "mgca", "packs/a", "runs/b", "--epochs", "3"], cwd=tmp_path, env=room)
    while not (tmp_path / "begun").exists():
        assert job.poll() is None
        time.sleep(0.05)
    if asked:
        job.terminate()
    else:
        (tmp_path / "end").touch()
    assert job.wait(30) == (1 if asked else 0)
    command = "--nnodes 2 --nproc_per_node 8 --rdzv_id 77 --rdzv_backend c10d --rdzv_endpoint node1:29500 -m -- medvis pretrain mgca --data packs/a --run runs/b --workers 4 --no-progress --epochs 3"
    assert (tmp_path / "said").read_text().splitlines() == [command, *(["checkpoint", "requeue 77"] if asked else [])]


def small(run: Path, **changes):
    torch.manual_seed(0)
    method = ConVIRT.from_preset("tiny", phantom_tokenizer(40), hidden=32, dim=16)
    return method, TrainConfig.of(method, run, **{**dict(epochs=1, batch_size=8, progress=False, device="cpu"), **changes})


def test_a_second_caller_is_told_in_a_line(pack, tmp_path):
    method, config = small(tmp_path / "run")
    with lock_folder(config.run, "run"):
        with pytest.raises(OSError, match=rf"process {os.getpid()} on .* is working on this run") as caught:
            fit(method, Pack(pack), config)
        assert "\n" not in str(caught.value)
        with pytest.raises(OSError, match="is working on this Pack"), lock_folder(tmp_path / "new", "Pack"):
            prepare_phantom(PhantomConfig(out=tmp_path / "new", studies=8, progress=False))
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    note = json.dumps({"host": __import__("socket").gethostname(), "pid": int(child.stdout), "start": 0.0})
    (tmp_path / "run.lock").write_text(note)      # its process has gone: taken over
    fit(method, Pack(pack), config)
    assert not (tmp_path / "run.lock").exists()


def test_a_finished_run_is_only_read(pack, tmp_path):
    method, config = small(tmp_path / "run")
    fit(method, Pack(pack), config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again, _ = small(tmp_path / "run")
    assert fit(again, Pack(pack), config) == Run(config.run)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for name, value in method.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_foreign_and_damaged_runs_are_told_in_a_line(pack, tmp_path):
    method, config = small(tmp_path / "run")
    run = fit(method, Pack(pack), config).path
    whole = {name: (run / name).read_bytes() for name in ("config.json", "manifest.json", "weights.safetensors")}
    settings = json.loads(whole["config.json"])
    flipped = bytearray(whole["weights.safetensors"])
    flipped[-9] ^= 4
    damage = {
        "config.json": [b"", b"null", b"[" * 50_000, b"{}", json.dumps(settings | {"method": "mine"}).encode(), json.dumps(settings | {"method": None}).encode(),
                        json.dumps(settings | {"config": {"no": 1}}).encode(), json.dumps(settings | {"config": settings["config"] | {"dim": 32}}).encode(),
                        json.dumps(settings | {"config": settings["config"] | {"dim": "x"}}).encode()],
        "manifest.json": [b"{", b"[]", b'{"data": 3}', b'{"data": {}}', whole["manifest.json"].replace(b'"seed": 0', b'"seed": 8')],
        "weights.safetensors": [b"", b"x" * 100, whole["weights.safetensors"][:-50], bytes(flipped)],
    }
    for name, versions in damage.items():
        for data in versions:
            (run / name).write_bytes(data)
            with pytest.raises((ValueError, OSError)) as caught:
                load_method(run)
            assert "\n" not in str(caught.value) and (name in str(caught.value) or b'"mine"' in data), (name, data[:40], str(caught.value))
        (run / name).write_bytes(whole[name])
    load_method(run)


def test_a_batch_of_one_is_warned_of(pack, tmp_path):
    method, config = small(tmp_path / "run", batch_size=1)
    with pytest.warns(UserWarning, match="nothing to contrast a pair with"):
        fit(method, Pack(pack), config)
    method, config = small(tmp_path / "other")
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        fit(method, Pack(pack), config)
    assert not any("contrast" in str(warning.message) for warning in raised)
