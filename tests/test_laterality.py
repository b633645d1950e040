"""Laterality: an oracle written region by region, a real method, data that is no phantom, and runs that saw the test split."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.preprocessing import Preprocessing
from medvis.data.targets import report_targets
from medvis.evaluate.ground import mirrored
from medvis.evaluate.laterality import (
    _CONDITIONS, _SIDES, _TABLE, _ZONES, _find_sentences, _lung_extents, _place_area, _place_scores, _placed_sentences, measure_places)
from medvis.train import create_method


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(-3, 3), min_size=36, max_size=36), st.sampled_from(sorted(_SIDES)))
def test_scores_are_those_counted_region_by_region(height, width, values, side):
    map = np.array(values[:height * width], float)
    inside = []
    for column in [*range(width)] * height:
        middle = (column + 0.5) / width
        inside.append(0.5 if np.isclose(middle, 0.5) else float((middle > 0.5) == (side == "left")))
    area = _place_area(side, (height, width))
    assert np.allclose(area, inside)
    hit, mass, chance = (value[0] for value in _place_scores(map[None], area[None]))
    best = [k for k, value in enumerate(map) if value == map.max()]
    assert hit == pytest.approx(np.mean([inside[k] for k in best])) and chance == pytest.approx(0.5)
    above = map - map.min()
    assert mass == pytest.approx(above @ inside / above.sum() if above.any() else 0.5)
    flipped = map.reshape(height, width)[:, ::-1].reshape(1, -1)
    assert _place_scores(flipped, area[None])[0][0] == pytest.approx(1 - hit)      # of the mirrored map the other side


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("laterality") / "pack", studies=60, size=64, progress=False))


@pytest.fixture(scope="module")
def method(pack):
    return create_method("mgca", data=pack)


def test_mirrored_images_aremirrored(pack):
    assert np.array_equal(mirrored(pack).image(3), pack.image(3)[:, ::-1])


@pytest.mark.parametrize("what, places", [("side", _SIDES), ("zone", _ZONES)])
def test_a_randomly_initialised_method_is_measured(pack, method, what, places):
    rows, table = measure_places(method, pack, what, split=None, resamples=20)
    shares = rows[[f"{condition}{name}" for condition in _CONDITIONS for name in ("hit", "mass")]].to_numpy()
    assert set(rows["place"]) <= set(places) and np.nanmin(shares) >= 0 and np.nanmax(shares) <= 1
    assert rows[["hit", "mirrored_hit", "other_hit"]].notna().all(axis=None)
    assert rows.loc[rows["place"] == "middle", "exchanged_hit"].isna().all() and rows["exchanged_hit"].notna().any()
    assert tuple(table.columns) == tuple(_TABLE) and set(table["of"]) >= {"all", "balanced", *rows["place"], *rows["finding"]}
    assert rows["chance"].gt(0).all() and (table["low"].isna() | (table["low"] <= table["high"])).all()
    kept = _find_sentences(_placed_sentences(report_targets(pack), what), pack, None)
    assert rows[["study", "sentence"]].to_numpy().tolist() == kept[["study", "sentence"]].to_numpy().tolist()


def test_lungs_of_other_data_are_not_known():
    other = SimpleNamespace(manifest={"source": {"kind": "nih"}})
    assert _lung_extents(SimpleNamespace(preprocessing=Preprocessing()), other, [4, 2]).tolist() == [[0, 1], [0, 1]]


def test_a_split_without_a_sentence_is_refused(pack, method):
    empty = pd.DataFrame(columns=["study", "sentence", "finding", "status", "side", "zone"])
    with pytest.raises(ValueError, match="at one zone alone"):
        measure_places(method, pack, "zone", empty)


def test_runs_that_saw_the_images_are_refused(pack, method, monkeypatch):
    asked = []
    def refuse(of, models, allow_leaks, images):
        asked.append((of, models, allow_leaks, set(of.studies["split"].iloc[of.image_table["study"].iloc[images]])))
        raise ValueError("seen in training")
    monkeypatch.setattr("medvis.evaluate.laterality.check_unseen", refuse)
    for what in ("side", "zone"):
        with pytest.raises(ValueError, match="seen in training"):
            measure_places(method, pack, what)
    assert asked == [(pack, [method], False, {"test"})] * 2
