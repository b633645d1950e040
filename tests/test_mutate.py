"""The mutation runner makes what it says, the same for the same seed, and tells the killed from the survivors."""
import subprocess
import sys

import pytest
from notebooks import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import mutate  # noqa: E402

SOURCE = '''\
def f(x: int = 2, *, on: bool = True) -> int:
    "A text with 3 numbers."
    if x < 1 and not on:
        raise ValueError(f"{x + 1} is wrong")
    x += 1
    print("x")
    return x * 2 if on else -x
'''


def test_every_kind_of_change_is_made_and_nothing_else_moves():
    made = list(mutate.mutants(SOURCE))
    assert {mutant.what for mutant in made} == {
        "2 -> 3", "constant flipped", "Lt -> LtE", "1 -> 2", "And flipped", "not dropped", "condition negated", "statement dropped", "Mult -> Div",
        "branches swapped", "minus dropped", "returns None"}
    for mutant in made:
        assert mutate.is_python(mutant.of(SOURCE))
        old, new = SOURCE.splitlines(), mutant.of(SOURCE).splitlines()
        assert len(new) == len(old) and [n for n, (a, b) in enumerate(zip(old, new), 1) if a != b] == [mutant.line] and "3 numbers" in mutant.of(SOURCE)
        assert "{x + 1} is wrong" in mutant.of(SOURCE) or mutant.what == "statement dropped", "the words of an error are left alone"


def test_the_draw_depends_on_the_seed_alone():
    paths = list((ROOT / "medvis/evaluate").glob("s*.py"))
    drawn = mutate.draw(paths, 15, seed=1)
    assert drawn == mutate.draw(paths[::-1], 15, seed=1) != mutate.draw(paths, 15, seed=2)
    assert len({(mutant.path, mutant.line) for mutant in drawn}) == 15


def test_replay_comes_first_and_then_what_names_the_module():
    found = mutate.targets("medvis/evaluate/stats.py", (ROOT / "medvis/evaluate/stats.py").read_text())
    assert found[0] == "tests/test_replay.py::test_replay[evaluate/02_stats]" and "tests/test_stats.py" in found


def test_tests_that_reach_a_module_by_a_helper_are_asked():
    assert "tests/test_widget_correspondence.py" in mutate.targets("medvis/widgets/correspondence.py", (ROOT / "medvis/widgets/correspondence.py").read_text())


@pytest.mark.parametrize("body, killer", [("assert f(1) == 2", True), ("f(1)", False)])
def test_killed_and_survived(body, killer, tmp_path, monkeypatch):
    "A small tree of its own: one module, one test file that looks, or does not."
    (tmp_path / "root/medvis").mkdir(parents=True)
    (tmp_path / "root/tests").mkdir()
    (tmp_path / "root/medvis/m.py").write_text("# File to edit: ../nbs/m.ipynb\n__all__ = ['f']\ndef f(x): return x + 1\n")
    (tmp_path / "root/tests/test_replay.py").write_text("import pytest\n@pytest.mark.parametrize('name', ['m'])\ndef test_replay(name): pass\n")
    (tmp_path / "root/tests/test_m.py").write_text(f"from medvis.m import f\ndef test(): {body}\n")
    monkeypatch.setattr(mutate, "ROOT", tmp_path / "root")
    source = (tmp_path / "root/medvis/m.py").read_text()
    broken, = (one for one in mutate.mutants(source, "medvis/m.py") if one.what == "Add -> Sub")
    judge = mutate.Judge(tmp_path / "trees", 1, 60)
    assert judge.killer(broken) == ("tests/test_m.py" if killer else None)
    assert judge.trees.get().path.joinpath("medvis/m.py").read_text() == source, "the change is taken back"


def test_from_the_command_line():
    told = subprocess.run([sys.executable, "tools/mutate.py", "--list", "--seed", "1", "--number", "2", "--module", "evaluate/stats"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.count("medvis/evaluate/stats.py:") == 2, told.stderr
    assert subprocess.run([sys.executable, "tools/mutate.py", "--module", "nonsense"], cwd=ROOT, capture_output=True).returncode == 2
