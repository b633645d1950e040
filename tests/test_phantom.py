"""The phantom's promises: a study is a function of (size, seed, index), its masks tell the truth about its pixels, its words about its masks."""
import hashlib
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvis.data.phantom import FINDINGS, Phantom, PhantomStudy, Scene, patient_number, render, tight_box
from medvis.data.phantom.anatomy import Patient, Pose, sample_patient, sample_pose, stream
from medvis.data.phantom.findings import DEVICES, Planted, place, sample_findings, sample_state
from medvis.data.phantom.report import _DOUBT, read_labels, write_report

LUNGS = {"Consolidation", "Edema", "Lung Opacity", "Pneumonia", "Atelectasis", "Nodule"}
INDICES = st.integers(0, 10**9)


def fingerprint(study: PhantomStudy) -> str:
    "A hash of everything a study holds."
    digest = hashlib.sha256(study.image.tobytes() + study.report.encode() + study.patient_id.encode())
    for finding in study.findings:
        digest.update(finding.mask.tobytes() + repr((finding.name, finding.side, finding.zone, finding.box)).encode())
    digest.update(repr((study.sentences, study.labels, study.severities)).encode())
    return digest.hexdigest()


def test_same_study_in_another_process_and_another_order():
    wanted = (12, 3, 10**12, 4)
    script = ("import sys; sys.path.insert(0, 'tests'); from test_phantom import *; "
              f"print([fingerprint(Phantom(64, 5)[i]) for i in reversed({wanted})])")
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert there.strip() == repr([fingerprint(Phantom(64, 5)[i]) for i in wanted][::-1])


@settings(max_examples=20, deadline=None)
@given(index=INDICES, seed=st.integers(0, 2**40))
def test_a_study_is_a_function_of_seed_and_index(index, seed):
    assert fingerprint(Phantom(64, seed)[index]) == fingerprint(Phantom(64, seed)[index])
    assert fingerprint(Phantom(64, seed)[index]) != fingerprint(Phantom(64, seed + 1)[index])
    assert not np.array_equal(Phantom(64, seed)[index].image, Phantom(64, seed)[index + 1].image)


@pytest.mark.parametrize("index", range(0, 40, 4))
def test_the_scene_does_not_depend_on_the_size(index):
    small, large = Phantom(64)[index], Phantom(256)[index]
    assert small.report == large.report and small.sentences == large.sentences and small.view == large.view
    assert [(f.name, f.side, f.zone, f.severity) for f in small.findings] == [(f.name, f.side, f.zone, f.severity) for f in large.findings]
    shrunk = large.image.reshape(64, 4, 64, 4).mean((1, 3))
    both = np.corrcoef(shrunk[4:-4, 4:-4].ravel(), small.image[4:-4, 4:-4].ravel())[0, 1]
    assert both > 0.95, "the large picture, shrunk, is the small one"


@pytest.mark.parametrize("size", (64, 96, 101, 224, 512))
def test_masks_and_boxes_at_every_size(size):
    phantom, seen = Phantom(size, 1), set()
    for index in range(40 if size < 200 else 6):
        study = phantom[index]
        assert study.image.shape == (size, size) and study.image.dtype == np.uint8
        for f in study.findings:
            seen.add(f.name)
            assert f.mask.shape == (size, size) and f.mask.dtype == bool and f.mask.any()
            x0, y0, x1, y1 = f.box
            assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
            inside = f.mask[y0:y1, x0:x1]
            assert inside.sum() == f.mask.sum(), "nothing outside of the box"
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any(), "the box is tight"
            assert (f.name in FINDINGS and f.side in ("left", "right", "both", "none")
                    and f.zone in ("upper", "middle", "lower", "none") and f.severity in (1, 2, 3))
    assert seen


def test_a_nodule_at_the_rim_of_the_picture_has_a_mask():
    scene = Scene(Patient(), Pose(dx=-3.0), (Planted("Nodule", "right"),))
    assert render(scene, 64)[1][0].box == tight_box(render(scene, 64)[1][0].mask)


def varieties() -> list[tuple[str, str]]:
    "Every finding in each of its varieties."
    kinds = {"Support Devices": sorted({kind for kinds in DEVICES.values() for kind in kinds}), "Atelectasis": ["plate", "collapse"],
             "Foreign Object": ["button", "coin", "clip", "necklace", "bullet"]}
    return [(name, kind) for name in FINDINGS for kind in kinds.get(name, [""])]


@pytest.mark.parametrize("size", (64, 256))
@pytest.mark.parametrize("name, kind", varieties())
def test_findings_show_where_their_masks_say(name, kind, size):
    "The same exposure with and without the finding differs inside of the mask, hardly outside."
    inside, outside = [], []
    for number in range(12 if size == 64 else 4):
        rng = stream(99, 1, number)
        spec = place(rng, name, "", set())
        if kind:
            spec = replace(spec, kind=kind)
        if name == "Support Devices":
            spec = replace(spec, side="left" if number % 2 else "right", zone="lower")
        if name == "Foreign Object":
            spec = replace(spec, side="none", zone="upper") if kind == "necklace" else replace(spec, side="left")
        pose = replace(sample_pose(rng, number % 2 == 0), border=(0.0,) * 4, marker="")
        scene = Scene(sample_patient(rng), pose, (spec,))
        picture, (found,) = render(scene, size)
        change = np.abs(picture.astype(float) - render(replace(scene, findings=()), size)[0])
        inside.append(change[found.mask].mean())
        outside.append(change[~found.mask].mean())
    assert np.median(inside) > 8 and min(inside) > 2.5 and np.median(np.array(inside) / np.array(outside).clip(0.01)) > 4, (inside, outside)


@pytest.mark.parametrize("side, first", (("left", False), ("right", True)))
def test_the_patients_right_is_on_the_left_of_the_picture(side, first):
    for name in ("Consolidation", "Pleural Effusion", "Pneumothorax", "Nodule", "Atelectasis", "Pneumonia", "Lung Opacity"):
        found = render(Scene(findings=(Planted(name, side, "lower", kind="plate" if name == "Atelectasis" else ""),)), 128)[1][0]
        assert found.mask[:, :64].any() == first and found.mask[:, 64:].any() != first, name


@pytest.mark.parametrize("name", ("Consolidation", "Pneumonia", "Lung Opacity", "Nodule"))
def test_zones_go_downwards(name):
    def height(zone: str, down: float) -> float:
        found = render(Scene(findings=(Planted(name, "right", zone, down=down),)), 128)[1][0]
        return np.argwhere(found.mask)[:, 0].mean()
    assert height("upper", 0.22) < height("middle", 0.52) < height("lower", 0.80)


@pytest.mark.parametrize("name", ("Edema", "Pleural Effusion", "Pneumothorax", "Cardiomegaly", "Nodule"))
def test_severity_grows_in_the_picture(name):
    plain = render(Scene(), 128)[0].astype(float)
    amounts = [np.abs(render(Scene(findings=(Planted(name, {"Edema": "both", "Cardiomegaly": "none"}.get(name, "left"), severity=s),)), 128)[0] - plain).sum()
               for s in (1, 2, 3)]
    assert amounts[0] < amounts[1] < amounts[2]


# Reports. They need no pictures, so many can be read.

def written(number: int, seed: int = 0):
    "The findings, report and sentences of a random patient."
    found = sample_findings(stream(seed, 1, number), sample_state(stream(seed, 2, number)))
    view = "AP" if number % 2 else "PA"
    return found, *write_report(stream(seed, 3, number), found, view, number % 3 == 0)


@settings(max_examples=150, deadline=None)
@given(number=INDICES)
def test_report_layout_and_sentences(number):
    found, report, sentences = written(number)
    lines = report.split("\n")
    assert lines[0] == " " * 33 + "FINAL REPORT" and lines[-1] == "" and "" not in lines[:-1], "blank lines hold one space"
    assert all(len(line) <= 79 and line.startswith(" ") for line in lines[:-1])
    headers = re.findall(r"\n ([A-Z ()/,-]+):\s", report)
    assert headers[:2] == ["EXAMINATION", "INDICATION"] and "COMPARISON" in headers and {"FINDINGS", "IMPRESSION"} & set(headers)
    assert [h.lower() for h in headers if h in ("FINDINGS", "IMPRESSION")] == list(dict.fromkeys(s.section for s in sentences))
    flat = " ".join(report.split())
    at = 0
    for sentence in sentences:
        at = flat.index(sentence.text, at) + len(sentence.text)
        assert sentence.text[0].isupper() and sentence.text.endswith(".") and not re.search(r"[\[\]<>{}|@]|  | \.", sentence.text)


@settings(max_examples=150, deadline=None)
@given(number=INDICES)
def test_word_spans(number):
    found, _, sentences = written(number)
    for s in sentences:
        assert [(a, b) for a, b, _ in s.words] == [m.span() for m in re.finditer(r"\w+", s.text) if m[0].strip("_")]
        pointed = {index for _, _, index in s.words} - {None}
        assert pointed <= set(range(len(found))) and (s.finding in pointed if s.finding is not None else not pointed)
        for a, b, index in s.words:
            word = s.text[a:b].lower()
            if word in ("left", "right") and index is not None and found[index].name != "Support Devices":
                assert found[index].side == word, s.text
            if word in ("upper", "apical", "apex", "lower", "base", "basilar", "basal") and index is not None:
                assert found[index].zone == ("upper" if word in ("upper", "apical", "apex") else "lower"), s.text
            if word in ("severe", "large", "marked") and index is not None:
                assert found[index].severity == 3, s.text


@settings(max_examples=150, deadline=None)
@given(number=INDICES)
def test_labels_follow_the_words_and_never_deny_the_truth(number):
    found, _, sentences = written(number)
    names, labels, states = {f.name for f in found}, read_labels(sentences), [state for s in sentences for state in s.states]
    for name in FINDINGS:
        said = {state for n, state in states if n == name}
        assert labels[name] == (1 if 1 in said else -1 if -1 in said else 0 if 0 in said else None)
        if labels[name] == 0:
            assert name not in names
        if labels[name] == 1:
            assert name in names or (name == "Lung Opacity" and names & LUNGS)
    for s in sentences:
        negated = re.match(r"(There is |There are )?(no|neither) |no ", s.text, re.I) and s.states
        if negated:
            assert {state for _, state in s.states} == {0} and s.finding is None and all(w[2] is None for w in s.words), s.text
        if re.search(r"\b(possible|may|cannot be excluded|could|suspected|possibly)\b", s.text, re.I) and s.states:
            assert -1 in {state for _, state in s.states}, s.text


def test_hedges_are_minus_one_and_some_findings_go_unmentioned():
    hedged, omitted, total, doubts = set(), 0, 0, 0
    for number in range(1500):
        found, _, sentences = written(number, seed=7)
        labels = read_labels(sentences)
        spoken = {index for s in sentences for _, _, index in s.words} - {None}
        total, omitted = total + len(found), omitted + len(found) - len(spoken)
        hedged |= {name for name, label in labels.items() if label == -1}
        doubts += any(label == -1 and name not in {f.name for f in found} for name, label in labels.items())
    assert hedged == set(FINDINGS) - {"Support Devices"}
    assert 0.03 < omitted / total < 0.15 and 0.01 < doubts / 1500 < 0.12 and len(_DOUBT) >= 5


def test_reports_are_varied():
    reports = [written(number)[1] for number in range(400)]
    texts = {s.text for number in range(400) for s in written(number)[2]}
    assert len(set(reports)) == 400 and len(texts) > 700
    only = [("FINDINGS:" in r, "IMPRESSION:" in r) for r in reports]
    assert set(only) == {(True, True), (True, False), (False, True)}
    assert any(" 1. " in r for r in reports) and any("lateral view" in r for r in reports) and any("ompared to" in r for r in reports)


# Patients

@settings(max_examples=200, deadline=None)
@given(index=INDICES, seed=st.integers(0, 1000))
def test_patients_have_one_to_four_neighbouring_studies(index, seed):
    first = patient_number(seed, index)
    assert first <= index < first + 4 and first // 10 == index // 10 and patient_number(seed, first) == first
    phantom = Phantom(64, seed)
    assert phantom.scene(index).patient == phantom.scene(first).patient
    assert phantom[index].patient_id == f"patient-{first:07d}"


def test_the_body_differs_between_patients_and_the_pose_between_studies():
    phantom = Phantom()
    scenes = [phantom.scene(index) for index in range(200)]
    assert len({s.patient for s in scenes}) == len({patient_number(0, index) for index in range(200)}) < 150
    assert len({s.pose for s in scenes}) == 200


def test_prevalence():
    shown = [{f.name for f in Phantom(seed=3).scene(index).findings} for index in range(3000)]
    rate = {name: np.mean([name in names for names in shown]) for name in FINDINGS}
    assert 0.33 < np.mean([not names for names in shown]) < 0.45 and min(rate.values()) > 0.03, rate
    assert min(rate[n] for n in ("Support Devices", "Edema", "Lung Opacity")) > max(rate[n] for n in ("Nodule", "Pneumothorax", "Foreign Object"))
    assert max(len(Phantom(seed=3).scene(index).findings) for index in range(3000)) == 5


@pytest.mark.parametrize("make, error", (
    (lambda: Phantom(32), ValueError), (lambda: Phantom(1024), ValueError), (lambda: Phantom(seed=-1), ValueError), (lambda: Phantom()[-1], IndexError),
    (lambda: Phantom()[0.5], TypeError), (lambda: Phantom(size=64.5), TypeError)))
def test_bad_input(make, error):
    with pytest.raises(error, match="size|seed|study|integer"):
        make()
