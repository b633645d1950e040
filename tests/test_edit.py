"""The phantom edited by hand: the picture changes where the finding is and nowhere else, and maps, outlines and words follow or stay, as asked."""
import numpy as np
import pytest
import torch

import medvis as mv
from medvis.data.phantom import Phantom
from medvis.data.phantom.findings import FINDINGS
from medvis.widgets import PhantomEditor, edit_phantom
from medvis.widgets.phantom import placements

PHANTOM = Phantom(96)


class Light:
    "Its map is the brightness of the cells."

    def embed_regions(self, images):
        cells = torch.nn.functional.adaptive_avg_pool2d(images, 12)[:, 0]
        return torch.stack([cells, torch.ones_like(cells)], -1)

    def embed_texts(self, texts):
        return np.array([[1.0, -0.2 * ("left" in text)] for text in texts])


def showing(name: str, count: int = 3) -> list[int]:
    return [i for i in range(400) if [f.name for f in PHANTOM.scene(i).findings].count(name) == 1][:count]


@pytest.mark.parametrize("name", FINDINGS)
def test_erased_is_as_if_it_had_never_been(name):
    for index in showing(name):
        study = edit_phantom(PHANTOM, index, ("erase", name))
        rest = [f for f in PHANTOM.scene(index).findings if f.name != name]
        np.testing.assert_array_equal(study.image, PHANTOM.render(index, rest)[0])
        assert name not in [f.name for f in study.findings] and (study.image != PHANTOM[index].image).any()
        assert name == "Lung Opacity" or study.labels.get(name) != 1, "opacity is said of others too"


@pytest.mark.parametrize("name", ["Pneumothorax", "Nodule", "Consolidation"])
def test_mirrored_twice_is_as_it_was(name):
    for index in [i for i in showing(name, 6) if next(f for f in PHANTOM.scene(i).findings if f.name == name).side in ("left", "right")][:2]:
        once, twice = (edit_phantom(PHANTOM, index, *[("mirror", name)] * times) for times in (1, 2))
        before, after = (next(f for f in study.findings if f.name == name) for study in (PHANTOM[index], once))
        assert {before.side, after.side} == {"left", "right"} and not (before.mask & after.mask).any()
        assert twice.image.tolist() == PHANTOM[index].image.tolist() and after.zone == before.zone


def test_moved_to_every_place():
    index = showing("Nodule", 1)[0]
    for where, (kind, side, zone) in placements("Nodule").items():
        found = next(f for f in edit_phantom(PHANTOM, index, ("move", "Nodule", where)).findings if f.name == "Nodule")
        assert (found.kind, found.side, found.zone) == (kind, side, zone)


def test_words_that_are_kept_lose_what_was_erased():
    "Other findings keep their words, under their new numbers."
    index = next(i for i in range(400) if len({f.name for f in PHANTOM.scene(i).findings}) == len(PHANTOM.scene(i).findings) == 2
                 and all(any(n == k for s in PHANTOM[i].sentences for *_, n in s.words) for k in (0, 1)))
    before, first, second = PHANTOM[index], *[f.name for f in PHANTOM.scene(index).findings]
    study = edit_phantom(PHANTOM, index, ("erase", first), words="keep")
    assert study.report == before.report and study.labels == before.labels and [f.name for f in study.findings] == [second]
    for old, new in zip(before.sentences, study.sentences):
        assert old.text == new.text
        assert [n for *_, n in new.words] == [{None: None, 0: None, 1: 0}[n] for *_, n in old.words]


def test_what_cannot_be_edited_is_said():
    index = showing("Cardiomegaly", 1)[0]
    for edit, said in ((("mirror", "Cardiomegaly"), "Cardiomegaly has no side to exchange .it is none."), (("erase", "Mass"), "no 'Mass' in this study; it shows"),
                       (("spin", "Cardiomegaly"), "unknown edit 'spin'; expected erase, move or mirror"), (("move", "Cardiomegaly", "left upper"), "no 'Cardiomegaly' at 'left upper'")):
        with pytest.raises(ValueError, match=said):
            edit_phantom(PHANTOM, index, edit)
    with pytest.raises(ValueError, match="words is 'drop'; expected follow or keep"):
        edit_phantom(PHANTOM, index, words="drop")


def test_a_model_that_looks_follows():
    "The change of a map is where the finding was and where it is now, and what was typed and pinned stays."
    index = next(i for i in showing("Consolidation", 30) if len(PHANTOM.scene(i).findings) == 1 and PHANTOM.scene(i).findings[0].side in ("left", "right"))
    editor = PhantomEditor({"light": mv.wrap(Light(), size=96, channels=1)}, PHANTOM, index)
    editor.widget.ask("left lung")
    before = editor.widget.study
    editor.edit("mirror", "Consolidation")
    after = editor.widget.study
    assert [after.sentences[s] for s in editor.widget.selection["sentences"]] == ["left lung"], "what was asked stays pinned"
    assert after.typed == ["left lung"] and len(editor.widget.studies) == 2 and editor.widget.position == 1
    change = np.abs(after.runs["light"].scores["sentences"][-1] - before.runs["light"].scores["sentences"][-1])
    touched = before.cells["light"][0] | after.cells["light"][0]
    assert change[touched].mean() > 10 * change[~touched].mean()
    said = [sum(side in text for text in view.sentences) for view in (before, after) for side in ("left", "right")]
    assert said[:2] != said[2:]
    editor.reset()
    np.testing.assert_array_equal(editor.widget.study.picture, before.picture)
    assert editor.widget.study.sentences == before.sentences and len(editor.widget.studies) == 3


def test_the_buttons_say_what_they_cannot():
    editor = PhantomEditor({"light": mv.wrap(Light(), size=96, channels=1)}, PHANTOM, showing("Cardiomegaly", 1)[0])
    editor.finding.value = "Cardiomegaly"
    editor.buttons["mirror"].click()
    assert "has no side to exchange" in editor.said.value and not editor.edits and len(editor.widget.studies) == 1
    editor.buttons["erase"].click()
    assert editor.said.value == "" and editor.edits == [("erase", "Cardiomegaly")] and "Cardiomegaly" not in editor.finding.options


def test_a_saved_page_holds_the_edits(tmp_path):
    editor = PhantomEditor({"light": mv.wrap(Light(), size=96, channels=1)}, PHANTOM, showing("Nodule", 1)[0])
    editor.edit("erase", "Nodule")
    page = editor.widget.to_html(tmp_path / "page.html", studies=[0, 1]).read_text()
    assert "0: as it is" in page and "1: erase Nodule" in page
