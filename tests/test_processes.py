"""Two real processes (gloo, torchrun): they end as one does, stop together, and write into no folder that another one holds."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from medvis.data.files import lock_folder
from medvis.data.pack import Pack
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.methods import ConVIRT
from medvis.methods.method import phantom_tokenizer
from medvis.train import Run, TrainConfig, fit, load_method

PROGRAM = """
import sys, torch
from medvis.data.pack import Pack
from medvis.methods import ConVIRT
from medvis.methods.method import Losses, phantom_tokenizer
from medvis.train import TrainConfig, fit

pack, run, fault, batch_size = sys.argv[1:]
class Sick(Pack):
    def image(self, index):
        import os
        if fault == "unreadable" and os.environ.get("RANK") == "1" and self.studies["split"].iloc[index] == "train":
            raise OSError("input/output error")
        return super().image(index)

torch.manual_seed(0)
method = ConVIRT.from_preset("tiny", phantom_tokenizer(40), hidden=32, dim=16)
def spoil(module, args, losses):
    import os
    bad = os.environ.get("RANK") == "1" and (fault == "nan" and module.training or fault == "nan in validation" and not module.training)
    return Losses(losses.total * torch.nan, losses.parts) if bad else losses
method.register_forward_hook(spoil)
try:
    fit(method, Sick(pack), TrainConfig.of(method, run, epochs=2, batch_size=int(batch_size), progress=False, device="cpu", max_rejects=0.2))
except (ValueError, RuntimeError, OSError) as error:
    print(f"stopped: {error}", flush=True)
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("data") / "pack", studies=60, progress=False)).path


def together(pack: Path, run: Path, fault: str = "", batch_size: int = 8, processes: int = 2) -> str:
    "What two processes print that train together; both must end by themselves, and soon."
    program = run.with_name("program.py")
    program.write_text(PROGRAM)
    room = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", program, pack, run, fault, str(batch_size)],
        capture_output=True, text=True, timeout=150, env=room)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_they_end_and_go_on_only_as_many(pack, tmp_path):
    run = tmp_path / "run"
    assert together(pack, run) == ""
    metrics, manifest = Run(run).metrics, Run(run).manifest
    assert manifest["processes"] == 2 and not metrics.duplicated(["step", "epoch", "split"]).any()
    assert np.isfinite(metrics.loss).all() and load_method(run) is not None
    method = ConVIRT.from_preset("tiny", phantom_tokenizer(40), hidden=32, dim=16)
    with pytest.raises(ValueError, match="train differs in processes"):
        fit(method, Pack(pack), TrainConfig.of(method, run, epochs=2, batch_size=8, progress=False, device="cpu", max_rejects=0.2))


@pytest.mark.parametrize("fault, told", [
    ("nan", "is not finite"), ("nan in validation", "validation after step"), ("unreadable", "samples could not be read")])
def test_what_stops_one_stops_both(fault, told, pack, tmp_path):
    out = together(pack, tmp_path / "run", fault)
    assert out.count("stopped: ") == 2 and out.count(told) == 2
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_fewer_validation_samples_than_processes(tmp_path):
    data = prepare_phantom(PhantomConfig(out=tmp_path / "pack", studies=40, progress=False))
    assert (data.studies["split"] == "validate").sum() == 1
    assert together(data.path, tmp_path / "run") == ""
    validated = Run(tmp_path / "run").metrics.query("split == 'validate'")
    assert len(validated) == 2 and np.isfinite(validated.loss).all()


def small(run: Path, **changes):
    torch.manual_seed(0)
    method = ConVIRT.from_preset("tiny", phantom_tokenizer(40), hidden=32, dim=16)
    return method, TrainConfig.of(method, run, **{**dict(epochs=1, batch_size=8, progress=False, device="cpu"), **changes})


def test_a_second_caller_is_told_in_a_line(pack, tmp_path):
    method, config = small(tmp_path / "run")
    with lock_folder(config.run, "run"):
        with pytest.raises(OSError, match=rf"process {os.getpid()} on .* is working on this run") as told:
            fit(method, Pack(pack), config)
        assert "\n" not in str(told.value)
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
        "manifest.json": [b"{", b"[]", b'{"data": 3}'],
        "weights.safetensors": [b"", b"x" * 100, whole["weights.safetensors"][:-50], bytes(flipped)],
    }
    for name, versions in damage.items():
        for data in versions:
            (run / name).write_bytes(data)
            with pytest.raises((ValueError, OSError)) as told:
                load_method(run)
            assert "\n" not in str(told.value) and (name in str(told.value) or b'"mine"' in data), (name, data[:40], str(told.value))
        (run / name).write_bytes(whole[name])
    load_method(run)


def test_a_batch_of_one_is_warned_of(pack, tmp_path):
    method, config = small(tmp_path / "run", batch_size=1)
    with pytest.warns(UserWarning, match="nothing to contrast a pair with"):
        fit(method, Pack(pack), config)
    method, config = small(tmp_path / "other")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(method, Pack(pack), config)
    assert not any("contrast" in str(warning.message) for warning in told)
