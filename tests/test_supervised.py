"""The supervised baseline: its targets and loss against plain loops, the AUROC that its run is judged by, its doors, a step at full size."""
import copy
import json
import math
import random
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

import medvis.objectives.labels as objectives
from medvis.data.build import ImageRecord, StudyRecord, write_pack
from medvis.data.pairs import Pairs, collate, read_batch
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.tasks import BLANK, UNCERTAIN, label_targets, pack_task, study_targets
from medvis.encoders.image import image_encoder
from medvis.cli.commands import main
from medvis.evaluate import head_predictions, head_table, linear_probe, paired_gain, probe_table
from medvis.evaluate.ground import phrase_maps
from medvis.evaluate.retrieve import retrieve, zero_shot
from medvis.methods import METHODS, SimCLR, Supervised
from medvis.methods.method import NoText
from medvis.objectives.labels import batch_targets, macro_auroc
from medvis.studies.show import show_run
from medvis.testing import tiny_batch
from medvis.train import Run, TrainConfig, create_method, fit, load_encoder, load_method, loop
from medvis.train.checkpoint import read_weights
from medvis.train.diagnostics import collapse
from medvis.train.processes import make_accelerator
from medvis.widgets.study import Studies


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("data") / "pack", studies=100, size=64, progress=False))


# ---------------------------------------------------------------- targets, loss and AUROC, one by one

def target_by_hand(value, unlabelled, uncertain, blank):
    if unlabelled:
        return math.nan
    if math.isnan(value):
        return {"negative": 0, "ignore": math.nan}[blank]
    return {"positive": 1, "negative": 0, "ignore": math.nan}[uncertain] if value == -1 else value


def loss_by_hand(logits, targets):
    terms = []
    for s, y in zip(logits.flatten(), targets.flatten()):
        if y == 1:
            terms.append(torch.log(1 + torch.exp(-s)))
        elif y == 0:
            terms.append(torch.log(1 + torch.exp(s)))
    return sum(terms) / len(terms)


def auroc_by_hand(scores, targets):
    columns = []
    for c in range(scores.shape[1]):
        won = [float((a > b) + (a == b) / 2) for a, b in product(scores[targets[:, c] == 1, c].tolist(), scores[targets[:, c] == 0, c].tolist())]
        columns += [sum(won) / len(won)] if won else []
    return sum(columns) / len(columns)


def some_labels(count=40, seed=0):
    draw = random.Random(seed)
    labels = {name: torch.tensor([draw.choice([1.0, 0.0, -1.0, math.nan]) for _ in range(count)]) for name in "abc"}
    for values in labels.values():
        values[::7] = math.nan      # not labelled
    return labels


def check_targets():
    labels = some_labels()
    for uncertain, blank in product(UNCERTAIN, BLANK):
        found = objectives.batch_targets(labels, ["c", "a"], uncertain, blank)
        for i, row in enumerate(found.tolist()):
            unlabelled = all(math.isnan(labels[name][i]) for name in "abc")
            wanted = [target_by_hand(float(labels[name][i]), unlabelled, uncertain, blank) for name in "ca"]
            assert all(a == b or math.isnan(a) and math.isnan(b) for a, b in zip(row, wanted, strict=True)), (i, uncertain, blank)


def check_loss():
    logits = 3 * torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([random.Random(k).choice([1.0, 0.0, math.nan]) for k in range(120)]).view(30, 4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    for chosen in (slice(None), order):
        ours, theirs = (logits[chosen].clone().requires_grad_() for _ in range(2))
        found, wanted = objectives.label_loss(ours, targets[chosen]), loss_by_hand(theirs, targets[chosen])
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
        grads = torch.autograd.grad(found, ours)[0], torch.autograd.grad(wanted, theirs)[0]
        torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-6)
        assert not grads[0][targets[chosen].isnan()].any()
    assert objectives.label_loss(logits, targets * math.nan) == 0
    half = (100 * logits).half()
    torch.testing.assert_close(objectives.label_loss(half, targets), objectives.label_loss(half.float(), targets), atol=1e-6, rtol=1e-6)


def check_auroc():
    scores = torch.randn(60, 4, generator=torch.Generator().manual_seed(3)).round(decimals=1)
    targets = torch.tensor([random.Random(k).choice([1.0, 0.0, 0.0, math.nan]) for k in range(240)]).view(60, 4)
    targets[:, 3] = 1.0
    assert objectives.macro_auroc(scores, targets) == pytest.approx(auroc_by_hand(scores, targets), abs=1e-12)
    assert math.isnan(objectives.macro_auroc(scores[:, 3:], targets[:, 3:]))


@pytest.mark.parametrize("check", [check_targets, check_loss, check_auroc])
def test_against_plain_loops(check):
    check()


MUTANTS = [     # what is written, what a slip would write, which check must notice
    ("torch.where(given == -1,", "torch.where(given == 1,", check_targets), ("masked_fill(given.isnan(), BLANK[blank])", "masked_fill(given.isnan(), 0.0)", check_targets),
    ("UNCERTAIN[policy] for", "UNCERTAIN['ignore'] for", check_targets), (".isnan().all(0)", ".isnan().any(0)", check_targets), ("unlabelled[:, None], math.nan", "unlabelled[:, None], 0.0", check_targets),
    ("targets.nan_to_num(0)", "1 - targets.nan_to_num(0)", check_loss), ("(losses * counted)", "losses", check_loss), ("~targets.isnan()", "targets.isnan()", check_loss),
    ("counted.sum().clamp(min=1)", "counted.numel()", check_loss), (".clamp(min=1)", "", check_loss), ("at_least_float32(logits), ~", "logits, ~", check_loss),
    ("scores[targets == 1], scores[targets == 0]", "scores[targets == 0], scores[targets == 1]", check_auroc), ("(below + up_to)", "(below + below)", check_auroc),
    ("scores[targets == 0].sort().values", "scores[targets == 0]", check_auroc), ("if not math.isnan(value)]", "if True]", check_auroc)]


@pytest.mark.parametrize("written, slip, check", MUTANTS, ids=[f"{check.__name__}-{number}" for number, (*_, check) in enumerate(MUTANTS)])
def test_a_slip_is_noticed(written, slip, check, monkeypatch):
    source = Path(objectives.__file__).read_text(encoding="utf-8")
    assert source.count(written) == 1, "the line is there, once"
    space = {"__name__": objectives.__name__, "__package__": objectives.__package__}
    exec(compile(source.replace(written, slip), objectives.__file__, "exec"), space)
    for name in ("batch_targets", "label_loss", "macro_auroc"):
        monkeypatch.setattr(objectives, name, space[name])
    with pytest.raises((AssertionError, RuntimeError)):
        check()


def test_a_batch_has_the_targets_of_the_pack(pack):
    "Policies in tensors and in tables are one: those that train and those that measure."
    pairs = Pairs(pack, None, image_encoder("tiny_resnet").preprocessing, need_text=False)
    batch = read_batch(pairs, range(len(pairs)))
    names = ["Edema", "Cardiomegaly"]
    for uncertain, blank in product(UNCERTAIN, BLANK):
        wanted = study_targets(pack, names, uncertain, blank).iloc[batch.study_id.numpy()]
        np.testing.assert_array_equal(batch_targets(batch.labels, names, uncertain, blank), wanted.to_numpy(np.float32))
    assert (pack.labels[names] == -1).to_numpy().any() and label_targets(pack.labels, "ignore").isna().to_numpy().any()


# ---------------------------------------------------------------- what a run is judged by

SCRIPT = [0.6, 0.8, 0.7, 0.65, 0.6, 0.9]     # the AUROC falls after the second epoch, and would rise again in the sixth


class Scripted(Supervised):
    "Its validation says what is written above, and a loss that falls in every epoch."

    def start_epoch(self, epoch):
        self.epoch = epoch

    def measure(self, judged):
        return {"auroc": SCRIPT[self.epoch], "loss": 1 / (1 + self.epoch)}


def scripted(pack, run, **changes):
    torch.manual_seed(0)
    method, kept = Scripted.from_preset("tiny"), []
    settings = dict(epochs=6, batch_size=16, lr=1e-3, schedule="plateau", plateau_patience=0, patience=2, progress=False)
    done = lambda made: kept.append(read_weights(made.path / "weights.safetensors"))
    return fit(method, pack, TrainConfig.of(method, run, **{**settings, **changes}), each_epoch=done), kept


def test_the_monitored_number_stops_the_run_and_chooses_its_weights(pack, tmp_path):
    "Plateau, early stopping and best weights go by the AUROC alike, not by the loss; the log has both by their names."
    run, kept = scripted(pack, tmp_path / "run")
    seen = run.metrics.query("split == 'validate'")
    assert seen.auroc.tolist() == pytest.approx(SCRIPT[:4]) and seen.loss.is_monotonic_decreasing, "two epochs without a better one"
    same = lambda a, b: all(torch.equal(a[name], b[name]) for name in a)
    assert same(kept[1], kept[2]) and same(kept[1], kept[3]) and not same(kept[0], kept[1])
    assert same(read_weights(run.path / "weights.safetensors"), kept[1]) and not same(read_weights(run.path / "last.safetensors"), kept[1])
    assert same(run.method().state_dict(), kept[1])
    rates = run.metrics.query("split == 'train'").groupby("epoch").lr.agg(["min", "max"])
    assert rates["min"].tolist() == rates["max"].tolist() == [1e-3, 1e-3, 1e-3, 5e-4], "halved after the third"


@pytest.mark.parametrize("keep, epochs", [("last", 4), ("best", 1)])
def test_other_ways_to_end(keep, epochs, pack, tmp_path):
    run, _ = scripted(pack, tmp_path / "run", keep=keep, epochs=epochs)
    same = [(run.path / name).read_bytes() for name in ("weights.safetensors", "last.safetensors")]
    assert same[0] == same[1]


def test_the_loss_is_watched_by_all_others():
    for name, kind in METHODS.items():
        values = {"loss": 0.25, "auroc": 0.75}
        assert kind.monitor(object.__new__(kind), values) == (-0.75 if name == "supervised" else 0.25)
        alone = name in ("supervised", "caption-lstm", "caption-transformer")  # nothing is contrasted with other samples
        assert kind.least_batch == (1 if alone else 2) and (kind.measure is Supervised.measure) == (name == "supervised")


def test_the_whole_split_is_judged_at_once(pack, tmp_path, monkeypatch):
    "The last incomplete batch included, whatever the batch size; and of several processes together."
    torch.manual_seed(0)
    method = Supervised.from_preset("tiny").eval()
    held = Pairs(pack, None, method.preprocessing, method.sampling, "validate", need_text=False)
    batch, count = read_batch(held, range(len(held))), len(held)
    with torch.no_grad():
        targets = batch_targets(batch.labels, method.label_names, "ignore", "negative")
        wanted = macro_auroc(method.classify(batch.image), targets)
    for size in (count, 5, 7):
        config = TrainConfig.of(method, tmp_path / f"run{size}", batch_size=size, progress=False)
        state = loop._RunState(method, pack, config)
        keys = state.batches("validate", 0)
        assert sorted(i for keys in keys for _, i in keys) == list(range(count)) and len(keys) == -(-count // size)
        found = loop.validate(method, state.load("validate", keys), state.accelerator)
        assert found["auroc"] == pytest.approx(wanted, abs=1e-3) and set(found) == {"loss", "labels", "auroc"}
    shares, said = [[batch_of(held, rows)] for rows in (range(0, count, 2), range(1, count, 2))], []
    monkeypatch.setattr(loop, "gather_object", lambda own: said.append(own[0]) or own)
    accelerator = make_accelerator(TrainConfig(run=tmp_path, device="cpu"))
    for share in shares:
        loop.validate(method, share, accelerator)
    monkeypatch.setattr(loop, "gather_object", lambda own: list(said))
    for share in shares:
        assert loop.validate(method, share, accelerator)["auroc"] == pytest.approx(wanted, abs=1e-3)


def batch_of(pairs, rows):
    return next(iter(DataLoader(pairs, batch_sampler=[list(rows)], collate_fn=collate)))


def test_other_methods_validate_as_before(pack, tmp_path):
    "In whole batches: a contrastive loss of the rest would be another loss."
    method = SimCLR.from_preset("tiny")
    state = loop._RunState(method, pack, TrainConfig.of(method, tmp_path / "run", batch_size=5, progress=False))
    assert {len(batch) for batch in state.batches("validate", 0)} == {5} and len(state.pairs["validate"]) % 5


# ---------------------------------------------------------------- what is asked of a Pack

def test_a_pack_without_these_labels_is_refused_before_any_work(pack, tmp_path):
    method = create_method("supervised", data=pack, classes=("Edema", "Hernia"))
    with pytest.raises(ValueError, match="has no label Hernia, on which this Supervised is trained; its labels are .*Edema.*choose among them .classes=., or take the Pack's .classes=None."):
        fit(method, pack, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def unlabelled(index: int) -> StudyRecord:
    image = ImageRecord(f"i{index}", np.full((64, 64), 20 * index, np.uint8))
    return StudyRecord(f"s{index}", f"p{index}", ("train", "validate", "test")[index % 3], [image], labels={"Edema": index % 2 if index % 3 else None})


def test_a_train_split_without_labels_is_refused(tmp_path):
    bare = write_pack(tmp_path / "bare", range(12), unlabelled, 64, {}, labels=("Edema",), require_report=False, progress=False)
    method = create_method("supervised", data=bare, classes=None)
    assert method.label_names == ("Edema",)
    with pytest.raises(ValueError, match="no study in the train split of .*bare has a label of Edema"):
        fit(method, bare, tmp_path / "run", progress=False)


# ---------------------------------------------------------------- doors

def test_a_run_goes_through_every_door(pack, tmp_path, recwarn):
    method = create_method("supervised", "tiny", data=pack)
    run = fit(method, pack, tmp_path / "run", epochs=3, batch_size=8, lr=3e-3, progress=False)
    assert collapse(run.diagnostics.iloc[-1].to_dict()) == [] and not [one for one in recwarn if "Collapse" in one.category.__name__]
    losses = run.metrics.query("split == 'train'").loss
    assert losses.iloc[-5:].mean() < losses.iloc[:5].mean() and run.metrics.query("split == 'validate'").auroc.between(0, 1).all()
    loaded = load_method(run)
    assert type(loaded) is Supervised and loaded.label_names == method.label_names and not (run.path / "text").exists()
    more = create_method("supervised", "tiny", init=run.path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in more.state_dict().items())
    assert all(torch.equal(value, loaded.image_encoder.state_dict()[name]) for name, value in load_encoder(run).state_dict().items())
    table = linear_probe({"supervised": run, "drawn": load_encoder("random-init", image="tiny_resnet")}, pack, fractions=(1.0,), seeds=(0,))
    assert table.auroc.notna().any() and set(table.encoder) == {"supervised", "drawn", "random-init"}
    own = head_predictions(run)      # of the Pack that it was trained on
    both = pd.concat([own.assign(encoder="its head"), own.assign(encoder="random-init", score=-own["score"])])
    macro = probe_table(own).set_index("finding").auroc["macro"]
    assert paired_gain(both)["gain"].iloc[0] == pytest.approx(2 * macro - 1) and set(own.study_id) == set(pack.studies.study_id[pack.studies.split == "test"])
    page = show_run(run, pack, tmp_path / "page.html").read_text()
    assert "This method reads no text" in page and 'alt="auroc"' in page
    for door in (lambda: retrieve(run, pack), lambda: zero_shot(run, pack), lambda: Studies(loaded, pack)[0], lambda: loaded.tokenizer,
                 lambda: phrase_maps(loaded, pack, ["effusion"], [0]), lambda: loaded.correspondence(tiny_batch(loaded))):
        with pytest.raises(NoText, match="Supervised reads no text"):
            door()
    with pytest.raises(ValueError, match="holds another run: config differs in uncertain"):
        fit(create_method("supervised", data=pack, uncertain="positive"), pack, run.path, epochs=3, batch_size=8, lr=3e-3, progress=False)
    assert Run(run.path).config["config"]["classes"] == list(method.label_names)


# ---------------------------------------------------------------- full size

@pytest.mark.parametrize("preset, side, encoder, count", [("paper", 224, "resnet50", 5), ("local-mi", 256, "resnet256", 9)])
def test_one_step_at_full_size(preset, side, encoder, count):
    "Batch 2: exactly what the loss sees moves, the head with it, and what is not known says nothing."
    torch.manual_seed(0)
    method = Supervised.from_preset(preset, image_weights=None).train()
    assert (method.config.image, len(method.label_names)) == (encoder, count)
    batch = tiny_batch(method, [(), ()], patients=[0, 1], size=side)
    losses = method(batch)
    losses.total.backward()
    assert batch.image.shape[2:] == (side, side) and losses.total.isfinite() and losses.total > 0 and losses.judged.shape == (2, count, 2)
    weights = dict(method.named_parameters())
    unused = {name for name, value in weights.items() if value.grad is None}
    assert unused == {name for name in weights if ".body.fc." in name}
    before, settings = {name: value.detach().clone() for name, value in weights.items()}, TrainConfig.of(method, "run")
    groups = loop._parameter_groups(method, settings)
    torch.optim.Adam([{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups], settings.lr).step()
    moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert moved == weights.keys() - unused and {"head.weight", "head.bias"} <= moved


# ---------------------------------------------------------------- an epoch that measured nothing

@pytest.mark.parametrize("seen, kept", [([math.nan, 0.5, 0.7], 0.5), ([0.5, math.nan, 0.4], 0.4), ([0.5, 0.4, math.nan], 0.4), ([0.5, math.nan, 0.6], 0.5), ([math.nan] * 3, math.nan)])
def test_an_epoch_without_a_number_is_not_the_best(seen, kept, pack, tmp_path, monkeypatch):
    "The weights of the best number are kept, whatever epochs without one stand around it; without any, the last."
    method, left = create_method("supervised", data=pack), iter(seen)
    monkeypatch.setattr(Supervised, "monitor", lambda self, values: next(left))
    states = []
    run = fit(method, pack, tmp_path / "run", each_epoch=lambda run: states.append({name: value.clone() for name, value in method.state_dict().items()}),
              epochs=3, batch_size=32, lr=1e-3, progress=False, schedule="plateau", plateau_patience=1, patience=2)
    wanted = states[2 if math.isnan(kept) else seen.index(kept)]
    best = read_weights(run.path / "weights.safetensors")
    assert len(states) == 3 and all(torch.equal(value, wanted[name]) for name, value in best.items())


# ---------------------------------------------------------------- one rule for uncertain and blank labels, the recipe's

def asking(pack, **recipe):
    "The same Pack with a recipe."
    other = copy.copy(pack)
    other.manifest = pack.manifest | {"source": pack.manifest["source"] | {"recipe": recipe}}
    return other


def trained_targets(method, pack):
    "What a method's loss takes for the targets of all studies."
    pairs = Pairs(pack, None, method.preprocessing, need_text=False)
    batch = read_batch(pairs, range(len(pairs)))
    with torch.no_grad():
        return method(batch).judged[..., 1].numpy(), batch.study_id.numpy()


@pytest.mark.parametrize("recipe", [{}, dict(uncertain="positive"), dict(uncertain="negative", blank="ignore"), dict(uncertain=dict(Edema="positive", Cardiomegaly="negative"))], ids=str)
def test_it_trains_on_the_targets_that_a_probe_of_the_same_pack_has(recipe, pack, tmp_path, recwarn):
    data, names = asking(pack, **recipe), ["Edema", "Cardiomegaly"]
    method = create_method("supervised", "tiny", data=data, classes=names)
    found, rows = trained_targets(method, data)
    np.testing.assert_array_equal(found, study_targets(data, names).iloc[rows].to_numpy(np.float32))
    assert (pack.labels[names] == -1).to_numpy().any() and (method.config.classes, method.config.blank) == (names, recipe.get("blank", "negative"))
    run = fit(method, data, tmp_path / "run", epochs=1, batch_size=32, progress=False)
    assert not [one for one in recwarn if "rules" in str(one.message)] and load_method(run.path).label_rule == method.label_rule


def test_a_class_that_the_recipe_says_nothing_of_is_read_alike_at_every_door(pack, tmp_path):
    "A recipe with a rule of each class, and one class more: its uncertain labels are left out, in training and in measuring."
    data, names = asking(pack, uncertain=dict(Edema="positive")), ["Edema", "Pneumothorax"]
    wanted = label_targets(pack.labels[names], dict(Edema="positive", Pneumothorax="ignore"))
    assert (pack.labels["Pneumothorax"] == -1).any() and pack.labels.notna().any(axis=1).all()
    method = create_method("supervised", "tiny", data=data, classes=names)
    found, rows = trained_targets(method, data)
    np.testing.assert_array_equal(found, wanted.iloc[rows].to_numpy(np.float32))
    pd.testing.assert_frame_equal(study_targets(data, names), wanted)
    np.testing.assert_array_equal(pack_task(data, classes=names).targets, wanted.iloc[data.image_table["study"]].dropna(how="all").to_numpy())
    own, test = head_predictions(method, data), (pack.studies["split"] == "test").to_numpy()
    for name in names:
        np.testing.assert_array_equal(own.label[own.finding == name], wanted[name][test])
    with np.errstate(invalid="ignore"):
        table = linear_probe({"one": method.image_encoder}, data, fractions=(1.0,), seeds=(0,), findings=names, baseline=None)
    counted = table.set_index("finding").n_test
    assert {name: counted[name] for name in names} == {name: int(wanted[name][test].notna().sum()) for name in names}
    with pytest.raises(ValueError, match="expected a policy for Pneumothorax too"):
        study_targets(data, names, dict(Edema="positive"))      # a rule of the caller's is to be whole
    assert loop._other_rules(method, data) == ""
    other = create_method("supervised", "tiny", data=data, classes=names, uncertain="positive")
    assert loop._other_rules(other, data) == "uncertain labels of Pneumothorax count as positive, not ignore"


def test_a_rule_that_is_set_is_kept_and_said(pack, tmp_path):
    data = asking(pack, uncertain="ignore")
    method = create_method("supervised", "tiny", data=data, classes=("Edema", "Cardiomegaly"), uncertain=("positive", "ignore"))
    found, rows = trained_targets(method, data)
    wanted = study_targets(data, ["Edema", "Cardiomegaly"], {"Edema": "positive", "Cardiomegaly": "ignore"}).iloc[rows]
    np.testing.assert_array_equal(found, wanted.to_numpy(np.float32))
    with pytest.warns(UserWarning, match="uncertain labels of Edema count as positive, not ignore. Leave them out"):
        fit(method, data, tmp_path / "run", epochs=1, batch_size=32, progress=False)
    paper = Supervised(Supervised.Config(**{**Supervised.presets["paper"][0], "image": "tiny_resnet", "image_weights": None}))
    assert paper.label_rule == {"uncertain": "positive", "blank": "negative"}
    with pytest.raises(ValueError, match="uncertain has 2 words; expected one, or one of each"):
        Supervised.from_preset("tiny", uncertain=("positive", "ignore"))


# ---------------------------------------------------------------- the layer itself, at every door

def test_the_layer_of_a_run_is_measured_at_the_command_line_as_in_python(pack, tmp_path, capsys):
    classes = ("Edema", "Cardiomegaly")
    taught = fit(create_method("supervised", data=pack, classes=classes), pack, tmp_path / "taught", epochs=1, batch_size=32, progress=False)
    alone = fit(create_method("simclr", data=pack), pack, tmp_path / "alone", epochs=1, batch_size=32, progress=False)
    probe = ["probe", "--data", str(pack.path), "--fractions", "1.0", "--seeds", "0", "--out", str(tmp_path / "out"), "--encoders"]
    assert main([*probe, str(alone.path), str(taught.path), "--heads"]) == 0
    said, found = capsys.readouterr().out, pd.read_csv(tmp_path / "out" / "heads.csv")
    wanted = head_table({"taught": taught}, pack)
    pd.testing.assert_frame_equal(found, wanted)
    pd.testing.assert_frame_equal(wanted[["auroc", "low", "high"]], probe_table(head_predictions(taught))[["auroc", "low", "high"]])
    assert found["finding"].tolist() == [*classes, "macro"] and (found["low"] <= found["auroc"]).all() and "Layers of their own" in said
    rules = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert (rules["findings"], rules["uncertain"], rules["blank"]) == (list(classes), "ignore", "negative")
    assert main([*probe, str(alone.path), "--heads"]) == 1
    assert "--heads: none of" in capsys.readouterr().err and not (tmp_path / "alone" / "probe").exists()
