"""The constants of presets and protocols, as they were checked against the papers and the released code (tests/golden/settings.json).

A constant that changes is a decision: make it in the notebook with its source, then write the file anew: python tests/test_settings.py"""
import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from medvis.data.sampling import Sampling
from medvis.evaluate.recipes import RELEASED
from medvis.evaluate.recipes import PROTOCOLS
from medvis.methods.settings import SETTINGS
from medvis.studies.config import DemoConfig, GroundingConfig, RealPairsConfig
from medvis.train.config import TrainConfig

GOLDEN = Path(__file__).parent / "golden" / "settings.json"


def defaults(config) -> dict:
    return {field.name: field.default for field in fields(config) if field.default is not MISSING}


def current() -> dict:
    "All settings by name, as plain values."
    found = {
        "methods": {name: defaults(config) for name, (config, _) in SETTINGS.items()},
        "presets": {f"{name}, {preset}": {"built": built, "trained": trained} for name, (_, presets) in SETTINGS.items() for preset, (built, trained) in presets.items()},
        "protocols": {name: asdict(one) for name, one in PROTOCOLS.items()},
        "released": RELEASED,
        "training": {name: value for name, value in defaults(TrainConfig).items() if name != "run"},
        "sampling": defaults(Sampling),
        "demo": defaults(DemoConfig),
        "grounding": defaults(GroundingConfig),
        "real pairs": defaults(RealPairsConfig),
    }
    return json.loads(json.dumps(found, default=str))


def test_constants_are_those_that_were_checked():
    kept, found = json.loads(GOLDEN.read_text()), current()
    assert found.keys() == kept.keys()
    for part in kept:
        assert found[part].keys() == kept[part].keys(), f"{part}: others than in {GOLDEN.name}"
        for name, value in kept[part].items():
            assert found[part][name] == value, f"{part}, {name}"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(current(), indent=1) + "\n")
