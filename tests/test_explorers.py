"""The explorers as a notebook's user moves them, without a browser: controls change what is shown; hostile text stays text."""
import json
import re

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch

from medvis.data.preprocessing import AUGMENTATIONS, Preprocessing
from medvis.data.pairs import Pairs, Sampling
from medvis.data.phantom import Phantom
from medvis.data.phantom.findings import FINDINGS
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.widgets import shell
from medvis.widgets.augmentation import AugmentationExplorer
from medvis.widgets.embedding import EmbeddingView, _point_data
from medvis.widgets.phantom import PhantomExplorer, placements, plant, study_with

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&\"'`{{x}} $x_{2}$ عربى 🩻\u202e"


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("packs") / "pack", studies=12, size=64, workers=0))


@pytest.fixture
def augmentation(pack):
    return AugmentationExplorer(pack, split=None, views=2)


@pytest.fixture(scope="module")
def phantom():
    return PhantomExplorer(Phantom(64), index=3)


@pytest.mark.parametrize("control, value", [("study", 4), ("augment", "lovt"), ("epoch", 7), ("seed", 5), ("views", 3)])
def test_every_control_changes_the_views(augmentation, control, value):
    before = augmentation.picture.value
    getattr(augmentation, control).value = value
    assert augmentation.picture.value != before


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_views_are_those_of_training(augmentation, pack, augment):
    augmentation.augment.value, augmentation.epoch.value, augmentation.study.value = augment, 3, 2
    true = Pairs(pack, None, Preprocessing(size=64, channels=1), Sampling(augment=augment), train=True)
    for epoch, look in enumerate(augmentation.looks, 3):
        assert torch.equal(look.image, true.image(2, epoch))


def test_looking_leaves_the_dice_alone(augmentation):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    augmentation.augment.value = "lovt"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("preprocessing", [
    Preprocessing(size=48, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)), Preprocessing(size=64, crop=1.0, scale="max", mean=0.0, std=1.0)])
def test_any_preprocessing_is_shown(pack, preprocessing):
    explorer = AugmentationExplorer(pack, preprocessing, Sampling(augment="local-mi", per="study"), split=None, views=1)
    assert explorer.picture.value.count("<img") == 2 and explorer.to_figure()


@pytest.mark.parametrize("name", FINDINGS)
def test_a_slider_plants_what_it_says(phantom, name):
    for row in phantom.rows.values():
        row.severity.value = 0
    empty = phantom.picture.value
    assert "<path" not in empty and not phantom.study.findings
    row = phantom.rows[name]
    row.severity.value = 2
    (finding,) = phantom.study.findings
    assert (finding.name, finding.severity) == (name, 2) and "<path" in phantom.picture.value
    row.where.value = row.where.options[-1]
    (moved,) = phantom.study.findings
    assert (moved.kind, moved.side, moved.zone) == placements(name)[row.where.value]


def test_own_findings_are_those_of_the_study(phantom):
    phantom.index.value = 12
    phantom.own.click()
    own = {finding.name: (finding.side, finding.zone, finding.severity) for finding in reversed(Phantom(64)[12].findings)}
    assert {finding.name: (finding.side, finding.zone, finding.severity) for finding in phantom.study.findings} == own


def test_marks_name_the_findings(phantom):
    phantom.own.click()
    phantom.rows["Pleural Effusion"].severity.value = 3
    numbers = [finding.name for finding in phantom.study.findings]
    words = [s.text[start:end] for s in phantom.study.sentences for start, end, k in s.words if k is not None and numbers[k] == "Pleural Effusion"]
    marks = re.findall(r"<mark[^>]*>(.*?)<sup>(\d+)</sup></mark>", phantom.picture.value)
    marked = " ".join(text for text, number in marks if numbers[int(number) - 1] == "Pleural Effusion")
    assert words and all(word in marked for word in words)


def test_a_draw_moves_spot_and_words():
    study, other = (study_with([plant("Nodule", "left upper", key=key)], Phantom(64), 5, wording=5 + key) for key in (0, 1))
    assert study.findings[0].box != other.findings[0].box and study.report != other.report


def table(n=50, **columns):
    rng = np.random.default_rng(0)
    return pd.DataFrame({"x": rng.normal(size=n), "y": rng.normal(size=n), "kind": rng.choice(["a", "b"], n), **columns})


def test_views_are_saved_whole_or_not_at_all(tmp_path):
    view = EmbeddingView(table(text=HOSTILE, kind=HOSTILE + "1"))
    page = view.to_html(tmp_path / "deep" / "page.html", title=HOSTILE)
    text = page.read_text(encoding="utf-8")
    assert "<script>document" not in text and "<img" not in text and text.count("</script>") == 2
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert state["data"]["texts"] == [HOSTILE] * 50 and set(state) == {"data", "colour", "hidden", "selection", "focus", "mode"}
    view.data = {"broken": object()}
    with pytest.raises(TypeError):
        view.to_html(page)
    assert page.read_text(encoding="utf-8") == text and len(list(page.parent.iterdir())) == 1


def test_masked_text_stays_in_the_kernel(tmp_path):
    view = EmbeddingView(table(text="effusion"), show_text=False)
    assert "effusion" not in json.dumps(view.data, default=bytes.hex)
    assert "effusion" not in view.to_html(tmp_path / "page.html").read_text()
    titles = [text.get_text() for ax in view.to_figure().subfigs[1].axes for text in ax.findobj() if hasattr(text, "get_text")]
    assert not any("effusion" in title for title in titles)


@pytest.mark.parametrize("kind", [
    pd.Series([True, False] * 25), pd.Series([None] * 50), pd.Series(pd.Categorical(["a", "b"] * 25)), pd.Series([1, None] * 25, dtype="Int64"),
    pd.Series([f"name {k}" for k in range(50)]), pd.Series([1.5, np.inf] * 25), pd.Series(["$x$", "_y"] * 25)])
def test_any_column_will_do(kind):
    view = EmbeddingView(table(kind=kind))
    assert len(view.shades()[0]) == 50 and view.to_figure().savefig("/dev/null", format="png") is None


@pytest.mark.parametrize("wrong, said", [
    ({"x": ["a"] * 50}, "could not convert"), ({"picture": 0}, "picture 0"), ({"y": np.inf}, "50 points")])
def test_bad_tables_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        _point_data(table(**wrong))


def test_each_widget_carries_a_figure(augmentation, phantom):
    for widget in (augmentation, phantom, EmbeddingView(table())):
        bundle = widget._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(data)
        assert isinstance(widget, ipywidgets.DOMWidget)


def test_files_of_the_widgets_ship():
    for name in ("theme.css", "explorers.css", "embedding.css", "embedding.js", "slider.css", "slider.js", "standalone.js"):
        text = shell.static(name)
        assert text and not re.search(r"https?://|@import|url\(", text), name
