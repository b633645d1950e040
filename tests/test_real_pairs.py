"""The study of real pairs with planted trainings: who is run in which order, what is equal, what is written, and that no text of a report is."""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from medvis.data.pack import Pack
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders.frozen import read_view
from medvis.encoders.image import image_encoder
from medvis.encoders.tower import FrozenEncoder
from medvis.methods.settings import SETTINGS, idle_settings, methods_with_text
from medvis.studies import real_pairs
from medvis.studies.config import RealPairsConfig
from medvis.studies.real_pairs import _Job, _KeptTower, _Study
from medvis.train import TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("real_pairs") / "pack", studies=90, size=64, seed=0, workers=0, progress=False))


@pytest.fixture
def config(tmp_path, data):
    return RealPairsConfig(
        data=data.path, boxes=data.path, boxes_split="test", runs=tmp_path / "runs", out=tmp_path / "out", preset="tiny", subjects=("clip",), seeds=(3, 4),
        epochs=1, resamples=10, progress=False)


def test_every_subject_is_measured_once_before_the_next_seed(config):
    config = replace(config, subjects=("clip", "mixture-mi:tiny", "imagenet"), pairs=(30,), phantom=Path("p"))
    assert [job.name for job in real_pairs._jobs(config) if job.seed == 3] == [
        "clip-3", "random-init-clip-3", "mixture-mi-tiny-3", "imagenet-3",
        "clip-3-30", "clip-3-30-phantom", "clip-3-phantom", "mixture-mi-tiny-3-30", "mixture-mi-tiny-3-30-phantom", "mixture-mi-tiny-3-phantom"]
    seeds = [job.seed for job in real_pairs._jobs(config)]
    assert seeds == sorted(seeds) and set(seeds) == {3, 4}
    assert _Job("random-init:clip", 0).method == "clip" and _Job("mixture-mi:laptop-no-prior", 0).method == "mixture-mi"
    with pytest.raises(ValueError, match="mcga"):
        replace(config, subjects=("mcga",))


def test_only_the_objective_differs(tmp_path, data, monkeypatch):
    made = {name: real_pairs._make_method(_Job(name, 0), data, "tiny", 6) for name in methods_with_text()}
    settings = [vars(TrainConfig.of(method, tmp_path)) for method in made.values()]
    assert all(one == settings[0] for one in settings)
    assert (settings[0]["batch_size"], settings[0]["mirror"], settings[0]["augment"], settings[0]["swap"], settings[0]["epochs"]) == (64, True, "none", 0, 6)
    assert {method.config.negatives for method in made.values() if "negatives" not in idle_settings(method.Config)} == {"other-patient"}
    asked = []
    monkeypatch.setattr(real_pairs, "create_method", lambda *args, **changes: asked.append(args[1]) or SimpleNamespace(training_settings={"mirror": False}))
    assert real_pairs._make_method(_Job("mixture-mi:laptop-no-mirror", 0), data, "laptop", 6).training_settings["mirror"] is False, "an ablation keeps what it leaves out"
    assert asked == ["laptop-no-mirror"]


def test_laptop_stands_on_one_network_whatever_the_method():
    "Read from the settings: a method that names no weights would stand on noise, and every seed on another."
    towers, shared = set(), ("image", "image_weights", "text", "text_weights", "freeze_text")
    for name in methods_with_text():
        kind, presets = SETTINGS[name]
        for preset in presets:
            if preset.startswith("laptop"):
                config = kind(**presets[preset][0])
                towers.add(tuple(getattr(config, field) for field in shared))
    assert towers == {("efficientnet_lite0_frozen", "imagenet", "minilm", True, "all")}


def test_results_of_other_settings_are_refused(config, trained, monkeypatch):
    real_pairs.run_real_pairs(config)
    with monkeypatch.context() as patched:
        patched.setitem(real_pairs._TRAINING, "weight_decay", 0.5)
        with pytest.raises(ValueError, match="clip-3 is of other settings of clip: delete it"):
            real_pairs.run_real_pairs(config)
        for folder in (config.out / "results").iterdir():
            (folder / "results.csv").unlink()
        with pytest.raises(ValueError, match="clip.csv is of other settings of clip: delete it"):
            real_pairs.run_real_pairs(config)
    real_pairs.run_real_pairs(config)


def test_a_control_reads_texts_as_the_tuned_method(config, trained, monkeypatch):
    seen = []
    monkeypatch.setattr(real_pairs, "_measure", lambda method, study: seen.append(getattr(method, "training_settings", None)) or real_pairs._rows(
        "side", pd.DataFrame({"value": [0.5]}), of="all", measure="hit", control="own image"))
    real_pairs.run_real_pairs(replace(config, seeds=(3,)))
    assert seen[0] is None and seen[1]["sentences"] == "all" and seen[1]["lr"] == 0.001


def test_fewer_pairs_are_part_of_more_and_take_as_many_steps(data):
    parts = [real_pairs._first_studies(data, pairs) for pairs in (10, 40)]
    few, more = ({*part.studies.query("split == 'train'").study_id} for part in parts)
    assert len(few) == 10 and len(more) == 40 and few < more
    assert all(part.studies.query("split != 'train' and split != 'left out'").equals(data.studies.query("split != 'train'")) for part in parts)
    assert real_pairs._first_studies(data, None) is data and len(real_pairs._with_reports(Pack(data.path))) > 40, "the Pack itself is as it was"
    big = SimpleNamespace(studies=pd.concat([data.studies] * 10, ignore_index=True))
    assert real_pairs._equal_epochs(6, big, parts[0]) == 6 * real_pairs._steps(big, 64)


def test_a_tower_is_asked_once_for_an_image(data):
    encoder = FrozenEncoder(image_encoder("tiny_resnet", layer="layer4", size=64), width=8).eval()
    images = torch.stack([read_view(data, encoder.preprocessing, row, view, "mirror") for row, view in ((0, 0), (5, 1), (7, 0))])
    with torch.no_grad():
        own = encoder(images)
        encoder.tower = kept = _KeptTower(encoder.tower, [data], room=1)
        calls = []
        kept.tower.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(encoder(images).regions, own.regions, atol=2e-3, rtol=1e-2)
        assert not calls, "all of them are images of the Pack, one mirrored"
        changed = images.clone()
        changed[1, :, :20] = 0
        first = encoder(changed).regions
        assert torch.equal(encoder(changed).regions, first) and len(calls) == 1 and not torch.equal(first[1], encoder(images).regions[1])
        encoder(images + 1)
        assert len(kept.others) == 1, "no more than there is room for"


def planted(sign: float, data: Pack):
    "A method whose score is higher, or lower, where the text has been seen as it stands in the reports."
    said = {sentence.lower() for sentences in data.studies["sentences"] for sentence in sentences}
    method = real_pairs._make_method(_Job("clip", 0), data, "tiny", 1).eval()
    method.embed_image = lambda image: torch.zeros(len(image), 1)
    method.embed_text = lambda batch: torch.tensor([[float(sentences[0].lower() in said)] for sentences in batch.sentences])
    method.similarity = lambda image, text: sign * text.T.expand(len(image), -1)
    return method


def test_twins_are_the_test_sentences_of_one_side(data, config):
    study = _Study(config)
    found = real_pairs._one_sided(study)
    test = {sentence: patient for sentences, patient in data.studies.query("split == 'test'")[["sentences", "patient_id"]].itertuples(index=False) for sentence in sentences}
    assert found and all(sentence in test and twin != sentence and {"left", "right"} & {*twin.lower().replace(".", "").split()} for sentence, twin, *_ in found)
    rows = [real_pairs._twin_rows(planted(sign, data), study, batch_size=3) for sign in (1, 0)]
    said = {sentence.lower() for sentences in data.studies["sentences"] for sentence in sentences}
    expected = np.mean([(1 + (twin.lower() not in said)) / 2 for _, twin, *_ in found])
    assert rows[0].value.item() == pytest.approx(expected) and expected > 0.5 and rows[1].value.item() == 0.5
    assert rows[0].n.item() == len(found) and rows[0].patients.item() == len({patient for *_, patient in found})


@pytest.fixture
def trained(monkeypatch, data):
    "Trainings that are only noted, and a measure of one row: the seed and settings of the method."
    log = []

    def fit(method, pack, settings):
        log.append((settings.run.name, settings.lr, settings.sentences, settings.seed, settings.epochs, len(real_pairs._with_reports(pack))))
        return SimpleNamespace(path=settings.run)

    def load(run):
        return SimpleNamespace(run=run.name, config=SimpleNamespace(dim=1))

    def measure(method, study):
        return real_pairs._rows("side", pd.DataFrame({"value": [0.5]}), of="all", measure="hit", control="own image")

    monkeypatch.setattr(real_pairs, "fit", fit)
    monkeypatch.setattr(real_pairs, "load_method", load)
    monkeypatch.setattr(real_pairs, "_measure", measure)
    monkeypatch.setattr(real_pairs, "_validation_rank", lambda method, study: {"0.001-one": 20.0, "0.001-all": 9.0, "0.003-one": 9.0, "0.003-all": 30.0}[method.run.split("-", 2)[2]])
    return log


def test_the_best_try_is_used_for_all_seeds_and_nothing_is_done_twice(config, data, trained, capsys, monkeypatch):
    everything = len(real_pairs._with_reports(data))
    table = real_pairs.run_real_pairs(config)
    tries = [(f"clip-3-{rate}-{sentences}", rate, sentences, 3, 1, everything) for rate in (0.001, 0.003) for sentences in ("one", "all")]
    assert trained == [*tries, ("clip-3-0.001-all", 0.001, "all", 3, 1, everything), ("clip-4-0.001-all", 0.001, "all", 4, 1, everything)], "ties: the first"
    assert table[table.family == "side"].groupby("subject").seed.apply(list).to_dict() == {"clip": [3, 4], "random-init:clip": [3, 4]}
    assert "4 of 4 runs are measured" in capsys.readouterr().out
    assert real_pairs.run_real_pairs(replace(config, runs=config.runs / "elsewhere")).equals(table) and len(trained) == 6, "results are enough"
    create, starts = real_pairs.create_method, []
    monkeypatch.setattr(real_pairs, "create_method", lambda name, preset, pack, seed, init, **changes: starts.append(init) or create(name, preset, pack, seed, **changes))
    real_pairs.run_real_pairs(replace(config, seeds=(3,), pairs=(30,), phantom=config.data))
    phantom = ("clip-3-0.001-all-on-phantom", 0.001, "all", 3, 1, everything)
    assert trained[6:] == [
        ("clip-3-30-0.001-all", 0.001, "all", 3, 1, 30), phantom, ("clip-3-30-phantom-0.001-all", 0.001, "all", 3, 1, 30),
        phantom, ("clip-3-phantom-0.001-all", 0.001, "all", 3, 1, everything), phantom]
    assert [start and start.name for start in starts if start] == [phantom[0]] * 2


def test_a_deadline_stops_between_pieces(config, trained):
    late = replace(config, deadline_minutes=0)
    assert real_pairs.run_real_pairs(late).empty, "the first try, and no results yet"
    assert len(trained) == 1 and len(pd.read_csv(config.out / "tuning" / "clip.csv")) == 1
    for _ in range(4):
        real_pairs._check_study(late)
        next(done for job in real_pairs._jobs(late) for done in real_pairs._run_job(job, _Study(late)))
    assert len(trained) == 5 and (config.out / "results" / "clip-3" / "results.csv").exists(), "three more tries, one run"


def test_a_folder_holds_one_study(config, trained, data, tmp_path):
    real_pairs._check_study(config)
    real_pairs._check_study(replace(config, phantom=config.data))
    for change in ({"epochs": 2}, {"preset": "laptop"}, {"resamples": 11}, {"boxes_split": "all"}):
        with pytest.raises(ValueError, match=f"another {next(iter(change))}; choose another folder with --out"):
            real_pairs._check_study(replace(config, **change))
    other = prepare_phantom(PhantomConfig(out=tmp_path / "other", studies=40, size=64, seed=1, workers=0, progress=False))
    with pytest.raises(ValueError, match="another data and boxes"):
        real_pairs._check_study(replace(config, data=other.path, boxes=other.path))


@pytest.mark.trains
def test_results_hold_numbers_and_no_text(config, data, capfd):
    "Trained, measured in full and written: no sentence of the Pack is in any file, log or output, and the tables can be made of it."
    results = real_pairs.run_real_pairs(replace(config, seeds=(3,)))
    assert set(results.family) == {*real_pairs._parts(real_pairs._Study(config)), "cost"} and len(pd.read_csv(config.out / "tuning" / "clip.csv")) == 4
    sentences = {sentence for sentences in data.studies["sentences"] for sentence in sentences}
    files = [path for folder in (config.out, config.runs) for path in folder.rglob("*") if path.is_file() and path.suffix in (".csv", ".json", ".jsonl", ".seconds")]
    texts = [*(path.read_text() for path in files), *capfd.readouterr()]
    assert {path.suffix for path in files} == {".csv", ".json", ".jsonl", ".seconds"} and all(sentence not in text for sentence in sentences for text in texts)
    assert {path.suffix for path in config.out.rglob("*") if path.is_file()} == {".csv", ".json"}, "no pictures, no weights"
    table, verdicts = real_pairs.headline_table(results), real_pairs.verdict_table(results)
    assert list(table.index) == ["clip"] and {"side", "pointing", "zero-shot AUROC", "median rank"} <= set(verdicts.index)
    assert real_pairs._total_seconds(config.out) > results[results.family == "cost"].value.sum()
