"""What README.md shows: its Python is run and prints what stands below it; its commands, and those of docs/, are taken by the parser of the command line."""
import contextlib
import io
import re
import shlex
from importlib.util import find_spec

import matplotlib
import pytest
from notebooks import ROOT
from torch.distributed.run import parse_args

from medvis.cli import commands

FENCES = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_python_runs_as_it_stands_and_prints_what_stands_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with matplotlib.rc_context():
        for (kind, code), (below, shown) in zip(FENCES, [*FENCES[1:], ("", "")]):
            if kind != "python":
                continue
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, "README.md", "exec"), namespace)
            if below == "text":
                assert printed.getvalue().strip() == shown.strip()
    assert namespace["run"].method() and any(kind == "text" for kind, _ in FENCES)


def test_the_first_screen_is_ten_lines():
    kind, code = FENCES[0]
    assert kind == "python" and code.startswith("import medvis as mv\n") and len(code.splitlines()) == 10


def test_it_is_one_screen_without_badges():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60 and "![" not in text and "<img" not in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 15 and not [link for link in links if not (ROOT / link).is_file()]


KNOWN = ("medvis", "make", "pip", "torchrun", "accelerate", "python -m medvis", "tensorboard", "sbatch")


def commands_of(fences: list[tuple[str, str]], kinds: tuple[str, ...]) -> list[str]:
    "Command lines of fenced blocks, without comments."
    lines = [line.split("#")[0].strip() for kind, code in fences if kind in kinds for line in code.replace("\\\n", "").splitlines()]
    return [line for line in lines if line.startswith(KNOWN)]


SHOWN = [line for path in sorted((ROOT / "docs").rglob("*.md")) for line in commands_of(re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL), ("text",))]    # those of `sh` are run: test_pages.py
LINES = list(dict.fromkeys([*commands_of(FENCES, ("sh",)), *SHOWN]))


def understood(argv, monkeypatch) -> bool:
    "Whether the command line takes these words; nothing is done."
    done = []
    monkeypatch.setattr(commands, "resolve_name", lambda name: done.append)
    monkeypatch.setattr(commands, "pretrain", lambda method, options: done.append(options))
    monkeypatch.setattr(commands, "_start_processes", lambda count, argv: done.append(argv))
    monkeypatch.setattr(commands, "ending_of", lambda *given: None)
    try:
        commands._run_command(argv, False)
    except SystemExit as stop:
        return not stop.code
    return bool(done) or argv == ["--version"]


@pytest.mark.parametrize("line", LINES)
def test_commands_are_understood(line, monkeypatch, capsys):
    words = shlex.split(line.removeprefix("$ "))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "torchrun":
        asked = parse_args(words[1:])
        assert asked.module and asked.training_script == "medvis" and understood(asked.training_script_args, monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        assert understood(words[words.index("medvis") + 1:], monkeypatch) and words[words.index("medvis") - 1] == "-m"
    elif words[:3] == ["python", "-m", "medvis"]:
        assert understood(words[3:], monkeypatch)
    elif words[0] == "medvis" and words[1].startswith("--tyro-print-completion"):
        assert understood(words[1:3], monkeypatch) and "medvis" in capsys.readouterr().out
    elif words[0] == "medvis":
        assert understood(words[1:], monkeypatch)
    elif words[0] == "sbatch":
        assert (ROOT / words[1]).is_file() and understood(["pretrain", words[2], "--data", words[3], "--run", *words[4:]], monkeypatch)
    elif words[0] == "pip":
        where = words[2].partition("[")[0]
        assert words[1] == "install" and (where == "." or find_spec(where)), f"{where}: nothing of this name is ours to install"
    else:
        assert words[:2] == ["tensorboard", "--logdir"], f"a command that no test knows: {line}"


def test_a_wrong_command_is_not_understood(monkeypatch, capsys):
    assert not understood(["evaluate", "rsna_seg_linear_10", "--dta", "pack"], monkeypatch) and not understood(["shw", "run"], monkeypatch)
