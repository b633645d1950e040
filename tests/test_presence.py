"""Phrases from labels on simulated copies of the public sets: planted players who see, boast, or see nothing, and numbers written differently."""
from copy import copy

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score, recall_score, roc_auc_score
from torch import nn

from medvis.cli.commands import main
from medvis.data.label_phrases import phrases_from_labels
from medvis.data.pairs import tokenise
from medvis.data.phrases import Phrase, find_phrases, phrase_region
from medvis.data.preprocessing import Preprocessing
from medvis.data.sampling import Sampling
from medvis.data.sets.registry import DATASETS, prepare_data, prepare_options, simulate
from medvis.data.source import BuildConfig
from medvis.evaluate import presence
from medvis.evaluate.ground import ground_phrases
from medvis.methods.method import Correspondence, phantom_tokenizer

SETS = {"rsna": "boxes", "siim": "masks", "nih": "boxes", "object-cxr": "masks", "covid-rural": "masks"}


class Player(nn.Module):
    "Knows what is on every image of a Pack, by its pixels, and answers by `play(region of 8 x 8)`."

    def __init__(self, pack, phrases, play):
        super().__init__()
        self.tokenizer, self.weight, self.sampling = phantom_tokenizer(30), nn.Parameter(torch.zeros(1)), Sampling()
        self.preprocessing = Preprocessing(size=64, crop=1.0, channels=1)
        prepare, self.maps = self.preprocessing.transform(), {}
        for number, (phrase, image) in enumerate(zip(phrases, find_phrases(phrases, pack))):
            seen = phrase_region(phrase, pack, image).reshape(8, 8, 8, 8).mean((1, 3)).ravel()
            pixels = prepare(torch.from_numpy(pack.image(int(image)))[None]).numpy().tobytes()
            self.maps[pixels, tuple(self.ids(phrase.text))] = torch.from_numpy(play(seen, number)).float()

    def ids(self, text):
        return tokenise([text], self.tokenizer, self.sampling.max_tokens, self.sampling.punctuation, self.sampling.overflow).input_ids

    def correspondence(self, batch):
        texts = [tuple(ids[held > 0].tolist()) for ids, held in zip(batch.input_ids, batch.attention_mask)]
        scores = torch.stack([self.maps.get((image.numpy().tobytes(), text), torch.zeros(64)) for image, text in zip(batch.image, texts)])
        valid = torch.ones(len(batch), 1, dtype=torch.bool)
        return Correspondence(scores[:, :, None], scores[:, :, None], valid, valid, (8, 8))


@pytest.fixture(scope="module", params=list(SETS))
def pack(request, tmp_path_factory):
    name, root = request.param, tmp_path_factory.mktemp("sets")
    simulate(name, root / "raw", 24, 64)
    read, build = DATASETS[name].config(root=root / "raw"), BuildConfig(out=root / "pack", size=64, progress=False)
    return name, prepare_data(prepare_options(name)(read=read, build=build))


def test_who_sees_and_who_boasts(pack):
    name, pack = pack
    phrases = phrases_from_labels(pack, split=None, without_boxes=True)
    shown = [phrase for phrase in phrases if phrase.boxes or phrase.masks]
    assert {SETS[name]} == {"masks" if phrase.masks else "boxes" for phrase in shown} and len(shown) < len(phrases)
    seer = Player(pack, phrases, lambda seen, _: seen)
    boaster = Player(pack, phrases, lambda seen, _: seen / seen.max() if seen.any() else np.eye(64)[27])
    _, table = presence.ground_labels(seer, pack, split=None, threshold=0.01, resamples=20)
    line = table.set_index(["finding", "measure"])["value"]
    for measure in ("auroc", "auroc_mean", "sensitivity", "specificity", "f1"):
        assert line["all", measure] == 1, measure
    rows = ground_phrases(boaster, pack, shown)
    assert rows["hit"].mean() > 0.75, "it points"
    _, table = presence.ground_labels(boaster, pack, split=None, threshold=0.5, resamples=20)
    line = table.set_index(["finding", "measure"])["value"]
    assert line["all", "auroc"] == 0.5 and line["all", "specificity"] == 0 and line["all", "sensitivity"] == 1


def test_the_measures_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    rows = pd.DataFrame({"patient": draw.integers(0, 30, 300).astype(str), "finding": draw.choice(["a", "b"], 300), "shown": draw.random(300) < 0.3})
    rows["highest"] = draw.normal(rows["shown"] * 0.8, 1).round(1)      # with ties
    rows["mean"] = draw.normal(0, 1, 300)
    table = presence.presence_table(rows, 0.4, 200).set_index(["finding", "measure"])
    for name, own in [*rows.groupby("finding"), ("all", rows)]:
        said = own["highest"] > 0.4
        expected = {"auroc": roc_auc_score(own["shown"], own["highest"]), "auroc_mean": roc_auc_score(own["shown"], own["mean"]), "f1": f1_score(own["shown"], said),
                    "sensitivity": recall_score(own["shown"], said), "specificity": recall_score(~own["shown"], ~said)}
        for measure, value in expected.items():
            assert table.loc[(name, measure), "value"] == pytest.approx(value), (name, measure)
            assert table.loc[(name, measure), "low"] <= value <= table.loc[(name, measure), "high"]
    assert table.loc[("macro", "auroc"), "value"] == pytest.approx(table["value"].loc[(["a", "b"], "auroc")].mean())
    assert table.loc[("all", "auroc"), ["shown", "not_shown", "patients"]].tolist() == [rows["shown"].sum(), (~rows["shown"]).sum(), 30]


def test_a_threshold_is_of_validation_images_and_a_missing_side_is_no_number():
    draw = np.random.default_rng(1)
    rows = pd.DataFrame({"patient": np.arange(400).astype(str), "finding": "a", "shown": np.arange(400) % 4 == 0})
    rows["mean"] = rows["highest"] = np.where(rows["shown"], 2.0, 0.0) + draw.uniform(0, 1, 400)
    rules = presence.presence_rules(rows)
    assert 1 < rules.loc["a", "threshold"] < 2 and rules.loc["a", "share"] == 0.25 and rules.loc["all", "images"] == 400
    other = rows.assign(highest=rows["highest"] + 5, finding="a")          # heights of another set: its threshold does not do here
    line = presence.presence_table(other, rules, 20).set_index(["finding", "measure"])["value"]
    assert line["a", "auroc"] == 1 and line["a", "specificity"] == 0 and line["a", "brier_skill"] < -1
    line = presence.presence_table(rows, rules, 20).set_index(["finding", "measure"])["value"]
    assert line["a", "specificity"] == line["a", "f1"] == 1 and line["a", "brier_skill"] > 0.8
    alone = presence.presence_table(rows[rows["shown"]], rules, 20).set_index(["finding", "measure"])["value"]
    assert np.isnan(alone["a", "auroc"]) and np.isnan(alone["macro", "specificity"]) and alone["a", "sensitivity"] == 1


@pytest.fixture(scope="module")
def louder(tmp_path_factory):
    "A player whose maps of test images are five higher, and whose best threshold there is another one."
    root = tmp_path_factory.mktemp("louder")
    simulate("rsna", root / "raw", 90, 64)
    pack = prepare_data(prepare_options("rsna")(read=DATASETS["rsna"].config(root=root / "raw"), build=BuildConfig(out=root / "pack", size=64, progress=False)))
    phrases = phrases_from_labels(pack, split=None, without_boxes=True)
    splits = [phrase.split for phrase in phrases]
    assert {"validate", "test"} <= {phrase.split for phrase in phrases if phrase.boxes} & {phrase.split for phrase in phrases if not phrase.boxes}
    return pack, Player(pack, phrases, lambda seen, number: seen / max(seen.max(), 1) + (seen.any() and 1) + 5 * (splits[number] == "test"))


def test_everything_that_is_tuned_is_tuned_on_validation_images(louder):
    "The threshold, the curve and the share: on test images each would be another, and the table much better."
    pack, player = louder
    _, table = presence.ground_labels(player, pack, resamples=20)
    own, other = (presence.presence_rules(presence.presence_scores(player, pack, phrases_from_labels(pack, split=split, without_boxes=True))) for split in ("validate", "test"))
    lines = table.set_index(["finding", "measure"])
    for finding in ("Pneumonia", "all"):
        assert lines.loc[(finding, "sensitivity"), "threshold"] == own.loc[finding, "threshold"] < other.loc[finding, "threshold"] - 3
        assert lines.loc[(finding, "sensitivity"), "value"] == 1 and lines.loc[(finding, "specificity"), "value"] == 0
        assert lines.loc[(finding, "auroc"), "value"] == 1 and lines.loc[(finding, "brier_skill"), "value"] < 0
    rows = presence.presence_scores(player, pack, phrases_from_labels(pack, without_boxes=True))
    chances = 1 / (1 + np.exp(-(own.loc["all", "slope"] * rows["highest"] + own.loc["all", "intercept"])))
    skill = 1 - ((chances - rows["shown"]) ** 2).sum() / ((own.loc["all", "share"] - rows["shown"]) ** 2).sum()
    assert lines.loc[("all", "brier_skill"), "value"] == pytest.approx(skill) and own.loc["all", "share"] != other.loc["all", "share"]


@pytest.mark.parametrize("split", ["validate", None])
def test_no_threshold_is_chosen_on_images_that_are_measured(louder, split):
    _, table = presence.ground_labels(louder[1], louder[0], split=split, resamples=20)
    assert table["threshold"].isna().all() and table.query("measure == 'f1' or measure == 'brier_skill'")["value"].isna().all()


def test_a_pack_of_validation_images_alone_is_measured_whole(louder):
    "Failed: `ground` measured all of it, and labels were told that of 0 phrases none has a box."
    pack = copy(louder[0])
    vars(pack)["studies"] = pack.studies.assign(split="validate")
    _, table = presence.ground_labels(louder[1], pack, resamples=5)
    assert table["threshold"].isna().all() and set(table["recipe"]) == {"raw, bilinear, union"}
    with pytest.raises(ValueError, match="unknown split of .* 'tset'; choose from validate"):
        presence.ground_labels(louder[1], pack, split="tset")


def test_a_region_outside_of_the_crop_is_no_answer(tmp_path):
    simulate("rsna", tmp_path / "raw", 12, 64)
    read = DATASETS["rsna"].config(root=tmp_path / "raw")
    pack = prepare_data(prepare_options("rsna")(read=read, build=BuildConfig(out=tmp_path / "pack", size=64, progress=False)))
    phrases = phrases_from_labels(pack, split=None, without_boxes=True)
    player = Player(pack, phrases, lambda seen, _: seen)
    player.preprocessing = Preprocessing(size=48, crop=0.75, channels=1)
    corner = [Phrase(**{**vars(phrase), "boxes": ((0.0, 0.0, 9.0, 9.0),)}) if phrase.boxes else phrase for phrase in phrases]
    rows = presence.presence_scores(player, pack, corner)
    assert not rows["shown"].any() and len(rows) == sum(not phrase.boxes for phrase in phrases)


def test_the_command(tmp_path, capsys):
    assert main(["phrases", str(tmp_path), "--threshold", "0.5"]) == 1 and "goes with --from-labels" in capsys.readouterr().err
    assert main(["phrases", str(tmp_path), "--from-labels", "--phrases", "a.json"]) == 1 and "leave one out" in capsys.readouterr().err
