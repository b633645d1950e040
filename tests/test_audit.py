"""The audit and the map recipes beyond their notebooks: a real method, phrases as MS-CXR writes them and without boxes, any outline, any map."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medvis.data.phrases import phantom_phrases, write_ms_cxr
from medvis.evaluate.audit import _CONTROLS, _elsewhere, _fixed_maps, audit, audit_table, verdict
from medvis.evaluate.ground import ground, measure
from medvis.evaluate.map_recipes import recipe_maps, map_recipe_table
from medvis.testing import small_phantom
from medvis.train import create_method


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.integers(0, 99))
def test_an_equal_part_elsewhere_touches_no_box(mask, seed):
    mask[0, 0] = True
    found = _elsewhere(mask, np.random.default_rng(seed))
    if found is not None:
        assert found.sum() == mask.sum() and not (found & mask).any()
    else:
        rows, columns = np.nonzero(mask)
        assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) > 1 or mask.size == 1


def test_a_fixed_map_never_holds_a_patients_own_targets():
    random = np.random.default_rng(0)
    cells, findings, patients = random.random((60, 5)) > 0.5, random.choice(["a", "b"], 60), random.integers(0, 15, 60)
    before = _fixed_maps(cells, findings, patients)
    for patient in range(15):
        changed = cells.copy()
        changed[patients == patient] ^= True
        mine = patients == patient
        assert np.array_equal(_fixed_maps(changed, findings, patients)[mine], before[mine], equal_nan=True)


@pytest.fixture(scope="module")
def pack():
    return small_phantom(60, 64)


@pytest.fixture(scope="module")
def method(pack):
    return create_method("mgca", data=pack)


def test_a_randomly_initialised_method_has_nothing_to_audit(pack, method, tmp_path):
    phrases = phantom_phrases(pack, None)
    write_ms_cxr(tmp_path / "phrases.json", phrases)
    table = audit(method, pack, tmp_path / "phrases.json", tmp_path / "out", resamples=100)
    assert table["control"].tolist() == list(_CONTROLS) and table["phrases"].max() == len(phrases)
    assert table.loc[table["control"] != "best fixed map", ["hit", "cnr", "score"]].notna().all(axis=None)
    rows = pd.read_csv(tmp_path / "out" / "audit_phrases.csv")
    pd.testing.assert_frame_equal(audit_table(rows, 100), table)       # the table is made of the rows that are written
    own = pd.read_csv(tmp_path / "out" / "audit_phrases.csv").set_index("phrase")
    grounded = ground(method, pack, phrases, resamples=10).set_index(["finding", "measure"])
    for name in ("hit", "cnr"):
        assert own[f"own image: {name}"].mean() == pytest.approx(grounded.loc[("all", name), "value"])
        assert own[f"another image: {name}"].mean() == pytest.approx(grounded.loc[("all", name), "other"])      # the same control
    line = verdict(table)
    assert "\n" not in line and "by chance" in line and line in (tmp_path / "out" / "audit.json").read_text()
    assert np.isnan(table["lost"]).all() == line.startswith("finds nothing")


def test_phrases_without_boxes_are_left_out(pack, method):
    phrases = phantom_phrases(pack)
    table = audit(method, pack, [replace(phrases[0], boxes=(), text="no effusion"), *phrases], resamples=10)
    assert table["phrases"].max() == len(phrases)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float64, (3, 12), elements=st.integers(-9, 9)), hnp.arrays(bool, (3, 6, 8)), st.floats(0.05, 5))
def test_recipes_keep_what_they_must(scores, masks, temperature):
    masks[:, 2, 3], masks[:, 5, 7] = True, False
    table = map_recipe_table(scores, masks, (3, 4), temperature, bias=0.5, resamples=5).set_index(["recipe", "drawing", "boxes", "measure", "convention"])["value"]
    own = measure(scores, masks, (3, 4)).mean()
    assert table["raw", "-", "union", "hit", "-"] == pytest.approx(own["hit"])
    for what, convention, name in (("miou", "0..1", "miou"), ("miou", "-1..1", "miou_signed"), ("miou", "as is", "miou_raw"), ("cnr", "signed, population", "cnr")):
        assert table["raw", "bilinear", "union", what, convention] == pytest.approx(own[name], nan_ok=True)
        assert table["raw", "bilinear", "each", what, convention] == pytest.approx(own[name], nan_ok=True)          # one mask is one box
    for recipe in ("raw", "gaussian", "softmax"):
        signed, absolute = (table[recipe, "nearest", "union", "cnr", f"{sign}, sample"] for sign in ("signed", "absolute"))
        assert np.isnan(absolute) or absolute >= abs(signed) - 1e-9
    shifted = recipe_maps(scores + 3, (3, 4), temperature)["softmax"]
    np.testing.assert_allclose(shifted, recipe_maps(scores, (3, 4), temperature)["softmax"], atol=1e-12)            # a softmax knows differences alone
    np.testing.assert_allclose(recipe_maps(scores, (3, 4))["gaussian"].mean(1), scores.mean(1), atol=1e-9)          # reflected borders lose nothing
