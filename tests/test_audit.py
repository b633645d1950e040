"""The audit and the map recipes beyond their notebooks: a real method, phrases as MS-CXR writes them and without boxes, any outline, any map."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from medvis.cli.commands import main
from medvis.data.label_phrases import phrases_from_labels
from medvis.data.phrases import find_phrases, phantom_phrases, phrase_region, write_ms_cxr
from medvis.data.preprocessing import Preprocessing
from medvis.data.sets.registry import DATASETS, prepare_data, prepare_options, simulate
from medvis.data.source import BuildConfig
from medvis.evaluate import audit as module
from medvis.evaluate.audit import _CONTROLS, _elsewhere, _fixed_maps, audit, audit_table, verdict
from medvis.evaluate.ground import ground, ground_phrases, measure, upsample_map
from medvis.evaluate.map_recipes import ground_recipes, recipe_maps, map_recipe_table
from medvis.methods.method import Correspondence
from medvis.testing import small_phantom
from medvis.train import create_method


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(1, 8))
def test_elsewhere_is_the_most_alike_of_all_places_that_are_free(data, height, width):
    mask = data.draw(hnp.arrays(bool, (height, width)))
    mask[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = True
    pixels = data.draw(hnp.arrays(np.uint8, (height, width)))
    away, places = lambda place: (pixels[place].mean() - pixels[mask].mean()) ** 2 + (pixels[place].std() - pixels[mask].std()) ** 2, []
    for outline in (mask, mask[:, ::-1]):
        points = np.argwhere(outline)
        for down in range(-height, height + 1):
            for right in range(-width, width + 1):
                moved = points + (down, right)
                if (moved >= 0).all() and (moved < mask.shape).all():
                    place = np.zeros_like(mask)
                    place[tuple(moved.T)] = True
                    if not (place & mask).any():
                        places.append(place)
    found = _elsewhere(mask, pixels)
    if not places:
        assert found is None
    else:
        assert any(np.array_equal(found, place) for place in places)
        assert away(found) == pytest.approx(min(map(away, places)), abs=1e-6)


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
    table = audit(method, pack, tmp_path / "phrases.json", tmp_path / "out", split=None, resamples=100)
    assert table["control"].tolist() == list(_CONTROLS) and table["phrases"].max() == len(phrases)
    assert table.loc[table["control"] != "best fixed map", ["hit", "cnr", "score"]].notna().all(axis=None)
    assert set(table["recipe"]) == {"raw, bilinear, union"}
    rows = pd.read_csv(tmp_path / "out" / "audit_phrases.csv")
    pd.testing.assert_frame_equal(audit_table(rows, 100), table)       # the table is made of the rows that are written
    own = pd.read_csv(tmp_path / "out" / "audit_phrases.csv").set_index("phrase")
    assert set(own["recipe"]) == {"raw, bilinear, union"}
    grounded = ground(method, pack, phrases, split=None, resamples=10).set_index(["finding", "measure"])
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


@pytest.fixture(scope="module", params=["siim", "rsna"])
def drawn(request, tmp_path_factory):
    "A Pack with masks and one with boxes, its phrases, and who sees all of a picture."
    name, root = request.param, tmp_path_factory.mktemp("drawn")
    simulate(name, root / "raw", 60, 64)
    read, build = DATASETS[name].config(root=root / "raw"), BuildConfig(out=root / "pack", size=64, progress=False)
    pack = prepare_data(prepare_options(name)(read=read, build=build))
    phrases = phrases_from_labels(pack, split=None)
    assert all(bool(phrase.masks) == (name == "siim") != bool(phrase.boxes) for phrase in phrases)
    return pack, phrases


@pytest.fixture(scope="module")
def reader(pack):
    "Untrained, and sees pictures that are cut by an eighth."
    reader = create_method("mgca", data=pack)
    reader.image_encoder.preprocessing = replace(reader.preprocessing, size=56, crop=0.875)
    return reader


@pytest.mark.parametrize("fill", ["mean", "blur"])
def test_masks_and_boxes_are_hidden_alike(drawn, reader, fill):
    "Failed: the outline of a phrase with a mask was that of its boxes, which it has none of, so nothing was hidden."
    pack, phrases = drawn
    placed, seen = module.open_grounding(reader, pack, phrases, None).placed, np.zeros((64, 64), bool)
    seen[4:60, 4:60] = True
    conditions = module._conditions(reader, pack, placed, fill, 0)
    asked = np.flatnonzero(conditions["box occluded"][0].exists)
    assert len(asked) > 5 and np.array_equal(asked, np.flatnonzero(conditions["elsewhere occluded"][0].exists))
    for k in asked:
        target, image = phrase_region(placed.phrases[k], pack, placed.images[k]) & seen, pack.image(int(placed.images[k]))
        own, away = (conditions[name][0].shown.image(k) != image for name in ("box occluded", "elsewhere occluded"))
        assert target.any() and not (own & ~target).any() and own.sum() > 0.9 * target.sum(), "all of the target, and nothing else"
        assert not (away & target).any() and not (away & ~seen).any() and 0.8 * target.sum() < away.sum() <= target.sum(), "as much, and where it is seen"


class Looker(torch.nn.Module):
    "Its map is how much of what is drawn it sees in each region, with the pixels that it knows: what is filled it does not."

    def __init__(self, pack, phrases, reader):
        super().__init__()
        self.tokenizer, self.sampling, self.weight = reader.tokenizer, reader.sampling, torch.nn.Parameter(torch.zeros(1))
        self.preprocessing = Preprocessing(size=64, crop=1.0, channels=1)
        images = find_phrases(phrases, pack)
        self.films = torch.stack([self.preprocessing.transform()(torch.from_numpy(pack.image(int(row)))[None])[0] for row in images])
        self.truth = torch.stack([torch.from_numpy(phrase_region(phrase, pack, row)) for phrase, row in zip(phrases, images)])

    def correspondence(self, batch):
        maps = []
        for image in batch.image[:, 0]:
            same = image == self.films
            film = same.flatten(1).float().mean(1).argmax()
            clear = torch.from_numpy(ndimage.binary_opening(same[film].numpy(), np.ones((3, 3))))      # a pixel may be as the mean by accident
            maps.append((self.truth[film] & clear).float().view(8, 8, 8, 8).mean((1, 3)).flatten())
        valid = torch.ones(len(batch), 1, dtype=torch.bool)
        scores = torch.stack(maps)[:, :, None]
        return Correspondence(scores, scores, valid, valid, (8, 8))


class Breaker(Looker):
    "Sees as well, and says nothing of a picture of which any part is filled."

    def correspondence(self, batch):
        broken = torch.tensor([not any(torch.equal(image, film) for film in self.films) for image in batch.image[:, 0]])
        found = super().correspondence(batch)
        scores = found.sentences * ~broken[:, None, None]
        return replace(found, words=scores, sentences=scores)


def test_who_breaks_under_any_patch_is_not_told_to_need_no_box(drawn, reader):
    "Failed: what an occlusion anywhere had lost was not there to be lost at the box, so the answer was 'no, 0 %'."
    pack, phrases = drawn
    table = audit(Breaker(pack, phrases, reader), pack, phrases, split=None, resamples=50)
    assert table.set_index("control").loc["elsewhere occluded", "lost"] > 0.8
    assert "needs the box: unclear (any occlusion loses " in verdict(table), verdict(table)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 1), st.floats(0.05, 0.95), st.floats(0, 1))
def test_a_loss_is_a_share_of_what_the_reference_finds(own, left, lost):
    "Of hits that an occlusion elsewhere leaves, so many are lost at the box, however few are left."
    rows = pd.DataFrame({"patient": np.arange(30).astype(str), "chance": 0.1, **{f"{name}: {what}": own for name in _CONTROLS for what in module._MEASURED}})
    rows["elsewhere occluded: hit"] = 0.1 + left * (own - 0.1)
    rows["box occluded: hit"] = 0.1 + (1 - lost) * left * (own - 0.1)
    lines = audit_table(rows, 20).set_index("control")["lost"]
    assert lines["elsewhere occluded"] == pytest.approx(1 - left) and lines["box occluded"] == pytest.approx(lost)
    assert ("any occlusion" in verdict(audit_table(rows, 20))) == (lines["elsewhere occluded"] >= 0.25)


@pytest.mark.parametrize("phrases, patients, answers", [(3, 3, False), (19, 19, False), (20, 9, False), (20, 10, True), (60, 60, True)])
def test_a_handful_of_phrases_gives_no_answer(phrases, patients, answers):
    "Failed: three phrases that were all equal gave 'yes, 100 % [100, 100]', and a fixed map that nobody could make 'nan'."
    rows = pd.DataFrame({"patient": (np.arange(phrases) % patients).astype(str), "chance": 0.1, **{f"{name}: {what}": 0.1 for name in _CONTROLS for what in module._MEASURED}})
    rows["own image: hit"] = rows["elsewhere occluded: hit"] = 1.0
    rows["best fixed map: hit"] = np.nan
    line = verdict(audit_table(rows, 20))
    assert "fixed map" not in line and "nan" not in line
    assert line.count("not asked") == (0 if answers else 4) and line.count(f"yes, 100 % [100, 100] of {phrases}") == (4 if answers else 0), line
    assert line.startswith("sees 100 % [100, 100]" if answers else "has too few phrases")


def test_who_looks_at_what_is_drawn_needs_it(drawn, reader):
    pack, phrases = drawn
    looker = Looker(pack, phrases, reader)
    lines = audit(looker, pack, phrases, split=None, resamples=50).set_index("control")
    assert lines.loc["own image", "hit"] > 0.7 and lines.loc["box occluded", "lost"] > 0.7 and lines.loc["elsewhere occluded", "lost"] < 0.05
    assert "needs the box: yes" in verdict(lines.reset_index())


def test_a_target_that_fills_the_picture_is_not_hidden(pack, method):
    phrases = phantom_phrases(pack)
    whole = [replace(phrase, boxes=((0.0, 0.0, 40.0, 64.0),)) for phrase in phrases[:2]]
    with torch.no_grad():
        rows = module._audit_rows(method, pack, module.open_grounding(method, pack, [*whole, *phrases[2:]]).placed)
    hidden = rows[[f"{name} occluded: hit" for name in ("box", "elsewhere")]]
    assert hidden.iloc[:2].isna().all(axis=None) and hidden.iloc[2:].notna().any(axis=None) and rows["own image: hit"].notna().all()
    table = audit_table(rows[:2], 10).set_index("control")
    assert np.isnan(table.loc["box occluded", "hit"]) and table.loc["box occluded", "phrases"] == 0 and "box: not asked" in verdict(
        table.assign(above_low=0.1).reset_index())


def test_labels_at_every_door(drawn, reader, tmp_path):
    "What boxes and masks name is asked by `ground`, `audit` and `ground_recipes`, and is the same."
    pack, phrases = drawn
    for split in (None, "train"):
        given = phrases_from_labels(pack, split=split)
        rows = ground_phrases(reader, pack, given)
        table = ground(reader, pack, phrases, tmp_path / "ground", split=split, resamples=10).set_index(["finding", "measure"])
        audited = audit(reader, pack, phrases, tmp_path / "audit", split=split, resamples=10).set_index("control")
        recipes = ground_recipes(reader, pack, phrases, tmp_path / "recipes", split=split, resamples=10).set_index(["recipe", "boxes", "measure", "convention", "drawing"])
        assert len(rows) == audited.loc["own image", "phrases"] == recipes.loc[("raw", "union", "hit", "-", "-"), "targets"]
        assert rows["hit"].mean() == pytest.approx(table.loc[("all", "hit"), "value"]) == pytest.approx(audited.loc["own image", "hit"])
        assert rows["cnr"].mean() == pytest.approx(recipes.loc[("raw", "union", "cnr", "signed, population", "bilinear"), "value"])
    for file in ("ground/phrases", "ground/findings", "audit/audit_phrases", "audit/audit", "recipes/recipes"):
        assert pd.read_csv(tmp_path / f"{file}.csv")["recipe"].str.startswith(("raw", "gaussian", "softmax", "absolute")).all(), file


def test_help_says_what_is_asked(capsys):
    with pytest.raises(SystemExit):
        main(["phrases", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option, meaning in {"--audit": "what the score is owed to", "--recipes": "under every recipe and convention", "--split {train,validate,test,all}": "phrases about others are left out"}.items():
        assert option in text and meaning in text[text.index(option):][:300], option


def test_few_maps_are_drawn_at_a_time(monkeypatch):
    "345 boxes at 512 pixels are 700 MB of drawn maps, several times over."
    random, drawn = np.random.default_rng(0), []
    maps, masks = random.random((150, 16)), random.random((150, 8, 8)) < 0.3
    masks[:, 0, 0] = True
    together = module._measured(maps, masks, (4, 4), together=150)
    monkeypatch.setattr(module, "upsample_map", lambda some, *rest: drawn.append(len(some)) or upsample_map(some, *rest))
    np.testing.assert_allclose(module._measured(maps, masks, (4, 4)), together)
    assert max(drawn) <= 64 and sum(drawn) == 150


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
