"""The command line as a user meets it: the two ways from data to a page, and what it says when something is wrong."""
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed.run
import tyro
from accelerate.commands.launch import launch_command_parser
from PIL import Image

import medvis
from medvis.cli.commands import _COMMANDS, main
from medvis.data.pack import Pack
from medvis.data.phantom import FINDINGS, Phantom
from medvis.methods import METHODS
from medvis.methods.settings import SETTINGS
from medvis.train import Run

SMALL = ["--epochs", "1", "--hidden", "32", "--dim", "16", "--batch-size", "16", "--no-progress"]
PROBE = ["--fractions", "0.1", "1.0", "--seeds", "0"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def installed(*argv: str) -> subprocess.CompletedProcess:
    "Run the command that pip installed, as a user does."
    command = Path(sys.executable).with_name("medvis")
    return subprocess.run([command, *argv], capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "100"})


def run(capsys, *argv) -> tuple[int, str, str]:
    "Exit code, output and error output of a command."
    capsys.readouterr()
    try:
        code = main([str(word) for word in argv])
    except SystemExit as stop:      # tyro's own: help, and words that it does not know
        code = stop.code
    printed = capsys.readouterr()
    return code or 0, printed.out, printed.err


def succeeds(capsys, *argv) -> str:
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    return out


def fails(capsys, *argv) -> str:
    "The one line that a command fails with."
    code, _, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith("medvis: ")]
    assert code == 1 and len(lines) == 1 and err.rstrip().endswith(lines[0]), err
    assert "Traceback" not in err
    return lines[0]


def misused(capsys, *argv) -> str:
    "What the parser says of words that it does not know, without its frame."
    code, _, err = run(capsys, *argv)
    assert code == 2 and "Traceback" not in err, err
    return " ".join(re.sub(r"[─-╿]", " ", err).split())


def tree(folder: Path) -> dict[str, bytes]:
    "Every file of a folder with its bytes; but for the note of which files have been hashed, which any reader may write."
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "checked.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# ---- the phantom's way

@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "A phantom pack and a run on it, made by the commands."
    home = tmp_path_factory.mktemp("home")
    assert main(["prepare", "phantom", "--out", str(home / "pack"), "--studies", "150", "--no-progress"]) == 0
    assert main(["pretrain", "mgca", "--data", str(home / "pack"), "--run", str(home / "run"), *SMALL]) == 0
    return home


def test_phantom_way(home, capsys):
    assert len(Pack(home / "pack").studies) == 150
    made = Run(home / "run")
    assert made.config["method"] == "mgca" and made.config["config"]["hidden"] == 32 and made.config["preset"] == "tiny"
    assert (home / "run" / "last.safetensors").exists()

    before = tree(home / "run")
    out = succeeds(capsys, "pretrain", "mgca", "--data", home / "pack", "--run", home / "run", *SMALL)
    assert f"Run: {home / 'run'}" in out
    assert tree(home / "run") == before, "a finished run is left as it is"

    probe = ["probe", "--data", home / "pack", "--encoders", home / "run", "random-init", *PROBE]
    assert main([*map(str, probe)]) == 1, "a ResNet-50's 256 pixels cannot be had of 64"
    assert "would be enlarged" in capsys.readouterr().err
    out = succeeds(capsys, *probe, "--size", "56")
    table = pd.read_csv(home / "run" / "probe" / "probe.csv")
    assert set(table.encoder) == {"run", "random-init"} and set(table.finding) == {*FINDINGS, "macro"}
    for row in table[table.finding == "macro"].itertuples():
        assert f"{row.auroc:.3f}" in out
    assert str(home / "run" / "probe" / "probe.csv") in out

    out = succeeds(capsys, "show", home / "run", "--studies", "2")
    page = (home / "run" / "page.html").read_text()
    assert f"Page: {home / 'run' / 'page.html'}" in out and "<img" in page and "macro AUROC" in page
    succeeds(capsys, "show", home / "run", "--data", home / "pack", "--out", home / "other.html", "--studies", "1")
    assert (home / "other.html").exists() and not list(home.rglob("*.partial"))


def test_init_from_a_run(home, tmp_path, capsys):
    succeeds(capsys, "prepare", "phantom", "--out", tmp_path / "pack", "--studies", "60", "--seed", "1", "--no-progress")
    more = ["--data", tmp_path / "pack", "--run", tmp_path / "run", "--init", home / "run", *SMALL]
    succeeds(capsys, "pretrain", "mgca", *more, "--lr", "0")
    old, new = Run(home / "run").method("last"), Run(tmp_path / "run").method("last")
    for (name, value), (_, other) in zip(old.named_parameters(), new.named_parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6, msg=name)     # a rate of 0 changes nothing
    assert old.tokenizer.get_vocab() == new.tokenizer.get_vocab()
    message = fails(capsys, "pretrain", "mgca", *more[:2], "--run", tmp_path / "new", "--init", home / "run", "--epochs", "1")
    assert f"{home / 'run'} does not fit" in message and not (tmp_path / "new").exists()


# ---- the real way: a folder of pictures and a table

@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "Sixty PNG files of several sizes and depths, two a patient, and a table of them with reports and labels."
    folder = tmp_path_factory.mktemp("folder")
    (folder / "png").mkdir()
    rows = []
    for i in range(60):
        study = Phantom(size=96, seed=2)[i]
        image = np.pad(study.image, ((0, 0), (i % 7, 0)))
        Image.fromarray(image.astype(np.uint16) * 257 if i % 2 else image).save(folder / "png" / f"{i}.png")
        labels = {name: study.labels[name] for name in ("Pleural Effusion", "Cardiomegaly")}
        rows.append({"file": f"png/{i}.png", "text": study.report, "who": f"p{i // 2}", **labels})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder


PREPARE = ["prepare", "folder", "--image-column", "file", "--report-column", "text", "--patient-column", "who", "--no-progress"]


def test_folder_way(folder, tmp_path, capsys):
    out = succeeds(capsys, *PREPARE, "--root", folder, "--out", tmp_path / "pack", "--size", "64",
                   "--label-columns", "Pleural Effusion", "Cardiomegaly")
    assert "60 images of 60 studies of 30 patients" in out
    data = Pack(tmp_path / "pack")
    assert list(data.labels) == ["Pleural Effusion", "Cardiomegaly"] and set(data.studies["split"]) == {"train", "validate", "test"}
    succeeds(capsys, "pretrain", "convirt", "--data", data.path, "--run", tmp_path / "run", *SMALL)
    out = succeeds(capsys, "probe", "--data", data.path, "--encoders", tmp_path / "run", "--names", "mine", *PROBE,
                   "--out", tmp_path / "probe", "--findings", "Cardiomegaly")
    table = pd.read_csv(tmp_path / "probe" / "probe.csv")
    assert "mine" in out and set(table.encoder) == {"mine", "random-init"} and set(table.finding) == {"Cardiomegaly", "macro"}
    out = succeeds(capsys, "show", tmp_path / "run")
    page = (tmp_path / "run" / "page.html").read_text()
    held_out = data.studies[data.studies["split"] == "test"]
    assert "<img" in page and not any(sentence in page for sentences in held_out["sentences"] for sentence in sentences)
    succeeds(capsys, "show", tmp_path / "run", "--show-text", "True")
    page = (tmp_path / "run" / "page.html").read_text()
    assert any(sentence in page for sentences in held_out["sentences"] for sentence in sentences)


def test_rejects_are_told(folder, tmp_path, capsys):
    table = pd.read_csv(folder / "table.csv").head(20)
    table.loc[3, "file"] = "png/missing.png"
    table.loc[4, "text"] = ""
    table.to_csv(tmp_path / "table.csv", index=False)
    out = succeeds(capsys, *PREPARE, "--table", tmp_path / "table.csv", "--root", folder, "--out", tmp_path / "pack")
    assert "18 images" in out and out.count(" 1 rejected: ") == 2 and "20 images seen" in out
    assert "png/missing.png" in set(Pack(tmp_path / "pack").rejects["item"])


# ---- errors in one line

def test_missing_pack(home, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    for argv in (["pretrain", "mgca", "--run", tmp_path / "run"], ["probe", "--encoders", home / "run"], ["show", home / "run"]):
        message = fails(capsys, *argv, "--data", nowhere)
        assert str(nowhere) in message and "Pack" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("changes, words", [
    (["--image-column", "nope"], ["table.csv", "'nope'", "file, text, who"]),
    (["--report-column", "nope"], ["table.csv", "'nope'", "file, text, who"]),
    (["--label-columns", "nope"], ["table.csv", "'nope'", "file, text, who"]),
    (["--label-columns", "text"], ["row 1", "'text'"]),
    (["--table", "/nowhere/table.csv"], ["/nowhere/table.csv"]),
    (["--where", "nope == 1"], ["table.csv", "nope"]),
])
def test_bad_tables(changes, words, folder, tmp_path, capsys):
    line = fails(capsys, *PREPARE, "--root", folder, "--out", tmp_path / "pack", *changes)
    assert all(word in line for word in words), line
    assert not any(tmp_path.iterdir())


def test_a_root_that_is_not_there_tells_what_is_needed(tmp_path, capsys):
    code, _, err = run(capsys, *PREPARE, "--root", "/nowhere/at/all", "--out", tmp_path / "pack")
    assert code == 1 and err.startswith("medvis: /nowhere/at/all: no such folder. Your own data.") and "ROOT/table.csv" in err and not any(tmp_path.iterdir())


def test_all_images_missing(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = fails(
        capsys, *PREPARE, "--table", folder / "table.csv", "--root", tmp_path / "empty", "--out", tmp_path / "pack")
    assert "60 of 60 images" in line and str(tmp_path / "pack.partial" / "rejects.csv") in line
    assert not (tmp_path / "pack").exists()
    assert len(pd.read_csv(tmp_path / "pack.partial" / "rejects.csv")) == 60


def test_place_is_taken(home, tmp_path, capsys):
    message = fails(capsys, "prepare", "phantom", "--out", home / "pack", "--studies", "30", "--no-progress")
    assert str(home / "pack") in message and len(Pack(home / "pack").studies) == 150


def test_run_of_another(home, capsys):
    before = tree(home / "run")
    here = ["--data", home / "pack", "--run", home / "run", *SMALL]
    for name, argv in {"lr": ["mgca", *here, "--lr", "0.5"], "dim": ["mgca", *here, "--dim", "8"], "method": ["convirt", *here]}.items():
        message = fails(capsys, "pretrain", *argv)
        assert str(home / "run") in message and "another run" in message and name in message
    assert tree(home / "run") == before


def test_unknown_words(home, tmp_path, capsys):
    here = ["--data", home / "pack", "--run", tmp_path / "run"]
    assert "nonsense" in misused(capsys, "nonsense")
    assert "nonsense" in (message := misused(capsys, "pretrain", "nonsense", *here)) and all(name in message for name in METHODS)
    assert "nonsense" in (message := fails(capsys, "pretrain", "mgca", "--preset", "nonsense", *here)) and "released-resnet50" in message
    assert "nonsense" in (message := fails(capsys, "pretrain", "mgca", "--preset=nonsense", *here)) and "released-resnet50" in message
    assert "--nonsense" in misused(capsys, "pretrain", "mgca", *here, "--nonsense", "1")
    assert "--schedule" in misused(capsys, "pretrain", "mgca", *here, "--schedule", "nonsense")
    assert "--epochs" in misused(capsys, "pretrain", "mgca", *here, "--epochs", "many")
    assert "--data" in misused(capsys, "pretrain", "mgca", "--run", tmp_path / "run")
    assert "nonsense" in fails(capsys, "prepare", "nonsense")
    assert "--nonsense" in misused(capsys, "demo", "--nonsense")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [
    "image", "text", "layer", "negatives", "directions", "whole-text", "augment", "image-weights"])
def test_settings_that_do_not_exist(setting, home, tmp_path, capsys):
    "Every setting that is a word is checked before the run begins."
    argv = ["pretrain", "mgca", "--data", home / "pack", "--run", tmp_path / "run", *SMALL, f"--{setting}", "nonsense"]
    code, _, err = run(capsys, *argv)
    assert code and "nonsense" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists(), "the run was begun before its settings were checked"


@pytest.mark.parametrize("setting, value", [
    ("batch-size", 0), ("accumulate", 0), ("save-every", 0), ("max-tokens", 2), ("max-tokens", 100_000), ("epochs", 0)])
def test_numbers_out_of_range(setting, value, home, tmp_path, capsys):
    argv = ["pretrain", "mgca", "--data", home / "pack", "--run", tmp_path / "run", *SMALL, f"--{setting}", str(value)]
    code, _, err = run(capsys, *argv)
    assert code and "Traceback" not in err and str(value) in err and (setting in err or setting.replace("-", "_") in err), err
    assert not (tmp_path / "run").exists()


def test_option_of_another_encoder(home, tmp_path, capsys):
    "A vision transformer has no layer3: the default of the ResNets is in the way, and the line says how to take it away."
    argv = ["pretrain", "convirt", "--data", home / "pack", "--run", tmp_path / "run", *SMALL, "--image", "tiny_vit"]
    message = fails(capsys, *argv)
    assert "tiny_vit has no layer" in message and "None" in message and not (tmp_path / "run").exists()
    succeeds(capsys, *argv, "--layer", "None")


def test_unknown_method_of_demo(tmp_path, capsys):
    code, _, err = run(capsys, "demo", "--method", "nonsense", "--out", tmp_path / "demo", "--studies", "20")
    assert code and "nonsense" in err and "mgca" in err and "Traceback" not in err
    assert not (tmp_path / "demo").exists()


def test_probe_of_what_is_not_there(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = ["probe", "--data", home / "pack", *PROBE]
    assert "no-such-encoder" in fails(capsys, *here, "--encoders", "no-such-encoder")
    (tmp_path / "text.pt").write_text("not weights")
    assert "text.pt" in fails(capsys, *here, "--encoders", "text.pt")
    assert "nonsense" in fails(capsys, *here, "--encoders", "random-init", "--image", "nonsense")
    assert "nonsense" in fails(capsys, *here, "--encoders", "random-init", "--image", "tiny_resnet", "--findings", "nonsense")
    assert "--names" in fails(capsys, *here, "--encoders", home / "run", home / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["text.pt"]


def test_probe_without_labels(folder, home, tmp_path, capsys):
    succeeds(capsys, *PREPARE, "--root", folder, "--out", tmp_path / "pack", "--size", "64")
    message = fails(capsys, "probe", "--data", tmp_path / "pack", "--encoders", home / "run", *PROBE, "--out", tmp_path / "probe")
    assert "label" in message and not (tmp_path / "probe").exists()


def test_nobody_is_measured_on_what_was_trained_on(folder, tmp_path, capsys):
    table = pd.read_csv(folder / "table.csv")
    for name, other in {"learned": "validate", "asked": "test"}.items():        # the same patients train in the one and test in the other
        table.assign(split=np.where((table.index < 20) == (name == "asked"), other, "train")).to_csv(folder / f"{name}.csv", index=False)
        succeeds(capsys, *PREPARE, "--root", folder, "--table", folder / f"{name}.csv", "--split-column", "split", "--out", tmp_path / name, "--size", "64",
                 "--label-columns", "Pleural Effusion", "Cardiomegaly")
    succeeds(capsys, "pretrain", "convirt", "--data", tmp_path / "learned", "--run", tmp_path / "run", *SMALL)
    before = tree(tmp_path / "asked")
    probe = ["probe", "--data", tmp_path / "asked", "--encoders", tmp_path / "run", *PROBE]
    evaluate = ["evaluate", "tiny-linear", "--data", tmp_path / "asked", "--encoder", tmp_path / "run", "--out", tmp_path / "results"]
    for command in (probe, evaluate, ["retrieve", tmp_path / "run", "--data", tmp_path / "asked"]):
        code, _, err = run(capsys, *command)
        assert code == 1 and "20 x same file" in err and "--allow-leaks" in err and "Traceback" not in err, err
    assert len(pd.read_csv(tmp_path / "asked.leaks.csv")) >= 20 and tree(tmp_path / "asked") == before
    succeeds(capsys, *probe, "--allow-leaks")
    assert Pack(tmp_path / "asked").manifest["guard"]["leaks"]["same file"] == 20
    assert run(capsys, *probe)[0] == 1          # allowed once is not allowed for ever


def test_show_of_what_is_not_a_run(home, tmp_path, capsys):
    message = fails(capsys, "show", tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'} is not a run" in message
    message = fails(capsys, "show", home / "pack")
    assert f"{home / 'pack'} is not a run" in message
    assert not any(tmp_path.iterdir())


# ---- every method

@pytest.mark.parametrize("method", METHODS)
def test_every_method_pretrains(method, home, tmp_path, capsys):
    "From the command line, at its tiny preset, to weights that load; another preset's options are there to see."
    argv = ["pretrain", method, "--preset", "tiny", "--data", home / "pack", "--run", tmp_path / "run", "--no-progress"]
    succeeds(capsys, *argv, "--epochs", "1", "--batch-size", "16", "--max-tokens", "64")
    made = Run(tmp_path / "run")
    assert made.config["method"] == method and made.metrics.loss.notna().all()
    loaded = made.method()
    assert type(loaded) is METHODS[method] and loaded.preset == "tiny"
    full = [preset for preset in METHODS[method].presets if preset != "tiny"]
    code, out, _ = run(capsys, "pretrain", method, "--preset", full[0], "--help")
    assert code == 0 and all(preset in out for preset in full)


def test_presets_are_listed(capsys):
    "The same table as in Python, of all methods or of one, without a Pack."
    every, one = succeeds(capsys, "presets"), succeeds(capsys, "presets", "lovt")
    every, one = (said.partition("\nNext: medvis pretrain")[0] + "\n" for said in (every, one))
    table = medvis.list_presets()
    assert [line for line in every.splitlines() if not line.startswith(" ")] == list(METHODS) and one.splitlines()[0] == "lovt" and one in every
    assert len(every.splitlines()) == len(METHODS) + len(table) and len(one.splitlines()) == 1 + len(medvis.list_presets("lovt"))
    for row in table.itertuples():
        line = next(line for line in succeeds(capsys, "presets", row.method).splitlines() if line.split()[0] == row.preset)
        assert row.source in line and (f"; {row.parent} with {row.changes}" in line) == bool(row.parent)
    assert fails(capsys, "presets", "mcga") == f"medvis: unknown method 'mcga'; choose from {', '.join(METHODS)}"


@pytest.mark.parametrize("method", ["global-mi", "local-mi"])
def test_the_four_rows_of_local_mi(method, home, tmp_path, capsys):
    "Each method with either bound, measured with the encoder frozen and tuned: eight plain lines, here at the tiny preset."
    for bound in ("cpc", "mine"):
        pretrained = tmp_path / bound
        succeeds(capsys, "pretrain", method, "--preset", "tiny", "--bound", bound, "--data", home / "pack", "--run", pretrained, "--epochs", "1", "--batch-size", "16", "--no-progress")
        assert Run(pretrained).config["config"]["bound"] == bound == METHODS[method].Config(**METHODS[method].presets["paper" if bound == "cpc" else "mine"][0]).bound
        for how in ("frozen", "tuned"):
            out = tmp_path / f"{bound}-{how}"
            succeeds(capsys, "evaluate", f"localmi_{how}", "--data", home / "pack", "--encoder", pretrained, "--out", out, "--epochs", "1", "--seeds", "0", "--resamples", "0", "--no-baseline", "--no-progress")
            results = pd.read_csv(out / "results.csv")
            assert set(results["encoder"]) == {bound} and set(results["protocol"]) == {f"localmi_{how}"} and results["value"].notna().any()
    scores = [pd.read_csv(tmp_path / f"{bound}-{how}" / "results.csv")["value"] for bound in ("cpc", "mine") for how in ("frozen", "tuned")]
    assert all(not one.equals(other) for place, one in enumerate(scores) for other in scores[:place])


# ---- help, and the command that pip installed

HELP = {(name,): kind.__doc__ for name, (kind, _) in _COMMANDS.items()} | {
    ("prepare", "folder"): "one row per image", ("prepare", "phantom"): "synthetic radiographs",
    ("prepare", "class-folder"): "folder per class", ("prepare", "rsna"): "RSNA Pneumonia", ("data", "check", "chexpert"): "CheXpert", ("data", "leaks"): "more than one split",
    ("pretrain", "mgca"): "MGCA", ("pretrain", "convirt"): "", ("pretrain", "mgca", "--preset", "paper"): "--tau-instance"}


@pytest.mark.parametrize("argv", HELP, ids=" ".join)
def test_help(argv, capsys):
    "Every command says what it does, and every option what it means."
    code, out, err = run(capsys, *argv, "--help")
    assert code == 0 and not err and out.startswith(f"usage: medvis {argv[0]}")
    plain = " ".join(re.sub(r"[─-╿]", " ", out).split())
    assert " ".join(HELP[argv].split(":")[0].lower().split()) in plain.lower()
    assert "MISSING" not in plain and "<" not in plain and "Args:" not in plain
    assert max(len(line) for line in out.splitlines() if not line.startswith(("usage: medvis prepare", "usage: medvis pretrain"))) <= 120      # these name all data sets and methods
    options = re.split(r" (?=--[a-z])", plain[plain.index("show this help"):])[1:]
    for option in options:
        words = re.sub(r"\(default: [^)]*\)|\(required\)|--[\w-]+,?|\{[^}]*\}|\[[^\]]*\]+|\b[A-Z]+\b|\|", " ", option).split()
        assert words or "--no-" in plain, f"{option!r} does not say what it means"


HEAVY = ("torch", "torchvision", "transformers", "timm", "accelerate", "matplotlib", "sklearn", "scipy")
QUICK = [*([*name, "--help"] for name in HELP), ["--help"], ["--version"], [], ["shwo"], ["pretrain"], ["pretrain", "mcga", "--data", "p"], ["prepare", "rsnaa"],
         *([name, "--nonsense", "1"] for name in _COMMANDS), ["pretrain", "mgca", "--nonsense"], ["pretrain", "mgca", "--data", "p"], ["probe"], ["show"],
         ["pretrain", "mgca", "--data", "p", "--run", "r", "--epochs", "many"], ["pretrain", "mgca", "--preset", "huge"], ["demo", "--method", "mcga"],
         ["pretrain", "mgca", "--data", "p", "--run", "r", "--epochs", "0"], ["pretrain", "mgca", "--data", "p", "--run", "r", "--augment", "nonsense"],
         ["pretrain", "local-mi", "--data", "p", "--run", "r", "--negatives", "nonsense"], ["grounding", "--subjects", "mcga"], ["evaluate", "rsna", "--data", "p"],
         ["probe", "--data", "nowhere", "--encoders", "imagenet"], ["pretrain", "mgca", "--data", "nowhere", "--run", "r"], ["show", "r", "--data", "nowhere"],
         ["data", "get", "rsna"], ["--tyro-print-completion", "bash"]]


def test_help_and_typos_do_not_wait_for_torch(tmp_path):
    "In a fresh interpreter: whatever the parser can answer, it answers before anything heavy is imported."
    code = (
        "import sys, io, contextlib\n"
        "from medvis.cli.start import main\n"
        f"for argv in {QUICK!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        try: main(argv)\n"
        "        except SystemExit: pass\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not heavy, (argv, heavy)\n")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-600:]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["prepare", "phantm"], ["data", "check", "phantm", "--root", "r"]])
def test_a_mistyped_data_set_is_answered_before_any_option_is_read(words, capsys, monkeypatch):
    "To read those of all data sets takes half a second"
    monkeypatch.setattr(tyro, "cli", lambda *given, **more: pytest.fail("options were read"))
    message = fails(capsys, *words)
    assert "unknown data set 'phantm'; choose from " in message and all(name in message for name in ("rsna", "openi", "class-folder"))


@pytest.mark.parametrize("home, name", [
    ("medvis.train", "TrainConfig"), ("medvis.train.loop", "TrainConfig"), ("medvis.train.loop", "Diverged"), ("medvis.data.pairs", "Sampling"), ("medvis.methods", "METHODS"),
    ("medvis.methods.method", "MethodConfig"), ("medvis.methods.mgca", "PRESETS"), ("medvis.evaluate.protocol", "PROTOCOLS"),
    ("medvis.evaluate.protocol", "LOCALMI"), ("medvis.evaluate.finetune", "SWITCHES"), ("medvis.train.loop", "Schedule"),
    ("medvis.evaluate.finetune", "Protocol"), ("medvis.studies.demo", "DemoConfig"),
    ("medvis.studies.grounding", "GroundingConfig"), ("medvis.studies.downstream", "DownstreamConfig"), ("medvis.studies.real_pairs", "RealPairsConfig")])
def test_settings_are_found_where_they_are_used(home, name):
    assert hasattr(importlib.import_module(home), name)


def test_methods_hold_their_settings():
    assert {name: (kind.Config, kind.presets) for name, kind in METHODS.items()} == SETTINGS


def test_version_and_module(capsys):
    assert succeeds(capsys, "--version") == f"medvis {medvis.__version__}\n"
    result = subprocess.run([sys.executable, "-m", "medvis", "shwo"], capture_output=True, text=True)
    assert result.returncode == 2 and "shwo" in result.stderr and "medvis" in result.stderr


def test_launchers_hand_over_the_words(capsys):
    "The lines in the help of pretrain, as torchrun and accelerate read them; without its dashes torchrun refuses --run."
    message = " ".join(succeeds(capsys, "pretrain", "convirt", "--help").split())
    for line in ("torchrun --nproc_per_node 2 -m -- medvis pretrain", "accelerate launch --multi_gpu --num_processes 2 -m medvis pretrain"):
        assert line in message
    rest = ["pretrain", "convirt", "--data", "p", "--run", "r"]
    asked = torch.distributed.run.parse_args(["--nproc_per_node", "2", "-m", "--", "medvis", *rest])
    assert (asked.module, asked.training_script, asked.training_script_args) == (True, "medvis", rest)
    asked = launch_command_parser().parse_args(["--multi_gpu", "--num_processes", "2", "-m", "medvis", *rest])
    assert (asked.module, asked.training_script, asked.training_script_args) == (True, "medvis", rest)


def test_two_processes_by_torchrun(home, tmp_path):
    "The line of the help, with two processes on the CPU: one run, a step of both, printed once."
    words = ["pretrain", "convirt", "--data", str(home / "pack"), "--run", str(tmp_path / "run"), *SMALL, "--batch-size", "8", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--", "medvis", *words],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, [line for line in result.stderr.splitlines() if "rror" in line or "medvis:" in line]
    assert result.stdout.count("Run: ") == 1
    metrics, train = Run(tmp_path / "run").metrics, (Pack(home / "pack").studies["split"] == "train").sum()
    assert (metrics["split"] == "train").sum() == train // 16       # batches of 8 for each of two


def test_a_run_is_looked_at_from_another_folder(home, tmp_path, capsys, monkeypatch):
    run = Path(shutil.copytree(home / "run", tmp_path / "above" / "runs" / "one"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["data"] |= {"path": "packs/mine", "absolute": str(tmp_path / "gone" / "packs" / "mine")}
    del manifest["sha256"]      # changed on purpose
    (run / "manifest.json").write_text(json.dumps(manifest))
    for command in ("show", "retrieve", "phrases"):
        message = fails(capsys, command, run)
        assert "--data" in message and str(run) in message and str(tmp_path / "gone" / "packs" / "mine") in message, message
    succeeds(capsys, "show", run, "--data", home / "pack", "--studies", "1")
    shutil.copytree(home / "pack", tmp_path / "above" / "packs" / "mine")      # a folder above the run's holds it under the recorded name
    succeeds(capsys, "show", run, "--studies", "1")
    other = tmp_path / "above" / "packs" / "mine" / "manifest.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "hash": "another"}))
    assert "--data" in fails(capsys, "show", run), "another Pack of that name is not taken for it"


def test_installed_command():
    result = installed("--help")
    assert result.returncode == 0 and not result.stderr and all(name in result.stdout for name in _COMMANDS)


def test_installed_command_fails_in_a_line(tmp_path):
    result = installed("probe", "--data", str(tmp_path / "nowhere"), "--encoders", "random-init")
    assert result.returncode == 1 and not result.stdout
    assert re.fullmatch(r"medvis: .*nowhere is not a Pack.*\n", result.stderr)


def test_demo(tmp_path, capsys):
    "From nothing to a page; a second time most of it is there already."
    argv = ["demo", "--studies", "150", "--epochs", "1", "--out", tmp_path / "demo", "--no-progress"]
    first = succeeds(capsys, *argv)
    page = tmp_path / "demo" / "run" / "page.html"
    assert f"Page: {page}" in first and "Pointing game" in first and "macro AUROC" in first and "gain over random" in first
    assert "<img" in page.read_text()
    kept = {name: value for name, value in tree(tmp_path / "demo").items()
            if name.startswith(("pack/", "run/")) and "probe" not in name and "page" not in name}
    second = succeeds(capsys, *argv)
    assert re.sub(r"\(\d.*", "", second) == re.sub(r"\(\d.*", "", first), "the same numbers again"
    assert {name: tree(tmp_path / "demo")[name] for name in kept} == kept
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("command", ["pretrain", "probe", "evaluate", "retrieve", "phrases", "show"])
def test_nothing_is_measured_on_changed_pixels(command, home, tmp_path, capsys):
    "All pixels inverted in place, with the size as before: every door names the file before it says a number."
    shutil.copytree(home / "pack", tmp_path / "pack")
    (tmp_path / "pack" / "checked.json").unlink(missing_ok=True)
    pixels = (tmp_path / "pack" / "images.u8").read_bytes()
    (tmp_path / "pack" / "images.u8").write_bytes(bytes(255 - value for value in pixels))
    words = {
        "pretrain": ["mgca", "--data", tmp_path / "pack", "--run", tmp_path / "run", *SMALL],
        "probe": ["--data", tmp_path / "pack", "--encoders", home / "run", "--out", tmp_path / "probe", *PROBE],
        "evaluate": ["tiny-linear", "--data", tmp_path / "pack", "--encoder", home / "run", "--out", tmp_path / "results"],
        "retrieve": [home / "run", "--data", tmp_path / "pack"],
        "phrases": [home / "run", "--data", tmp_path / "pack"],
        "show": [home / "run", "--data", tmp_path / "pack", "--out", tmp_path / "page.html"],
    }[command]
    message = fails(capsys, command, *words)
    assert "images.u8" in message and not (tmp_path / "page.html").exists(), message
