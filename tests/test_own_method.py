"""A stranger's method, image encoder and data set, in a module outside medvis, go the whole way: command line, runs, loading, probe, maps, phrases.
So does the method of CONTRIBUTING.md, word for word."""
import importlib
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from commands import run_fresh, run_line
from notebooks import ROOT
from safetensors.torch import load_file

from medvis.analyse import draw_map
from medvis.data.sets.registry import DATASETS, list_datasets
from medvis.data.pack import Pack
from medvis.data.pairs import Pairs, collate
from medvis.data.phantom import Phantom
from medvis.data.phrases import phantom_phrases
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders.image import IMAGE_ENCODERS
from medvis.evaluate import ground_phrases, linear_probe
from medvis.exchange import export
from medvis.methods import METHODS, list_methods, list_presets, register_method
from medvis.methods.settings import SETTINGS
from medvis.train import Run, TrainConfig, create_method, fit, load_encoder, load_method
from medvis.train.run import _find_kind, _name_method

OWN = '''
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from medvis.data.sets.class_folder import CLASS_FOLDER
from medvis.data.sets.registry import register_dataset
from medvis.data.preprocessing import Preprocessing
from medvis.encoders import ImageFeatures, register_encoder
from medvis.methods import Method, MethodConfig, add_up, cosine_correspondence, register_method


@register_encoder("patches")
class Patches(nn.Module):
    "Squares of 8 x 8 pixels, each projected: no part of medvis' own encoders."

    def __init__(self, size: int = 64, width: int = 16):
        super().__init__()
        self.preprocessing, self.region_dim, self.whole_dim = Preprocessing(size=size, crop=1.0, channels=1), width, width
        self.body = nn.Conv2d(1, width, 8, stride=8)

    def forward(self, image):
        maps = self.body(image)
        return ImageFeatures(maps.flatten(2).mT, maps.mean((2, 3)), tuple(maps.shape[2:]))


@dataclass(frozen=True)
class MineConfig(MethodConfig):
    "Settings of mine."
    power: float = 2.0
    "Exponent of the gap."


@register_method("mine")
class Mine(Method):
    "Pulls an image to its text, and knows no negatives."
    Config = MineConfig
    presets = {"tiny": (dict(image="patches", image_weights=None, text="tiny-bert", dim=8), dict(lr=1e-3, epochs=1, batch_size=16, max_tokens=64))}

    def __init__(self, config, tokenizer=None):
        super().__init__(config, tokenizer, whole="mean")
        self.image_head, self.text_head = nn.Linear(self.image_encoder.whole_dim, config.dim), nn.Linear(self.text_encoder.dim, config.dim)

    def forward(self, batch):
        gap = self.embed_image(batch.image) - self.embed_text(batch)
        return add_up(gap=gap.abs().pow(self.config.power).mean())

    def embed_image(self, image):
        return self.image_head(self.image_encoder(image).whole)

    def embed_text(self, batch):
        return self.text_head(self.read(batch).whole)

    def correspondence(self, batch):
        image, text = self.encode(batch)
        return cosine_correspondence(self.image_head(image.regions), self.text_head(text.words), self.text_head(text.sentences), text, image.grid)


WARD = register_dataset(replace(CLASS_FOLDER, name="ward", title="Our ward"))
'''
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPE = CONTRIBUTING[CONTRIBUTING.index("## Add a method"):CONTRIBUTING.index("## Checks")]
CODE, COMMANDS = (re.search(rf"^```{kind}\n(.*?)^```", RECIPE, re.MULTILINE | re.DOTALL)[1] for kind in ("python", "sh"))
SMALLER = {     # what takes an hour as it stands
    "prepare phantom": "--studies 60 --no-progress", "pretrain siglip:SigLIP --data": "--epochs 1 --batch-size 16 --hidden 32 --dim 16 --no-progress",
    "probe": "--fractions 1.0 --seeds 0", "show": "--studies 2"}


def forget(names: tuple[str, ...] = ("their_package.own", "their_package", "siglip")) -> None:
    "Take what the stranger's modules registered out of the lists, and the modules out of this process."
    for registry in (METHODS, IMAGE_ENCODERS, DATASETS):
        for name, origin in [*registry.origins.items()]:
            if origin.partition(":")[0] in names:       # what other tests of this process registered stays
                registry.remove(name)
                SETTINGS.pop(name, None)
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "A folder with the stranger's modules, and what the command line made of them: a Pack and runs in this process, tables and pages in a fresh one."
    home = tmp_path_factory.mktemp("home")
    (home / "code" / "their_package").mkdir(parents=True)
    (home / "code" / "their_package" / "own.py").write_text(OWN)
    (home / "code" / "siglip.py").write_text(CODE)
    DATASETS["class-folder"].simulate(home / "files", [Phantom(64, 0)[index] for index in range(10)])
    lines = [" ".join([line, *(more for start, more in SMALLER.items() if line.startswith(f"medvis {start}"))]) for line in COMMANDS.splitlines()]
    assert all(len([line for line in lines if line.endswith(more)]) == 1 for more in SMALLER.values())
    train = [line for line in lines if line.startswith(("medvis prepare", "medvis pretrain"))] + [
        "medvis pretrain their_package.own:Mine --help",
        "medvis pretrain their_package.own:Mine --data packs/phantom --run runs/mine --power 3 --seed 5 --no-progress",
        "medvis pretrain mgca --data packs/phantom --run runs/mgca --image their_package.own:Patches --dim 8 --hidden 16 --prototypes 5 --epochs 1 --batch-size 16 --no-progress",
        "medvis prepare their_package.own:WARD --root files --out packs/ward --size 64 --max-rejects 1 --no-progress"]
    measure = [line for line in lines if line not in train] + [
        "medvis probe --data packs/phantom --encoders runs/mine runs/mgca --fractions 1.0 --seeds 0", "medvis phrases runs/mine", "medvis presets their_package.own:Mine"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("COLUMNS", "200")
        patch.syspath_prepend(home / "code")
        done = dict(zip(train, map(run_line, train)))
        forget()
    done |= dict(zip(measure, run_fresh(measure, home, home / "code"), strict=True))
    failed = {line: output for line, (code, output) in done.items() if code}
    assert not failed, failed
    (home / "output.json").write_text(json.dumps({line: output for line, (_, output) in done.items()}))
    return home


@pytest.fixture
def own(home, monkeypatch):
    "The stranger's module, imported."
    monkeypatch.syspath_prepend(home / "code")
    yield importlib.import_module("their_package.own")
    forget()


def test_its_presets_are_listed(home, own):
    said = json.loads((home / "output.json").read_text())["medvis presets their_package.own:Mine"]
    listed, _, advice = said.partition("Next: ")
    assert listed.split() == ["their_package.own:Mine", "tiny"] and advice.startswith("medvis pretrain")
    assert list_presets("their_package.own:Mine") == ["tiny"]
    for name, missing in (("their_package.own:Nothing", "Nothing"), ("nowhere:Mine", "which cannot be imported"), ("their_package.own:Patches", "is no method")):
        code, said = run_line(f"medvis presets {name}")
        assert code == 1 and missing in said and "Traceback" not in said, said


def test_the_command_line_knows_it(home):
    output = json.loads((home / "output.json").read_text())
    assert "--power FLOAT" in (page := output["medvis pretrain their_package.own:Mine --help"]) and "Exponent of the gap." in page
    assert "--scale FLOAT" in output["medvis pretrain siglip:SigLIP --help"]
    config = json.loads((home / "runs" / "mine" / "config.json").read_text())
    assert config["method"] == "mine" and config["config"]["power"] == 3
    assert config["defined_in"] == {"method": "their_package.own:Mine", "image": "their_package.own:Patches"}
    assert (home / "runs" / "siglip" / "page.html").exists() and (home / "runs" / "mine" / "phrases" / "phrases.csv").exists()
    assert {"mine", "mgca", "random-init"} <= {row.split(",")[0] for row in (home / "runs" / "mine" / "probe" / "probe.csv").read_text().splitlines()}
    assert Pack(home / "packs" / "ward").manifest["source"]["kind"] == "ward"


def test_without_its_module_the_run_names_the_import(home):
    for run, missing in (("mine", "their_package"), ("siglip", "siglip")):
        with pytest.raises(ValueError, match=rf"config.json: .* is defined in .*No module named '{missing}'.*PYTHONPATH"):
            load_method(home / "runs" / run)
    with pytest.raises(ValueError, match="the image encoder 'their_package.own:Patches' .*No module named 'their_package'"):
        load_method(home / "runs" / "mgca")
    code, output = run_line(f"medvis probe --data {home}/packs/phantom --encoders {home}/runs/mine")
    assert code == 1 and output.count("\n") == 1 and "No module named 'their_package'" in output


def test_it_is_loaded_where_nobody_imported_it(home, own):
    forget()
    method = load_method(home / "runs" / "mine")
    assert type(method).__name__ == "Mine" and METHODS["mine"] is type(method) and method.config.power == 3
    assert type(load_encoder(home / "runs" / "mine")).__name__ == "Patches"


def test_a_run_of_medvis_with_their_encoder(home, own):
    method = create_method("mgca", data=Pack(home / "packs" / "phantom"), image="patches", dim=8, hidden=16, prototypes=5)
    config = {**_name_method(method), "config": {"image": method.config.image}}
    assert config["method"] == "mgca" and config["defined_in"] == {"image": "their_package.own:Patches"}
    forget()
    with pytest.raises(ValueError, match="unknown image encoder 'patches'; choose from resnet50, "):
        load_encoder("random-init", image="patches")
    assert _find_kind(home / "config.json", config) is METHODS["mgca"] and type(load_encoder("random-init", image="patches")).__name__ == "Patches"


def test_in_the_library(home, own, tmp_path):
    assert list_methods()[-1] == "mine" and list_presets("mine") == ["tiny"] and list_datasets()[-1] == "ward"
    pack = Pack(home / "packs" / "phantom")
    method = create_method("mine", data=pack, seed=5, power=3.0)
    start, weights = {name: value.clone() for name, value in method.state_dict().items()}, load_file(home / "runs" / "mine" / "last.safetensors")
    run = fit(method, pack, TrainConfig.of(method, tmp_path / "run", seed=5, progress=False))
    same = load_file(run.path / "last.safetensors")
    assert all(torch.equal(same[name], weights[name]) for name in weights), "the command line and the library train the same"
    assert any(not torch.equal(same[name], start[name]) for name in weights)
    again = create_method("their_package.own:Mine", init=run.path)
    assert all(torch.equal(value, run.method().state_dict()[name]) for name, value in again.state_dict().items())
    assert load_encoder("random-init", image="patches", width=4).whole_dim == 4
    export(run, "safetensors", tmp_path / "out")
    exported = load_encoder(tmp_path / "out" / "image.safetensors", image="patches")
    assert torch.equal(exported.body.weight, run.method().image_encoder.body.weight)
    table = linear_probe(exported, pack, fractions=(1.0,), seeds=(0,))
    assert table.auroc.between(0, 1).any()


@pytest.mark.parametrize("name", ["mine", "siglip"])
def test_it_is_drawn_and_grounded(home, own, name):
    pack, method = Pack(home / "packs" / "phantom"), Run(home / "runs" / name).method()
    batch = collate([Pairs(pack, method.tokenizer, method.preprocessing, method.sampling, "test")[0]])
    with torch.no_grad():
        found = method.correspondence(batch)
    figure, ax = plt.subplots()
    draw_map(ax, batch.image[0], found.sentences[0, :, 0], found.grid)
    assert ax.images
    plt.close(figure)
    rows = ground_phrases(method, pack, phantom_phrases(pack))
    assert len(rows) and rows.hit.isin([0, 1]).all()


def test_the_recipe_s_loss_by_hand(own):
    siglip = importlib.import_module("siglip")
    image, text = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])     # cosines 1 1 / 0 0
    one = torch.tensor(1.0)
    softplus = lambda x: torch.log1p(torch.exp(torch.tensor(x)))     # noqa: E731
    own_pairs, others = softplus(-2.0) + softplus(-1.0), softplus(2.0) + softplus(1.0)      # logits 2 2 / 1 1
    torch.testing.assert_close(siglip.siglip_loss(image, text, one, one), (own_pairs + others) / 2)
    torch.testing.assert_close(siglip.siglip_loss(image, text, one, one, torch.eye(2, dtype=torch.bool)), own_pairs / 2)


def test_the_recipe_learns(home, own, tmp_path):
    importlib.import_module("siglip")
    pack = Pack(home / "packs" / "phantom")
    method = create_method("siglip", data=pack, hidden=32, dim=16)
    run = fit(method, pack, TrainConfig.of(method, tmp_path / "run", epochs=4, batch_size=16, progress=False))
    losses = run.metrics.query("split == 'train'").groupby("epoch").loss.mean()
    assert losses.iloc[-1] < losses.iloc[0]


def test_names_are_not_taken_twice(own):
    with pytest.raises(ValueError, match="there is a method 'mgca' already .one of medvis.: choose another name for their_package.own:Mine"):
        register_method("mgca")(own.Mine)
    with pytest.raises(ValueError, match="there is a method 'mine' already .their_package.own:Mine."):
        register_method("mine")(type("Other", (own.Mine,), {"__module__": "elsewhere"}))
    importlib.reload(own)       # as a cell that is run again


def test_what_a_notebook_defined(home, own, tmp_path, monkeypatch):
    "A class of `__main__` is loaded where its cell has run, and nowhere else."
    pack = Pack(home / "packs" / "phantom")
    kind = register_method("noted")(type("Noted", (own.Mine,), {"__module__": "__main__"}))
    method = create_method("noted", data=pack)
    run = fit(method, pack, TrainConfig.of(method, tmp_path / "run", progress=False))
    assert type(run.method()) is kind
    METHODS.remove("noted")
    del SETTINGS["noted"]
    with pytest.raises(ValueError, match="the method 'noted' is __main__:Noted, and was defined in a notebook or script: run its definition first"):
        run.method()
    monkeypatch.setattr(sys.modules["__main__"], "Noted", kind, raising=False)
    assert type(run.method()) is kind


def test_a_pack_of_another_vocabulary_is_refused(home, tmp_path):
    pack, other = Pack(home / "packs" / "phantom"), prepare_phantom(PhantomConfig(tmp_path / "other", studies=40, seed=1, progress=False))
    with pytest.raises(ValueError, match="'tiny-bert' has no vocabulary of its own: create_method"):
        METHODS["convirt"].from_preset("tiny")
    method = create_method("convirt", data=other)
    with pytest.raises(ValueError, match="from the reports of another Pack than .*phantom: make the method with create_method"):
        fit(method, pack, TrainConfig.of(method, tmp_path / "run", progress=False))
    assert not (tmp_path / "run").exists()
