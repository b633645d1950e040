"""Experiment trackers get the numbers of a run, and nothing of its reports."""
import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medvis.testing import raises, small_phantom
from medvis.train import create_method, fit


@pytest.fixture(scope="module")
def pack():
    return small_phantom(40)


def trained(pack, run: Path, *log: str):
    return fit(create_method("clip", "tiny", data=pack, seed=0), pack, run, epochs=2, batch_size=16, progress=False, log=log)


def numbers(run) -> dict[str, list[tuple[int, float]]]:
    "What metrics.jsonl holds, by `split/name`."
    found = {}
    for line in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name not in ("step", "epoch", "split") and isinstance(value, (int, float)):
                found.setdefault(f"{line['split']}/{name}", []).append((line["step"], value))
    return found


def test_tensorboard_reads_back_every_number(pack, tmp_path):
    run = trained(pack, tmp_path / "run", "tensorboard")
    log, wanted = EventAccumulator(str(run.path / "medvis")).Reload(), numbers(run)
    assert set(wanted) == set(log.Tags()["scalars"]) and {"train/loss", "validate/loss"} <= set(wanted)
    for name, rows in wanted.items():
        read = log.Scalars(name)
        assert [event.step for event in read] == [step for step, _ in rows]
        assert all(math.isclose(event.value, value, rel_tol=1e-6) for event, (_, value) in zip(read, rows))


def test_no_report_and_no_study_leaves(pack, tmp_path):
    run = trained(pack, tmp_path / "run", "tensorboard")
    sent = b"".join(path.read_bytes() for path in (run.path / "medvis").rglob("*") if path.is_file())
    studies = pack.studies
    secrets = [sentence for sentences in studies["sentences"] for sentence in sentences] + list(studies["study_id"].astype(str))
    assert b"batch_size" in sent, "the settings are there"
    assert not [secret for secret in secrets if secret.encode() in sent]


def test_a_run_with_a_tracker_is_the_run_without(pack, tmp_path):
    watched, plain = trained(pack, tmp_path / "watched", "tensorboard"), trained(pack, tmp_path / "plain")
    assert numbers(watched) == numbers(plain)
    assert fit(create_method("clip", "tiny", data=pack, seed=0), pack, plain.path, epochs=2, batch_size=16, progress=False, log=("tensorboard",)).path == plain.path


def test_a_tracker_that_is_not_installed_is_named(pack, tmp_path, monkeypatch):
    monkeypatch.setattr("medvis.train.processes.find_spec", lambda name: None)
    with raises(ModuleNotFoundError, "pip install wandb"):
        trained(pack, tmp_path / "run", "wandb")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_others_run_without_a_network(pack, tmp_path, monkeypatch, name):
    pytest.importorskip(name, reason=f"{name} is not installed: it is no dependency of medvis")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")     # a database needs the whole of mlflow
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = trained(pack, tmp_path / "run", name)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".wandb", ".db", ".jsonl", ".parquet") or path.name == "loss"]
    assert run.path.exists() and len(written) > 1, "it has written its log on this disk"
    sent = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    secrets = {sentence.encode() for sentences in pack.studies["sentences"] for sentence in sentences if len(sentence) > 12}
    assert secrets and not [secret for secret in secrets if secret in sent], "no sentence, in whatever form it writes"
