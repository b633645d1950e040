"""The doors show all their names and load nothing; people, editors and type checkers see the same."""
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jedi
import pytest

import medvis
from medvis.core.doors import names_for_checkers

ROOMS = ["medvis", *(f"medvis.{room.name}" for room in pkgutil.iter_modules(medvis.__path__) if room.ispkg)]
DOORS = {room: names for room in ROOMS if (names := names_for_checkers(Path(find_spec(room).origin).read_text(encoding="utf-8")))}


def test_the_front_and_every_room_of_names_have_a_door():
    assert {"medvis", "medvis.data", "medvis.objectives", "medvis.methods", "medvis.train", "medvis.evaluate", "medvis.studies"} <= DOORS.keys()


@pytest.mark.parametrize("room", DOORS)
def test_a_door_has_what_it_says(room):
    door = importlib.import_module(room)
    assert set(door.__all__) == DOORS[room].keys() and len(door.__all__) == len(set(door.__all__)) and set(door.__all__) <= set(dir(door))
    for name, (module, own) in DOORS[room].items():
        thing, meant = getattr(door, name), getattr(importlib.import_module(module), own)
        assert thing is meant or inspect.ismodule(thing) and inspect.getdoc(thing) == inspect.getdoc(meant) and inspect.signature(thing) == inspect.signature(meant)
    with pytest.raises(AttributeError, match="nonsense"):
        door.nonsense


@pytest.mark.parametrize("room", DOORS)
def test_no_name_is_hidden_by_a_module(room):
    "Python sets a module on its package when it is imported: a function of that name would be there or not, as it comes. medvis.evaluate is both (core.doors)."
    modules = {module.name for module in pkgutil.iter_modules(importlib.import_module(room).__path__)}
    assert all(callable(importlib.import_module(f"{room}.{name}")) for name in modules & DOORS[room].keys())


def test_a_door_loads_nothing():
    heavy = "torch", "pandas", "transformers", "numpy", "matplotlib"
    ask = f"import sys, {', '.join(DOORS)}; [dir(sys.modules[name]) for name in {list(DOORS)}]; print({{name for name in {heavy} if name in sys.modules}})"
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize("room", DOORS)
def test_editors_see_every_name_and_its_arguments(room):
    seen = {one.name: one for one in jedi.Script(f"import {room} as door\ndoor.").complete()}
    assert DOORS[room].keys() <= seen.keys()
    things = {name: getattr(importlib.import_module(module), own) for name, (module, own) in DOORS[room].items()}
    name = next(name for name, thing in things.items() if inspect.isfunction(thing) and not hasattr(thing, "__wrapped__") and inspect.signature(thing).parameters)
    signature, = jedi.Script(f"import {room} as door\ndoor.{name}(").get_signatures()
    assert [one.name for one in signature.params] == list(inspect.signature(things[name]).parameters)


def test_the_front_has_what_a_first_hour_needs():
    assert set("""prepare list_datasets list_methods list_presets create_method fit load_run load_encoder linear_probe evaluate retrieve ground CorrespondenceWidget
        register_method register_encoder register_dataset Pack Phantom""".split()) <= set(medvis.__all__)
    assert medvis.__version__ == importlib.metadata.version("medvis") and (Path(medvis.__file__).parent / "py.typed").is_file()
