"""A study from an empty folder gives the committed numbers again, and a cell's code is that which it runs.

`python tests/test_study_again.py` writes the committed numbers anew, where a change of them is meant."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_table

import medvis
from medvis.core.machine import describe_machine
from medvis.core.sources import _imported_sources
from medvis.studies import study_table

HERE = Path(__file__).parent
COMMITTED = HERE / "golden" / "small_study"
KIND = ("processor", "cpu_capability", "python", "packages")  # of a machine


def run(*command: str, root: Path = Path(medvis.__file__).parents[1], check: bool = True) -> str:
    "What a new process with one thread prints."
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=root)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def run_small(out: Path) -> pd.DataFrame:
    run("-m", "medvis", "study", "run", "small_table:make", "--out", str(out), "--no-progress")
    return study_table(small_table.make(out))


def test_an_empty_folder_comes_to_the_committed_numbers(tmp_path):
    table, committed = run_small(tmp_path / "small"), study_table(small_table.make(COMMITTED))
    note = json.loads((COMMITTED / "manifest.json").read_text())["cells"]["CLIP-0-findings"]
    here = describe_machine()
    if all(note[name] == here[name] for name in KIND):
        pd.testing.assert_frame_equal(table, committed, check_exact=True)
    names = ["variant", "seed", "task", "measure", "n"]
    pd.testing.assert_frame_equal(table[names], committed[names])
    headline = (table["measure"] == "AUROC, macro").to_numpy()
    np.testing.assert_allclose(table["value"][headline], committed["value"][headline], atol=0.1)  # other kernels, same study


def test_two_empty_folders_come_to_the_same(tmp_path):
    first = run_small(tmp_path / "one" / "small")
    code = "import sys; from pathlib import Path; import small_table; from medvis.studies.runner import run_study; "
    code += "run_study(small_table.make(Path(sys.argv[1])), progress=False); print(*sorted(m for m in sys.modules if m.startswith('medvis.')))"
    loaded = run("-c", code, str(tmp_path / "two" / "small")).split()
    pd.testing.assert_frame_equal(first, study_table(small_table.make(tmp_path / "two" / "small")), check_exact=True)
    own = _imported_sources("medvis.studies.paper_tables", "medvis.studies.runner")
    doors = {name for name in loaded if Path(sys.modules[name].__file__ if name in sys.modules else "").name == "__init__.py"}
    assert {"medvis.train.loop", "medvis.methods.clip"} <= set(loaded)
    assert not set(loaded) - set(own) - doors, "a cell runs what is not part of its code"


CHANGED = """
import sys
import tempfile
from pathlib import Path
import medvis
from medvis.core import sources

def code():
    for cached in (sources._file, sources._tree, sources._door, sources._imported_sources, sources.sources_hash):
        cached.cache_clear()
    return sources.sources_hash("medvis.studies.paper_tables", "medvis.studies.runner")

before, root = code(), Path(medvis.__file__).parent
assert root.parent == Path.cwd(), 'a copy, and not the library that is tested'
for name in sys.argv[1:]:
    path = root / name
    text = path.read_text()
    path.write_text(text + "\\nADDED = 1\\n")
    print(name, code() != before)
    path.write_text(text)
assert code() == before
"""
RUN = "studies/paper_tables studies/runner objectives/contrastive methods/clip data/augment train/loop encoders/small evaluate/finetune"
NOT_RUN = "cli/commands widgets/tour analyse/page studies/claims studies/lovt_ablation studies/config analyse/embed studies/real_pairs __init__ train/__init__"


def test_what_a_cell_runs_is_its_code_and_nothing_else(tmp_path):
    shutil.copytree(Path(medvis.__file__).parent, tmp_path / "medvis")
    names = [f"{name}.py" for name in f"{RUN} {NOT_RUN}".split()]
    changed = dict(line.split() for line in run("-c", CHANGED, *names, root=tmp_path).splitlines())
    assert {name for name, other in changed.items() if other == "True"} == {f"{name}.py" for name in RUN.split()}


def test_a_table_of_nothing_says_so(tmp_path):
    said = run("-m", "medvis", "study", "table", "small_table:make", "--out", str(tmp_path / "nothing"))
    assert "no cell is filled yet" in said and "medvis study run small_table:make" in said and "Empty" not in said
    with pytest.raises(AssertionError):
        run("-m", "medvis", "study", "table", "small_table:nothing")


if __name__ == "__main__":
    shutil.rmtree(COMMITTED, ignore_errors=True)
    work = Path(tempfile.mkdtemp())
    run_small(work / "small")
    COMMITTED.mkdir()
    for name in ("results.parquet", "manifest.json"):
        shutil.copy(work / "small" / name, COMMITTED / name)
    shutil.rmtree(work)
