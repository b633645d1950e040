"""What leaves the house: every layout is read back by its own library alone, in a process without medvis, and computes what the run computes."""
import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import run_line
from PIL import Image
from safetensors.torch import load_file, save_file

from medvis.data.pack import Pack
from medvis.data.pairs import tokenise
from medvis.data.phantom import Phantom
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders.heads import BatchNorm
from medvis.exchange import export, import_checkpoint, outgoing, readers, wrap
from medvis.methods import METHODS
from medvis.methods.method import phantom_tokenizer
from medvis.train import TrainConfig, create_method, fit, load_encoder

WITHOUT = "import sys\nsys.modules['medvis'] = None\n"     # import medvis fails


def needs(*packages: str):
    absent = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} not installed: pip install 'medvis[export]'")


ONNX, OPEN_CLIP = needs("onnx", "onnxscript", "onnxruntime"), needs("open_clip")


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Pack:
    return prepare_phantom(PhantomConfig(tmp_path_factory.mktemp("packs") / "phantom", studies=48, progress=False))


@pytest.fixture(scope="module")
def run(pack, tmp_path_factory):
    "One epoch, so that running statistics and heads are not those of a new network."
    method = create_method("convirt", data=pack, image="tiny_vit", layer=None, hidden=32, dim=16)
    return fit(method, pack, TrainConfig.of(method, tmp_path_factory.mktemp("runs") / "one", epochs=1, batch_size=16, progress=False))


def make(name: str, **changes):
    "A method with weights that no constructor gives: statistics, constants and normalisations are drawn."
    torch.manual_seed(0)
    method = METHODS[name].from_preset("tiny", phantom_tokenizer(60), **changes)
    with torch.no_grad():
        for part in method.modules():
            if isinstance(part, torch.nn.BatchNorm2d | BatchNorm):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 2)
            for value in part.parameters(recurse=False) if isinstance(part, torch.nn.LayerNorm | torch.nn.BatchNorm2d | torch.nn.Linear) else ():
                value.add_(0.02 * torch.randn_like(value))
    return method.eval()


CASES = [("convirt", dict(image="tiny_vit", layer=None), "timm"), ("convirt", dict(image="tiny_vit", layer=None), "transformers"),
         ("gloria", dict(image="resnet50", summed_layers=2), "torchvision"), ("gloria", dict(image="resnet50", summed_layers=2), "timm"),
         ("gloria", dict(image="resnet50", summed_layers=2), "transformers"), ("convirt", dict(image="efficientnet_lite0", layer=None), "timm"),
         ("convirt", {}, "safetensors"), ("simclr", {}, "safetensors"),
         pytest.param("convirt", {}, "onnx", marks=ONNX), pytest.param("mgca", {}, "onnx", marks=ONNX), pytest.param("lovt", {}, "onnx", marks=ONNX),
         pytest.param("convirt", dict(image="tiny_vit", layer=None, whole_text="mean"), "onnx", marks=ONNX),
         pytest.param("vse", dict(image="efficientnet_lite0", layer=None, dim=24, whole_text="cls"), "open_clip", marks=OPEN_CLIP)]


@functools.cache
def made(name: str, changes: str):
    "The same weights for all layouts of one case."
    return make(name, **json.loads(changes))


def card_lines(folder: Path, pieces, given, place: Path) -> tuple[list[str], list[Path]]:
    "The code of a card, between reading what it is given and writing what it finds; and the files that it writes."
    code = re.search(r"## How to load it\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    sources, calls = code.rsplit("\n\n\n", 1)
    assert len(calls.strip().splitlines()) == len(pieces)
    lines, found = [f"os.chdir({str(folder)!r})\n{sources}"], []
    for number, (piece, call) in enumerate(zip(pieces.values(), calls.strip().splitlines())):
        inputs = {argument: given[source].contiguous() for argument, source in piece.inputs.items()}
        taken, gives = place / f"in{number}.safetensors", place / f"out{number}.safetensors"
        save_file(inputs or {"none": torch.zeros(1)}, taken)
        lines.append(f"globals().update(load_file({str(taken)!r}))\n{call}\nsave_file({{k: v.contiguous().clone() for k, v in features.items()}}, {str(gives)!r})")
        found.append(gives)
    return lines, found


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    "What the cards of all cases find, by the packages that they need: one process for each, as libraries take seconds to import."
    @functools.cache
    def run_all(needed: tuple[str, ...]) -> dict[str, list]:
        lines, told, home = [f"import os\nfrom safetensors.torch import load_file, save_file\nfrom pathlib import Path\n{WITHOUT}"], {}, tmp_path_factory.mktemp("strangers")
        for name, changes, to in (case for case in ALL if outgoing._LAYOUTS[case[2]].needs == needed):
            method, case = made(name, json.dumps(changes)), f"{name}-{to}-{changes}"
            place = home / str(len(told))
            place.mkdir()
            folder, pieces, given = export(method, to, place / "out"), outgoing._choose_pieces(method, to, None), outgoing._trial_inputs(method)
            more, found = card_lines(folder, pieces, given, place)
            lines += more
            told[case] = method, given, list(zip(pieces.values(), found))
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return told

    return run_all


@pytest.mark.parametrize("name, changes, to", CASES)
def test_a_stranger_computes_the_same(name, changes, to, stranger):
    "The code of the card runs where medvis cannot be imported, and its features are those of the method, computed here."
    method, given, pieces = stranger(outgoing._LAYOUTS[to].needs)[f"{name}-{to}-{changes}"]
    for piece, file in pieces:
        with torch.no_grad():
            wanted = piece.features(method, given)
        found = load_file(file)
        assert found and found.keys() <= wanted.keys()
        for feature, value in found.items():
            close = 1e-5 * max(1.0, float(wanted[feature].abs().max())) if wanted[feature].numel() else 0
            torch.testing.assert_close(value, wanted[feature].to(value.dtype), atol=close, rtol=0)
            if piece.inputs:
                assert value.std() > 0, "features that tell something"


ALL = [getattr(case, "values", case) for case in CASES]


@pytest.mark.parametrize("to, changes, said", [
    ("torchvision", {}, "torchvision has no TinyResNet .* choose --to onnx or --to safetensors"), ("timm", {}, "timm has no TinyResNet"),
    ("transformers", {}, "transformers has no TinyResNet"), ("torchvision", dict(image="tiny_vit", layer=None), "torchvision has no VisionTransformer"),
    pytest.param("open_clip", dict(image="efficientnet_lite0", layer=None), "open_clip has linear projections .* ConVIRT has others", marks=OPEN_CLIP),
    ("pickle", {}, "unknown layout 'pickle'; choose from torchvision, timm")])
def test_what_has_no_place_is_refused_in_words(to, changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export(make("convirt", **changes), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@OPEN_CLIP
def test_a_constant_that_does_not_fit(tmp_path):
    "A shared space wider than the text tower: a drawn constant is not in the span of the projection; none at all is."
    wide = make("vse", image="efficientnet_lite0", layer=None, dim=128, whole_text="mean-all")
    with pytest.raises(ValueError, match="projects texts without a constant.*128 dimensions from 96"):
        export(wide, "open_clip", tmp_path / "out")
    torch.nn.init.zeros_(wide.text_head.bias)
    assert (export(wide, "open_clip", tmp_path / "out") / "open_clip_model.safetensors").is_file()


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(outgoing, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--to onnx needs onnx, onnxscript, onnxruntime: pip install 'medvis\[export\]'"):
        export(make("convirt"), "onnx", tmp_path / "out")


@pytest.mark.parametrize("fault", ["weights", "shape", "crash"])
def test_a_file_that_fails_is_not_left(fault, tmp_path, monkeypatch):
    method, right = make("convirt", image="tiny_vit", layer=None), readers.read_timm

    def wrong(folder, images):
        found = right(folder, images)
        if fault == "crash":
            raise RuntimeError("cannot read")
        return {"whole": found["whole"] + 1e-3} if fault == "weights" else {"whole": found["whole"][:1]}

    piece = outgoing._Piece("", outgoing._write_timm, wrong, {"images": "seen"})
    monkeypatch.setitem(outgoing._LAYOUTS, "timm", outgoing._Layout("timm", (), {"image": piece}))
    said = {"weights": "does not compute what the run computes .whole by ", "shape": r"whole has shape \(1, 128\), expected \(2, 128\)", "crash": "cannot read"}[fault]
    with pytest.raises((ValueError, RuntimeError), match=said):
        export(method, "timm", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_card_of_a_run(run, pack):
    (run.path / "probe").mkdir()
    pd.DataFrame({"encoder": ["one"], "finding": ["Edema"], "auroc": [0.75], "low": [0.5], "high": [0.875]}).to_csv(run.path / "probe" / "probe.csv", index=False)
    code, said = run_line(f"medvis export {run.path} --to timm")
    assert code == 0 and "export/timm" in said
    card = (run.path / "export" / "timm" / "README.md").read_text()
    assert pack.manifest["hash"] in card and "| one | Edema | 0.75 | 0.5 | 0.875 |" in card and "Generated by medvis: no patient" in card
    assert "Not a medical device" in card and "| image | whole |" in card and card.startswith("---\nlibrary_name: timm\n")
    assert "2 epochs" not in card and "run `one` of 20" in card and ", 1 epochs, seed" in card and f"{pack.manifest['counts']['patients']} patients" in card and "cosines between pictures and texts need" in card
    assert str(run.path) not in card and "medvis." not in re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code, said = run_line(f"medvis export {run.path} --to timm")
    assert code == 1 and "exists: delete it" in said and "Traceback" not in said
    code, said = run_line(f"medvis export {run.path} --to torchvision")
    assert code == 1 and "torchvision has no VisionTransformer" in said and not (run.path / "export" / "torchvision").exists()


def test_a_stranger_reads_the_same_tokens(run, tmp_path):
    "Our tokenizers add no [CLS] and [SEP] by themselves; the exported one does, and ours is left as it was."
    from transformers import AutoTokenizer
    method, text = run.method(), "no pleural effusion in the left lung"
    folder = export(method, "transformers", tmp_path / "out")
    ours = tokenise([text], method.tokenizer).input_ids
    assert AutoTokenizer.from_pretrained(folder / "text")(text).input_ids == ours and ours[0] == method.tokenizer.cls_token_id
    assert method.tokenizer(text).input_ids == ours[1:-1]
    assert "without its punctuation" in (folder / "README.md").read_text()


def test_plain_tensors_come_back(run, tmp_path):
    folder = export(run, "safetensors", tmp_path / "plain")
    method = run.method()
    assert torch.equal(load_encoder(folder / "image.safetensors").body.state_dict()["norm.weight"], method.image_encoder.body.norm.weight)
    held = {name: load_file(folder / f"{name}.safetensors") for name in ("image", "text", "heads")}
    assert sum(map(len, held.values())) == len(method.state_dict())


def test_nothing_is_sent_unless_asked(run, tmp_path, monkeypatch):
    import huggingface_hub
    sent = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            sent.append((name, private))

        def upload_folder(self, repo_id, folder_path):
            sent.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            if "down" in repo_id:
                raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export(run, "timm", tmp_path / "quiet")
    assert not sent
    export(run, "timm", tmp_path / "loud", push_to_hub="me/mine")
    assert sent == [("me/mine", True), ("me/mine", ["README.md", "config.json", "model.safetensors", "preprocessing.json"])]
    with pytest.raises(OSError, match="is written, but could not be uploaded to me/down"):
        export(run, "timm", tmp_path / "down", push_to_hub="me/down")
    assert (tmp_path / "down" / "README.md").is_file()


@pytest.mark.parametrize("image, to", [("tiny_vit", "timm"), ("tiny_vit", "transformers"), ("efficientnet_lite0", "timm"), ("resnet50", "transformers")])
def test_the_other_library_prepares_pictures_alike(image, to, tmp_path):
    "By its own transform, from a square film; a grey level or two apart, as it rounds after resizing."
    method = make("convirt", image=image, layer=None)
    folder, film = export(method, to, tmp_path / "out"), Phantom(288, 0)[3].image
    ours = method.preprocessing.transform()(torch.from_numpy(film)[None])
    if to == "timm":
        import timm
        from timm.data import create_transform, resolve_model_data_config
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        mode = "RGB" if ours.shape[0] == 3 else "L"
        theirs = create_transform(**resolve_model_data_config(model))(Image.fromarray(film).convert(mode))
    else:
        from transformers import AutoImageProcessor
        picture = Image.fromarray(film).convert("RGB") if ours.shape[0] == 3 else film[..., None]
        extra = {} if ours.shape[0] == 3 else {"input_data_format": "channels_last"}
        theirs = AutoImageProcessor.from_pretrained(folder / "image")(picture, return_tensors="pt", **extra)["pixel_values"][0]
    assert theirs.shape == ours.shape
    std = np.max(method.preprocessing.std)
    assert (theirs - ours).abs().max() * std * 255 <= 2.5
    assert (theirs - ours).abs().mean() * std * 255 < 0.6


def test_preprocessing_is_stated_everywhere(run, tmp_path):
    for to in ("timm", "transformers", "safetensors"):
        folder = export(run, to, tmp_path / to)
        assert json.loads((folder / "preprocessing.json").read_text())["size"] == run.method().preprocessing.size


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    "A small SigLIP as a folder of Hugging Face, imported."
    from transformers import SiglipConfig, SiglipModel
    home, words = tmp_path_factory.mktemp("imported"), phantom_tokenizer(60)
    side = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
    SiglipModel(SiglipConfig(text_config=side | dict(vocab_size=len(words), max_position_embeddings=24), vision_config=side | dict(image_size=32, patch_size=16))).save_pretrained(home / "theirs")
    words.save_pretrained(home / "theirs")
    return import_checkpoint(home / "theirs", home / "run")


def test_the_card_of_an_imported_model(imported, tmp_path):
    "It says whose the model is, what it was made of and what to beware of; and calls no file a Pack, nor medvis its trainer."
    card = (export(imported, "safetensors", tmp_path / "out") / "README.md").read_text()
    said = imported.manifest["imported"]
    assert "# SigLIP, also MedSigLIP, imported\n" in card and "medvis did not train it" in card and f"`theirs` (SHA-256 `{said['sha256']}`)" in card
    assert all(f"\n- Beware: {note}" in card for note in said["beware"]) and "As its authors declare it: nothing is known" in card
    assert not re.search(r"Pack `|preset|trained by medvis|\bNone\b", card) and str(tmp_path.parent) not in card


@pytest.mark.parametrize("to", ["transformers", pytest.param("onnx", marks=ONNX)])
def test_the_texts_of_an_imported_model_are_read_by_its_authors_code(imported, to, tmp_path):
    with pytest.raises(ValueError, match="the code of its authors does.*--to safetensors .*--tower image"):
        export(imported, to, tmp_path / "out", tower="text")
    assert not list(tmp_path.iterdir())


def test_a_wrapped_model_stays_where_it_is(tmp_path):
    model = type("Mine", (), {"embed_images": lambda self, x: x.mean((2, 3)).repeat(1, 2), "embed_texts": lambda self, texts: np.ones((len(texts), 2))})()
    for to in outgoing._LAYOUTS:
        with pytest.raises(ValueError, match="Mine is wrapped"):
            export(wrap(model, size=16, channels=1), to, tmp_path / "out")


@pytest.mark.parametrize("scale, words", [("max", "divided by the largest"), ("range", "the darkest of the picture to 0")])
def test_grey_levels_that_the_other_library_does_not_know(scale, words, tmp_path):
    "No file of the export claims that pictures are divided by 255, where they are not."
    method = make("convirt", image="tiny_vit", layer=None)
    method.image_encoder.preprocessing = replace(method.preprocessing, scale=scale)
    folder = export(method, "transformers", tmp_path / "out", tower="image")
    card = (folder / "README.md").read_text()
    assert words in card and "transformers has no such scale of grey levels" in card and not (folder / "image/preprocessor_config.json").exists()
