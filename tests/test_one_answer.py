"""A wish has one answer, whether it is asked at the command line, of a library function or of a task: as the Pack's recipe says, unless the caller says otherwise."""
import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from medvis.cli.commands import main
from medvis.data.sets.chexpert import _COMPETITION
from medvis.data.sets.registry import simulate
from medvis.data.pack import Pack
from medvis.data.phrases import phantom_phrases
from medvis.data.tasks import label_policy, pack_task, study_targets
from medvis.evaluate import evaluate, linear_probe, probe_predictions, prompt_table, zero_shot
from medvis.evaluate.ground import ground, ground_phrases, grounding_table
from medvis.evaluate.models import as_method, check_unseen
from medvis.evaluate.retrieve import PairScores, retrieve, _zero_shot_targets
from medvis.train import TrainConfig, create_method, fit, load_encoder
from medvis.train.checkpoint import write_json
from medvis.train.run import Provenance, Run, note_provenance

PROBE = dict(fractions=(0.2, 1.0), seeds=(0,))
OPTIONS = "--fractions 0.2 1.0 --seeds 0".split()


def command(*words) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory):
    "LoVT's CheXpert: uncertain counts as positive, five of fourteen classes, small shares are the first rows."
    root = tmp_path_factory.mktemp("chexpert")
    simulate("chexpert", root / "files", studies=120, size=64)
    command(*f"prepare chexpert --root {root}/files --out {root}/pack --recipe lovt --validation 20 --size 64 --no-progress".split())
    return Pack(root / "pack")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "LoVT's MIMIC-CXR, with reports, and a run of one epoch on it."
    root = tmp_path_factory.mktemp("mimic")
    torch.set_num_threads(1)
    simulate("mimic-cxr", root / "files", studies=120, size=64)
    command(*f"prepare mimic-cxr --root {root}/files --out {root}/pack --recipe lovt --size 64 --no-progress".split())
    command(*f"pretrain convirt --data {root}/pack --run {root}/run --epochs 1 --hidden 16 --dim 8 --batch-size 16 --no-progress".split())
    return root


@pytest.fixture(scope="module")
def data(home):
    return Pack(home / "pack")


def test_the_recipes_are_not_the_default(chexpert, data):
    for pack in (chexpert, data):
        policy = label_policy(pack)
        assert policy.uncertain == "positive" and len(policy.findings) == 5 < len(pack.labels.columns) and pack.recipe["subset"] == "first"
        assert (pack.labels[list(policy.findings)] == -1).to_numpy().any()
    assert set(label_policy(chexpert).findings) == set(_COMPETITION)
    said = label_policy(chexpert, ["Edema", "Fracture"], "ignore", "ignore")
    assert (said.findings, said.uncertain, said.blank) == (("Edema", "Fracture"), "ignore", "ignore")


@pytest.mark.parametrize("which", ["chexpert", "data"])
def test_probe(which, request, home, tmp_path):
    pack = request.getfixturevalue(which)
    given = [] if which == "data" else ["--image", "tiny_resnet"]
    name = home / "run" if which == "data" else "random-init"
    command("probe", "--data", pack.path, "--encoders", name, *given, *OPTIONS, "--out", tmp_path / "cli")
    encoder = load_encoder(name, "tiny_resnet")
    if which == "chexpert":         # drawn anew at each door: the numbers of features differ, the answers asked for do not
        tables = [linear_probe({"random-init": encoder}, pack, **PROBE)]
    else:
        tables = [linear_probe(one, pack, **PROBE) for one in ({"run": encoder}, name, Run(name), {"run": as_method(name)}, {"run": str(name)})]
    cli = pd.read_csv(tmp_path / "cli" / "probe.csv")
    rules = json.loads((tmp_path / "cli" / "probe.json").read_text())
    assert rules["uncertain"] == "positive" and rules["blank"] == "negative" and rules["subset"] == "first" and len(rules["findings"]) == 5
    for table in tables:
        columns = list(table) if which == "data" else ["encoder", "finding", "fraction", "n", "positives", "n_test", "positives_test"]
        pd.testing.assert_frame_equal(table[columns], cli[columns], check_dtype=False)
    said = probe_predictions({"it": encoder}, pack, **PROBE, findings=rules["findings"], baseline=None, uncertain="positive", blank="negative", subset="first")
    silent = probe_predictions({"it": encoder}, pack, **PROBE, baseline=None)
    pd.testing.assert_frame_equal(said, silent)
    task = pack_task(pack)          # and so does a protocol's task
    targets = study_targets(pack)
    assert list(targets) == list(task.classes) == rules["findings"]
    rows = pack.image_table["study"].to_numpy()[task.images["image"]]
    assert np.array_equal(targets.to_numpy()[rows], task.targets, equal_nan=True)


def test_evaluate(chexpert, tmp_path):
    torch.manual_seed(0)
    encoder = load_encoder("random-init", "tiny_resnet")
    torch.save(encoder.body.state_dict(), tmp_path / "it.pt")
    words = "--seeds 0 1 --fractions 0.2 --lrs 0.03 --epochs 2 --resamples 20 --device cpu --no-progress --image tiny_resnet"
    command("evaluate", "tiny-linear", "--data", chexpert.path, "--encoder", tmp_path / "it.pt", "--out", tmp_path / "cli", *words.split())
    options = dict(seeds=(0, 1), fractions=(0.2,), lrs=(0.03,), epochs=2, resamples=20, device="cpu", progress=False)
    for number, (given, task) in enumerate([({"it.pt": encoder}, chexpert), ({"it.pt": encoder}, pack_task(chexpert, name=chexpert.path.name)),
                                            (str(tmp_path / "it.pt"), str(chexpert.path))]):
        evaluate(given, task, "tiny-linear", tmp_path / str(number), image="tiny_resnet", **options)
        for file in ("results.csv", "patients.csv"):
            assert (tmp_path / str(number) / file).read_bytes() == (tmp_path / "cli" / file).read_bytes(), file
    results = pd.read_csv(tmp_path / "cli" / "results.csv")
    train = pack_task(chexpert).rows("train", 0.2, how="first")
    assert set(results["encoder"]) == {"it.pt", "random-init"} and len(train) == round(0.2 * len(pack_task(chexpert).rows("train")))


def test_retrieve_and_zero_shot(home, data, tmp_path):
    command("retrieve", home / "run", "--out", tmp_path / "cli")
    for name, (run, pack) in {"run": (home / "run", None), "method": (as_method(home / "run"), data)}.items():
        retrieve(run, pack, out=tmp_path / name)
        zero_shot(run, pack, out=tmp_path / name)
        for file in ("retrieval.csv", "zero_shot_findings.csv", "zero_shot_prompts.csv", "zero_shot_classes.csv"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "cli" / file).read_bytes(), file
    rules = json.loads((tmp_path / "cli" / "retrieval.json").read_text())
    assert rules["uncertain"] == "positive" and rules["findings"] == list(label_policy(data).findings)
    assert json.loads((tmp_path / "cli" / "zero_shot.json").read_text())["uncertain"] == "positive"
    named = pd.read_csv(tmp_path / "cli" / "zero_shot_findings.csv").set_index(["finding", "metric"])
    truth = study_targets(data)[(data.studies["split"] == "test").to_numpy()]
    for finding in named.index.get_level_values(0).drop("macro"):
        assert named.loc[(finding, "AUROC"), "positives"] >= (truth[finding] == 1).sum()
    command("retrieve", home / "run", "--out", tmp_path / "other", "--uncertain", "negative", "--findings", "Edema", "Atelectasis")
    assert json.loads((tmp_path / "other" / "retrieval.json").read_text())["findings"] == ["Edema", "Atelectasis"]
    other = pd.read_csv(tmp_path / "other" / "zero_shot_findings.csv")
    assert set(other["finding"]) <= {"Edema", "Atelectasis", "macro"}


def test_targets_of_prompts_follow_the_recipe(data, home):
    images = data.image_table[["image_id"]].assign(study_id=data.studies["study_id"].iloc[data.image_table["study"]].to_numpy())
    pairs = PairScores(np.zeros((len(data), 4)), images, prompt_table(["Edema"])[:4])
    found = _zero_shot_targets(pairs, data)["Edema"].to_numpy()
    assert np.array_equal(found, study_targets(data)["Edema"].to_numpy()[data.image_table["study"]], equal_nan=True)


def test_phrases(tmp_path):
    command(*f"prepare phantom --out {tmp_path}/pack --studies 60 --size 64 --no-progress".split())
    command(*f"pretrain convirt --data {tmp_path}/pack --run {tmp_path}/run --epochs 1 --hidden 16 --dim 8 --batch-size 16 --no-progress".split())
    command("phrases", tmp_path / "run", "--out", tmp_path / "cli")
    pack = Pack(tmp_path / "pack")
    for name, (run, data) in {"run": (tmp_path / "run", None), "method": (as_method(tmp_path / "run"), pack)}.items():
        table = ground(run, data, out=tmp_path / name)
        for file in ("phrases.csv", "findings.csv"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "cli" / file).read_bytes()
    pd.testing.assert_frame_equal(table, grounding_table(ground_phrases(as_method(tmp_path / "run"), pack, phantom_phrases(pack))))


def test_leaks_are_refused_at_every_door(home, data, tmp_path):
    "The run's training patients are tested on: in a Pack of other splits, whatever door it is asked at, and by the method that was trained just now."
    studies = data.studies.copy()
    path = shutil.copytree(data.path, tmp_path / "pack")
    table = pd.read_parquet(path / "studies.parquet")
    table.assign(split=studies["split"].map({"train": "test", "validate": "validate", "test": "train"}).to_numpy()).to_parquet(path / "studies.parquet", index=False)
    manifest = {**data.manifest, "hash": "other", "guard": {"against": {}, "leaks": {}}}
    content = (path / "studies.parquet").read_bytes()
    manifest["files"] = {**manifest["files"], "studies.parquet": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    write_json(path / "manifest.json", {key: value for key, value in manifest.items() if key != "checksum"})
    other = Pack(path)
    method, trained = as_method(home / "run"), as_method(home / "run")
    vars(trained).pop("provenance")
    vars(trained.image_encoder).pop("provenance")
    trained.training_settings, trained.preset = method.training_settings, "tiny"
    fit(trained, data, TrainConfig(run=tmp_path / "again", epochs=1, batch_size=16, progress=False, **trained.training_settings))
    begun = create_method("convirt", init=home / "run", hidden=16, dim=8)      # goes on from that run, on whatever data
    assert fit(begun, other, TrainConfig.of(begun, tmp_path / "more", epochs=1, batch_size=16, progress=False)).manifest["init"] == [method.provenance.data]
    for model in (method, trained, begun):
        doors = {"probe": lambda: linear_probe({"it": model}, other, **PROBE), "encoder": lambda: linear_probe(model.image_encoder, other, **PROBE),
                 "retrieve": lambda: retrieve(model, other), "zero-shot": lambda: zero_shot(model, other),
                 "evaluate": lambda: evaluate({"it": model}, other, "tiny-linear", tmp_path / "out", progress=False),
                 "ground": lambda: ground(model, other, [])}
        for name, door in doors.items():
            with pytest.raises(ValueError, match="--allow-leaks"):
                door()
    check_unseen(other, [load_encoder("random-init", "tiny_resnet")])


def test_what_somebody_else_declares_is_refused_at_every_door(home, data, tmp_path):
    "A model that declares the split that is measured is refused; one that declares another split, or no data, is said to be so."
    method, rules = as_method(home / "run"), dict(allow_leaks=False)
    doors = {"probe": lambda **more: linear_probe({"it": method}, data, **PROBE, **more), "encoder": lambda **more: linear_probe(method.image_encoder, data, **PROBE, **more),
             "retrieve": lambda **more: retrieve(method, data, resamples=5, **more), "zero-shot": lambda **more: zero_shot(method, data, resamples=5, **more),
             "some studies": lambda **more: retrieve(method, data, resamples=5, studies=5, **more),
             "evaluate": lambda **more: evaluate({"it": method}, data, "tiny-linear", tmp_path / "out", progress=False, **more)}
    for declared, refused in (["mimic test"], True), (["mimic"], True), (["mimic train"], False), ([], False):
        note_provenance(method, Provenance(tmp_path / "foreign", {"hash": "declared 0", "path": "file.pt", "declared": declared}))
        for name, door in doors.items():
            if refused:
                with pytest.raises(ValueError, match="declares to have been trained on mimic.*--allow-leaks"):
                    door(**rules)
            else:
                with pytest.warns(UserWarning, match="somebody else's model"):
                    door(**rules)
    note_provenance(method, Provenance(tmp_path / "foreign", {"hash": "declared 0", "path": "file.pt", "declared": ["mimic test"]}))
    with pytest.warns(UserWarning, match="somebody else's model"):
        doors["retrieve"](allow_leaks=True)
