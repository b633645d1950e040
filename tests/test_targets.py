"""Report targets: long and strange texts, and what the benchmark counts against what people coded."""
import importlib.util
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvis.data.coded import coded_findings, compare_targets, target_agreement
from medvis.data.sets.registry import DATASETS, command_config, prepare_data, simulate
from medvis.data.source import BuildConfig
from medvis.data.targets import (
    _LONGEST, ONE_SIDED, STATUSES, TERMS, agreement, exchange_side, exchange_zone, _find_mentions, mirror_sentence, negate_sentence, other_finding_sentence, possible_sides, sentence_side, sentence_targets, side_words)

WORDS = ("no", "possible", "prior", "versus", "effusion", "opacity", "nodule", "heart", "is", "enlarged", "normal", "lungs", "clear", "left", "right", "upper", "lobe",
         "bases", "or", "and", "but", ",", "/", ";", "may", "not", "seen", "has", "resolved", "there", "costophrenic", "angles", "sharp", "XXXX", "é", "5 mm", "lingula")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join))
def test_any_words_have_targets_of_the_known_kinds(sentence):
    for name, (status, side, zone) in sentence_targets(sentence).items():
        assert name in TERMS and status in STATUSES
        assert side in (None, "left", "right", "bilateral") and zone in (None, "upper", "middle", "lower")
    if exchanged := exchange_side(sentence):
        assert exchange_side(exchanged) == sentence
    if negated := negate_sentence(sentence):
        assert {status for status, *_ in sentence_targets(negated).values()} == {"negated"}
    if other := other_finding_sentence(sentence, "Mass"):
        assert set(sentence_targets(other)) == {"Mass"}
    exchange_zone(sentence)


@pytest.mark.parametrize("piece", ["no left effusion, ", "heart ", "lungs a b c ", "opacity and ", "there is ", "a" * 50, "costophrenic x ", "not ", "left ", "prior / "])
def test_time_grows_with_the_length_of_the_text(piece):
    "Eight times the text may take sixteen times as long, not sixty-four; and so long a text at all is read in seconds."
    def seconds(count: int) -> float:
        start = time.process_time()
        _find_mentions.__wrapped__(piece * count)
        return time.process_time() - start
    count = 4_000 // len(piece)
    seconds(10)
    short, long = min(seconds(count) for _ in range(3)), seconds(8 * count)
    assert long < 16 * short + 0.1


def test_a_cue_reaches_no_further_than_a_clause():
    far = "no effusion" + " and more words" * (_LONGEST // 10) + " and a nodule"
    assert sentence_targets(far)["Pleural Effusion"][0] == "negated" and sentence_targets(far)["Nodule"][0] == "asserted"


@pytest.mark.parametrize("sentence, name, target", [
    ("Blunting of the costophrenic angles by small effusions.", "Pleural Effusion", ("asserted", "bilateral", "lower")),
    ("Blunting of the left costophrenic angle.", "Pleural Effusion", ("uncertain", "left", "lower")),
    ("The right costophrenic sulcus is blunted.", "Pleural Effusion", ("uncertain", "right", "lower")),
    ("No blunting of the costophrenic angles.", "Pleural Effusion", ("negated", "bilateral", "lower")),
    ("The costophrenic angles are not blunted.", "Pleural Effusion", ("negated", "bilateral", "lower")),
    ("Right PICC ends in the mid SVC.", "Support Devices", ("asserted", "right", None)),
    ("Leads in the right atrium and ventricle from a left pacemaker.", "Support Devices", ("asserted", "left", None)),
    ("Lingular scar.", "Scar", ("asserted", "left", "middle")),
    ("Neither effusion nor pneumothorax is present.", "Pneumothorax", ("negated", None, None)),
    ("No evidence of consolidation, large effusion/pneumothorax.", "Pneumothorax", ("negated", None, None)),
    ("Evaluation for pneumothorax is limited.", "Pneumothorax", ("uncertain", None, None)),
    ("The previously seen tubes and lines have been removed.", "Support Devices", ("negated", None, None)),
    ("Compared to the prior film a left nodule is new.", "Nodule", ("asserted", "left", None)),
    ("Consolidation has cleared only partially.", "Consolidation", ("asserted", None, None)),
    ("Trace pleural fluid is difficult to exclude.", "Pleural Effusion", ("uncertain", None, None)),
    ("Effusion, right greater than left.", "Pleural Effusion", ("asserted", "bilateral", None)),
    ("Middle lobe opacity.", "Lung Opacity", ("asserted", "right", "middle")),
    ("Nodule over the cardiac apex.", "Nodule", ("asserted", "left", None)),
    ("LLL pneumonia.", "Pneumonia", ("asserted", "left", "lower")),
    ("Subcutaneous emphysema and a joint effusion.", "Emphysema", None),
])
def test_single_sentences(sentence, name, target):
    assert sentence_targets(sentence).get(name) == target


@pytest.mark.parametrize("sentence, side", [
    ("No left effusion, small right nodule.", "right"), ("No left effusion.", None), ("The left ribs are intact.", None), ("Left effusion, right nodule.", None),
    ("Bibasilar atelectasis.", "bilateral"), ("Possible lingular opacity, no right effusion.", "left"), ("Nodule.", None)])
def test_the_side_of_a_sentence_is_that_of_what_it_does_not_deny(sentence, side):
    assert sentence_side(sentence) == side


BOTH = {"left", "right"}


@pytest.mark.parametrize("sentence, finding, sides", [
    ("Pleural effusions.", "Pleural Effusion", BOTH), ("A pleural effusion.", "Pleural Effusion", set()), ("Scattered opacity.", "Lung Opacity", BOTH),
    ("Multiple left nodules.", "Nodule", {"left"}), ("Lung mass.", "Mass", set()), ("Masses.", "Mass", BOTH), ("Fibrosis.", "Fibrosis", set()),
    ("Left effusion and diffuse opacity.", "Lung Opacity", BOTH), ("Left effusion and diffuse opacity.", "Pleural Effusion", {"left"}),
    ("Possible infiltrates.", "Pneumonia", BOTH), ("Pneumothoraces.", "Pneumothorax", BOTH)])
def test_several_of_no_side_may_be_on_both(sentence, finding, sides):
    assert possible_sides([sentence])[finding] == sides
    assert finding not in possible_sides([f"No {sentence.lower()}"])


@pytest.mark.parametrize("side", ONE_SIDED)
@pytest.mark.parametrize("number", range(9))
def test_what_has_no_other_side_is_neither_exchanged_nor_mirrored(side, number):
    names = ["lingula", "lingular segment", "cardiac apex", "apex of the heart", "LUL", "LLL"] if side == "left" else ["middle lobe", "right middle lobe", "mid lobe", "minor fissure", "horizontal fissure", "azygos lobe", "RUL", "RML", "RLL"]
    sentence = f"Opacity in the {names[number % len(names)]}"
    assert sentence_side(sentence) == side and exchange_side(sentence) is mirror_sentence(sentence) is exchange_side(f"{sentence} and on the {side}") is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from((*WORDS, "leftward", "both", "middle", "atrium")), max_size=20).map(" ".join))
def test_one_pattern_of_side_words(sentence):
    "What is exchanged is what is left out where side words are not read, and of what is mirrored nothing keeps its side."
    words = sentence.split()
    if exchanged := exchange_side(sentence):
        turned = [old != new for old, new in zip(words, exchanged.split())]
        assert turned == [flag and word != "both" for flag, word in zip(side_words(words), words)]
    if (mirrored := mirror_sentence(sentence)) and "lobe" not in sentence:
        assert sentence_side(mirrored) == {"left": "right", "right": "left"}.get(sentence_side(sentence), sentence_side(sentence))


def test_agreement_of_nothing():
    none = pd.Series([None], dtype=object)
    line = agreement(none, none, pd.Series(["a"])).loc["all"]
    assert line[["found", "true", "both"]].tolist() == [0, 0, 0] and line[["precision", "recall"]].isna().all()


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "targets.py"
    spec = importlib.util.spec_from_file_location("benchmark_targets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_folder_and_its_pack_are_counted_alike(benchmark, tmp_path, monkeypatch, capsys):
    "The tables of the benchmark: the folder as it lies there and the Pack of it have the same, and no word of a report."
    simulate("openi", tmp_path / "root", studies=40)
    pack = prepare_data(command_config(DATASETS["openi"])(DATASETS["openi"].config(tmp_path / "root"), BuildConfig(tmp_path / "pack", size=32, progress=False)))
    printed = []
    for place in ("root", "pack"):
        monkeypatch.setattr("sys.argv", ["targets.py", str(tmp_path / place), "--half", "all"])
        benchmark.main()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and f"{len(pack.studies)} coded reports" in printed[0]
    assert not any(sentence in printed[0] for sentences in pack.studies["sentences"] for sentence in sentences)
    found = target_agreement(pack)
    line = next(line.split() for line in printed[0].partition("counted as there if asserted")[2].splitlines() if line.startswith("all"))
    assert line[1:4] == [str(value) for value in found.loc[("finding", "all"), ["found", "true", "both"]].astype(int)]
    counts = benchmark.prevalence(pack.studies.set_index("study_id")["coded"])
    codes = coded_findings(pack)
    assert counts["reports"].to_dict() == {name: codes[codes["finding"] == name]["study"].nunique() for name in counts.index} and counts["reports"].is_monotonic_decreasing
    (tmp_path / "root/radrestruct.tgz").unlink()
    with pytest.raises(ValueError, match="no coded reports"):
        benchmark.coded_reports(tmp_path / "root")


def test_what_is_coded_is_compared_by_finding_and_place():
    "One report, counted by hand: a finding on both sides, one that is only possible, one that nobody coded, one that nobody wrote."
    said = {"CXR1": ["Opacities at both bases.", "A possible left upper lobe nodule.", "There is a hiatal hernia.", "Right apical scar."]}
    coded = {"CXR1": [["Lung Opacity", "left lower lobe", "left"], ["Lung Opacity", "right lower lobe", "right"], ["Nodule", "right upper lobe", "right"], ["Mass", "", ""]], "CXR2": []}
    table = compare_targets(said, coded)
    assert table.loc["finding"].loc["all", ["found", "true", "both"]].tolist() == [2, 3, 1]         # opacity and scar; opacity, nodule and mass
    assert table.loc["side"].loc[["bilateral", "right"], "both"].tolist() == [1, 0] and table.loc["zone"].loc["all", "precision"] == 1
    assert table.loc["one side"].loc["all", ["found", "both"]].tolist() == [1, 0], "the nodule is on the other side"
    assert compare_targets(said, coded, statuses=STATUSES[:2]).loc["finding"].loc["all", ["found", "both"]].tolist() == [3, 2]
    assert "Hernia" not in table.loc["finding"].index, "which the form does not ask for"


@pytest.mark.parametrize("codes, side", [
    ([("Nodule", "middle lobe", "")], None), ([("Nodule", "left lower lobe", "left"), ("Nodule", "middle lobe", "")], None), ([("Nodule", "right lower lobe", "right"), ("Nodule", "middle lobe", "")], None),
    ([("Nodule", "left lower lobe", "left"), ("Nodule", "middle lobe", ""), ("Nodule", "right lower lobe", "right")], "bilateral"), ([("Nodule", "apex", "bilateral"), ("Nodule", "middle lobe", "")], "bilateral"),
    ([("Nodule", "middle lobe", "left")], "left"), ([("Nodule", "left lower lobe", "left"), ("Mass", "middle lobe", "")], "left")])
def test_a_middle_lobe_without_a_side_is_right_or_the_lingula(codes, side):
    "Rad-ReStruct has no lingula: whatever a report says of it, and of the other lung, is not counted as wrong."
    for said in ("A nodule in the middle lobe.", "A lingular nodule.", "Bilateral nodules.", "A left nodule."):
        table = compare_targets({"a": [said]}, {"a": codes})
        found = sentence_targets(said)["Nodule"][1]
        assert table.loc["side"].loc["all", ["true", "both"]].tolist() == [side is not None, side is not None and found == side]
        assert table.loc["one side"].loc["all", "true"] == (side == "left" and found != "bilateral")


def test_codes_may_be_read_once():
    "Codes are an Iterable: those of an iterator have their zones too."
    codes = [("Nodule", "left lower lobe", "left"), ("Scar", "apex", "right")]
    said = {"a": ["A left basal nodule.", "Right apical scar."]}
    assert compare_targets(said, {"a": iter(codes)}).equals(compare_targets(said, {"a": codes})) and compare_targets(said, {"a": iter(codes)}).loc["zone"].loc["all", "both"] == 2


def test_the_halves_do_not_move(benchmark):
    assert [benchmark.half(f"CXR{number}") for number in range(1, 9)] == ["develop", "develop", "report", "report", "report", "report", "develop", "report"]
