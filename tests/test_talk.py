"""How commands talk: every one ends with what was written where and with lines that can be typed next; bars have one shape."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch
import torchvision
from notebooks import ROOT

from medvis.cli import commands
from medvis.cli.commands import _COMMANDS, main
from medvis.studies.downstream import _TASKS as TASKS

COMMANDS = {  # command line -> what it writes, and the title of the bar of what takes long; in an empty folder and in this order
    "data simulate folder --root mine --studies 40 --size 64": ("mine", "draw"),
    "data check folder --root mine": (None, "files"),
    "prepare phantom --out packs/a --studies 150": ("packs/a", "prepare a"),
    "data leaks packs/a": (None, "near duplicates"),
    "pretrain clip --data packs/a --run runs/a --epochs 1 --batch-size 16": ("runs/a", "a"),
    "probe --data packs/a --encoders runs/a --fractions 1.0 --seeds 0": ("runs/a/probe/probe.csv", "probe"),
    "evaluate tiny-linear --data packs/a --encoder runs/a --out results --seeds 0 --lrs 0.03 --epochs 1 --resamples 0": ("results/results.csv", "tiny-linear on"),
    "retrieve runs/a": ("runs/a/retrieval", "images"),
    "phrases runs/a": ("runs/a/phrases", "phrases"),
    "show runs/a --studies 1": ("runs/a/page.html", "reports"),
    "import eye.pth --out runs/eye": ("runs/eye", None),
    "export runs/a --to safetensors": ("runs/a/export/safetensors", None),
    "demo --out demo --studies 150 --epochs 1": ("demo/run/page.html", "run"),
    "grounding --out grounding --subjects random-init --seeds 0 --studies 150": ("grounding", "grounding"),
    "downstream --runs runs/a --data packs/a --out downstream --fractions 0.3 --resamples 10": ("downstream", "downstream"),
    "real-pairs --data packs/a --boxes packs/a --runs runs --out pairs --subjects clip --preset tiny --deadline-minutes 0": ("pairs", "runs"),
    "study run toy_study:make --out toy --seeds 0": ("toy", "toy"),
    **dict.fromkeys(["data get rsna", "presets clip", "doctor", "doctor eye.pth", "study status toy_study:make --out toy", "study table toy_study:make --out toy"], (None, None)),
}
WRITING = {line: written for line, (written, _) in COMMANDS.items() if written}
BARRED = {line: title for line, (_, title) in COMMANDS.items() if title}
FILLED = {"METHOD": "clip", "PRESET": "tiny", "PROTOCOL": "tiny-linear"}  # words that stand for a choice; other capitals are folders


def said(line: str) -> tuple[str, str]:
    "What a command that succeeds prints, and what it says on its error output."
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(line.split())
    assert code == 0, f"medvis {line}: {err.getvalue()[-2000:]}"
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    "What every command prints, and what it shows on its error output, one after the other in one folder."
    folder = tmp_path_factory.mktemp("talk")
    torch.set_num_threads(1)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("medvis.core.bars._SHORT", 0)
        patch.setattr("medvis.studies.downstream._TASKS", {"classification": TASKS["classification"]})  # the others are the same, and long
        torch.save(torchvision.models.resnet18().state_dict(), "eye.pth")
        yield {line: said(line) for line in COMMANDS}


def last_lines(printed: str) -> tuple[str, list[str]]:
    "The line above `Next: `, and the command lines from there on."
    above, _, following = printed.rpartition("\nNext: ") if not printed.startswith("Next: ") else ("", "", printed.removeprefix("Next: "))
    return above.rpartition("\n")[2], [line.strip() for line in following.splitlines()]


def test_every_command_is_asked():
    assert {line.split()[0] for line in COMMANDS} == set(_COMMANDS)


@pytest.mark.parametrize("line", WRITING)
def test_the_end_says_what_was_written_where(line, talk):
    what, _, path = last_lines(talk[line][0])[0].partition(": ")
    assert what and path == WRITING[line] and Path(path).exists(), talk[line][0][-400:]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_end_says_what_to_do_next(line, talk, monkeypatch):
    "Every line is parsed as a user would type it; only the work is not done."
    following, called = last_lines(talk[line][0])[1], []
    assert following
    monkeypatch.setattr(commands, "resolve_name", lambda name: called.append)
    monkeypatch.setattr(commands, "pretrain", lambda method, options: called.append(options))
    monkeypatch.setattr(commands, "ending_of", lambda *given: None)
    for one in following:
        assert one.startswith("medvis "), one
        words = [FILLED.get(word, word) for word in one.split()[1:]]
        assert main(words) == 0 and called, one
        called.clear()


@pytest.mark.parametrize("line", ["show runs/a --studies 1", "data get rsna", "presets clip", "study table toy_study:make --out toy"])
def test_scripts_are_told_the_same(line, talk):
    answer = json.loads(said(f"{line} --json")[0])
    above, following = last_lines(talk[line][0])
    assert answer["next"] == following and (answer["written"] or "") == above.partition(": ")[2]
    assert said(f"{line} --quiet") == ("", "")


def test_several_processes_are_quiet_too(talk):
    words = "pretrain clip --data packs/a --run runs/two --processes 2 --epochs 1 --batch-size 8 --device cpu --json"
    done = subprocess.run([sys.executable, "-m", "medvis", *words.split()], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "it/s" not in done.stderr and json.loads(done.stdout)["written"] == "runs/two"


def test_an_unusable_installation_is_said_to_scripts(monkeypatch, capsys):
    monkeypatch.setattr("medvis.cli.installation.package_versions", lambda *names: {name: "99" for name in names if name != "timm"})
    assert main(["doctor", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert "pip install 'timm>=1.0'" in answer["error"] and {"check": "packages", "state": "wrong"}.items() <= next(row for row in answer["rows"] if row["state"] == "wrong").items()
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "wrong   packages: timm is not installed" in printed.out and printed.err.startswith("medvis: 1 of ") and "Traceback" not in printed.err


@pytest.mark.parametrize("line", BARRED)
def test_what_takes_long_shows_how_far_it_is(line, talk):
    "With the two seconds' grace taken away: a title, how many of how many, the time spent and left, and the rate."
    shown = talk[line][1]
    bars = [text.strip() for text in re.split(r"[\r\n]", shown) if text.strip().startswith(BARRED[line])]
    assert any(re.search(r"\d+/\d+ \[[\d:]+<[\d:?]+, .*(it|s|studies|cell)", text) for text in bars), shown[-1500:]


def test_all_bars_have_one_shape():
    named = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "medvis").rglob("*.py")) if re.search(r"\btqdm\b", path.read_text(encoding="utf-8"))]
    assert named == ["medvis/core/bars.py"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes(shell, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-print-completion", shell])
    script = capsys.readouterr().out
    assert not stop.value.code and all(name in script for name in _COMMANDS) and "--encoders" in script
    if which(shell):
        checked = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
