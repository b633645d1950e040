"""The widget with a trained run: its page opened from disk without a network, and the pointing game from the scores in it."""
import base64
import json
import re

import numpy as np
import pytest
from browser import browser, opened  # noqa: F401
from correspondences import pixels, shot, word
from notebooks import ROOT

from medvis.data.phantom import Phantom
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.evaluate.ground import pointing_hits
from medvis.widgets import beside_random_init

NAMED = ("Nodule", "Consolidation", "Pleural Effusion")


@pytest.fixture(scope="module")
def widget(tmp_path_factory):
    pack = prepare_phantom(PhantomConfig(tmp_path_factory.mktemp("phantom") / "pack", studies=60, size=64, seed=3, progress=False))
    return beside_random_init(ROOT / "nbs/widgets/run", pack, split=None, name="trained", grain="sentences")


@pytest.fixture(scope="module")
def page_path(widget, tmp_path_factory):
    return widget.to_html(tmp_path_factory.mktemp("page") / "page.html", range(60))


def test_pointing_game_from_the_scores_in_the_page(page_path):
    state = json.loads(re.search(r'<script type="application/json" id="state">(.*?)</script>', page_path.read_text(), re.S)[1])
    phantom, throws = Phantom(64, seed=3), {"trained": [], "random-init": []}
    for study in state["held"]["studies"]:
        head, (_, *bodies) = study["head"], (base64.b64decode(body["base64"]) for body in study["buffers"])
        truth = phantom[int(head["id"].rpartition("-")[2])].findings
        for name, body in zip(throws, bodies[1::2]):     # words, sentences of each run
            scores = np.frombuffer(body, "<f4").reshape(-1, 256)
            throws[name] += [np.ravel(pointing_hits(scores[[s]], truth[o].mask[None], (16, 16)))
                             for o, outline in enumerate(head["outlines"]) if outline["name"] in NAMED for s in outline["sentences"]]
    (hits, chance), (blind, _) = (np.mean(rows, 0) for rows in throws.values())
    assert len(throws["trained"]) > 10 and hits > 3 * chance and hits > blind + 0.15, (hits, chance, blind)


def test_the_page_without_a_network(browser, widget, page_path):  # noqa: F811
    position = widget.studies.find(finding="Pleural Effusion")[0]
    view = widget.studies[position]
    sentence, _, hit = view.hits("trained", "sentences")[0]
    with opened(browser, page_path, height=900) as page:
        page.get_by_label("Search ids and words").fill(view.id)
        page.wait_for_selector(f"[data-ready={view.id}]")
        before = pixels(page, "trained")
        page.hover(word(sentence, "sentences"))
        row, column = divmod(int(view.runs["trained"].scores["sentences"][sentence].argmax()), 16)
        change = np.abs(pixels(page, "trained") - before).sum(2)
        assert change[10 * row:10 * row + 10, 10 * column:10 * column + 10].mean() > 2 * np.median(change)
        assert page.locator(".badge").first.get_attribute("data-hit") == str(hit).lower()
        shot(page, "page-light")


def test_dark_page(browser, page_path):  # noqa: F811
    with opened(browser, page_path, color_scheme="dark", height=900) as page:
        page.hover(word(0, "sentences"))
        shot(page, "page-dark")


def test_the_script_is_in_the_package():
    from importlib.resources import files
    for name in ("correspondence.js", "correspondence.css", "theme.css"):
        assert (files("medvis.widgets") / "static" / name).is_file()


def test_boxes_masks_and_places_of_any_pack(tmp_path):
    "The phantom as somebody's table: its masks are outlined, named by the rules, and hit as its phrases are."
    from folders import folder_pack
    from medvis.data.sets.registry import simulate
    from medvis.data.label_phrases import phrases_from_labels
    from medvis.data.phrases import find_phrases, phrase_region
    simulate("folder", tmp_path / "raw", 16)
    pack = folder_pack(tmp_path / "raw" / "table.csv", tmp_path / "pack", size=64, boxes="boxes.csv", masks="masks.csv")
    shown = beside_random_init(ROOT / "nbs/widgets/run", pack, split=None, name="trained")
    assert {f"{name} (report)" for name in ("Edema", "Nodule")} <= set(shown.hidden)
    phrases = phrases_from_labels(pack, split=None)
    regions = {(phrase.image_id, phrase.category): phrase_region(phrase, pack, image) for phrase, image in zip(phrases, find_phrases(phrases, pack))}
    seen, linked, silent = 0, 0, 0
    for position in range(len(shown.studies)):
        view = shown.studies[position]
        image = str(pack.image_table["image_id"][shown.studies.table["image_rows"].iloc[position][0]])
        drawn = {outline.name: outline for outline in view.outlines if not outline.said}
        assert set(drawn) == {name for of, name in regions if of == image}
        for name, outline in drawn.items():
            assert (outline.mask == regions[image, name]).all()
            linked += bool(outline.sentences)
        for outline in view.outlines:
            if outline.said:
                side = {"left": slice(32, None), "right": slice(32)}.get(outline.name.partition(": ")[2].split()[0], slice(None))
                assert outline.mask[:, side].any() and outline.mask.sum() <= 64 * 32 and outline.sentences
        assert all(not view.outlines[o].said for o in view.targets("trained"))
        silent += not drawn and bool(view.outlines) and view.hits("trained", "sentences") == []
        for item, o, hit in view.hits("trained", "sentences"):
            scores = view.runs["trained"].scores["sentences"][[item]]
            assert pointing_hits(scores, view.outlines[o].mask[None], (16, 16))[0][0] == hit
            seen += 1
    assert seen > 10 and linked > 10 and shown.study.judged == "drawn"
    bare = folder_pack(tmp_path / "raw" / "table.csv", tmp_path / "bare", size=64)
    shown = beside_random_init(ROOT / "nbs/widgets/run", bare, split=None, name="trained")
    views = [shown.studies[position] for position in range(len(shown.studies))]
    assert shown.hidden == [] and shown.study.judged == "said" and all(outline.said for view in views for outline in view.outlines)
    assert sum(len(view.hits("trained", "sentences")) for view in views) > 5, "with reports alone, what they say is the target"
