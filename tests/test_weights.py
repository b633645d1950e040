"""Weights, vocabularies and checkpoints from elsewhere: what is absent, damaged or hostile is refused in one line, and runs nothing."""
import argparse
import json
import pathlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from medvis.data.pairs import Pairs, collate, tokenise
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.views import Views
from medvis.encoders import image_encoder, pretrained_encoder, text_encoder
from medvis.encoders.text import train_tokenizer
from medvis.evaluate import retrieve
from medvis.evaluate.encoder import encode, _open_feature_files
from medvis.evaluate.predictions import load_predictions
from medvis.methods import METHODS
from medvis.methods import method as method_module
from medvis.methods.method import phantom_tokenizer
from medvis.train import load_encoder
from medvis.train.checkpoint import load_checkpoint

TEXT = "No pleural effusion, no pneumothorax. Heart-size (CTR 0.5) is normal; X-ray of 2 views."
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("pack") / "pack", studies=24, size=64, progress=False))


def save_text(folder, kind="Bert", layers=2, **changes):
    "A tiny text model with its tokenizer, as transformers writes them."
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 200)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **{**TINY, "num_hidden_layers": layers, **changes})
    model = getattr(transformers, f"{kind}Model")(config)
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return model, tokenizer


def rename(folder, change, name="model.safetensors"):
    "Write the weights of a folder anew, as `change` of the state dict."
    state = change(load_file(folder / name))
    (folder / name).unlink()
    save_file({key: value.clone() for key, value in state.items()}, folder / name)
    return state


def one_line(call, *words, kind=(ValueError, OSError)):
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


# ---------------------------------------------------------------- what is absent would be random

@pytest.mark.parametrize("prefix", ["bert.", "my.encoder.", "module.bert.", "text_model.bert.", "model."])
def test_a_prefix_that_holds_all(tmp_path, prefix):
    model, _ = save_text(tmp_path)
    rename(tmp_path, lambda state: {prefix + key: value for key, value in state.items()} | {"cls.bias": torch.zeros(3)})
    loaded = text_encoder(str(tmp_path)).body.state_dict()
    assert loaded and all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.items())


def test_the_pooler_may_be_absent_where_nothing_reads_it(tmp_path):
    save_text(tmp_path)
    rename(tmp_path, lambda state: {key: value for key, value in state.items() if not key.startswith("pooler.")})
    assert text_encoder(str(tmp_path)).body.pooler is None
    one_line(lambda: text_encoder(str(tmp_path), whole="pooler"), str(tmp_path), "pooler.dense.bias", "would be random")


LOST = {
    "another name": lambda state: {key.replace("attention", "attn"): value for key, value in state.items()},
    "a layer": lambda state: {key: value for key, value in state.items() if ".layer.1." not in key},
    "one weight": lambda state: {key: value for key, value in state.items() if not key.endswith("layer.0.output.dense.bias")},
    "a shape": lambda state: {key: value[:-1] if key.endswith("word_embeddings.weight") else value for key, value in state.items()},
    "nan": lambda state: {key: value * torch.nan if key.endswith("layer.1.output.dense.bias") else value for key, value in state.items()},
    "inf": lambda state: {key: value + torch.inf if key.endswith("layer.1.output.dense.bias") else value for key, value in state.items()},
    "half of it below a prefix": lambda state: {("bert." if ".layer.1." in key else "x.") + key: value for key, value in state.items()},
}


@pytest.mark.parametrize("lost", LOST)
def test_what_a_text_folder_lacks(tmp_path, lost):
    save_text(tmp_path)
    rename(tmp_path, LOST[lost])
    one_line(lambda: text_encoder(str(tmp_path)), str(tmp_path), "e.g.", "NaN or infinite" if lost in ("nan", "inf") else "would be random", kind=ValueError)


@pytest.mark.parametrize("form", ["bin", "shards", "shard lost"])
def test_other_forms_of_files(tmp_path, form):
    model, _ = save_text(tmp_path)
    state = {f"odd.{key}": value for key, value in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        parts = {f"model-{n}.safetensors": dict(list(state.items())[n::2]) for n in (0, 1)}
        for name, part in parts.items():
            save_file(part, tmp_path / name)
        index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if form == "shard lost":
        (tmp_path / "model-1.safetensors").unlink()
        return one_line(lambda: text_encoder(str(tmp_path)), str(tmp_path), "model-1.safetensors")
    torch.testing.assert_close(text_encoder(str(tmp_path)).body.state_dict()["embeddings.word_embeddings.weight"],
                               model.embeddings.word_embeddings.weight.detach())


def test_vocabularies(tmp_path):
    "No vocabulary, one that knows no word, one larger than the embedding, one without [CLS]; no weights; damaged settings."
    _, tokenizer = save_text(tmp_path)
    name = str(tmp_path)
    tokenizer.add_tokens(["pleuraleffusion"]), tokenizer.save_pretrained(tmp_path)
    one_line(lambda: text_encoder(name), name, "embeddings")
    one_line(lambda: text_encoder(name, weights=False), name, "embeddings")
    bare = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3}, "[UNK]"))
    special = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(tmp_path)
    one_line(lambda: text_encoder(name), name, "has no words")
    del special["cls_token"]
    (tmp_path / "tokenizer_config.json").unlink()
    transformers.PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([TEXT], 200).backend_tokenizer, **special).save_pretrained(tmp_path)
    one_line(lambda: text_encoder(name), name, "cls_token")
    (tmp_path / "tokenizer.json").unlink()
    one_line(lambda: text_encoder(name), name, "holds no vocabulary")
    train_tokenizer([TEXT], 200).save_pretrained(tmp_path)
    assert text_encoder(name)
    (tmp_path / "model.safetensors").unlink()
    one_line(lambda: text_encoder(name), name, "without model.safetensors")
    (tmp_path / "tokenizer.json").write_text('{"version"')
    one_line(lambda: text_encoder(name), str(tmp_path / "tokenizer.json"), "not JSON")
    one_line(lambda: text_encoder(str(tmp_path / "tokenizer.json")), "is a file")
    (tmp_path / "config.json").write_text("{")
    one_line(lambda: text_encoder(name), "config.json", "not JSON")


VISION = dict(TINY, image_size=32, patch_size=8)


@pytest.mark.parametrize("lost", ["a prefix", "a layer", "a shape", "nan", "no weights"])
def test_a_vision_folder(tmp_path, lost):
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**VISION))
    model.save_pretrained(tmp_path)
    if lost == "no weights":
        (tmp_path / "model.safetensors").unlink()
        return one_line(lambda: pretrained_encoder(tmp_path), str(tmp_path), "no weights")
    change = {
        "a prefix": lambda key, value: (f"backbone.{key}", value),
        "a layer": lambda key, value: (key.replace("layer.1.", "layer.7."), value),
        "a shape": lambda key, value: (key, value[..., :-1] if key.endswith("cls_token") else value),
        "nan": lambda key, value: (key, value * torch.nan if key.endswith("cls_token") else value),
    }[lost]
    rename(tmp_path, lambda state: dict(change(key, value) for key, value in state.items()))
    if lost == "a prefix":
        return torch.testing.assert_close(pretrained_encoder(tmp_path).body.embeddings.cls_token, model.embeddings.cls_token)
    one_line(lambda: pretrained_encoder(tmp_path), str(tmp_path), "NaN" if lost == "nan" else "would be random", kind=ValueError)


# ---------------------------------------------------------------- no code runs

@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("weights", [True, False])
def test_no_code_of_a_text_folder_runs(tmp_path, monkeypatch, file, weights):
    save_text(tmp_path)
    settings = json.loads((tmp_path / file).read_text())
    entry = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (tmp_path / file).write_text(json.dumps(settings | {"model_type": "evil", "tokenizer_class": "Evil", "auto_map": entry}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    one_line(lambda: text_encoder(str(tmp_path), weights=weights), str(tmp_path), file, "auto_map", kind=ValueError)
    assert not (tmp_path / "ran").exists()


def test_no_code_of_a_vision_folder_runs(tmp_path, monkeypatch):
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    one_line(lambda: load_encoder(tmp_path), "config.json", "auto_map", kind=ValueError)
    assert not (tmp_path / "ran").exists()


class Evil:
    "Makes a file when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def hostile_npz(path, ran):
    names = ("scores", "kind", "predicted", "truth", "classes", "image_id", "patient_id", "images image_id", "texts text_id")
    with open(path, "wb") as file:
        np.savez(file, **{name: np.array([Evil(ran)], dtype=object) for name in names})


def hostile_store(path, ran):
    _open_feature_files(path, 3, [(2,)])
    np.save(path / "filled.npy", np.array([Evil(ran)] * 3, dtype=object), allow_pickle=True)


def hostile_checkpoint(path, ran):
    path.mkdir()
    torch.save({"epoch": 1, "x": Evil(ran)}, path / "step_00000001.pt")


def test_the_trap_snaps(tmp_path):
    "What the next test proves nothing without: unpickled, it does run."
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("door, make", [
    (retrieve._load_pairs, hostile_npz), (load_predictions, hostile_npz),
    (lambda path: _open_feature_files(path, 3, [(2,)]), hostile_store),
    (load_encoder, lambda path, ran: torch.save({"fc.weight": Evil(ran)}, path)),
    (lambda path: load_checkpoint(path), hostile_checkpoint),
], ids=["pairs", "predictions", "features", "weights", "checkpoint"])
def test_nothing_is_unpickled_at_any_door(tmp_path, door, make):
    make(tmp_path / "file.npz", tmp_path / "ran")
    with pytest.raises((ValueError, OSError)):
        door(tmp_path / "file.npz")
    assert not (tmp_path / "ran").exists()


def test_kept_features_are_not_unpickled(tmp_path, pack):
    encoder = image_encoder("tiny_resnet").eval()
    encode(encoder, pack, cache=tmp_path)
    (kept,) = tmp_path.glob("*/0.npy")
    np.save(kept, np.array([Evil(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        encode(encoder, pack, cache=tmp_path)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- shapes of checkpoints, damaged files

@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return image_encoder("tiny_resnet").body.state_dict()


def under(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


SHAPES = {
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1.0}]}},
    "model of state_dict": lambda state: {"state_dict": {"model": state}},
    "another name": lambda state: {"backbone_weights": state, "args": {"lr": 1.0}},
    "module": under("module."),
    "model of DDP": lambda state: {"model": under("module.")(state)},
    "mgca": lambda state: {"state_dict": under("img_encoder_q.model.")(state) | {"text_encoder_q.x": torch.zeros(2), "prototype.weight": torch.zeros(2)}},
    "lightning": lambda state: {"state_dict": under("model.backbone.")(state) | {"head.weight": torch.zeros(3)}, "pytorch-lightning_version": "2"},
    "encoder": under("encoder."), "backbone": under("backbone."), "visual": under("visual.trunk."),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_checkpoints(tmp_path, backbone, shape):
    torch.save(SHAPES[shape](backbone), tmp_path / "a.ckpt")
    loaded = load_encoder(tmp_path / "a.ckpt").body.state_dict()
    assert all(torch.equal(value, backbone[key]) for key, value in loaded.items())
    named = image_encoder("tiny_resnet", str(tmp_path / "a.ckpt")).body.state_dict()
    assert all(torch.equal(value, backbone[key]) for key, value in named.items())


def test_what_does_not_say_which(tmp_path, backbone):
    path = tmp_path / "a.ckpt"
    for held, words in (
        (under("q.")(backbone) | under("k.")(backbone), ("2 times", "q., k.")),
        ({"teacher": backbone, "student": backbone}, ("several state dicts", "teacher, student")),
        ({"epoch": 1, "lr": 2.0}, ("no state dict", "epoch")), ([1, 2], ("no state dict", "list")), (torch.zeros(3), ("no state dict", "Tensor")),
        (under("nonsense.")({key: value for key, value in backbone.items() if "layer2" not in key}), ("fits none of", "nonsense")),
        (backbone | {"conv1.weight": backbone["conv1.weight"] * torch.nan}, ("NaN or infinite", "conv1.weight")),
    ):
        torch.save(held, path)
        one_line(lambda: load_encoder(path), str(path), *words, kind=ValueError)


@pytest.mark.parametrize("extra, name", [
    (argparse.Namespace(lr=1), "argparse.Namespace"), (pathlib.PurePosixPath("runs/1"), "pathlib.PurePosixPath"), (nn.Linear(1, 1), "torch.nn.modules.linear.Linear")])
def test_the_class_that_stands_in_the_way(tmp_path, backbone, extra, name):
    for legacy in (True, False):
        torch.save({"state_dict": backbone, "hyper_parameters": extra}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
        one_line(lambda: load_encoder(tmp_path / "a.ckpt"), "a.ckpt", name, "torch.save", kind=ValueError)


def damaged(tmp_path, state):
    "(path, what made it) of weights that cannot be read."
    save_file(state, tmp_path / "whole.safetensors"), torch.save(state, tmp_path / "whole.pt")
    for suffix in ("safetensors", "pt"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        for what, data in (("empty", b""), ("short", whole[:4]), ("half", whole[: len(whole) // 2]), ("noise", b"\xff\x80" * 200), ("zeros", bytes(500))):
            (tmp_path / f"{what}.{suffix}").write_bytes(data)
            yield tmp_path / f"{what}.{suffix}"
    (tmp_path / "folder.pt").mkdir(), (tmp_path / "folder.safetensors").mkdir()
    yield from (tmp_path / "folder.pt", tmp_path / "folder.safetensors")


def test_damaged_files_are_named(tmp_path, backbone):
    for path in damaged(tmp_path, backbone):
        one_line(lambda: load_encoder(path), str(path))
        one_line(lambda: image_encoder("tiny_resnet", str(path)), str(path))


def test_damaged_files_in_a_folder_are_named(tmp_path):
    for number, make in enumerate((save_text, lambda folder: transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(folder))):
        folder = tmp_path / str(number)
        make(folder)
        whole, load = (folder / "model.safetensors").read_bytes(), (text_encoder, pretrained_encoder)[number]
        for data in (b"", whole[:5], whole[: len(whole) // 2], b"\xff" * 100):
            (folder / "model.safetensors").write_bytes(data)
            one_line(lambda: load(str(folder)), str(folder / "model.safetensors"))


def test_damaged_tables_are_named(tmp_path):
    for data in (b"", b"PK\x03\x04", bytes(300)):
        (tmp_path / "pairs.npz").write_bytes(data)
        one_line(lambda: retrieve._load_pairs(tmp_path / "pairs.npz"), str(tmp_path / "pairs.npz"), kind=ValueError)


# ---------------------------------------------------------------- the pieces of running text

def byte_level(**options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, **options), decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer, dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def metaspace(model=models.Unigram, trainer=trainers.UnigramTrainer, **options):
    tokenizer = Tokenizer(model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    return tokenizer, trainer, dict(unk_token="<unk>") if model is models.Unigram else {}


def lower_metaspace():
    tokenizer, *rest = metaspace()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer, *rest


def word_piece(lowercase):
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer, {}


KINDS = {
    "byte-level": byte_level, "byte-level, blanks in offsets": lambda: byte_level(trim_offsets=False),
    "metaspace": metaspace, "metaspace, pieces over blanks": lambda: metaspace(split=False), "metaspace bpe": lambda: metaspace(models.BPE, trainers.BpeTrainer),
    "metaspace, none at the front": lambda: metaspace(prepend_scheme="never"), "metaspace, lower": lower_metaspace,
    "cased": lambda: word_piece(False), "uncased": lambda: word_piece(True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [300, 700])
def test_pieces_are_those_of_running_text(kind, vocabulary):
    tokenizer, trainer, options = KINDS[kind]()
    corpus = [TEXT, "No pleural effusion is seen.", "The heart is normal in size."] * 9
    tokenizer.train_from_iterator(corpus, trainer(
        vocab_size=vocabulary, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False, **options))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>")
    for text in (TEXT, "No pleural effusion is seen.", "The heart  is\tnormal (12) in size."):
        running = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert tokenise([text], tokenizer, punctuation=True).input_ids[1:-1] == running.input_ids
        report, stands = tokenise([text], tokenizer), running.offset_mapping
        pieces = [n for n, w in zip(report.input_ids, report.word_index) if w >= 0]
        kept = [k for k, (start, end) in enumerate(stands) if any(c.isalnum() for c in text[start:end])]
        for k in reversed(range(len(stands))):      # a blank by itself goes with the word behind it
            kept += [k] if k + 1 in kept and not text[slice(*stands[k])].strip() else []
        assert pieces == [running.input_ids[k] for k in sorted(kept)]
        assert set(report.word_index) == {-1, *range(len(report.words))}, "every word has pieces"
        assert all(word.strip() == word and any(c.isalnum() for c in word) for word in report.words)
        for room in (3, 5, 9):
            short, n = tokenise([text], tokenizer, room), min(room - 1, len(report.input_ids) - 1)
            assert short.input_ids == [*report.input_ids[:n], report.input_ids[-1]] and len(short.words) == max(short.word_index) + 1


def test_a_tokenizer_without_cls_and_sep_is_read_without_them():
    "As those of CLIP and SigLIP are; what they have is kept."
    tokenizer = train_tokenizer([TEXT], 200)
    whole = tokenise([TEXT], tokenizer)
    tokenizer.cls_token = None
    half = tokenise([TEXT], tokenizer)
    tokenizer.sep_token = None
    bare = tokenise([TEXT], tokenizer)
    assert half.input_ids == whole.input_ids[1:] and bare.input_ids == whole.input_ids[1:-1]
    assert bare.word_index == whole.word_index[1:-1] and bare.words == whole.words


# ---------------------------------------------------------------- half precision, and which width is whose

@pytest.fixture(scope="module")
def batch_of(pack):
    tokenizer = phantom_tokenizer(60)

    def build(name, **changes):
        torch.manual_seed(0)
        method = METHODS[name].from_preset("tiny", tokenizer, **changes)
        words = method.tokenizer if method.reads_text else None
        pairs = Pairs(pack, words, method.preprocessing, method.sampling) if method.views == 1 else Views(pack, method.preprocessing, method.sampling)
        samples = {sample.patient_id: sample for sample in (pairs[i] for i in range(len(pairs)))}
        return method, collate(list(samples.values())[:6])     # of six patients

    return build


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_half_precision(batch_of, name, dtype):
    "One step's loss and gradients under autocast are finite, and the loss is that of single precision but for rounding."
    method, batch = batch_of(name)
    method.eval()  # no dropout
    whole = method(batch).total.item()
    assert len(batch) == 6 and whole != 0
    with torch.autocast("cpu", dtype=dtype):
        half = method(batch).total
    half.backward()
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    assert any(grad.any() for grad in grads) and all(grad.isfinite().all() for grad in grads)
    assert half.item() == pytest.approx(whole, abs=0.15 * max(1.0, abs(whole)))
    if not method.reads_text:
        return
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        correspondence = method.correspondence(batch)
    assert correspondence.words.isfinite().all() and correspondence.sentences.isfinite().all()


class TwoWidths(nn.Module):
    "An image encoder whose whole is wider than its regions."

    def __init__(self, inner):
        super().__init__()
        self.inner, self.preprocessing, self.region_dim, self.whole_dim = inner, inner.preprocessing, inner.region_dim, inner.region_dim + 3

    def forward(self, image):
        seen = self.inner(image)
        return replace(seen, whole=nn.functional.pad(seen.regions.mean(1), (0, 3)))


@pytest.mark.parametrize("whole", ["encoder", "attention"])
def test_convirt_takes_the_width_of_what_it_projects(batch_of, monkeypatch, whole):
    "Its heads fit an encoder whose whole and regions have different widths: the whole's, or the pooled regions'."
    build = method_module.image_encoder
    monkeypatch.setattr(method_module, "image_encoder", lambda *args, **options: TwoWidths(build(*args, **options)))
    method, batch = batch_of("convirt", whole_image=whole)
    width = method.image_encoder.region_dim if whole == "attention" else method.image_encoder.whole_dim
    assert next(p for p in method.image_head.parameters() if p.ndim == 2).shape[1] == width
    assert method(batch).total.isfinite() and method.embed_image(batch.image).shape == (6, method.config.dim)
