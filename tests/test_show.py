"""The page of a run in a browser, and the pages of runs that lack something."""
import shutil

import pytest
import torch
from browser import browser, opened  # noqa: F401

from medvis.data.pack import Pack
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.sets.registry import DATASETS, prepare_data, prepare_options, simulate
from medvis.data.source import BuildConfig
from medvis.encoders import train_tokenizer
from medvis.methods import ConVIRT
from medvis.studies.show import _live_card, _without_reports, show_run
from medvis.train import Run, TrainConfig, fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("show")
    data = prepare_phantom(PhantomConfig(out=root / "pack", studies=80, size=64, workers=0, progress=False))
    torch.manual_seed(0)
    method = ConVIRT.from_preset("tiny", train_tokenizer(sentence for report in data.studies["sentences"] for sentence in report))
    return fit(method, data, TrainConfig.of(method, root / "run", epochs=1, batch_size=16, progress=False))


PIXELS = "() => document.querySelector('#widget canvas').toDataURL()"


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (380, "dark")])
def test_hovering_a_word_shows_its_map(run, browser, tmp_path, width, scheme):  # noqa: F811
    path = show_run(run, out=tmp_path / "page.html")
    assert path.stat().st_size < 3e6
    with opened(browser, path, width, 900, color_scheme=scheme) as page:
        assert page.title().startswith("convirt tiny on")
        words, seen = page.locator("#widget .word"), {page.evaluate(PIXELS)}
        for number in (0, words.count() - 1):
            words.nth(number).hover()
            page.wait_for_timeout(200)
            seen.add(page.evaluate(PIXELS))
        assert len(seen) == 3, "each word has a map of its own"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        top = page.locator("section.live").bounding_box()["y"]
        assert top < page.locator(".headlines").bounding_box()["y"] < page.locator("text=How to repeat it").bounding_box()["y"]


@pytest.mark.parametrize("missing, section", [("diagnostics.jsonl", "Is it well?"), (None, "Linear probe")])
def test_what_a_run_lacks_is_left_out(run, tmp_path, missing, section):
    poor = Run(shutil.copytree(run.path, tmp_path / "run"))
    if missing:
        (poor.path / missing).unlink()
    text = show_run(poor, studies=1).read_text()
    assert section not in text and "Point at a word" in text and "Pointing game" in text


def test_a_method_without_maps_has_a_page(run, tmp_path, monkeypatch):
    def refuse(self, batch):
        raise NotImplementedError

    monkeypatch.setattr(ConVIRT, "correspondence", refuse)
    text = show_run(run, out=tmp_path / "page.html").read_text()
    assert "Point at a word" not in text and "<script" not in text and "Training" in text


def test_withheld_reports_are_not_in_the_live_card(run, tmp_path):
    sentences = [sentence for report in Pack(run.manifest["data"]["path"]).studies["sentences"] for sentence in report]
    text = show_run(run, out=tmp_path / "page.html", show_text=False).read_text()
    assert "Point at a word" in text and r"\u2022\u2022\u2022" in text
    assert not any(sentence in text for sentence in sentences)


@pytest.fixture(scope="module")
def siim(tmp_path_factory):
    "Masks without reports: every image is annotated, and in half of them nothing is drawn."
    root = tmp_path_factory.mktemp("siim")
    simulate("siim", root / "raw", 60)
    read = DATASETS["siim"].config(root=root / "raw")
    return prepare_data(prepare_options("siim")(read=read, build=BuildConfig(out=root / "pack", size=64, progress=False)))


def test_studies_in_which_a_mask_is_drawn_come_first(siim, run, tmp_path):
    "An image that was annotated and shows nothing is none of them; where they are too few, the others follow, and the page says so."
    first = siim.studies["image_rows"].map(lambda images: int(images[0]))
    test = [row for row, split in enumerate(siim.studies["split"]) if split == "test"]
    drawn = [row for row in test if siim.mask(first[row]).any()]
    assert 1 < len(drawn) < len(test) and all(len(siim.image_table["masked"][first[row]]) for row in test), "annotated, all of them"
    empty = [row for row in test if row not in drawn]
    for count in (1, len(drawn), len(drawn) + 1):
        assert list(_without_reports(siim, count)) == [*drawn, *empty][:count]
    text = show_run(run, siim, tmp_path / "page.html", studies=len(drawn) + 1).read_text()
    assert "the studies in which something is drawn come first" in text and "rarest findings" not in text


def test_how_the_studies_of_reports_were_chosen(run):
    data = Pack(run.manifest["data"]["path"])
    row = int((data.studies["split"] == "test").to_numpy().argmax())
    assert _live_card("convirt", run.method(), data, {row: []}, True).about.endswith("; the first of them are shown.")
