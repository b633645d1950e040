"""The widget with a trained run: its page opened from disk without a network, and the pointing game from the scores in it."""
import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import browser, opened  # noqa: F401
from correspondences import pixels, shot, word
from notebooks import ROOT

from medvis.data.build import ImageRecord, StudyRecord, write_pack
from medvis.data.label_phrases import phrases_from_labels
from medvis.data.pack import Pack
from medvis.data.phantom import Phantom
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.sets.registry import DATASETS, prepare_data, prepare_options, simulate
from medvis.data.source import BuildConfig
from medvis.evaluate.ground import ground_phrases, pointing_hits
from medvis.studies.show import show_run
from medvis.train import Run, load_method
from medvis.widgets import CorrespondenceWidget, beside_random_init, study_points
from medvis.widgets.study import Studies

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


def test_what_is_typed_changes_no_order(widget):
    "The reader's phrases have hits of their own, and are no misses of the studies."
    typed = ["pulmonary nodule", "tubes and lines", "left pleural effusion"]
    position = next(p for p in range(60) if widget.studies.view(p, typed).misses("trained") != 1 and len(widget.studies.view(p, typed).hits("trained")) > len(widget.studies[p].hits("trained")))
    for p in {position, *range(12)}:
        plain, asked = widget.studies[p], widget.studies.view(p, typed)
        assert [asked.misses(name) for name in asked.runs] == [plain.misses(name) for name in plain.runs]
        linked = {asked.words[w].lower() for outline in asked.outlines for w in outline.words if w >= len(plain.words)}
        assert "and" not in linked, "it names nothing"


def test_a_typed_sentence_is_pinned_where_it_was_typed(widget):
    widget.position = 5
    own = widget.study.sentences
    try:
        for text in (own[-1], own[0], own[-1]):
            widget.ask(text)
            (number,) = widget.selection["sentences"]
            assert number >= len(own) and widget.study.sentences[number] == text and widget.study.kinds[number] == "typed"
    finally:
        widget.typed, widget.selection = [], {}


def test_the_figure_judges_what_is_hidden(widget):
    "A class that is not drawn over the picture is hit or missed as before; a masked report keeps its places."
    position = widget.studies.find(finding="Pleural Effusion")[0]
    widget.position, hidden = position, widget.hidden
    view = widget.study
    pins = {"sentences": [view.hits("trained", "sentences")[0][0]]}
    widget.selection = pins
    shown, bare = widget.to_figure(), widget.to_figure(hidden=[outline.kind for outline in view.outlines])
    verdicts = [[ax.get_title("right") for ax in figure.axes[:2]] for figure in (shown, bare)]
    assert verdicts[0] == verdicts[1] and all("(drawn)" in verdict for verdict in verdicts[0])
    assert len(bare.axes[0].patches) < len(shown.axes[0].patches)
    said = next(p for p in range(60) if any(outline.said for outline in widget.studies[p].outlines))
    widget.position, widget.selection = said, {}
    widget.masked = True
    masked, plain = widget.to_figure(hidden=[]), None
    widget.masked = False
    plain = widget.to_figure(hidden=[])
    assert len(masked.axes[0].patches) < len(plain.axes[0].patches) and widget.hidden == hidden


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


# ---------------------------------------------------------------- without reports

RUN = ROOT / "nbs/widgets/run"


@pytest.fixture(scope="module")
def nih(tmp_path_factory):
    "Boxes and labels, and no reports; the pictures are larger than what an encoder of 64 pixels and crop 0.8 sees."
    root = tmp_path_factory.mktemp("nih")
    simulate("nih", root / "raw", 24, 80)
    return prepare_data(prepare_options("nih")(read=DATASETS["nih"].config(root=root / "raw"), build=BuildConfig(out=root / "pack", size=80, progress=False)))


def moved(pack, boxes):
    "The Pack opened anew, with other places for its first boxes."
    pack = Pack(pack.path)
    pack.boxes.loc[pack.boxes.index[:len(boxes)], ["x0", "y0", "x1", "y1"]] = boxes
    return pack


def test_the_targets_are_those_of_the_pointing_game(nih):
    "A box that the crop leaves out is none; one that holds no region's centre is missed; all others are hit as `evaluate.ground` hits them."
    method = load_method(RUN)
    method.image_encoder.preprocessing = replace(method.preprocessing, crop=0.8)
    width, height = nih.image_table[["width", "height"]].iloc[int(nih.boxes["image"].iloc[0])]
    pack = moved(nih, [[0, 0, 0.06 * width, 0.06 * height], [0.5 * width, 0.5 * height, 0.51 * width, 0.51 * height]])
    phrases = phrases_from_labels(pack, split=None)
    rows = ground_phrases(method, pack, phrases)
    studies = Studies({"run": method}, pack, None)
    hits, targets = {}, 0
    for position in range(len(studies)):
        view = studies[position]
        image = str(pack.image_table["image_id"][studies.table["image_rows"].iloc[position][0]])
        hits |= {(image, view.sentences[s]): hit for s, _, hit in view.hits("run", "sentences")}
        targets += len(view.targets("run"))
    expected = {(row.image_id, phrases[row.phrase].text): row.hit == 1 for row in rows.itertuples()}
    assert hits == expected and targets == len(rows) == len(phrases) - 1 and 0 < sum(hits.values()) < len(hits)


def test_a_pack_without_reports_is_shown_by_phrases(nih, browser, tmp_path):  # noqa: F811
    shown = beside_random_init(RUN, nih, split=None, name="trained")
    position = next(p for p in range(len(shown.studies)) if shown.studies.outlines(p))
    shown.position = position
    view = shown.study
    (outline,) = view.outlines[:1]
    (number,) = outline.sentences
    assert view.kinds[number] == "label" and len(shown.studies) == len(nih.studies) and shown.studies.judged == "drawn"
    assert position in shown.studies.find(view.sentences[number]) and shown.studies.find("zebra") == []
    path = shown.to_html(tmp_path / "page.html", [position])
    with opened(browser, path, height=900) as page:
        assert page.locator("p[data-sentence]").all_text_contents() == view.sentences and "Phrases from labels" in page.locator(".report").inner_text()
        before = pixels(page, "trained")
        page.click(word(number, "sentences"))
        hit = dict((s, hit) for s, _, hit in view.hits("trained", "sentences"))[number]
        assert page.locator(".badge").first.get_attribute("data-hit") == str(hit).lower() and (pixels(page, "trained") != before).any()
    shown.selection = {"sentences": [number]}
    figure = shown.to_figure()
    assert figure.axes[0].get_title("right") == f"{'hit' if hit else 'miss'} (drawn)"
    assert sum(text.get_text() == "shown:" for text in figure.axes[-1].texts) == view.kinds.count("absent") > 0
    with pytest.raises(ValueError, match="has no reports; expected a data set with some"):
        study_points(shown.studies.runs["trained"], nih, None)


def test_when_it_is_unknown_how_pictures_were_made_square(nih):
    "A box on a picture that is not square may lie elsewhere: no hit and no miss. On a square one it lies where it lies."
    pack = Pack(nih.path)
    pack.image_table["width"] = (pack.image_table["width"] * 0.8).astype(int)
    for fit, sure in (("pad", True), (None, False)):
        pack.manifest["source"]["fit"] = fit
        studies = Studies({"run": load_method(RUN)}, pack, None)
        views = [studies[p] for p in range(len(studies)) if studies.outlines(p)]
        assert all(outline.fits == sure for view in views for outline in view.outlines) and any(view.hits("run", "sentences") for view in views) == sure
    shown = CorrespondenceWidget({"run": load_method(RUN)}, pack, None)
    shown.position = views[0].position
    shown.selection = {"sentences": list(views[0].outlines[0].sentences)}
    assert shown.to_figure().axes[0].get_title("right") == "unknown fit"
    square = Pack(nih.path)
    square.manifest["source"]["fit"] = None
    assert all(outline.fits for p in range(len(studies)) for outline in Studies({"run": load_method(RUN)}, square, None).outlines(p))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "Pictures and labels, and neither reports nor boxes."
    out = tmp_path_factory.mktemp("bare") / "pack"
    pictures = np.random.default_rng(0).integers(0, 255, (3, 64, 64)).astype(np.uint8)
    write_pack(out, range(3), lambda k: StudyRecord(f"s{k}", f"p{k}", "test", [ImageRecord(f"i{k}", pictures[k], width=64, height=64)], "", {"Edema": 1.0, "Mass": 0.0}),
               64, {"kind": "other", "fit": "pad"}, ["Edema", "Mass"], require_report=False, progress=False)
    return Pack(out)


def test_a_pack_with_neither_is_asked_phrases(bare):
    shown = CorrespondenceWidget({"trained": RUN}, bare)
    assert (shown.study.sentences, shown.studies.judged, shown.study.runs["trained"].scores["words"].shape) == ([], "nothing", (0, 256))
    assert len(shown.to_figure().axes) == 2 and shown.studies.find("s1") == [1]
    shown.ask("pulmonary edema")
    (scores,) = shown.study.runs["trained"].scores["sentences"]
    assert not np.isnan(scores).any() and shown.selection["sentences"] == [0] and shown.study.kinds == ["typed"]
    shown.position = 2
    assert shown.study.sentences == ["pulmonary edema"] and (shown.study.runs["trained"].scores["sentences"] != scores).any()


@pytest.mark.parametrize("which", ["nih", "bare"])
def test_the_page_of_a_run_on_a_pack_without_reports(which, request, tmp_path, browser):  # noqa: F811
    pack = request.getfixturevalue(which)
    path = show_run(Run(RUN), pack, tmp_path / "page.html", studies=2)
    expected = ["pulmonary edema", "mass"] if which == "bare" else None
    with opened(browser, path, height=900) as page:
        texts = page.locator("#widget p[data-sentence]").all_text_contents()
        assert texts == expected if expected else len(texts) > 3
        about = "nothing is drawn: the first are shown, with what reports call the labels" if which == "bare" else "the studies in which something is drawn come first"
        assert about in page.locator("section.live").inner_text()
        assert page.locator('#widget .number[aria-pressed="true"]').count() == 1 and "•" not in page.locator("#widget .report").inner_text()
        shot(page, f"show-{which}")
