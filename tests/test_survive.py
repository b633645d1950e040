"""`fit` survives bad numbers, bad disks and bad data: it stops with a clear word and a good checkpoint, or goes on."""
import json
import multiprocessing
import resource
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from folders import folder_pack
from PIL import Image

from medvis.data.pack import Pack
from medvis.data.pairs import Pairs, collate, epoch_batches
from medvis.data.phantom import Phantom
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders import train_tokenizer
from medvis.evaluate.encoder import _open_feature_files, _write_rows
from medvis.methods import MGCA, ConVIRT
from medvis.methods.method import Losses, phantom_tokenizer
from medvis.train import Diverged, Run, TrainConfig, fit, load_method
from medvis.train import loop, run as run_folder
from medvis.train.checkpoint import _list_checkpoints, load_checkpoint

FORK = multiprocessing.get_context("fork")
METHODS = {
    "mgca": (MGCA, {}),
    "mgca with learned attention and tiny_vit": (MGCA, dict(learned_attention=True, image="tiny_vit")),
    "convirt": (ConVIRT, {}),
}
every_method = pytest.mark.parametrize("kind", METHODS)


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("data") / "pack", studies=100, progress=False)).path


@pytest.fixture(scope="module")
def tokenizer():
    return phantom_tokenizer(60)


def build(kind: str, tokenizer):
    "A small method of that kind, always the same."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made, changes = METHODS[kind]
    return made.from_preset("tiny", tokenizer, hidden=32, dim=16, **changes)


def settings(method, run: Path, **changes) -> TrainConfig:
    return TrainConfig.of(method, run, **{**dict(epochs=1, batch_size=16, progress=False, device="cpu"), **changes})


def log(run: Path, split: str) -> list[dict]:
    "The lines of a run's log that speak of a split."
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def same_run(run: Path, wanted: Path) -> None:
    for name in ("last.safetensors", "weights.safetensors"):
        assert (run / name).read_bytes() == (wanted / name).read_bytes(), f"{name} differs"
    pd.testing.assert_frame_equal(Run(run).metrics, Run(wanted).metrics)
    assert not list(run.rglob("*.partial"))


def tells_no_text(pack: Pack, *texts: str) -> None:
    "Neither messages nor logs hold a sentence of a report."
    for sentence in {sentence for sentences in pack.studies["sentences"] for sentence in sentences if len(sentence) > 8}:
        assert not any(sentence in text for text in texts)


# ---- a loss that is not finite

def batch_of_step(data: Pack, step: int, batch_size: int = 16) -> list[int]:
    "Rows of the studies that step `step` (from 0) of the first epoch sees."
    train = np.flatnonzero(data.studies["split"] == "train")
    return train[epoch_batches(len(train), batch_size, 0, 0)[step]].tolist()


def poison(method, row: int, where: str) -> list[dict]:
    "Any batch with this study has a loss, or only a gradient, of nan. Returns the states before every step."
    states = []

    def before(module, args):
        if module.training:
            states.append({name: value.clone() for name, value in module.state_dict().items()})

    def after(module, args, losses: Losses):
        if row in args[0].study_id.tolist():
            if where == "gradient":
                losses.total.register_hook(lambda gradient: gradient * torch.nan)
                return losses
            return Losses(losses.total * torch.nan, losses.parts)

    method.register_forward_pre_hook(before)
    method.register_forward_hook(after)
    return states


@every_method
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_step(kind, where, pack, tokenizer, tmp_path):
    data, run = Pack(pack), tmp_path / "run"
    names = data.studies["study_id"].iloc[batch_of_step(data, 3)].tolist()
    method = build(kind, tokenizer)
    states = poison(method, batch_of_step(data, 3)[5], where)
    with pytest.raises(Diverged) as caught:
        fit(method, data, settings(method, run))
    message = str(caught.value)
    assert "step 4" in message and str(run) in message and all(name in message for name in names)
    assert len([name for name in data.studies["study_id"] if name in message]) == 16, "it names studies of other batches"
    tells_no_text(data, message, (run / "metrics.jsonl").read_text())

    assert len(states) == 4
    kept = load_checkpoint(run / "checkpoints")
    assert kept["step"] == 3 and kept["method"].keys() == states[3].keys()
    for name, value in kept["method"].items():
        assert torch.equal(value, states[3][name]), f"{name} is not what it was before the step"
    for name, value in method.state_dict().items():
        assert torch.equal(value, states[3][name]), f"{name} of the method was touched"
    assert [line["step"] for line in log(run, "train")] == [1, 2, 3]
    assert not (run / "last.safetensors").exists() and not list(run.rglob("*.partial"))

    with pytest.raises(Diverged) as again:       # the same run runs into it again
        method = build(kind, tokenizer)
        poison(method, batch_of_step(data, 3)[5], where)
        fit(method, data, settings(method, run))
    assert str(again.value) == message
    cured, healthy = build(kind, tokenizer), build(kind, tokenizer)
    fit(cured, data, settings(cured, run))
    fit(healthy, data, settings(healthy, tmp_path / "healthy"))
    same_run(run, tmp_path / "healthy")


def test_nan_in_an_accumulated_batch(pack, tokenizer, tmp_path):
    data, run, method = Pack(pack), tmp_path / "run", build("mgca", tokenizer)
    states = poison(method, batch_of_step(data, 3)[0], "loss")     # the second half of the second step
    with pytest.raises(Diverged, match="step 2 ") as caught:
        fit(method, data, settings(method, run, accumulate=2))
    rows = batch_of_step(data, 2) + batch_of_step(data, 3)
    assert all(name in str(caught.value) for name in data.studies["study_id"].iloc[rows])
    kept = load_checkpoint(run / "checkpoints")
    assert kept["step"] == 1 and all(torch.equal(value, states[2][name]) for name, value in kept["method"].items())


def test_nan_in_validation(pack, tokenizer, tmp_path):
    "It is never kept as the best; the message names the studies it came from."
    data, run, method = Pack(pack), tmp_path / "run", build("convirt", tokenizer)
    row = int(np.flatnonzero(data.studies["split"] == "validate")[0])
    poison(method, row, "loss")
    with pytest.raises(Diverged) as caught:
        fit(method, data, settings(method, run, batch_size=4))
    assert data.studies["study_id"].iloc[row] in str(caught.value)
    assert not (run / "weights.safetensors").exists()
    cured, healthy = build("convirt", tokenizer), build("convirt", tokenizer)
    fit(cured, data, settings(cured, run, batch_size=4))
    fit(healthy, data, settings(healthy, tmp_path / "healthy", batch_size=4))
    same_run(run, tmp_path / "healthy")


# ---- a full disk

def small_files(limit: int) -> None:
    "From now on this process cannot write a file beyond `limit` bytes: writes fail with an OSError, as on a full disk."
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def limit_at_call(owner, name: str, call: int, limit: int):
    "Limit the files when a function is called the nth time."
    def sabotage():
        real, calls = getattr(owner, name), [0]

        def limited(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call:
                small_files(limit)
            return real(*args, **kwargs)
        setattr(owner, name, limited)
    return sabotage


def train_and_tell(pipe, sabotage, pack: Path, tokenizer, run: Path) -> None:
    if sabotage:
        sabotage()
    method = build("mgca", tokenizer)
    try:
        fit(method, Pack(pack), settings(method, run, epochs=2, save_every=2))
        pipe.send("done")
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")


def in_process(sabotage, *args) -> str:
    "Train in a process of its own: 'done', or the error it ended with."
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=train_and_tell, args=(there, sabotage, *args))
    process.start()
    there.close()
    message = here.recv()
    process.join(60)
    return message


FULL = {    # what could not be written -> when files become how small
    "text": (loop, "open_run", 1, 2_000),
    "manifest.json": (run_folder, "write_settings", 1, 100),
    "config.json": (run_folder, "write_settings", 2, 100),
    "step_00000000.pt": (loop._Trainer, "restore", 1, 50_000),
    "metrics.jsonl": (loop._Trainer, "take_step", 1, 50),
    "step_00000002.pt": (loop._Trainer, "take_step", 2, 50_000),
    "weights.safetensors": (loop, "validate", 2, 50_000),
    "step_00000008.pt": (loop, "save_weights", 2, 5_000_000),
    "last.safetensors": (loop, "save_weights", 3, 50_000),
}


@pytest.fixture(scope="module")
def undisturbed(pack, tokenizer, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert in_process(None, pack, tokenizer, run) == "done"
    return run


@pytest.mark.parametrize("file", FULL)
def test_full_disk(file, pack, tokenizer, tmp_path, undisturbed):
    run = tmp_path / "run"
    message = in_process(limit_at_call(*FULL[file]), pack, tokenizer, run)
    assert message.startswith("OSError: ") and str(run) in message and f"/{file}: File too large" in message, message
    assert "\n" not in message and (run / "text").exists() == (file != "text")
    assert not list(run.rglob("*.partial")) and not (run / "last.safetensors").exists()
    made = _list_checkpoints(run / "checkpoints")
    assert bool(made) == (file not in ("text", "manifest.json", "config.json", "step_00000000.pt"))
    for path in made:
        state = torch.load(path, weights_only=True)
        build("mgca", tokenizer).load_state_dict(state["method"])
    assert in_process(None, pack, tokenizer, run) == "done", "with space again, the same command goes on"
    same_run(run, undisturbed)


# ---- images that cannot be read

class Broken(Pack):
    "A Pack some of whose images cannot be read."
    broken: frozenset[int] = frozenset()

    def image(self, index: int) -> np.ndarray:
        if index in self.broken:
            raise OSError(f"image {index}: Input/output error")
        return super().image(index)


def broken(pack: Path, rows) -> Broken:
    "The Pack with the images of these studies unreadable."
    data = Broken(pack)
    data.broken = frozenset(image for row in rows for image in data.studies["image_rows"].iloc[row])
    return data


@every_method
def test_unreadable_image(kind, pack, tokenizer, tmp_path):
    "The run goes on without it and says so; stopped and continued, it says so once."
    data = broken(pack, [batch_of_step(Pack(pack), 3)[0]])
    name = data.studies["study_id"].iloc[batch_of_step(data, 3)[0]]
    method = build(kind, tokenizer)
    fit(method, data, settings(method, tmp_path / "run"))
    [line] = log(tmp_path / "run", "reject")
    assert line["study_id"] == name and "Input/output error" in line["reason"]
    steps = log(tmp_path / "run", "train")
    assert [one["step"] for one in steps] == list(range(1, len(steps) + 1)) and np.isfinite([one["loss"] for one in steps]).all()
    tells_no_text(data, (tmp_path / "run" / "metrics.jsonl").read_text())

    stopped = build(kind, tokenizer)
    poison(stopped, batch_of_step(data, 3)[1], "loss")
    with pytest.raises(Diverged):
        fit(stopped, data, settings(stopped, tmp_path / "stopped"))
    cured = build(kind, tokenizer)
    fit(cured, data, settings(cured, tmp_path / "stopped"))
    same_run(tmp_path / "stopped", tmp_path / "run")


def test_batch_without_a_readable_image(pack, tokenizer, tmp_path):
    "A step without data changes nothing but the count; every study of it is listed."
    whole = Pack(pack)
    rows = batch_of_step(whole, 2, 2)
    data, method = broken(pack, rows), build("mgca", tokenizer)
    fit(method, data, settings(method, tmp_path / "run", batch_size=2))
    assert {line["study_id"] for line in log(tmp_path / "run", "reject")} == set(whole.studies["study_id"].iloc[rows])
    assert all("Input/output error" in line["reason"] for line in log(tmp_path / "run", "reject"))
    assert "loss" not in log(tmp_path / "run", "train")[2] and "loss" in log(tmp_path / "run", "train")[3]


def test_too_many_unreadable_images(pack, tokenizer, tmp_path):
    whole = Pack(pack)
    rows = sum((batch_of_step(whole, step)[:8] for step in range(4)), [])
    data, method = broken(pack, rows), build("mgca", tokenizer)
    with pytest.raises(ValueError, match=r"8 of 16 samples could not be read; .*run/metrics.jsonl lists them"):
        fit(method, data, settings(method, tmp_path / "run"))
    assert {line["study_id"] for line in log(tmp_path / "run", "reject")} == set(whole.studies["study_id"].iloc[rows[:8]])
    mended, healthy = build("mgca", tokenizer), build("mgca", tokenizer)
    fit(mended, whole, settings(mended, tmp_path / "run"))
    fit(healthy, whole, settings(healthy, tmp_path / "healthy"))
    for name in ("last.safetensors", "weights.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "healthy" / name).read_bytes()


def test_unreadable_in_validation(pack, tokenizer, tmp_path):
    rows = np.flatnonzero(Pack(pack).studies["split"] == "validate")
    one, method = broken(pack, rows[:1]), build("convirt", tokenizer)
    fit(method, one, settings(method, tmp_path / "one", batch_size=2, max_rejects=0.2))
    [line], [reject] = log(tmp_path / "one", "validate"), log(tmp_path / "one", "reject")
    assert np.isfinite(line["loss"]) and reject["study_id"] == one.studies["study_id"].iloc[rows[0]]
    method = build("convirt", tokenizer)
    with pytest.raises(ValueError, match="validat.* could not be read"):
        fit(method, broken(pack, rows), settings(method, tmp_path / "all", batch_size=2))


@pytest.mark.parametrize("file", ["images.u8", "studies.parquet", "manifest.json"])
def test_truncated_pack(file, pack, tmp_path):
    shutil.copytree(pack, tmp_path / "pack")
    whole = (pack / file).read_bytes()
    (tmp_path / "pack" / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=str(tmp_path / "pack" / file)):
        Pack(tmp_path / "pack")


# ---- reports of every kind

STRANGE = {
    "empty": "",
    "blank": " \n\t ",
    "one-sentence": "No pneumothorax.",
    "one-word": "Normal",
    "no-words": "... !? --- ___",
    "thousand-words": " ".join(f"The {side} lung shows opacity number {n}." for n in range(84) for side in ("left", "right")),
    "one-long-sentence": "opacity " * 1000,
    "one-long-word": "x" * 5000,
    "german": "Kein Nachweis eines Pneumothorax. Größe des Herzens regelrecht, Übergänge scharf.",
    "arabic": "لا يوجد استرواح صدري. القلب طبيعي الحجم.",
    "hebrew": "אין עדות לחזה אוויר. גודל הלב תקין.",
    "chinese": "双肺纹理清晰。心影大小正常。",
    "emoji": "Heart ❤️ fine 👍🏽. 🫁🫁",
    "combining": "Cœur nor\u0301mal\u0301. \u0301\u0301 \u200b\u200f \ufeff",
    "control": "Lungs\x07 are\x1b[31m clear.\u2028No effusion.",
    "surrogates and planes": "𝕷𝖚𝖓𝖌𝖘 clear. 𐍈𐍈 opacity.",
}


def strange_table(folder: Path, splits: dict[str, str], ordinary: int) -> Pack:
    "A Pack of a folder with one study for every strange report, and some ordinary ones."
    reports = {**STRANGE, **{f"ordinary-{i}": Phantom(seed=1)[i].report for i in range(ordinary)}}
    rows = []
    for i, (name, report) in enumerate(reports.items()):
        Image.fromarray(Phantom(seed=1)[i].image).save(folder / f"{i}.png")
        rows.append({"image_path": f"{i}.png", "study_id": name, "report": report, "split": splits.get(name, "train")})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder_pack(folder / "table.csv", folder / "pack", size=64, require_report=False)


@pytest.fixture(scope="module")
def strange(tmp_path_factory) -> Pack:
    return strange_table(tmp_path_factory.mktemp("strange"), {"ordinary-0": "test"}, 8)


@pytest.fixture(scope="module")
def strange_words(strange):
    return train_tokenizer(sentence for sentences in strange.studies["sentences"] for sentence in sentences)


@every_method
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_strange_reports(kind, batch_size, strange, strange_words, tmp_path):
    "All of them in one Pack, without a split to validate on."
    assert set(strange.studies["study_id"]) >= set(STRANGE) and "validate" not in set(strange.studies["split"])
    method, run = build(kind, strange_words), tmp_path / "run"
    fit(method, strange, settings(method, run, batch_size=batch_size, sentences="all", epochs=2, max_tokens=64))
    losses = [line["loss"] for line in log(run, "train")]
    assert np.isfinite(losses).all() and not log(run, "reject") and not log(run, "validate")
    for name, value in load_method(run).state_dict().items():
        assert torch.isfinite(value).all(), name
    tells_no_text(strange, *((run / name).read_text() for name in ("metrics.jsonl", "config.json", "manifest.json")))


@every_method
def test_strange_reports_with_foreign_vocabulary(kind, strange, tokenizer, tmp_path):
    "A vocabulary that has never seen these scripts: unknown words are words all the same."
    method, run = build(kind, tokenizer), tmp_path / "run"
    fit(method, strange, settings(method, run, batch_size=4, augment="lovt", swap=0.5, punctuation=True))
    assert np.isfinite([line["loss"] for line in log(run, "train")]).all() and not log(run, "reject")
    pairs = Pairs(strange, tokenizer, method.preprocessing, method.sampling)
    for i, (row, _) in enumerate(pairs.items):
        found = method.eval().correspondence(collate([pairs[i]]))
        words = len(pairs.report(i).words)
        assert int(found.word_mask.sum()) <= words and torch.isfinite(found.words).all(), strange.studies["study_id"].iloc[row]


def test_which_reports_are_seen(strange, tokenizer):
    pairs = Pairs(strange, tokenizer, build("mgca", tokenizer).preprocessing)
    names = strange.studies["study_id"].iloc[[row for row, _ in pairs.items]].tolist()
    assert not {"empty", "blank"} & set(names) and {"one-sentence", "arabic", "hebrew", "chinese", "german"} <= set(names)
    for i, name in enumerate(names):
        report = pairs.report(i)
        assert len(report.input_ids) == len(report.word_index) == len(report.sentence_index) <= 256
        for (s, start, end), word in zip(report.word_spans, report.words, strict=True):
            assert report.sentences[s][start:end] == word
        if name in ("thousand-words", "one-long-sentence"):
            assert len(report.input_ids) == 256 and report.word_index[-2] == len(report.words) - 1
    assert pairs.report(names.index("arabic")).words == "لا يوجد استرواح صدري القلب طبيعي الحجم".split()


@every_method
def test_train_split_of_one_study(kind, tmp_path):
    names = [*STRANGE, "ordinary-0", "ordinary-1"]
    data = strange_table(tmp_path, {name: "test" for name in names if name != "ordinary-0"}, 2)
    tokenizer, run = phantom_tokenizer(20), tmp_path / "run"
    method = build(kind, tokenizer)
    before = {name: value.clone() for name, value in method.named_parameters()}
    fit(method, data, settings(method, run, epochs=3))
    assert len(log(run, "train")) == 3 and np.isfinite([line["loss"] for line in log(run, "train")]).all()
    assert any(not torch.equal(before[name], value) for name, value in method.named_parameters())
    assert all(torch.isfinite(value).all() for value in load_method(run).state_dict().values())


def test_nothing_to_train_on(tmp_path):
    data = strange_table(tmp_path, {name: "test" for name in [*STRANGE, "ordinary-0"]} | {"empty": "train"}, 1)
    method = build("mgca", phantom_tokenizer(20))
    with pytest.raises(ValueError, match="pack has no study with text in its train split"):
        fit(method, data, settings(method, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@every_method
def test_bfloat16(kind, pack, tokenizer, tmp_path):
    "Mixed precision goes through the same losses: finite, and near those in single precision at the first step."
    first = {}
    for precision in ("no", "bf16"):
        method = build(kind, tokenizer)
        run = fit(method, Pack(pack), settings(method, tmp_path / precision, precision=precision))
        first[precision] = run.metrics["loss"].iloc[0]
        assert run.metrics["loss"].notna().all()
    assert abs(first["bf16"] - first["no"]) < 0.2 * first["no"]


def fill_and_tell(pipe, folder: Path) -> None:
    stores, _ = _open_feature_files(folder, 100, [(500,)])
    small_files(100_000)
    try:
        _write_rows(stores[0], np.arange(100), np.ones((100, 500), np.float32))
        pipe.send("done")
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")


def test_full_disk_under_kept_features(tmp_path):
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=fill_and_tell, args=(there, tmp_path))
    process.start()
    assert (message := here.recv()).startswith("OSError: ") and "0.npy" in message, message
    process.join(60)
