"""Defaults and constants are part of what every number hangs on: one that changes, changes on purpose.

All defaults of functions, methods and fields and all plain constants of medvis stand in `golden/defaults.json`; write it anew with
`python tests/test_defaults.py`, and read its difference in git. What is new, gone or renamed is no complaint."""
import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest
import traitlets

import medvis

KEPT = Path(__file__).parent / "golden" / "defaults.json"
FOLDER = Path(medvis.__file__).parent
MODULES = [".".join(("medvis", *path.relative_to(FOLDER).with_suffix("").parts)) for path in sorted(FOLDER.glob("*/**/[a-z]*.py"))]


def plain(value):
    "A value as it is kept: numbers, texts and what holds them; of anything else its name."
    if isinstance(value, str):
        return value if len(value) < 25 else "a text"
    if value is None or isinstance(value, bool | int | float):
        return value if value == value and abs(value or 0) != float("inf") else str(value)
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else getattr(value, "__name__", type(value).__name__)


def asked(function) -> dict:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return {}
    return {one.name: plain(one.default) for one in parameters if one.default is not one.empty}


def told(thing) -> dict:
    "Defaults of a function; of a class, those of its methods, fields and traits (which the browser shares or not), and whether it may be changed."
    if not inspect.isclass(thing):
        return asked(thing)
    methods = {name: asked(one) for name, one in vars(thing).items() if inspect.isfunction(one)}
    made = {one.name: plain(one.default_factory()) for one in dataclasses.fields(thing) if one.default_factory is not dataclasses.MISSING} if dataclasses.is_dataclass(thing) else {}
    rules = thing.__dataclass_params__ if dataclasses.is_dataclass(thing) else None
    constants = {name: plain(one) for name, one in vars(thing).items() if isinstance(one, bool | int | float | tuple | dict) and not name.startswith("_")}
    traits = {name: [plain(one.default_value), one.metadata.get("sync", False)] for name, one in vars(thing).items() if isinstance(one, traitlets.TraitType)}
    return {"fields": constants | made | traits, **{name: found for name, found in methods.items() if found}} | ({"rules": [rules.frozen, rules.eq, rules.order]} if rules else {})


def defaults(module) -> dict:
    found = {}
    for name, value in vars(module).items():
        if name.startswith("__") or name == "_all_":
            continue
        if callable(value) and getattr(value, "__module__", None) == module.__name__:
            found[name] = told(value)
        elif name.isupper() and name in module.__all__ and isinstance(value, bool | int | float | tuple | list | dict | set | frozenset):
            found[name] = plain(value)
    return json.loads(json.dumps({name: one for name, one in found.items() if one not in ({}, {"fields": {}})}))


def changes(kept, found, where: str) -> list[str]:
    if isinstance(kept, dict) and isinstance(found, dict):
        return [line for name in kept if name in found for line in changes(kept[name], found[name], f"{where}.{name}")]
    return [] if kept == found else [f"{where} was {kept!r:.200}, is {found!r:.200}"]


@pytest.mark.parametrize("name", MODULES)
def test_defaults_are_what_they_were(name):
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert changes(kept.get(name, {}), defaults(importlib.import_module(name)), name) == []


if __name__ == "__main__":
    lines = (f" {json.dumps(name)}: {{" + ",".join(f"\n  {json.dumps(one)}: {json.dumps(value, ensure_ascii=False)}" for one, value in defaults(importlib.import_module(name)).items()) + "}" for name in MODULES)
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
