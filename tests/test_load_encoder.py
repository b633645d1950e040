"""Encoders from everywhere: state dicts, Hugging Face folders of every layout of tokens, runs, names; and what must not be loaded."""
import json
import os
import socket

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
import transformers
from folders import folder_pack
from PIL import Image
from safetensors.torch import save_file

from medvis.data.preprocessing import Preprocessing
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders.pretrained import PretrainedEncoder, is_pretrained, pretrained_encoder, read_preprocessing
from medvis.evaluate.encoder import check_preprocessing, encode, encoder_hash, random_like
from medvis.methods import MGCA, SimCLR
from medvis.methods.method import phantom_tokenizer
from medvis.testing import small_phantom
from medvis.train import TrainConfig, create_method, fit, load_encoder, load_method

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
TEXT = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
KINDS = {
    "vit": lambda t: t.ViTModel(t.ViTConfig(**TINY)),
    "vit-classifier": lambda t: t.ViTForImageClassification(t.ViTConfig(**TINY)),
    "deit": lambda t: t.DeiTModel(t.DeiTConfig(**TINY)),
    "beit": lambda t: t.BeitModel(t.BeitConfig(**TINY)),
    "dinov2": lambda t: t.Dinov2Model(t.Dinov2Config(**TINY)),
    "registers": lambda t: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**TINY, num_register_tokens=4)),
    "siglip": lambda t: t.SiglipVisionModel(t.SiglipVisionConfig(**TINY)),
    "clip": lambda t: t.CLIPModel(t.CLIPConfig(vision_config=TINY, text_config=TEXT)),
    "blip-vision": lambda t: t.BlipVisionModel(t.BlipVisionConfig(**TINY)),
    "blip": lambda t: t.BlipForImageTextRetrieval(t.BlipConfig(vision_config=TINY, text_config={**TEXT, "encoder_hidden_size": 32})),
    "swin": lambda t: t.SwinModel(t.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4)),
    "resnet": lambda t: t.ResNetModel(t.ResNetConfig(embedding_size=16, layer_type="basic", hidden_sizes=[16, 32], depths=[1, 1])),
    "convnext": lambda t: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    "A folder with one tiny model of each kind, 32 x 32 pixels in, 4 x 4 regions out."
    root = tmp_path_factory.mktemp("shelf")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    for name, build in KINDS.items():
        build(transformers).save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}, **IMAGENET}))
    return root


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("somebody went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder(shelf, name, no_network):
    encoder = load_encoder(shelf / name)
    assert not any(module.training for module in encoder.modules())
    assert encoder.preprocessing == Preprocessing(32, 1.0, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert encoder_hash(encoder) == encoder_hash(load_encoder(str(shelf / name)))
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, maps = encoder(noise), encoder.pyramid(noise)
        assert out.grid == (4, 4) and out.regions.shape == (2, 16, encoder.region_dim) and out.whole.shape == (2, encoder.whole_dim)
        assert torch.equal(maps[0], noise) and [level.shape[1] for level in maps] == encoder.pyramid_dims
        assert [32 // level.shape[-2] for level in maps] == encoder.pyramid_strides and maps[-1].shape[-2:] == (4, 4)
        torch.testing.assert_close(maps[-1][:, :, 1, 2], out.regions[:, 6])
        one = encoder(noise[1:])                                # an image alone is what it is in a batch
        torch.testing.assert_close(one.regions[0], out.regions[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.whole[0], out.whole[1], rtol=1e-4, atol=1e-5)
    reach = 1 if name in ("resnet", "convnext") else 0          # their regions see beyond their cells
    for place in range(16):
        row, column, lit = place // 4, place % 4, noise[:1].clone()
        lit[..., row * 8:row * 8 + 8, column * 8:column * 8 + 8] += 3
        with torch.no_grad():
            moved = int((encoder(lit).regions - encoder(noise[:1]).regions).norm(dim=-1).argmax())
        assert max(abs(moved // 4 - row), abs(moved % 4 - column)) <= reach, (place, moved)


def test_weights_are_those_of_the_folder(shelf):
    "What is loaded computes what the saved model computed; a head or a text model in the folder changes nothing."
    noise = torch.rand(1, 3, 32, 32)
    for name, part in (("vit", None), ("vit-classifier", "vit"), ("blip", "vision_model"), ("clip", "vision_model")):
        model = getattr(transformers, json.loads((shelf / name / "config.json").read_text())["architectures"][0]).from_pretrained(shelf / name)
        body = (getattr(model, part) if part else model).eval()
        with torch.no_grad():
            torch.testing.assert_close(load_encoder(shelf / name)(noise).regions, body(pixel_values=noise).last_hidden_state[:, 1:])
    half = pretrained_encoder(shelf / "vit").body.half()
    half.save_pretrained(shelf / "half")
    assert {value.dtype for value in load_encoder(shelf / "half").state_dict().values() if value.is_floating_point()} == {torch.float32}


BLIP = dict(vision_config=TINY, text_config={**TEXT, "encoder_hidden_size": 32})


@pytest.mark.parametrize("kind", ["BlipVisionModel", "BlipModel", "BlipForConditionalGeneration", "BlipForImageTextRetrieval"])
def test_blip_by_its_folder(kind, tmp_path, no_network):
    "Whatever BLIP is in the folder, its vision model on images of its own preprocessing: the features of transformers."
    torch.manual_seed(3)
    config = transformers.BlipVisionConfig(**TINY) if kind == "BlipVisionModel" else transformers.BlipConfig(**BLIP)
    model = getattr(transformers, kind)(config).eval()
    for part in model.modules():
        if isinstance(part, torch.nn.LayerNorm):        # so that what is normalised twice is another
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_()
    model.save_pretrained(tmp_path)
    processor = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    encoder, body = load_encoder(tmp_path), getattr(model, "vision_model", model)
    assert type(encoder.body).__name__ == "BlipVisionModel" and encoder.grid == (4, 4)
    grey = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    theirs = torch.stack([torch.as_tensor(processor(Image.fromarray(image).convert("RGB"), return_tensors="np")["pixel_values"][0]) for image in grey])
    ours = encoder.preprocessing.transform()(torch.from_numpy(grey)[:, None])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with torch.no_grad():
        out, wanted = encoder(ours), body(pixel_values=theirs).last_hidden_state
    torch.testing.assert_close(out.regions, wanted[:, 1:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.whole, wanted[:, 0], rtol=1e-6, atol=1e-6)


def test_hash_and_random_twin(shelf):
    for name in ("vit", "resnet", "blip", "swin"):
        encoder, x = load_encoder(shelf / name), torch.rand(1, 3, 32, 32)
        fresh, again = random_like(encoder, 1), random_like(encoder, 1)
        assert len({encoder_hash(one) for one in (encoder, fresh, random_like(encoder, 2))}) == 3 and encoder_hash(fresh) == encoder_hash(again)
        with torch.no_grad():
            assert fresh(x).whole.isfinite().all() and not torch.allclose(fresh(x).whole, encoder(x).whole)
        weight = next(p for p in encoder.parameters() if p.ndim > 1)
        before = encoder_hash(encoder)
        weight.data.flatten()[0] += 1e-3
        assert encoder_hash(encoder) != before


def test_gradients_reach_the_pixels(shelf):
    for name in ("vit", "resnet", "blip", "swin"):
        encoder, x = load_encoder(shelf / name), torch.rand(1, 3, 32, 32, requires_grad=True)
        encoder(x).whole.square().sum().backward()
        assert x.grad.abs().sum() > 0 and any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.body.parameters())


def test_another_size(shelf):
    for name in ("vit", "blip", "dinov2", "siglip", "swin", "resnet"):
        assert load_encoder(shelf / name, size=64).grid == (8, 8)
    with pytest.raises(ValueError, match="images of 36 x 36"):
        load_encoder(shelf / "swin", size=36)


def test_on_a_pack(shelf, tmp_path):
    pack = prepare_phantom(PhantomConfig(out=tmp_path / "pack", studies=6, size=64, progress=False))
    encoder = load_encoder(shelf / "registers")
    features = encode(encoder, pack, cache=tmp_path / "cache")
    assert features.shape == (6, 32) and np.isfinite(features).all() and np.ptp(features, axis=0).max() > 0
    np.testing.assert_array_equal(encode(load_encoder(shelf / "registers"), pack, cache=tmp_path / "cache"), features)
    check_preprocessing(encoder, pack)


# ---------------------------------------------------------------- what the model wants to see

def test_pixels_are_those_of_the_models_own_processor():
    "Images of the very size that is resized to, so that only crop, scale and normalisation count."
    grey = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)
    cropped = dict(do_center_crop=True, crop_size={"height": 32, "width": 32})
    settings = {
        "ViTImageProcessor": dict(size={"height": 48, "width": 48}, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2]),
        "BitImageProcessor": dict(size={"shortest_edge": 48}, do_resize=True, **cropped, **IMAGENET),
        "CLIPImageProcessor": dict(size={"shortest_edge": 48}, **cropped, image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28]),
        "ConvNextImageProcessor": dict(size={"shortest_edge": 32}, crop_pct=32 / 48, **IMAGENET),
        "BlipImageProcessor": dict(size={"height": 48, "width": 48}, do_normalize=False),
    }
    for kind, options in settings.items():
        processor = getattr(transformers, kind)(**options)
        theirs = torch.as_tensor(np.array(processor(Image.fromarray(grey).convert("RGB"), return_tensors="np")["pixel_values"]))[0]
        saved = json.loads(processor.to_json_string())
        ours = read_preprocessing(saved).transform()(torch.from_numpy(grey)[None])
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5, msg=kind)


def test_a_folder_without_preprocessor(shelf, tmp_path):
    pretrained_encoder(shelf / "vit").body.save_pretrained(tmp_path)
    assert load_encoder(tmp_path).preprocessing == Preprocessing(32, 1.0, 3, 0.5, 0.5)


# ---------------------------------------------------------------- state dicts

def test_torchvisions_resnet50(tmp_path, no_network):
    torch.manual_seed(0)
    network = torchvision.models.resnet50().eval()
    torch.save(network.state_dict(), tmp_path / "resnet50.pth")
    encoder, x = load_encoder(tmp_path / "resnet50.pth"), torch.rand(1, 3, 64, 64)
    assert (encoder.region_dim, encoder.whole_dim, encoder.preprocessing.size) == (2048, 2048, 224) and not encoder.training
    with torch.no_grad():
        torch.testing.assert_close(network.fc(encoder(x).whole), network(x))
    named = {"state_dict." + key: value for key, value in network.state_dict().items()}
    save_file(named, tmp_path / "named.safetensors")
    torch.testing.assert_close(load_encoder(tmp_path / "named.safetensors").body.conv1.weight, network.conv1.weight)
    save_file({key.replace("layer3.0.conv1", "layer3.0.first"): value for key, value in named.items()}, tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match="strange.safetensors fits none of resnet50"):
        load_encoder(tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match="does not fit this backbone"):
        load_encoder(tmp_path / "resnet50.pth", image="tiny_resnet")
    assert load_encoder(tmp_path / "resnet50.pth", image="resnet50", layer="layer3").region_dim == 1024


def test_timms_vit(tmp_path, no_network):
    network = timm.create_model("vit_base_patch16_224")
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_224"}')      # as timm saves it
    encoder, x = load_encoder(tmp_path), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(network.eval().head(encoder(x).whole), network(x))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is not a state dict that can be read safely"):
        load_encoder(tmp_path / "evil.pt")
    assert not (tmp_path / "evil").exists()


# ---------------------------------------------------------------- names, runs, refusals

def test_names_and_paths(shelf, tmp_path, monkeypatch, no_network):
    assert load_encoder("random-init", "tiny_vit").region_dim == 128
    monkeypatch.chdir(tmp_path)
    os.mkdir("runs")
    for path in ("runs/mgca", "nothing.pt", "some/thing.safetensors", str(tmp_path / "a" / "b"), shelf / "nothing"):
        assert not is_pretrained(path)
        with pytest.raises(FileNotFoundError, match="no weights at"):
            load_encoder(path)
    with pytest.raises(OSError, match="'nobody/nothing' could not be loaded.*Pass the path of a folder.*'random-init'") as caught:
        load_encoder("nobody/nothing")             # offline: conftest
    assert "\n" not in str(caught.value)


def test_what_is_no_vision_model(tmp_path):
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="BertModel, which reads input_ids and no images"):
        load_encoder(tmp_path / "bert")
    transformers.ViTConfig(**TINY).save_pretrained(tmp_path / "weightless")
    with pytest.raises(OSError, match="no weights in it"):
        load_encoder(tmp_path / "weightless")
    for ratio, complaint in ((0.75, "5 tokens"), (0.0, "differently each time")):
        with pytest.raises(ValueError, match=complaint):
            PretrainedEncoder(transformers.ViTMAEModel(transformers.ViTMAEConfig(**TINY, mask_ratio=ratio)), Preprocessing(32, crop=1.0))


def test_a_run_remembers_how_its_images_were_made_square(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(draw.integers(0, 255, (80, 64), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    pd.DataFrame([{"image_path": f"{n}.png", "report": "There is a small left effusion.", "patient_id": f"p{n}", "study_id": f"s{n}",
                   "split": "train" if n < 8 else "validate"} for n in range(12)]).to_csv(tmp_path / "table.csv", index=False)
    packs = {how: folder_pack(tmp_path / "table.csv", tmp_path / how, size=64, fit=how) for how in ("pad", "stretch")}
    method = MGCA.from_preset("tiny", phantom_tokenizer(20))
    run = fit(method, packs["stretch"], TrainConfig.of(method, tmp_path / "run", epochs=1, batch_size=8, progress=False))
    encoder = load_encoder(run.path)
    assert encoder.preprocessing.fit == "stretch" and run.manifest["data"]["fit"] == "stretch"
    check_preprocessing(encoder, packs["stretch"])
    settings = json.loads((run.path / "text" / "config.json").read_text())
    (run.path / "text" / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(ValueError, match="asks to run code of its own"):
        load_encoder(run.path)                     # a foreign run
    with pytest.raises(ValueError, match="made square by fit='stretch', but .*pad has them by 'pad'; prepare the data set again"):
        check_preprocessing(encoder, packs["pad"])
    with pytest.raises(ValueError, match="resizes images to 256 x 256, but those of .* have 64 x 64 pixels and would be enlarged"):
        check_preprocessing(load_encoder("random-init"), packs["pad"])


def test_a_method_is_trained_with_a_hugging_face_model_by_a_function_of_ones_own(shelf, tmp_path, no_network, monkeypatch):
    "A folder itself is no `image=`: the error says what to write, and what it says works, with BLIP, for a run and its reload."
    with pytest.raises(ValueError, match="is no image encoder of medvis.*def my_encoder.*image = my_module:my_encoder"):
        SimCLR.from_preset("tiny", image=str(shelf / "blip"), layer=None)
    with pytest.raises(ValueError, match="is no image encoder of medvis"):
        SimCLR.from_preset("tiny", image="Salesforce/blip-image-captioning-base", layer=None)
    (tmp_path / "my_module.py").write_text(f"from medvis.encoders.pretrained import pretrained_encoder\n\ndef my_encoder():\n    return pretrained_encoder({str(shelf / 'blip')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    pack = small_phantom(40)
    method = create_method("simclr", "tiny", data=pack, image="my_module:my_encoder", layer=None)
    before = pretrained_encoder(shelf / "blip").body.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in method.image_encoder.body.state_dict().items()), "it starts from its weights"
    run = fit(method, pack, tmp_path / "run", epochs=1, batch_size=16, progress=False)
    again = load_encoder(run.path)
    moved = [not torch.equal(value, before[name]) for name, value in again.body.state_dict().items() if value.is_floating_point()]
    assert all(torch.equal(value, method.image_encoder.state_dict()[name]) for name, value in load_method(run.path, "last").image_encoder.state_dict().items()) and any(moved)
