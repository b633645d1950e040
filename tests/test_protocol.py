"""The loop of all heads against a hand-written one; frozen means frozen; cached means the same bits; interrupted runs; switches of published defects."""
import copy
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from sklearn.metrics import roc_auc_score
from torch import nn

from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.tasks import boxes_in_view, phantom_task
from medvis.encoders.image import image_encoder
from medvis.evaluate import encoder as room, finetune, linear_probe, protocol
from medvis.evaluate.encoder import FrozenFeatures
from medvis.evaluate.recipes import LOCALMI, LOVT, _MGCA_PROTOCOLS
from medvis.evaluate.finetune import Learner, LinearClassifier, Protocol, fit_head
from medvis.evaluate.predictions import load_predictions
from medvis.evaluate.protocol import PROTOCOLS, _run_one, run_protocol
from medvis.evaluate.recipes import EvaluateConfig

FINDINGS = ("Pleural Effusion", "Support Devices")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(tmp_path_factory.mktemp("protocol") / "phantom", studies=60, progress=False))


@pytest.fixture(scope="module")
def tasks(pack):
    made = {kind: phantom_task(pack, kind, FINDINGS, progress=False) for kind in ("labels", "masks", "boxes")}
    split = np.repeat(["train", "validate", "test"], [40, 10, 10])  # small splits that hold something to find
    return {kind: replace(task, images=task.images.assign(split=split, patient_id=np.arange(60).astype(str))) for kind, task in made.items()}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return image_encoder("tiny_resnet").eval()


def state(module: nn.Module) -> dict:
    return {key: value.clone() for key, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict) -> set[str]:
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}


# ---------------------------------------------------------------- cache

@pytest.mark.parametrize("name, options", [("tiny_resnet", {}), ("tiny_resnet_fine", {}), ("tiny_vit", {}), ("resnet50", {"size": 64})])
def test_company_changes_no_bit(name, options):
    "What the cache rests on: in groups of one size, an image's features do not depend on its place or its neighbours."
    torch.manual_seed(0)
    encoder = image_encoder(name, **options).eval()
    images = torch.randn(room._CHUNK, encoder.preprocessing.channels, 64, 64)
    with torch.no_grad():
        features, maps = encoder(images), encoder.pyramid(images)
        for _ in range(2):
            order = torch.randint(0, room._CHUNK, (room._CHUNK,))
            moved = encoder(images[order])
            assert torch.equal(moved.whole, features.whole[order]) and torch.equal(moved.regions, features.regions[order])
        assert all(torch.equal(a, b[order]) for a, b in zip(encoder.pyramid(images[order]), maps))


HEADS = [("linear", "labels", "auroc"), ("linear-map", "masks", "dice"), ("unet", "masks", "dice"), ("yolo", "boxes", "map")]


@pytest.mark.parametrize("head, kind, metric", HEADS)
def test_cached_and_uncached_runs_agree_to_the_last_bit(head, kind, metric, tasks, encoder, tmp_path):
    recipe = Protocol("both", head=head, metric=metric, batch_size=12, epochs=2, lrs=(1e-2, 1e-3), seeds=(0, 1), fractions=(0.5, 1.0))
    recipe = recipe if head == "linear" else replace(recipe, seeds=(0,), lrs=(1e-3,), fractions=(0.7,))
    before, told = state(encoder), {}
    for kept in (True, False):
        table = run_protocol({"e": encoder}, tasks[kind], recipe, tmp_path / str(kept), cache=kept, progress=False)
        runs = [tmp_path / str(kept) / "runs" / name for name in table["run"].unique()]
        told[kept] = [load_predictions(run / "predictions.npz") for run in runs], [pd.read_csv(run / "history.csv") for run in runs], table
    assert not changed(encoder, before) and encoder.body.conv1.weight.requires_grad
    assert (tmp_path / "True" / "features").exists() and not (tmp_path / "False" / "features").exists()
    for one, other in zip(told[True][0], told[False][0], strict=True):
        same = [x.predicted.table().to_numpy() if kind == "boxes" else x.predicted for x in (one, other)]
        assert np.array_equal(*same)
    pd.testing.assert_frame_equal(told[True][2], told[False][2], check_exact=True)
    assert all(a.equals(b) for a, b in zip(told[True][1], told[False][1]))


def test_one_map_is_kept_of_a_vit(tasks, tmp_path):
    vit, rows = image_encoder("tiny_vit").eval(), np.arange(20)
    head = protocol._make_head(Protocol(head="setr"), vit, tasks["masks"])
    features, plain = (FrozenFeatures(vit, tasks["masks"].pack, rows, head.needs, head.levels, of) for of in (tmp_path, None))
    room.fill_cache(features, rows)
    image, only = features[rows]
    assert len(features.stores) == 1 and torch.equal(only, plain[rows][1]) and image is None


def test_an_interrupted_fill_goes_on(pack, encoder, tmp_path, monkeypatch):
    rows = np.arange(60)
    monkeypatch.setattr(room, "_CHUNK", 2)  # blocks of 16 images
    features = FrozenFeatures(encoder, pack, rows, folder=tmp_path)
    encode, calls = features.encode, []

    def stop(chosen):
        calls.append(len(chosen))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(chosen)

    features.encode = stop
    with pytest.raises(KeyboardInterrupt):
        room.fill_cache(features, rows)
    again = FrozenFeatures(encoder, pack, rows, folder=tmp_path)
    assert again.folder == features.folder and np.flatnonzero(again.filled).tolist() == list(range(32))
    missing, encode = [], again.encode
    again.encode = lambda images: (missing.extend(images), encode(images))[1]
    room.fill_cache(again, rows)
    assert missing == list(range(32, 60)) and torch.equal(again[rows], FrozenFeatures(encoder, pack, rows)[rows])


@pytest.mark.parametrize("order", [("probe", "protocol"), ("protocol", "probe")])
def test_probe_and_protocol_find_each_others_features(order, pack, encoder, tmp_path, monkeypatch):
    "Each image is encoded once, whoever asks first; the probe does not look at the split `validate`. What they say is what they say alone."
    looked, encode, recipe = [], FrozenFeatures.encode, Protocol("shared", metric="loss", epochs=1, lrs=(1e-3,), seeds=(0,), fractions=(1.0,))
    task = phantom_task(pack, "labels", FINDINGS, progress=False)
    doors = {
        "probe": lambda out, cache: linear_probe(encoder, pack, (1.0,), (0,), baseline=None, resamples=10, out=out / "probe", cache=cache),
        "protocol": lambda out, cache: run_protocol({"encoder": encoder}, task, recipe, out, cache=bool(cache), progress=False)}
    asked = {"probe": set(task.rows("train")) | set(task.rows("test")), "protocol": set(range(60))}
    alone = {name: door(tmp_path / name, None) for name, door in doors.items()}
    monkeypatch.setattr(FrozenFeatures, "encode", lambda self, images: (looked.extend(images), encode(self, images))[1])
    for place, name in enumerate(order):
        looked.clear()
        pd.testing.assert_frame_equal(doors[name](tmp_path, tmp_path / "features"), alone[name], check_exact=True)
        assert set(looked) == asked[name] - (asked[order[0]] if place else set()) and len(looked) == len(set(looked)) + (not place)     # one more look, at the first, tells the shapes
    assert len(list((tmp_path / "features").iterdir())) == 1


# ---------------------------------------------------------------- the loop

def test_fine_tuning_is_what_one_would_write_by_hand(tasks, encoder):
    "Warm-up with frozen BatchNorm, plateau by torch's own scheduler, best epoch: the same weights, rates and scores."
    task, train, validate = tasks["labels"], np.arange(40), np.arange(40, 50)
    recipe = Protocol(trains="all", batch_size=16, epochs=7, patience=None, metric="loss", plateau=0, warmup_steps=3, warmup_lr=2e-3, weight_decay=1e-3)
    torch.manual_seed(1)
    learner = Learner(encoder, LinearClassifier(encoder, FINDINGS), task, recipe, seed=5)
    body, head = copy.deepcopy(encoder), copy.deepcopy(learner.head)
    history = fit_head(learner, 1e-2, train, validate)

    images, answers = room.read_images(encoder, task.pack, np.arange(50)), torch.from_numpy(task.targets[:50])
    entropy = lambda raw, target: head.loss(raw, target).total
    optimizer = torch.optim.Adam([*head.parameters(), *body.parameters()], lr=1e-2, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", factor=0.5, patience=0)
    step, losses, rates, best = 0, [], [], None
    for epoch in range(7):
        order = np.random.default_rng([5, epoch]).permutation(40)
        for batch in (order[:16], order[16:32]):
            warm = step < 3
            body.train(not warm), body.requires_grad_(not warm)
            optimizer.zero_grad()
            entropy(head(body(images[batch]).whole), answers[batch]).backward()
            kept = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 if warm else group["lr"]
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for group, lr in zip(optimizer.param_groups, kept):
                group["lr"] = lr
            step += 1
        body.eval()
        with torch.no_grad():
            losses.append(entropy(head(body(images[40:50]).whole), answers[40:50]).item())
        if losses[-1] == min(losses):
            best = state(body), state(head)
        scheduler.step(losses[-1])
    assert len(set(rates)) >= 2  # warm-up and the task's; that a plateau halves it is shown below, on planted losses
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(history["lr"], rates[1::2], rtol=1e-12)
    for mine, hand in zip((learner.encoder, learner.head), best):
        for key, value in mine.state_dict().items():
            torch.testing.assert_close(value, hand[key], rtol=1e-4, atol=1e-6)


def scripted(monkeypatch, losses):
    "Validation losses as written; each epoch leaves its number in the head's bias."
    seen = iter(losses)

    def predict(learner, rows):
        return None, next(seen)

    monkeypatch.setattr(finetune, "predict", predict)


@pytest.mark.parametrize("losses, patience, epochs, best", [
    ([3, 2, 1, 5, 5, 5, 5, 5], 3, 6, 2), ([3, 2, 1, 1, 1, 0.5, 5, 5], 3, 8, 5), ([1, 2, 3, 4], None, 4, 0), ([2, 2, 2, 2], 2, 3, 0), ([4, 3, np.nan, 1], 3, 2, 1)])
def test_early_stopping_and_the_best_epoch(losses, patience, epochs, best, tasks, encoder, monkeypatch):
    scripted(monkeypatch, losses)
    recipe = Protocol(metric="loss", patience=patience, batch_size=40, epochs=len(losses))
    learner, biases = Learner(encoder, LinearClassifier(encoder, FINDINGS), tasks["labels"], recipe), []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (step(self), biases.append(learner.head.linear.bias.detach().clone()))[0])
    history = fit_head(learner, 1e-2, np.arange(40), np.arange(40, 50))
    assert len(history) == epochs and history["score"].idxmax() == best
    assert torch.equal(learner.head.linear.bias, biases[best])  # one step an epoch


def test_a_plateau_halves_the_rate(tasks, encoder, monkeypatch):
    scripted(monkeypatch, [3, 2, 2, 2, 2, 2, 2])
    recipe = Protocol(metric="loss", plateau=1, patience=None, batch_size=40, epochs=7)
    history = fit_head(Learner(encoder, LinearClassifier(encoder, FINDINGS), tasks["labels"], recipe), 0.5, np.arange(40), np.arange(40, 50))
    assert history["lr"].tolist() == [0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_a_run_that_never_had_a_finite_loss_says_so(tasks, encoder, monkeypatch):
    scripted(monkeypatch, [np.nan])
    learner = Learner(encoder, LinearClassifier(encoder, FINDINGS), tasks["labels"], Protocol(metric="loss"))
    with pytest.raises(finetune.Diverged, match="0.01: lower it"):
        fit_head(learner, 1e-2, np.arange(40), np.arange(40, 50))


# ---------------------------------------------------------------- frozen

@pytest.mark.parametrize("head, kind, live", [(*one[:2], live) for one in HEADS for live in (False, True) if not (live and one[1] == "boxes")])
def test_frozen_is_frozen_and_the_head_learns(head, kind, live, tasks, encoder):
    "Weights and BatchNorm statistics bit-identical, also when the encoder looks at varied images in every epoch."
    recipe = Protocol(head=head, metric="loss", batch_size=20, epochs=1, augment="lovt" if live else "none")
    before = state(encoder)
    learner = Learner(encoder, protocol._make_head(recipe, encoder, tasks[kind]), tasks[kind], recipe)
    first = state(learner.head)
    fit_head(learner, 1e-3, np.arange(40), np.arange(40, 50))
    assert learner.live == live and not changed(encoder, before) and not changed(learner.encoder, before)
    assert all(value.grad is None for value in learner.encoder.parameters())
    assert {key for key, _ in learner.head.named_parameters()} <= changed(learner.head, first)


@pytest.mark.parametrize("settings, moved, statistics", [
    (dict(trains="all"), {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}, True),
    (dict(trains="top"), {"layer4"}, True),
    (dict(trains="all", warmup_steps=99), set(), False),
    (dict(trains="all", warmup_steps=1, switches=("late-batchnorm",)), {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}, False),
    (dict(switches=("loose-batchnorm",)), set(), True),
])
def test_only_what_is_trained_moves(settings, moved, statistics, tasks, encoder):
    before = state(encoder)
    learner = Learner(encoder, LinearClassifier(encoder, FINDINGS), tasks["labels"], Protocol(metric="loss", batch_size=20, epochs=1, **settings))
    fit_head(learner, 1e-3, np.arange(40), np.arange(40, 50))
    names, parameters = changed(learner.encoder, before), {key for key, _ in encoder.named_parameters()}
    assert {key.split(".")[1] for key in names & parameters} == moved
    assert any("running" in key for key in names) == statistics
    assert not changed(encoder, before)  # ours is another one


def test_each_epoch_of_the_warm_up_wakes_batchnorm_where_it_should(tasks, encoder):
    "late-batchnorm: statistics move from the epoch after the warm-up's end on, not within it."
    for epochs, moves in ((1, False), (2, True)):
        recipe = Protocol(trains="all", warmup_steps=1, metric="loss", batch_size=20, epochs=epochs, switches=("late-batchnorm",), patience=None)
        learner = Learner(encoder, LinearClassifier(encoder, FINDINGS), tasks["labels"], recipe)
        seen, forward = [], learner.encoder.forward
        learner.encoder.forward = lambda image: (seen.append(learner.encoder.body.bn1.training), forward(image))[1]
        fit_head(learner, 1e-4, np.arange(40), np.arange(40, 50))
        assert any(seen) == moves and seen[:2] == [False, False]


# ---------------------------------------------------------------- runs

def test_an_interrupted_protocol_goes_on_and_ends_the_same(tasks, encoder, tmp_path, monkeypatch):
    recipe = Protocol("short", batch_size=12, epochs=2, lrs=(1e-2, 1e-3), seeds=(0, 1, 2))
    whole = run_protocol({"e": encoder}, tasks["labels"], recipe, tmp_path / "whole", progress=False)
    calls, fit = [], protocol.fit_head

    def stop(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*given)

    monkeypatch.setattr(protocol, "fit_head", stop)
    with pytest.raises(KeyboardInterrupt):
        run_protocol({"e": encoder}, tasks["labels"], recipe, tmp_path / "parts", progress=False)
    assert not (tmp_path / "parts" / "results.csv").exists()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/runs/*/manifest.json")}
    assert len(done) == 2
    parts = run_protocol({"e": encoder}, tasks["labels"], recipe, tmp_path / "parts", progress=False)
    assert len(calls) == 3 + 2 and all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    pd.testing.assert_frame_equal(parts, whole, check_exact=True)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "parts" / "results.csv"), whole, check_dtype=False, rtol=1e-12)


def test_predictions_are_of_the_test_split_and_tables_are_made_of_them(tasks, encoder, tmp_path):
    view = encoder.preprocessing
    for head, kind, metric in HEADS:
        recipe = Protocol(head=head, metric=metric, batch_size=7, epochs=1)
        run = _run_one(encoder, tasks[kind], recipe, 1e-3, 1.0, 0, tmp_path)
        told, task = load_predictions(run / "predictions.npz"), tasks[kind]
        assert told.image_id.tolist() == task.images["image_id"].iloc[50:].tolist() and told.classes == FINDINGS
        assert told.patient_id.tolist() == [str(row) for row in range(50, 60)]
        if kind == "boxes":
            for row in range(10):
                boxes = boxes_in_view(task.targets[50 + row], 64, view)
                assert np.allclose(told.truth.corners[told.truth.image == row], boxes[:, :4])
                assert told.truth.classes[told.truth.image == row].tolist() == boxes[:, 4].tolist()
        else:
            assert np.array_equal(told.truth, task.targets[50:])
        manifest = json.loads((run / "manifest.json").read_text())
        assert manifest["images"] == {"train": 40, "validate": 10, "test": 10} and manifest["task_hash"] == task.hash
        assert manifest["recipe"]["head"] == head and manifest["watched"]["metric"] == metric and manifest["seed"] == 0
        rows = protocol._run_rows(run).set_index("metric")
        if kind == "labels":
            both = [c for c in range(2) if 0 < told.truth[:, c].sum() < 10]
            expected = np.mean([roc_auc_score(told.truth[:, c], told.predicted[:, c]) for c in both])
            assert both and np.isclose(rows.loc["AUROC, macro", "value"], expected)
        if kind == "masks":
            each = 2 * (told.predicted & (told.truth > 0)).sum((0, 2, 3)) / (told.predicted.sum((0, 2, 3)) + told.truth.sum((0, 2, 3)))
            there = told.truth.sum((0, 2, 3)) > 0
            assert there.any() and np.isclose(rows.loc["Dice, pooled pixels", "value"], each[there].mean())


def test_the_rate_is_chosen_on_one_run_by_the_validation_score(tasks, encoder, tmp_path):
    recipe = Protocol("grid", batch_size=12, epochs=4, lrs=(1e-6, 2e-2, 1e-5), seeds=(4, 5))
    table = run_protocol({"e": encoder}, tasks["labels"], recipe, tmp_path, progress=False)
    told = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/manifest.json")]
    scores = {one["lr"]: one["validation"] for one in told if one["seed"] == 4}
    assert len(told) == 3 + 1 and set(scores) == set(recipe.lrs) and set(table["lr"]) == {max(recipe.lrs, key=scores.get)}
    assert set(table["seed"]) == {4, 5} and not table.duplicated(["seed", "metric"]).any()


def test_rates_that_diverge_are_passed_over(tasks, encoder, tmp_path, monkeypatch):
    fit = protocol.fit_head

    def wild(learner, lr, *rows):
        if lr > 1:
            raise finetune.Diverged("too large")
        return fit(learner, lr, *rows)

    monkeypatch.setattr(protocol, "fit_head", wild)
    recipe = Protocol("wild", batch_size=12, epochs=1, lrs=(1e3, 1e-2, 1e4), seeds=(0,))
    assert set(run_protocol({"e": encoder}, tasks["labels"], recipe, tmp_path, progress=False)["lr"]) == {1e-2}
    with pytest.raises(finetune.Diverged, match="every learning rate"):
        run_protocol({"e": encoder}, tasks["labels"], replace(recipe, lrs=(1e3, 1e4)), tmp_path, progress=False)


def test_seeds_and_settings_make_other_runs(tasks, encoder):
    task, recipe = tasks["labels"], Protocol()
    told = [protocol._run_identity(encoder, task, recipe, 1e-3, 1.0, 0), protocol._run_identity(encoder, task, recipe, 1e-3, 1.0, 1),
            protocol._run_identity(encoder, task, recipe, 1e-4, 1.0, 0), protocol._run_identity(encoder, task, recipe, 1e-3, 0.1, 0),
            protocol._run_identity(encoder, task, replace(recipe, switches=("plateau-on-loss",)), 1e-3, 1.0, 0),
            protocol._run_identity(encoder, task, replace(recipe, plateau=None), 1e-3, 1.0, 0),
            protocol._run_identity(image_encoder("tiny_resnet"), task, recipe, 1e-3, 1.0, 0),
            protocol._run_identity(encoder, replace(task, targets=1 - task.targets), recipe, 1e-3, 1.0, 0)]
    assert len({json.dumps(one) for one in told}) == len(told)
    other = copy.deepcopy(encoder)
    other.layer = "layer4"  # the same weights, other regions
    assert protocol._run_identity(other, task, recipe, 1e-3, 1.0, 0) != told[0]


def test_grades_and_classes_and_silent_detectors(tasks, encoder, tmp_path):
    labels, draw = tasks["labels"], np.random.default_rng(0)
    for kind, classes, metric in (("ordinal", ("0", "1", "2", "3"), "AUROC, 0-1 vs 2-3"), ("classes", ("u", "v", "w"), "accuracy, all")):
        task = replace(labels, kind=kind, classes=classes, targets=draw.integers(0, len(classes), 60))
        table = run_protocol({"e": encoder}, task, Protocol("p", batch_size=20, epochs=1, seeds=(0, 1)), tmp_path, progress=False)
        short = protocol.summary_table(table)
        assert metric in set(table["metric"]) and len(short) == 1 and short["n"].iloc[0] == 2 and short["metric"].iloc[0] == protocol.HEADLINE[kind]
        told = load_predictions(next(tmp_path.glob(f"runs/*{table['run'].iloc[0][-12:]}")) / "predictions.npz")
        np.testing.assert_allclose(told.predicted.sum(1), 1, rtol=1e-5)
    mute = Protocol("mute", head="yolo", metric="map", batch_size=20, epochs=1, lrs=(0.0,), seeds=(0, 1))
    table = run_protocol({"e": encoder}, tasks["boxes"], mute, tmp_path, progress=False)
    assert len(protocol.summary_table(table)) == 1  # two runs without any detection are no copies of one another


def test_released_protocols_run(tasks, encoder, tmp_path):
    quick = dict(epochs=2, lrs=(1e-4,), seeds=(0,), fractions=(1.0,), batch_size=20)
    for name, kind in (("rsna_finetune_1", "boxes"), ("nih_seg_linear", "masks"), ("mgca_det", "boxes"), ("mgca_rsna", "labels")):
        recipe, before = replace(protocol.find_protocol(name, released=True), **quick), state(encoder)
        recipe = replace(recipe, warmup_steps=min(recipe.warmup_steps, 1))
        table = run_protocol({"e": encoder}, tasks[kind], recipe, tmp_path, progress=False)
        manifest = json.loads((tmp_path / "runs" / table["run"].iloc[0] / "manifest.json").read_text())
        assert manifest["recipe"]["switches"] == list(recipe.switches) and set(table["protocol"]) == {f"{name}-released"}
        assert manifest["images"]["validate"] == (1 if "rsna_f" in name else 10) and not changed(encoder, before)


# ---------------------------------------------------------------- the papers

def test_protocols_are_those_of_the_papers():
    "systems.md 4 and 5.5, a second time."
    grids = {
        "rsna_frozen_10": (64, (1e-3,), 10), "rsna_finetune_10": (64, (3e-4, 1e-3), 10), "rsna_seg_linear_10": (64, (3e-2, 1e-2, 3e-3, 1e-3), 10),
        "rsna_frozen_100": (64, (3e-4, 1e-3), 10), "rsna_finetune_100": (64, (3e-4, 1e-4), 10), "rsna_seg_linear_100": (64, (3e-2, 1e-2, 3e-3, 1e-3), 10),
        "rsna_frozen_1": (8, (1e-3, 3e-4), 20), "rsna_finetune_1": (8, (3e-4, 1e-4), 20), "rsna_seg_linear_1": (8, (3e-2, 1e-2, 3e-3, 1e-4), 20),
        "covid_unet_frozen": (8, (1e-4, 3e-4, 1e-3), 20), "covid_unet_finetune": (8, (1e-4, 3e-4), 20), "covid_seg_linear": (8, (3e-2, 1e-2, 3e-3, 1e-3), 20),
        "nih_seg_linear": (64, (1e-1, 3e-2, 1e-2), 10), "pneumothorax_unet_frozen_100": (64, (3e-5, 1e-5), 10), "pneumothorax_unet_finetune_100": (64, (3e-5, 1e-5), 10),
        "object_frozen_100": (64, (1e-3, 3e-3), 10), "object_finetune_100": (64, (1e-3, 3e-4), 10), "object_seg_linear_100": (64, (3e-1, 1e-1, 3e-2, 1e-2), 10),
    }
    assert set(grids) == set(LOVT)
    for name, (batch, lrs, patience) in grids.items():
        one = PROTOCOLS[name]
        assert (one.batch_size, one.lrs, one.patience, one.plateau, one.weight_decay, one.optimizer) == (batch, lrs, patience, 3, 1e-6, "adam"), name
        assert one.fractions == ({"1": 0.01, "10": 0.1}.get(name.rsplit("_")[-1], 1.0),) and len(one.seeds) == 5 and not one.switches and one.augment == "none"
        tuned = "finetune" in name
        assert (one.trains, one.warmup_steps) == (("all", 20 if "covid" in name else 100) if tuned else ("head", 0)) and one.warmup_lr == 1e-3
        assert one.head == ("linear-map" if "linear" in name else "unet" if "unet" in name else "yolo")
        assert one.metric == ("dice" if one.head != "yolo" else "froc" if "object" in name else "map")
    for name in _MGCA_PROTOCOLS:
        one = PROTOCOLS[name]
        assert (one.optimizer, one.epochs, one.patience, one.trains, one.plateau) == ("adamw", 50, 10, "head", None)
        assert one.weight_decay == (0.05 if "seg" in name else 1e-6) and one.metric == ("map" if "det" in name else "loss")
    assert all(PROTOCOLS[name].lrs == (5e-4,) and PROTOCOLS[name].optimizer == "adam" for name in LOCALMI)


def test_the_command_line_reads_the_configuration():
    flat = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    config = tyro.cli(EvaluateConfig, args="tiny-unet --data p --encoder runs/a imagenet --out o --classes Edema --seeds 0 1 --released".split(), config=flat)
    assert config.protocol == "tiny-unet" and config.encoder == ("runs/a", "imagenet") and config.classes == ("Edema",) and config.released
    with pytest.raises(SystemExit):
        tyro.cli(EvaluateConfig, args="tiny-net --data p --encoder a --out o".split(), config=flat)


def test_a_policy_of_labels_is_for_labels_alone(pack, tmp_path):
    "--uncertain and --blank turn the -1 and the gaps of a label table into answers; grades, classes, masks and boxes have none, and are not quietly read without them."
    ids = pack.image_table["image_id"]
    pd.DataFrame({"image_id": ids, "Edema": np.arange(len(ids)) % 3 - 1.0}).to_csv(tmp_path / "labels.csv", index=False)
    path = tmp_path / "labels.csv"
    found = {one: protocol.protocol_task(pack, "tiny-linear", path, uncertain=one).targets[:, 0] for one in ("positive", "negative", "ignore")}
    unsure = np.arange(len(ids)) % 3 == 0
    assert (found["positive"][unsure] == 1).all() and (found["negative"][unsure] == 0).all() and len(found["ignore"]) == (~unsure).sum()
    for option in ({"uncertain": "positive"}, {"blank": "ignore"}):
        for kind, name in (("classes", "tiny-linear"), ("ordinal", "tiny-linear"), (None, "tiny-unet"), (None, "tiny-detect")):
            with pytest.raises(ValueError, match="--uncertain and --blank are for labels"):
                protocol.protocol_task(pack, name, path, kind, **option)
        with pytest.raises(ValueError, match="what a phantom shows"):
            protocol.protocol_task(pack, "tiny-linear", **option)
