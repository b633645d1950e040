"""The committed module, notebooks and README are what the notebooks make, no more and no less. Nothing in the tree is written."""
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from notebooks import PATHS, ROOT, label

BIN = Path(sys.executable).parent


def files(folder: Path, pattern: str) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
            for path in sorted(folder.rglob(pattern)) if ".ipynb_checkpoints" not in path.parts}


def differences(kept: dict[str, str], made: dict[str, str]) -> list[str]:
    "Names that stand on one side only, or with another content."
    return ([f"{name}: no notebook makes it (renamed or removed? then delete it)" for name in sorted(kept.keys() - made.keys())]
            + [f"{name}: missing" for name in sorted(made.keys() - kept.keys())]
            + [f"{name}: differs" for name in sorted(kept.keys() & made.keys()) if kept[name] != made[name]])


def in_copy(folder: Path, *command: str | Path) -> None:
    "Run a step of `make export` in `folder`; nbdev does nothing under IN_TEST."
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    "The notebooks and the settings, without the module."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_module_in_step(copy: Path):
    in_copy(copy, BIN / "nbdev_export")
    in_copy(copy, sys.executable, ROOT / "tools/docstrings.py", "medvis")
    found = differences(files(ROOT / "medvis", "*.py"), files(copy / "medvis", "*.py"))
    assert not found, "medvis/ and the notebooks are out of step: run `make export`\n" + "\n".join(found)


def test_notebooks_clean(copy: Path):
    before = files(copy / "nbs", "*.ipynb")
    in_copy(copy, BIN / "nbdev_clean")
    found = differences(before, files(copy / "nbs", "*.ipynb"))
    assert not found, "notebooks carry run-time metadata: run `make export`\n" + "\n".join(found)


def test_readme_in_step():
    render = runpy.run_path(str(ROOT / "tools/readme.py"))["render"]
    made = render(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")))
    kept = (ROOT / "README.md").read_text(encoding="utf-8")
    assert kept == made, "README.md and nbs/index.ipynb are out of step: run `make export`"


@pytest.mark.parametrize("path", PATHS, ids=label)
def test_no_live_widgets(path: Path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [number for number, cell in enumerate(notebook["cells"], 1) for output in cell.get("outputs", [])
             if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    if cells or "widgets" in notebook["metadata"]:
        pytest.fail(f"{label(path)}: widget views (cells {cells}) or states have random ids: run `make export`; to show a widget, "
                    "put a PNG beside it", pytrace=False)


def test_differences_sees_drift_orphans_and_gaps():
    assert not differences({"a.py": "1"}, {"a.py": "1"})
    found = differences({"drift.py": "1", "orphan.py": ""}, {"drift.py": "2", "gap.py": ""})
    assert [line.split(":")[0] for line in found] == ["orphan.py", "gap.py", "drift.py"]
