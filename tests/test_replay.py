"""Each notebook's unexported cells, run against the installed module: what nbdev_test cannot see (a name that only the notebook
imports), and what coverage is measured over."""
import atexit
import importlib
import sys
import tempfile
import traceback
from pathlib import Path

import matplotlib
import pytest
from execnb.shell import CaptureShell
from notebooks import PATHS, ROOT, Cell, label, read


def replay(cells: list[Cell], namespace: dict, folder: Path) -> str | None:
    "Run the cells that nbdev_test runs and that are not exported; the first error with its cell, or None."
    shell = CaptureShell(folder, mpl_format="png")
    shell.user_ns.update({name: value for name, value in namespace.items() if not name.startswith("__")})
    atexit.unregister(shell.atexit_operations)      # or all shells stay to the end, where each of them collects the garbage of all
    for cell in cells:
        if cell.tested and not cell.exported:
            error = shell.run_cell(cell.source).exception
            if error is not None:
                return f"cell {cell.number}:\n{cell.source}\n\n{''.join(traceback.format_exception(error))}"
    return None


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    "IPython's shell takes over `__main__` and the path, notebooks the figure style and room on the disk; give them back."
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with matplotlib.rc_context(), tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.mark.parametrize("path", PATHS, ids=label)
def test_replay(path: Path, monkeypatch):
    notebook = read(path)
    name = f"medvis.{notebook.module}".removesuffix(".__init__") if notebook.module else "medvis"
    monkeypatch.chdir(path.parent)
    error = replay(notebook.cells, vars(importlib.import_module(name)), path.parent)
    if error is not None:
        pytest.fail(f"nbs/{notebook.name}, replayed against {name}: {error}", pytrace=False)


def test_the_installed_module_is_the_one_of_this_tree():
    assert Path(importlib.import_module("medvis").__file__).parent == ROOT / "medvis"


def test_replay_finds_a_name_the_module_lacks(tmp_path):
    cells = [Cell(1, "code", "#| export\ndef f(): raise SystemExit"), Cell(2, "code", "#| slow\n1/0"),
             Cell(3, "code", "%time g(1)\nassert g(1) == 1"), Cell(4, "code", "g(1)\nh(1)")]
    assert replay(cells[:3], {"g": lambda x: x}, tmp_path) is None
    assert "cell 4" in (error := replay(cells, {"g": lambda x: x}, tmp_path)) and "NameError: name 'h'" in error
