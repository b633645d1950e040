"""The studies' parts with a randomly initialised network and planted trainings: what is asked of whom, and what is written."""
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from medvis.data.pairs import Pairs, collate
from medvis.data.phantom import Phantom
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.evaluate import phantom_pointing, phantom_targets
from medvis.methods import METHODS
from medvis.methods.settings import methods_with_text
from medvis.studies import demo, grounding, mgca_figures, show
from medvis.train import TrainConfig
from medvis.studies.config import DemoConfig, GroundingConfig
from medvis.studies.runner import study_rows, run_study


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("studies") / "pack", studies=120, size=64, seed=0, workers=0, progress=False))


@pytest.fixture(scope="module")
def method(data):
    return grounding._make_subject("random-init", data, 3).eval()


@pytest.fixture(scope="module")
def pairs(method, data):
    return show.held_out_pairs(method, data)


def weights(method) -> torch.Tensor:
    return torch.cat([one.detach().flatten()[:50] for one in method.parameters()])


def test_a_subject_is_its_method_preset_and_seed(data, method):
    assert type(method) is next(iter(METHODS.values())) and torch.equal(weights(method), weights(grounding._make_subject("random-init", data, 3)))
    assert not torch.equal(weights(method), weights(grounding._make_subject("random-init", data, 4)))
    assert type(grounding._make_subject("lovt", data, 0)) is METHODS["lovt"]
    with pytest.raises(ValueError, match="preset"):
        grounding._make_subject("lovt:none", data, 0)


def test_test_studies_are_held_out_with_whole_reports(method, data, pairs):
    rows = [row for row, _ in pairs.items]
    assert set(data.studies["split"].iloc[rows]) == {"test"} and not pairs.train
    assert [len(pairs.report(item).sentences) for item in range(3)] == [len(data.studies["sentences"].iloc[row]) for row in rows[:3]]


def test_pointing_is_compared_with_that_on_another_patient_s_image(method, pairs):
    rows = grounding._pointing_rows(method, pairs, method)
    own, other = phantom_pointing(method, pairs), phantom_pointing(grounding._OtherImages(method, pairs), pairs)
    for grain in ("word", "sentence"):
        part = rows[rows.grain == grain].set_index("finding")
        assert part.hit_rate.equals(own.by_finding(grain=grain).set_index("finding").hit_rate)
        assert part.untrained.equals(part.hit_rate.rename("untrained"))
        assert part.other_image.tolist() == other.by_finding(grain=grain).set_index("finding").hit_rate.tolist()
    assert rows.index.tolist() == list(range(len(rows)))
    patients, studies = pairs.pack.studies["patient_id"].tolist(), [row for row, _ in pairs.items]
    assert any(patients[one] == patients[two] for one, two in zip(studies, studies[1:])), "neighbours of one patient, or nothing is tested"
    others = grounding._OtherImages(method, pairs)
    assert all(patients[study] != patients[studies[others.others[study]]] for study in studies)
    batch = collate([pairs[item] for item in range(3)])
    images = torch.stack([pairs[others.others[study]].image for study in studies[:3]])
    with torch.no_grad():
        torch.testing.assert_close(others.correspondence(batch).sentences, method.correspondence(replace(batch, image=images)).sentences)


def test_examples_are_the_maps_of_the_words(method, pairs):
    maps, chosen = grounding._example_maps(method, pairs, 3), show.pick_targets(phantom_targets(pairs), 3)
    assert maps.finding.tolist() == [target.finding for targets in chosen.values() for target in targets if target.word is not None and target.word < 512][: len(maps)]
    item, (first, *_) = next(iter(chosen.items()))
    with torch.no_grad():
        found = method.correspondence(collate([pairs[item]]))
    assert np.allclose(maps.scores[0], found.words[0, :, first.word], atol=1e-5) and maps.side[0] == found.grid[0] and maps.text[0] == first.text
    assert maps.study[0] == pairs.pack.studies["study_id"].iloc[pairs.items[item][0]]


def test_losses_are_means_over_whole_batches(method, data):
    pairs = Pairs(data, method.tokenizer, method.preprocessing, method.sampling, "test")
    rows = grounding._loss_rows(method, pairs, batch_size=4).set_index("part")
    with torch.no_grad():
        batches = [collate([pairs[item] for item in range(start, start + 4)]) for start in range(0, len(pairs) - 3, 4)]
        exchanged = grounding._OtherImages(method, pairs).exchanged
        own, other = ([method(change(batch)).parts for batch in batches] for change in (lambda batch: batch, exchanged))
    for part in rows.index:
        assert rows.own[part] == pytest.approx(np.mean([float(one[part]) for one in own]), rel=1e-4)
        assert rows.other_image[part] == pytest.approx(np.mean([float(one[part]) for one in other]), rel=1e-4)
    assert rows.index.tolist() == list(own[0]) and len(grounding._loss_rows(method, pairs, batch_size=len(pairs) + 9)) == len(rows)


def test_a_subject_is_trained_and_measured_once(data, tmp_path, monkeypatch):
    asked = []

    def probe(encoders, pack, fractions, seeds):
        asked.append((list(encoders), fractions, seeds))
        return pd.DataFrame({"encoder": ["trained", "trained", "random-init"], "finding": ["macro", "Edema", "macro"], "fraction": 0.1, "auroc": [0.7, 0.6, 0.5]})

    def fit(method, pack, config):
        asked.append((type(method).__name__, config.run.name, config.seed, config.progress))

    monkeypatch.setattr(grounding, "linear_probe", probe)
    monkeypatch.setattr(grounding, "fit", fit)
    monkeypatch.setattr(grounding, "prepare_phantom", lambda settings: asked.append((settings.out, settings.studies, settings.size, settings.seed, settings.progress)))
    shutil.copytree(data.path, tmp_path / "pack")
    config = GroundingConfig(out=tmp_path, subjects=("random-init", "convirt"), seeds=(5,), studies=120, progress=False)
    table = grounding.run_grounding(config)
    measured = [(["trained"], (0.01, 0.1, 1.0), (0, 1, 2))]
    taken_up = [("ConVIRT", "convirt-5", 5, False)]
    assert asked == [(tmp_path / "pack", 120, 64, 0, False), *measured, *taken_up * 2, *measured, *taken_up * 2], "for pointing it is trained, then taken up"
    assert set(table.index) == {"random-init", "convirt"} and table.auroc.tolist() == [0.7, 0.7] and table["random-init"].tolist() == [0.5, 0.5]
    probes = study_rows(tmp_path, "probe")
    assert set(probes) == {"variant", "seed", "encoder", "finding", "fraction", "auroc"} and set(probes.finding) == {"macro"} and set(probes.seed) == {5}
    assert set(study_rows(tmp_path, "maps").variant) == {"random-init", "convirt"} and "hit_rate" in study_rows(tmp_path, "pointing")
    assert set(study_rows(tmp_path, "loss")) == {"variant", "seed", "part", "own", "other_image"}
    count = len(asked)
    grounding.run_grounding(config)
    assert len(asked) == count, "done already"


def test_on_equal_footing_only_the_objective_differs(tmp_path, data, monkeypatch):
    "Every method, at whichever preset, gets the same encoder and the same of everything else that trains it; the settings that point best are used for all seeds."
    made = {subject: grounding._make_subject(subject, data, 0, "equal") for subject in methods_with_text()}
    assert {(method.config.image, type(method.image_encoder), method.image_encoder.region_dim) for method in made.values()} == {
        ("tiny_resnet_fine", type(made["clip"].image_encoder), 64)}
    settings = {name: {key: value for key, value in vars(TrainConfig.of(method, tmp_path)).items()} for name, method in made.items()}
    assert all(one == settings["clip"] for one in settings.values())
    assert (settings["clip"]["swap"], settings["clip"]["overflow"], settings["clip"]["weight_decay"], settings["clip"]["most_sentences"]) == (0, "cut", 0.05, 4)
    assert len(grounding._EQUAL_TUNING) == 4 and grounding._make_subject("lovt", data, 0).training_settings["swap"] == 0.4, "at its preset as it was"

    trained, points = [], {(0.001, "one"): 0.1, (0.001, "all"): 0.3, (0.004, "one"): 0.2, (0.004, "all"): 0.25}

    def fit(method, pack, config):
        trained.append((config.run.name, config.lr, config.sentences, config.seed))
        method.tried = config.lr, config.sentences

    class Pointing:
        def __init__(self, method, pairs):
            self.hit = points[method.tried]
            assert {split for split in data.studies["split"].iloc[[row for row, *_ in pairs.items]]} == {"validate"}

        def rate(self, grain):
            return SimpleNamespace(hit_rate=SimpleNamespace(value=self.hit))

    monkeypatch.setattr(grounding, "fit", fit)
    monkeypatch.setattr(grounding, "phantom_pointing", Pointing)
    shutil.copytree(data.path, tmp_path / "pack")
    config = GroundingConfig(out=tmp_path, subjects=("random-init", "clip"), seeds=(3, 4), footing="equal", progress=False)
    study = grounding.grounding_study(config)
    tried = run_study(replace(study.first, prepare=None), progress=False)
    assert trained == [(f"clip@{rate}-{sentences}-3", rate, sentences, 3) for rate, sentences in points] and len(set(tried.variant)) == 4
    assert {"subject", "lr", "sentences", "word", "sentence"} <= set(tried)
    best = grounding._best_settings(study.first.out, "clip")
    assert best == {"lr": 0.001, "sentences": "all"} and grounding._best_settings(study.first.out, "random-init") == {}
    assert grounding._best_settings(None, "clip") == {}, "nothing is tuned at the presets"
    grounding._trained_subject(study.variants["clip"], 4, data, best, tmp_path / "clip-4")
    assert trained[-1] == ("clip-4", 0.001, "all", 4)


def test_the_demo_goes_the_whole_way(tmp_path, data, monkeypatch, capsys):
    asked = {}
    gains = pd.DataFrame({"encoder": ["lovt"], "fraction": [1.0], "gain": [0.1], "low": [0.0], "high": [0.2]})
    table = pd.DataFrame({"encoder": ["lovt"], "finding": ["macro"], "fraction": [1.0], "auroc": [0.7], "low": [0.6], "high": [0.8], "n": [90]})
    monkeypatch.setattr(demo, "prepare_phantom", lambda config: asked.update(pack=(config.out, config.studies, config.seed, config.progress)) or data)

    def fit(method, pack, config):
        asked.update(fit=(type(method).__name__, str(config.run), config.seed, config.progress, config.workers, config.epochs))
        return SimpleNamespace(path=tmp_path / "run", method=method.eval, manifest={"processor": "Zen", "threads": 1})

    monkeypatch.setattr(demo, "fit", fit)
    monkeypatch.setattr(demo, "linear_probe", lambda encoders, pack, out, cache: asked.update(probe=(list(encoders), out, cache)) or table)
    monkeypatch.setattr(demo, "paired_gain", lambda predictions: gains)
    monkeypatch.setattr(demo.pd, "read_parquet", lambda path: asked.update(read=path))
    monkeypatch.setattr(demo, "show_run", lambda run, pack, pointing, command: asked.update(shown=command) or tmp_path / "page.html")
    config = DemoConfig(out=tmp_path, method="lovt", studies=120, epochs=2, seed=7, progress=False)
    assert demo.run_demo(config) == tmp_path / "page.html"
    assert asked == {"pack": (tmp_path / "pack", 120, 7, False), "fit": ("LoVT", str(tmp_path / "run"), 7, False, 1, 2), "shown": demo._demo_command(config),
                     "probe": (["lovt"], tmp_path / "run" / "probe", tmp_path / "features"), "read": tmp_path / "run" / "probe" / "predictions.parquet"}
    said = capsys.readouterr().out
    assert "0.700 (0.600 to 0.800)" in said and "+0.100 (+0.000 to +0.200)" in said and "Zen" in said and "(0.0 minutes)" in said


def test_single_findings_and_vectors(method):
    phantom = Phantom(64, 2)
    found = mgca_figures._single_findings(phantom, 4, start=50)
    assert [index for index, _ in found] == [index for index in range(50, found[-1][0] + 1) if len(phantom.scene(index).findings) == 1]
    assert [name for _, name in found] == [phantom.scene(index).findings[0].name for index, _ in found] and len(found) == 4
