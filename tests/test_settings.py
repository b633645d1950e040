"""The constants of presets and protocols, as they were checked against the papers and the released code (tests/golden/settings.json).

A constant that changes is a decision: make it in the notebook with its source, then write the file anew: python tests/test_settings.py"""
import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import pytest

import medvis as mv
from medvis.data.sampling import Sampling
from medvis.evaluate.recipes import RELEASED
from medvis.evaluate.recipes import PROTOCOLS
from medvis.methods.settings import _ORIGINS, SETTINGS, _changes, list_methods, list_presets, preset_table
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


NO_LOCAL = {"local_image_weight": 0.0, "local_report_weight": 0.0}
SENTENCES = {"sentences": "all", "swap": 0.4, "max_tokens": 512, "overflow": "drop"}
RESNET50 = {"image": "resnet50", "layer": "layer3", "upsample": 299}
ROWS = {        # (method, preset) -> paper and rows of its table; the preset that it changes, and in what
    ("lovt", "paper"): ("LoVT", "1", None, {}),
    ("lovt", "no-weights"): ("LoVT", "2", "paper", {"local_weights": False}),
    ("lovt", "no-attention-pooling"): ("LoVT", "3", "no-weights", {"pool": "avg-max", "lr": 3e-5}),
    ("lovt", "no-global"): ("LoVT", "4", "no-weights", {"global_weight": 0.0}),
    ("lovt", "non-smooth"): ("LoVT", "5", "paper", {"smooth": False}),
    ("lovt", "report-only"): ("LoVT", "6", "paper", {"local_image_weight": 0.0}),
    ("lovt", "image-only"): ("LoVT", "7", "paper", {"local_report_weight": 0.0}),
    ("lovt", "no-local"): ("LoVT", "8", "paper", {**NO_LOCAL, "lr": 3e-4}),
    ("lovt", "avg-max"): ("LoVT", "9", "no-local", {"pool": "avg-max"}),
    ("convirt", "cyclic-attention-all-sentences"): ("LoVT", "8", "cyclic-attention", SENTENCES),
    ("convirt", "cyclic-all-sentences"): ("LoVT", "9", "cyclic", SENTENCES),
    ("convirt", "cyclic-attention"): ("LoVT", "10", "cyclic", {"whole_image": "attention"}),
    ("clip", "all-sentences"): ("LoVT", "8", "paper", SENTENCES),
    ("clip", "paper"): ("LoVT", "10", None, {}),
    ("convirt", "cyclic"): ("LoVT", "11", "paper", {"schedule": "cyclic-cosine", "patience": 10}),
    ("convirt", "paper-30"): ("LoVT", "12", "paper", {"lr": 1e-5}),
    ("mgca", "ita"): ("MGCA", "1", "paper", {"token_weight": 0.0, "prototype_weight": 0.0}),
    ("mgca", "ita-cta"): ("MGCA", "2", "paper", {"prototype_weight": 0.0}),
    ("mgca", "ita-cpa"): ("MGCA", "3", "paper", {"token_weight": 0.0}),
    ("mgca", "paper"): ("MGCA", "4", None, {}),
    ("mgca", "ita-resnet50"): ("MGCA", "1", "paper-resnet50", {"token_weight": 0.0, "prototype_weight": 0.0, "layer": "layer4"}),
    ("mgca", "ita-cta-resnet50"): ("MGCA", "2", "paper-resnet50", {"prototype_weight": 0.0}),
    ("mgca", "ita-cpa-resnet50"): ("MGCA", "3", "paper-resnet50", {"token_weight": 0.0, "layer": "layer4"}),
    ("mgca", "paper-resnet50"): ("MGCA", "4", "paper", RESNET50),
    ("global-mi", "paper"): ("local-mi", "", None, {}),
    ("global-mi", "mine"): ("local-mi", "", "paper", {"bound": "mine"}),
    ("local-mi", "paper"): ("local-mi", "", None, {}),
    ("local-mi", "mine"): ("local-mi", "", "paper", {"bound": "mine"}),
    ("supervised", "local-mi"): ("local-mi", "", None, {}),
    ("vse", "paper"): ("MGCA", "VSE++", None, {}),
    ("dsve", "paper"): ("MGCA", "DSVE", None, {}),
    ("contrastive-binary", "paper"): ("MGCA", "Contrastive-Binary", None, {}),
    ("caption-lstm", "paper"): ("MGCA", "Caption-LSTM", None, {}),
    ("caption-transformer", "paper"): ("MGCA", "Caption-Transformer", None, {}),
}


def test_every_row_of_the_papers_is_a_preset_that_changes_what_it_says():
    "And nothing else. The rows of a table are those of the papers' texts: twelve, twice four, five of MGCA's Table 1, and five models."
    table = preset_table().set_index(["method", "preset"])
    assert (table["source"] != "").all()
    assert {key for key, source in table["source"].items() if "Table" in source} == ROWS.keys()
    for (method, preset), (paper, row, parent, changes) in ROWS.items():
        found = table.loc[(method, preset)]
        assert (found["parent"] or None, found["source"].split(",")[0]) == (parent, paper), (method, preset)
        assert f"row {row}" in found["source"] if row else "Tables 2 and 3" in found["source"]
        assert _changes(method, preset, parent) == changes, (method, preset)
        assert set(filter(None, found["changes"].split(", "))) == {f"{name}={value}" for name, value in changes.items()}, (method, preset)
    assert {row for paper, row, *_ in ROWS.values() if paper == "LoVT"} == set(map(str, range(1, 13)))


def test_changes_lead_from_the_parent_to_the_preset():
    "What a preset changes, put on the preset that it changes, gives the preset: what is built and how it is trained."
    for row in preset_table().itertuples():
        if row.parent:
            kind, presets = SETTINGS[row.method]
            (built, trained), (parent_built, parent_trained) = presets[row.preset], presets[row.parent]
            changes, names = _changes(row.method, row.preset, row.parent), {one.name for one in fields(kind)}
            assert changes and kind(**{**vars(kind(**parent_built)), **{name: value for name, value in changes.items() if name in names}}) == kind(**built)
            assert {**parent_trained, **{name: value for name, value in changes.items() if name not in names}} == {**dict.fromkeys(parent_trained, "default"), **trained}


def test_one_table_of_all_presets():
    table = mv.list_presets()
    assert table.equals(preset_table()) and [*zip(table["method"], table["preset"])] == [(name, preset) for name in list_methods() for preset in list_presets(name)]
    assert all(parent in SETTINGS[method][1] for method, parent in zip(table["method"], table["parent"]) if parent) and _ORIGINS.keys() <= set(list_methods())
    assert preset_table("lovt").equals(table[table["method"] == "lovt"].reset_index(drop=True)) and list(preset_table("lovt")["preset"]) == mv.list_presets("lovt")
    for door in (preset_table, list_presets):
        with pytest.raises(ValueError, match="unknown method 'lvot'; choose from convirt, clip"):
            door("lvot")


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(current(), indent=1) + "\n")
