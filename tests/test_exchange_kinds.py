"""Every published layout: random tensors under the published names -> import -> the same vectors as a small restatement of the published forward,
written here from the facts, or as the library that the model was made with."""
import json
import math
import os
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision import models as tv
from torchvision.models.convnext import CNBlockConfig
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, DINOv3ConvNextConfig, DINOv3ConvNextModel
from transformers import DINOv3ViTConfig, DINOv3ViTModel, MPNetConfig, MPNetModel, SiglipConfig, SiglipModel, SwinConfig, SwinModel

from medvis.data.pairs import Pairs, collate
from medvis.encoders.image import IMAGE_ENCODERS, ResNetEncoder, ViTEncoder
from medvis.data.preprocessing import Preprocessing
from medvis.exchange.doctor import examine
from medvis.exchange.importing import import_checkpoint
from medvis.exchange.layouts import LAYOUTS
from medvis.exchange.outgoing import export
from medvis.exchange.reader import UnsafeFile
from medvis.methods.method import phantom_tokenizer
from medvis.testing import small_phantom
from medvis.train.run import load_method

TEXTS = ["Small left effusion.", "No pneumothorax is seen.", "The heart is large, the lungs are clear.", "Small left effusion."]
CLOSE = dict(atol=1e-5, rtol=1e-5)


def bert_words(ends=("[CLS]", "[SEP]")):
    "A vocabulary of word pieces that puts its ends itself, as published tokenizers do."
    words = phantom_tokenizer(60)
    first, last = ends
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(token, words.convert_tokens_to_ids(token)) for token in ends])
    return words


WORDS = bert_words()


def numbers(state):
    "Random numbers that keep a network alive, in the shapes of a state dict."
    made = {}
    for name, value in state.items():
        if not value.is_floating_point():
            made[name] = value.clone()
        elif name.endswith("running_var"):
            made[name] = torch.rand_like(value) + 0.5
        elif value.ndim < 2:
            made[name] = value + 0.1 * torch.randn_like(value)
        else:
            made[name] = torch.randn_like(value) / math.sqrt(value[0].numel())
    return made


def with_numbers(network):
    network.load_state_dict(numbers(network.state_dict()))
    return network.eval()


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def bert(layers=2, width=64):
    return with_numbers(BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=layers, num_attention_heads=1, intermediate_size=96)))


def old_bert(network):
    "As files older than transformers 4.31 hold it: with position_ids and a pooler."
    return network.state_dict() | {"embeddings.position_ids": torch.arange(512)[None]}


def read(network, text):
    "All hidden states of one text, which is read alone."
    return network(**WORDS(text, return_tensors="pt"), output_hidden_states=True).hidden_states


def resnet(blocks=(1, 1, 1, 1), block=Bottleneck):
    return with_numbers(ResNet(block, list(blocks), num_classes=10))


def body_of(network):
    return {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}


def stages(network, x):
    "The maps of layer 3 and layer 4."
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    third = network.layer3(network.layer2(network.layer1(x)))
    return third, network.layer4(third)


def cells(x):
    return x.flatten(2).mT


def old_swin(network):
    "Hugging Face's names before transformers 5."
    out = {}
    for name, value in network.state_dict().items():
        for new, old in (("attention.q_proj", "attention.self.query"), ("attention.k_proj", "attention.self.key"), ("attention.v_proj", "attention.self.value"), ("attention.o_proj", "attention.output.dense"),
                         ("attention.relative_position_bias.", "attention.self."), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")):
            name = name.replace(new, old)
        out[name] = value
    return out | {"encoder.layers.0.blocks.0.attention.self.relative_position_index": torch.zeros(49, 49, dtype=torch.long)}


def swin():
    return with_numbers(SwinModel(SwinConfig(image_size=224, patch_size=4, embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], window_size=7)))


def linear(*shape):
    return torch.randn(*shape) / math.sqrt(shape[1])


# ---------------------------------------------------------------- each: content of the file, restatement of image, cells and texts, side of the image


def biovil(tmp_path, later=False):
    network, text, width = resnet(), bert(), 32
    state = under("encoder.encoder.", network.state_dict())
    conv, back, missing = linear(width, 512 if later else 2048), linear(256, 2048), torch.randn(256)
    projector = torch.nn.Sequential(torch.nn.Conv2d(conv.shape[1], width, 1, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 1))
    with_numbers(projector)
    state |= under("projector.model.", projector.state_dict())
    if later:
        state |= {"encoder.backbone_to_vit.weight": back[..., None, None], "encoder.missing_previous_emb": missing[None, :, None, None], "encoder.vit_pooler.norm_post.weight": torch.ones(256)}
    head = {"dense_to_hidden.weight": linear(width, 64), "dense_to_hidden.bias": torch.randn(width), "LayerNorm.weight": torch.randn(width), "LayerNorm.bias": torch.randn(width),
            "dense_to_output.weight": linear(width, width), "dense_to_output.bias": torch.randn(width)}
    folder = tmp_path / "cxr-bert"
    folder.mkdir()
    torch.save(under("bert.", old_bert(text)) | under("cls_projection_head.", head) | {"cls.predictions.bias": torch.ones(3)}, folder / "pytorch_model.bin")
    WORDS.save_pretrained(folder)

    def see(image):
        x = stages(network, image)[1]
        if later:
            x = F.conv2d(x, back[..., None, None])
            x = torch.cat([x, missing[None, :, None, None].expand(len(x), -1, *x.shape[2:])], 1)
        x = projector(x)
        return x.mean((2, 3)), cells(x)

    def say(one):
        x = F.gelu(F.linear(read(text, one)[-1][:, 0], head["dense_to_hidden.weight"], head["dense_to_hidden.bias"]))
        x = F.layer_norm(x, (width,), head["LayerNorm.weight"], head["LayerNorm.bias"], 1e-12)
        return F.linear(x, head["dense_to_output.weight"], head["dense_to_output.bias"])[0]

    return state, see, say, dict(text=folder), 480


def biovil_t(tmp_path):
    return *biovil(tmp_path, True)[:4], 448


def medclip(tmp_path, eye="resnet"):
    network, text, head, reader = (resnet() if eye == "resnet" else swin()), bert(3), linear(24, 2048 if eye == "resnet" else 128), linear(24, 64)
    state = under("vision_model.model.", body_of(network) | {"fc.weight": head} if eye == "resnet" else old_swin(network))
    state |= {"vision_model.projection_head.weight": head} if eye == "swin" else {}
    state |= under("text_model.model.", old_bert(text)) | {"text_model.projection_head.weight": reader, "logit_scale": torch.tensor(2.6592)}

    def see(image):
        x = cells(stages(network, image)[1]) if eye == "resnet" else network(image).last_hidden_state
        return x.mean(1) @ head.T, x @ head.T

    def say(one):
        layers = read(text, one)
        return (torch.stack([layers[1], layers[2], layers[-1]]).mean(0).mean(1) @ reader.T)[0]

    return state, see, say, dict(tokenizer=WORDS), 224


def medclip_swin(tmp_path):
    return medclip(tmp_path, "swin")


def cxr_clip(tmp_path, eye="resnet"):
    network, text, reader = (resnet() if eye == "resnet" else swin()), bert(), linear(24, 64)
    head, shift, other = linear(24, 2048 if eye == "resnet" else 128), torch.randn(24), torch.randn(24)
    state = under("image_encoder.resnet.", body_of(network)) if eye == "resnet" else under("image_encoder.image_encoder.", old_swin(network))
    state |= under("text_encoder.text_encoder.", old_bert(text)) | {"logit_scale": torch.tensor(2.6592)}
    state |= {"image_projection.projection.weight": head, "image_projection.projection.bias": shift, "text_projection.projection.weight": reader, "text_projection.projection.bias": other}

    def see(image):
        x = cells(stages(network, image)[1]) if eye == "resnet" else network(image).last_hidden_state
        return F.linear(x.mean(1) if eye == "resnet" else x[:, 0], head, shift), F.linear(x, head, shift)

    def say(one):
        return F.linear(read(text, one)[-1][:, -1], reader, other)[0]

    return {"model": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "scheduler": {}, "config": {"base": "r50"}, "epoch": 15}, see, say, dict(tokenizer=WORDS), 224


def cxr_clip_swin(tmp_path):
    return cxr_clip(tmp_path, "swin")


def biomedclip(tmp_path):
    network = with_numbers(timm.models.VisionTransformer(img_size=48, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=0))
    text, head, first, last = bert(), linear(24, 64), linear(40, 64), linear(24, 40)
    state = under("visual.trunk.", network.state_dict()) | under("text.transformer.", old_bert(text))
    state |= {"visual.head.proj.weight": head, "text.proj.0.weight": first, "text.proj.2.weight": last, "logit_scale": torch.tensor(4.4454)}

    def see(image):
        x = network.forward_features(image)
        return x[:, 0] @ head.T, x[:, 1:] @ head.T

    return state, see, lambda one: (F.gelu(read(text, one)[-1][:, 0] @ first.T) @ last.T)[0], dict(tokenizer=WORDS), 48


def small_clip():
    text = dict(vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, max_position_embeddings=40, eos_token_id=WORDS.sep_token_id, bos_token_id=WORDS.cls_token_id, hidden_act="quick_gelu")
    vision = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, image_size=64, patch_size=32, hidden_act="quick_gelu")
    return with_numbers(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))


def clip_parts(network):
    def see(image):
        out = network.vision_model(image)
        return network.visual_projection(out.pooler_output), network.visual_projection(network.vision_model.post_layernorm(out.last_hidden_state[:, 1:]))

    return see, lambda one: network.text_projection(network.text_model(**WORDS(one, return_tensors="pt", return_token_type_ids=False)).pooler_output)[0]


def chexzero(tmp_path):
    "OpenAI's names, with queries, keys and values in one matrix."
    network = small_clip()
    theirs, state = network.state_dict(), {}
    for side, here, layers in (("vision_model", "visual.transformer.", "visual."), ("text_model", "transformer.", "")):
        for block in range(2):
            old, new = f"{side}.encoder.layers.{block}.", f"{here}resblocks.{block}."
            for kind in ("weight", "bias"):
                state[f"{new}attn.in_proj_{kind}"] = torch.cat([theirs[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"])
                for there, name in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                    state[f"{new}{name}.{kind}"] = theirs[f"{old}{there}.{kind}"]
    for kind in ("weight", "bias"):
        state |= {f"visual.ln_pre.{kind}": theirs[f"vision_model.pre_layrnorm.{kind}"], f"visual.ln_post.{kind}": theirs[f"vision_model.post_layernorm.{kind}"], f"ln_final.{kind}": theirs[f"text_model.final_layer_norm.{kind}"]}
    state |= {"visual.class_embedding": theirs["vision_model.embeddings.class_embedding"], "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
              "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"], "visual.proj": theirs["visual_projection.weight"].T.contiguous(), "logit_scale": theirs["logit_scale"],
              "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"], "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"], "text_projection": theirs["text_projection.weight"].T.contiguous()}
    return state, *clip_parts(network), dict(tokenizer=WORDS), 64


def openai_clip(tmp_path):
    state, see, say, more, size = chexzero(tmp_path)
    return state, see, say, more | {"kind": "openai-clip"}, size


def clip(tmp_path):
    network = small_clip()
    network.save_pretrained(tmp_path / "clip")
    WORDS.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", *clip_parts(network), {}, 64


def siglip(tmp_path):
    "Texts are padded to the full length, and the padding is read."
    side = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    network = with_numbers(SiglipModel(SiglipConfig(text_config=side | dict(vocab_size=len(WORDS), max_position_embeddings=24), vision_config=side | dict(image_size=56, patch_size=14))))
    network.save_pretrained(tmp_path / "siglip")
    WORDS.save_pretrained(tmp_path / "siglip")
    (tmp_path / "siglip/preprocessor_config.json").write_text('{"size": {"height": 56, "width": 56}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')

    def see(image):
        out = network.vision_model(image)
        tokens = out.last_hidden_state
        return out.pooler_output, network.vision_model.head(tokens.flatten(0, 1)[:, None]).view_as(tokens)

    def say(one):
        ids = WORDS(one, return_tensors="pt", padding="max_length", max_length=24).input_ids
        return network.text_model(input_ids=ids).pooler_output[0]

    return tmp_path / "siglip", see, say, {}, 56


def afloc(tmp_path):
    "The whole and the cells have heads of their own; a text is the mean of all tokens, summed over the last four layers."
    network, text, whole, bias, local = resnet(), bert(4), linear(64, 2048), torch.randn(64), linear(64, 1024)
    state = under("afloc.img_encoder.model.", network.state_dict()) | under("afloc.text_encoder.model.", old_bert(text))
    state |= {"afloc.img_encoder.global_embedder.weight": whole, "afloc.img_encoder.global_embedder.bias": bias, "afloc.img_encoder.local_embedder.weight": local[..., None, None], "afloc.img_encoder.local2_embedder.weight": linear(64, 512)[..., None, None]}

    def see(image):
        third, fourth = stages(network, F.interpolate(image, size=(299, 299), mode="bilinear", align_corners=True))
        return F.linear(fourth.mean((2, 3)), whole, bias), cells(third) @ local.T

    return {"state_dict": state}, see, lambda one: torch.stack(read(text, one)[-4:]).sum(0).mean(1)[0], dict(tokenizer=WORDS), 224


def maco(tmp_path):
    "A text in small letters behind [CLS], without [SEP]; its vector is that of BERT's pooler."
    network = with_numbers(timm.models.VisionTransformer(img_size=48, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=0))
    text, head, bias, bare = bert(), linear(64, 64), torch.randn(64), phantom_tokenizer(60)
    state = network.state_dict() | under("bert_encoder.model.bert.", old_bert(text)) | {"img_mlp.weight": head, "img_mlp.bias": bias, "pos_weight_img.weight": torch.rand(1, 9), "pos_weight_img.bias": torch.zeros(1)}
    state |= {"Tpar": torch.tensor(14.0), "decoder_embed.weight": torch.ones(2), "mask_token": torch.ones(2), "bert_encoder.model.cls.predictions.bias": torch.ones(2)}

    def see(image):
        x = F.linear(network.forward_features(image)[:, 1:], head, bias)
        return x.mean(1), x

    def say(one):
        ids = torch.tensor([[bare.cls_token_id, *bare(one.lower(), add_special_tokens=False).input_ids]])
        return text(input_ids=ids).pooler_output[0]

    return {"model": state}, see, say, dict(tokenizer=bare), 48


DUAL = [afloc, maco, biovil, biovil_t, medclip, medclip_swin, cxr_clip, cxr_clip_swin, biomedclip, chexzero, openai_clip, clip, siglip]


def as_file(content, path):
    if isinstance(content, dict):
        torch.save(content, path / "model.pt")
        return path / "model.pt"
    return content


@pytest.mark.parametrize("make", DUAL, ids=lambda make: make.__name__)
@torch.no_grad()
def test_vectors_of_images_cells_and_texts(make, tmp_path):
    torch.manual_seed(len(make.__name__))
    content, see, say, more, size = make(tmp_path)
    run = import_checkpoint(as_file(content, tmp_path), tmp_path / "run", **more)
    method = load_method(run)
    image = torch.rand(2, 3, size, size)
    whole, local = see(image)
    found, grid = method.embed_regions(image)
    assert method.preprocessing.size == size and grid[0] * grid[1] == local.shape[1]
    torch.testing.assert_close(found, local, **CLOSE)
    torch.testing.assert_close(method.embed_image(image), whole, **CLOSE)
    torch.testing.assert_close(method.embed_texts(TEXTS), torch.stack([say(text) for text in TEXTS]), **CLOSE)
    kind = run.manifest["imported"]["kind"]
    assert kind == make.__name__.removesuffix("_swin").replace("_", "-") and run.manifest["data"]["declared"] == list(LAYOUTS[kind].trained_on) and run.manifest["data"]["fit"]


# ---------------------------------------------------------------- image-only models


@torch.no_grad()
@pytest.mark.parametrize("registers", [False, True])
def test_dinov2(registers, tmp_path):
    network = with_numbers(Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=70, patch_size=14)))
    state = network.state_dict()
    if registers:                                              # the names that RAD-DINO's file has
        state = {name.replace(f".attention.{part}_proj.", f".attention.attention.{old}."): value for name, value in state.items() for part, old in (("q", "query"), ("k", "key"), ("v", "value"))
                 if f".attention.{part}_proj." in name} | {name.replace("attention.o_proj", "attention.output.dense"): value for name, value in state.items() if not re.search("attention.[qkv]_proj", name)}
    torch.save(state, tmp_path / "model.pt")
    method = load_method(import_checkpoint(tmp_path / "model.pt", tmp_path / "run"))
    image = torch.rand(2, 3, 70, 70)
    features, theirs = method.image_encoder(image), network(image)
    torch.testing.assert_close(features.regions, theirs.last_hidden_state[:, 1:], **CLOSE)
    torch.testing.assert_close(features.whole, theirs.pooler_output, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_torchvision(block, tmp_path):
    network = resnet((2, 1, 1, 1), block)
    torch.save({"state_dict": under("module.", network.state_dict())}, tmp_path / "model.pth.tar")
    method = load_method(import_checkpoint(tmp_path / "model.pth.tar", tmp_path / "run"))
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(method.embed_image(image), stages(network, image)[1].mean((2, 3)), **CLOSE)
    assert method.reads_text is False and method.preprocessing.mean == (0.485, 0.456, 0.406)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timm(pool, tmp_path):
    network = with_numbers(timm.models.VisionTransformer(img_size=48, patch_size=16, embed_dim=64, depth=2, num_heads=1, class_token=pool == "token", global_pool=pool, fc_norm=False, num_classes=5))
    torch.save({"model": under("encoder.", network.state_dict())}, tmp_path / "model.pth")
    method = load_method(import_checkpoint(tmp_path / "model.pth", tmp_path / "run"))
    image = torch.rand(2, 3, 48, 48)
    tokens = network.forward_features(image)
    torch.testing.assert_close(method.image_encoder(image).regions, tokens[:, 1:] if pool == "token" else tokens, **CLOSE)
    torch.testing.assert_close(method.embed_image(image), tokens[:, 0] if pool == "token" else tokens.mean(1), **CLOSE)


# ---------------------------------------------------------------- models whose texts look for themselves


def small_vit(side=48, **more):
    return with_numbers(timm.models.VisionTransformer(img_size=side, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=0, **more))


def old_dino(state):
    "Names of Hugging Face's DINOv2 before transformers 5, which published files have."
    for new, old in (("attention.q_proj", "attention.attention.query"), ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"), ("attention.o_proj", "attention.output.dense")):
        state = {name.replace(new, old): value for name, value in state.items()}
    return state


def carzero_file():
    "Its state dict; with the self-attention that is never called, and the last normalisation twice."
    eye, text, width = small_vit(), bert(4), 64
    decoder = {f"decoder.layers.{n}.{name}": value for n in range(2) for name, value in (
        ("self_attn.in_proj_weight", linear(3 * width, width)), ("norm1.weight", torch.ones(width)), ("multihead_attn.in_proj_weight", linear(3 * width, width)), ("multihead_attn.in_proj_bias", torch.randn(3 * width)),
        ("multihead_attn.out_proj.weight", linear(width, width)), ("multihead_attn.out_proj.bias", torch.randn(width)), ("linear1.weight", linear(40, width)), ("linear1.bias", torch.randn(40)),
        ("linear2.weight", linear(width, 40)), ("linear2.bias", torch.randn(width)), *((f"norm{k}.{kind}", torch.randn(width)) for k in (2, 3) for kind in ("weight", "bias")))}
    head = {"mlp_head.0.weight": linear(24, width), "mlp_head.0.bias": torch.randn(24), "mlp_head.3.weight": linear(12, 24), "mlp_head.3.bias": torch.randn(12), "mlp_head.6.weight": linear(1, 12), "mlp_head.6.bias": torch.randn(1)}
    norm = {"decoder_norm.weight": torch.randn(width), "decoder_norm.bias": torch.randn(width)}
    fusion = decoder | head | norm | {name.replace("decoder_norm", "decoder.norm"): value for name, value in norm.items()} | {"logit_scale": torch.tensor(2.6)}
    return under("CARZero.img_encoder.model.", eye.state_dict()) | under("CARZero.text_encoder.model.", old_bert(text)) | under("CARZero.fusion_module.", fusion), eye, text, fusion


def carzero_text(text, one):
    "Words as sums of their pieces ([CLS] and [SEP] are words), filled to 97 with zeros, and their mean: what the text is."
    ids = WORDS(" ".join(re.findall(r"\w+", one.lower())))["input_ids"]
    tokens = torch.stack(text(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-4:]).sum(0)[0]
    words = []
    for token, vector in zip(WORDS.convert_ids_to_tokens(ids), tokens):
        if token.startswith("##"):
            words[-1] = words[-1] + vector
        else:
            words.append(vector)
    words = torch.cat([torch.stack(words), torch.zeros(97 - len(words), 64)])
    return torch.cat([words.mean(0, keepdim=True), words])


def carzero_fusion(parts, memory, query):
    "One query and one memory: the score, and the mean attention."
    norm = lambda x, name: F.layer_norm(x, (64,), parts[f"{name}.weight"], parts[f"{name}.bias"])
    memory, x, looked = norm(memory, "decoder_norm"), norm(query, "decoder_norm"), 0
    for n in range(2):
        own = lambda name: parts[f"decoder.layers.{n}.{name}"]
        q, k, v = (F.linear(y, w, b).view(-1, 4, 16).transpose(0, 1) for y, w, b in zip(
            (norm(x, f"decoder.layers.{n}.norm2")[None], memory, memory), own("multihead_attn.in_proj_weight").chunk(3), own("multihead_attn.in_proj_bias").chunk(3)))
        weights = (q @ k.mT / 4).softmax(-1)
        x = x + F.linear((weights @ v).transpose(0, 1).reshape(64), own("multihead_attn.out_proj.weight"), own("multihead_attn.out_proj.bias"))
        x = x + F.linear(F.linear(norm(x, f"decoder.layers.{n}.norm3"), own("linear1.weight"), own("linear1.bias")).relu(), own("linear2.weight"), own("linear2.bias"))
        looked = looked + weights.mean(0)[0] / 2
    x = norm(x, "decoder_norm")
    for place in (0, 3, 6):
        x = F.linear(x, parts[f"mlp_head.{place}.weight"], parts[f"mlp_head.{place}.bias"])
        x = x if place == 6 else x.relu()
    return x[0], looked


@torch.no_grad()
def test_carzero(tmp_path):
    torch.manual_seed(0)
    state, eye, text, fusion = carzero_file()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "CARZero_best_model.ckpt")
    run = import_checkpoint(tmp_path / "CARZero_best_model.ckpt", tmp_path / "run", tokenizer=WORDS)
    method = load_method(run)
    batch = phantom_batch(method)
    seen = eye.forward_features(batch.image)                   # CLS, then cells
    torch.testing.assert_close(method.embed_image(batch.image), seen, **CLOSE)
    texts = torch.stack([carzero_text(text, one) for one in TEXTS])
    torch.testing.assert_close(method.embed_texts(TEXTS), texts[:, 0], **CLOSE)
    torch.testing.assert_close(method.text_encoder(["Smallest effusions."])[0], carzero_text(text, "Smallest effusions."), **CLOSE)
    assert any(token.startswith("##") for token in WORDS.tokenize("smallest effusions"))           # a word of several pieces
    said = torch.stack([carzero_text(text, " ".join(sentences)) for sentences in batch.sentences])
    torch.testing.assert_close(method.embed_text(batch), said, **CLOSE)
    wanted = torch.stack([torch.stack([(carzero_fusion(fusion, image, one[0])[0] + carzero_fusion(fusion, one, image[0])[0]) / 2 for one in said]) for image in seen])
    torch.testing.assert_close(method.similarity(method.embed_image(batch.image), method.embed_text(batch)), wanted, **CLOSE)
    maps = method.correspondence(batch)
    for row, column in ((0, 0), (2, 0), (1, len(batch.sentences[1]) - 1)):
        looked = carzero_fusion(fusion, seen[row], carzero_text(text, batch.sentences[row][column])[0])[1]
        torch.testing.assert_close(maps.sentences[row, :, column], looked[1:], **CLOSE)
    assert maps.learned == ("sentences",) and run.manifest["data"] | {"fit": "pad", "declared": ["mimic train"]} == run.manifest["data"]
    told = " ".join(examine(tmp_path / "CARZero_best_model.ckpt", tokenizer=WORDS)["finding"])
    assert "it is whole" in told and "they cannot say that a finding is absent" in told and "a self-attention that its code never calls" in told
    assert run.manifest["imported"]["kind"] == "carzero" and method.preprocessing.mean == 0.4978


def radzero_file(image_size=56):
    dino = dict(hidden_size=64, num_attention_heads=1, patch_size=14, image_size=image_size)
    eye, more = with_numbers(Dinov2Model(Dinov2Config(num_hidden_layers=2, **dino))), with_numbers(Dinov2Model(Dinov2Config(num_hidden_layers=2, **dino)).encoder)
    text = with_numbers(MPNetModel(MPNetConfig(vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96)))
    norm = {"weight": torch.randn(64), "bias": torch.randn(64)}
    state = under("vision_model.", old_dino(eye.state_dict())) | under("align_transformer.transformer_layers.", old_dino(more.state_dict())) | under("text_model.", text.state_dict())
    return state | under("loss_fns.RadZeroLoss.layer_norm.", norm) | {"loss_fns.RadZeroLoss.loss_temperature": torch.tensor([math.log(0.07)])}, eye, more, text, norm


@torch.no_grad()
@pytest.mark.parametrize("size", [56, 84])
def test_radzero(size, tmp_path):
    "Also where its places are stored for fewer pixels than it sees."
    torch.manual_seed(0)
    state, eye, more, text, norm = radzero_file()
    (tmp_path / "radzero").mkdir()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "radzero/model.safetensors")
    WORDS.save_pretrained(tmp_path / "radzero")
    (tmp_path / "radzero/config.json").write_text('{"vision_config": {"model_type": "dinov2", "img_size": %d}}' % size)
    run = import_checkpoint(tmp_path / "radzero", tmp_path / "run")
    method = load_method(run)
    batch = phantom_batch(method)
    normed = lambda x: F.layer_norm(x, (64,), norm["weight"], norm["bias"])
    say = lambda one: normed(text(**WORDS(one, return_tensors="pt", return_token_type_ids=False)).last_hidden_state.mean(1))[0]
    tokens = normed(more(eye(batch.image).last_hidden_state).last_hidden_state)
    assert batch.image.shape[-1] == method.preprocessing.size == size and method.preprocessing.fit == "stretch"
    torch.testing.assert_close(method.embed_regions(batch.image)[0], tokens[:, 1:], **CLOSE)
    torch.testing.assert_close(method.embed_texts(TEXTS), torch.stack([say(one) for one in TEXTS]), **CLOSE)
    unit = F.normalize(tokens, dim=-1)
    said = F.normalize(torch.stack([say(" ".join(sentences)) for sentences in batch.sentences]), dim=-1)
    shares = (torch.einsum("td,ind->itn", said, unit) / 0.07).softmax(-1)
    wanted = (F.normalize(shares @ unit, dim=-1) * said).sum(-1)
    torch.testing.assert_close(method.similarity(method.embed_image(batch.image), method.embed_text(batch)), wanted, **CLOSE)
    maps = method.correspondence(batch)
    torch.testing.assert_close(maps.sentences[1, :, 0], unit[1, 1:] @ F.normalize(say(batch.sentences[1][0]), dim=0), **CLOSE)
    told = " ".join(examine(tmp_path / "radzero")["finding"])
    assert f"it is whole, and sees {size} x {size} pixels" in told and "CLS is not drawn" in told
    assert maps.temperature == pytest.approx(0.07) and method.config.bias == 0 and maps.learned == ("sentences",) and run.manifest["imported"]["kind"] == "radzero"


# ---------------------------------------------------------------- image-only models: content of the file, and what their library sees (whole, cells)


def eva_x(names="timm", inner=False):
    "Tiny and small have one matrix of queries, keys and values and one of the gate; base has them apart, and a normalisation between."
    network = with_numbers(timm.models.Eva(img_size=48, patch_size=16, embed_dim=64, depth=2, num_heads=1, mlp_ratio=4 * 2 / 3, swiglu_mlp=True, scale_mlp=inner, qkv_fused=not inner, use_rot_pos_emb=True, ref_feat_shape=(3, 3), num_classes=0))
    state = network.state_dict() | {"mask_token": torch.ones(1, 1, 64), "lm_head.weight": torch.ones(2, 64), "rope.freqs_cos": torch.ones(9, 64)}
    if names == "authors":
        for new, old in (("fc_norm", "norm"), ("mlp.norm", "mlp.ffn_ln"), ("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc1.", "mlp.w12."), ("mlp.fc2", "mlp.w3"), ("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias")):
            state = {name.replace(new, old): value for name, value in state.items()}

    def see(image):
        cells = network.forward_features(image)[:, 1:]
        return network.fc_norm(cells.mean(1)), network.fc_norm(cells)

    return {"module": state}, see, 48


def dinov3(names="transformers", gated=False):
    network = with_numbers(DINOv3ViTModel(DINOv3ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, image_size=32, patch_size=16, num_register_tokens=4, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu")))
    state = network.state_dict()
    if names == "published":                                   # the folders of Hugging Face
        state = {name.removeprefix("model."): value for name, value in state.items()}
    if names == "authors":
        theirs, state = state, {"cls_token": state["embeddings.cls_token"], "storage_tokens": state["embeddings.register_tokens"], "mask_token": torch.ones(1, 64), "rope_embed.periods": torch.ones(16)}
        for kind in ("weight", "bias"):
            state |= {f"patch_embed.proj.{kind}": theirs[f"embeddings.patch_embeddings.{kind}"], f"norm.{kind}": theirs[f"norm.{kind}"]}
            for n in range(2):
                old, new = f"model.layer.{n}.", f"blocks.{n}."
                parts = [theirs.get(f"{old}attention.{part}_proj.{kind}", torch.full((64,), 7.0)) for part in "qkv"]
                state |= {f"{new}attn.qkv.{kind}": torch.cat(parts), f"{new}attn.qkv.bias_mask": torch.ones(192), f"{new}attn.proj.{kind}": theirs[f"{old}attention.o_proj.{kind}"]}
                state |= {f"{new}norm{k}.{kind}": theirs[f"{old}norm{k}.{kind}"] for k in (1, 2)} | {f"{new}ls{k}.gamma": theirs[f"{old}layer_scale{k}.lambda1"] for k in (1, 2)}
                mlp = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
                state |= {f"{new}mlp.{ours}.{kind}": theirs[f"{old}mlp.{part}.{kind}"] for part, ours in mlp.items()}

    def see(image):
        tokens = network(image).last_hidden_state
        return tokens[:, 0], tokens[:, 5:]

    return state, see, 224


def dinov2_registers():
    network = with_numbers(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=70, patch_size=14, num_register_tokens=4)))

    def see(image):
        tokens = network(image).last_hidden_state
        return tokens[:, 0], tokens[:, 5:]

    return old_dino(network.state_dict()), see, 70


def torchvision_convnext():
    network = with_numbers(tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 2), CNBlockConfig(32, None, 1)], num_classes=5))
    end = lambda x: network.classifier[1](network.classifier[0](x))

    def see(image):
        x = network.features(image)
        return end(network.avgpool(x)), torch.stack([end(x[:, :, i, j, None, None]) for i in range(x.shape[2]) for j in range(x.shape[3])], 1)

    return network.state_dict(), see, 224


def timm_convnext(version=1, names="timm"):
    network = with_numbers(timm.models.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5, **(dict(use_grn=True, ls_init_value=None) if version == 2 else {})))
    state = network.state_dict()
    if names == "authors":
        for new, old in ((r"^stem\.", "downsample_layers.0."), (r"stages\.(\d)\.downsample", r"downsample_layers.\1"), (r"\.blocks\.", "."), ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"mlp\.grn\.weight", "grn.gamma"), (r"mlp\.grn\.bias", "grn.beta"), (r"head\.norm", "norm"), (r"head\.fc", "head")):
            state = {re.sub(new, old, name): value for name, value in state.items()}
        state = {name: value[None, None, None] if ".grn." in name else value for name, value in state.items()}

    def see(image):
        x = network.forward_features(image)
        return network.forward_head(x, pre_logits=True), F.layer_norm(cells(x), (32,), network.head.norm.weight, network.head.norm.bias, 1e-6)

    return state, see, 224


def dinov3_convnext():
    network = with_numbers(DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])))

    def see(image):
        tokens = network(image).last_hidden_state
        return tokens[:, 0], tokens[:, 1:]

    return {name.removeprefix("model."): value for name, value in network.state_dict().items()}, see, 224


def torchvision_swin():
    network = with_numbers(tv.SwinTransformer([4, 4], 16, [1, 2, 1, 1], [1, 2, 4, 8], [7, 7], num_classes=5))

    def see(image):
        x = network.norm(network.features(image)).flatten(1, 2)
        return x.mean(1), x

    return network.state_dict(), see, 224


def timm_swin(names="timm"):
    network = with_numbers(timm.models.SwinTransformer(img_size=224, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=5))
    state = network.state_dict()
    if names == "authors":
        state = {re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name).replace("head.fc", "head"): value for name, value in state.items()}
        state |= {"layers.0.blocks.0.attn_mask": torch.ones(64, 49, 49), "layers.0.blocks.0.attn.relative_position_index": torch.ones(49, 49)}

    def see(image):
        x = network.forward_features(image).flatten(1, 2)
        return x.mean(1), x

    return state, see, 224


def hf_swin():
    network = swin()
    return old_swin(network), lambda image: (network(image).pooler_output, network(image).last_hidden_state), 224


def densenet(names="torchvision"):
    network = tv.DenseNet(8, (1, 2, 1, 1), 16, num_classes=5)
    if names == "torchxrayvision":
        network.features.conv0 = torch.nn.Conv2d(1, 16, 7, 2, 3, bias=False)
    state = with_numbers(network).state_dict()
    if names == "chexnet":                                     # before torchvision 0.3
        state = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name) if "denselayer" in name else name: value for name, value in state.items()}
    if names == "torchxrayvision":
        state |= {"op_threshs": torch.rand(18)}

    def see(image):
        x = network.features(image).relu()
        return x.mean((2, 3)), cells(x)

    return state, see, 224


def efficientnet(name="efficientnet_b0"):
    network = with_numbers(tv.get_model(name, weights=None))

    def see(image):
        x = network.features(image)
        return x.mean((2, 3)), cells(x)

    return network.state_dict(), see, 224


def torchvision_vit(old=False):
    network = with_numbers(tv.VisionTransformer(48, 16, 2, 1, 64, 96, num_classes=5))
    state = network.state_dict()
    if old:
        state = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value for name, value in state.items()}

    def see(image):
        x = network.encoder(torch.cat([network.class_token.expand(len(image), -1, -1), network._process_input(image)], 1))
        return x[:, 0], x[:, 1:]

    return state, see, 48


ONLY_SEE = {
    "eva-x tiny": eva_x, "eva-x base": lambda: eva_x(inner=True), "eva-x tiny as published": lambda: eva_x("authors"), "eva-x base as published": lambda: eva_x("authors", True),
    "dinov3": dinov3, "dinov3 as published": lambda: dinov3("published"), "dinov3 gated": lambda: dinov3("published", True), "dinov3 of its authors": lambda: dinov3("authors"), "dinov3 of its authors, gated": lambda: dinov3("authors", True),
    "dinov2 with registers": dinov2_registers, "convnext of torchvision": torchvision_convnext, "convnext of timm": timm_convnext, "convnext of its authors": lambda: timm_convnext(names="authors"),
    "convnext V2": lambda: timm_convnext(2), "convnext V2 of its authors": lambda: timm_convnext(2, "authors"), "convnext of DINOv3": dinov3_convnext,
    "swin of torchvision": torchvision_swin, "swin of timm": timm_swin, "swin of its authors": lambda: timm_swin("authors"), "swin of Hugging Face": hf_swin,
    "densenet": densenet, "densenet of CheXNet": lambda: densenet("chexnet"), "densenet of torchxrayvision": lambda: densenet("torchxrayvision"),
    "torchvision-efficientnet": efficientnet, "torchvision-vit": torchvision_vit, "torchvision-vit, older": lambda: torchvision_vit(True),
}


@pytest.mark.parametrize("name", ONLY_SEE)
@torch.no_grad()
def test_models_that_only_see(name, tmp_path):
    torch.manual_seed(len(name))
    content, see, size = ONLY_SEE[name]()
    run = import_checkpoint(as_file(content, tmp_path), tmp_path / "run")
    method = load_method(run)
    image = torch.rand(2, method.preprocessing.channels, size, size)
    whole, local = see(image)
    found = method.image_encoder(image)
    assert run.manifest["imported"]["kind"] == re.split("[ ,]", name)[0] and method.preprocessing.size == size and found.grid[0] * found.grid[1] == local.shape[1]
    torch.testing.assert_close(found.regions, local, **CLOSE)
    torch.testing.assert_close(method.embed_image(image), whole, **CLOSE)
    assert method.reads_text is False and not run.manifest["imported"]["unknown"]
    table = examine(as_file(content, tmp_path))
    assert "stop" not in set(table["weight"]) and table["finding"].str.startswith(f"it is whole, and sees {size} x {size} pixels").any() and table["finding"].str.contains("it reads no text").any()


@pytest.mark.parametrize("architecture", ["resnet18d", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
@torch.no_grad()
def test_a_folder_of_timm(architecture, tmp_path):
    "Any architecture, by its name; the folder says what it sees."
    options = {"img_size": 64} if architecture.startswith("vit") else {}
    network = with_numbers(timm.create_model(architecture, **options))
    (tmp_path / "folder").mkdir()
    save_file(network.state_dict(), tmp_path / "folder/model.safetensors")
    seen = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.5}
    (tmp_path / "folder/config.json").write_text(json.dumps({"architecture": architecture, "model_args": options, "pretrained_cfg": seen}))
    run = import_checkpoint(tmp_path / "folder", tmp_path / "run")
    method, image = load_method(run), torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(method.embed_image(image), network.forward_head(network.forward_features(image), pre_logits=True), **CLOSE)
    assert run.manifest["imported"]["kind"] == "timm" and (method.preprocessing.mean, method.preprocessing.crop, method.preprocessing.fit) == ((0.1, 0.2, 0.3), 0.5, "crop")


@torch.no_grad()
def test_what_goes_out_as_timm_comes_back(tmp_path):
    torch.save(small_vit().state_dict(), tmp_path / "vit.pt")
    here = import_checkpoint(tmp_path / "vit.pt", tmp_path / "here")
    back = import_checkpoint(export(here.path, to="timm", out=tmp_path / "timm"), tmp_path / "back")
    image = torch.rand(2, 3, 48, 48)
    assert (here.manifest["imported"]["kind"], back.manifest["imported"]["kind"]) == ("timm-vit", "timm")
    first, again = load_method(here).image_encoder(image), load_method(back).image_encoder(image)
    torch.testing.assert_close(again.regions, first.regions, **CLOSE)
    torch.testing.assert_close(again.whole, first.whole, **CLOSE)


@pytest.mark.parametrize("to", ["timm", "torchvision", "transformers", "open_clip"])
def test_models_with_no_place_elsewhere_say_so(to, tmp_path):
    "Blocks behind a vision transformer, and the reading of others' texts, are no other library's."
    torch.save(radzero_file()[0], tmp_path / "model.pt")
    run = import_checkpoint(tmp_path / "model.pt", tmp_path / "run", tokenizer=WORDS)
    with pytest.raises(ValueError):
        export(run.path, to=to, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "words"), [
    ({"architecture": "hf-hub:someone/else"}, "knows no architecture"), ({"architecture": "../evil"}, "knows no architecture"), ({"architecture": "resnet34"}, "is half of a model"),
    ({"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": "large"}}, "timm makes no vit_tiny_patch16_224"), ({"architecture": 3, "pretrained_cfg": None}, "none of the published kinds")])
def test_a_folder_of_timm_that_lies(config, words, tmp_path):
    (tmp_path / "folder").mkdir()
    save_file({"stem.weight": torch.ones(2)}, tmp_path / "folder/model.safetensors")
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        import_checkpoint(tmp_path / "folder", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


class Calls:
    "Makes a folder when a pickle is trusted."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["carzero", "radzero", *ONLY_SEE])
def test_half_and_changed_files_of_them(name, tmp_path):
    "A weight less, a weight more, a weight of another shape, a call beside the weights: each is named, and nothing is written or run."
    made = {"carzero": carzero_file, "radzero": radzero_file}.get(name) or ONLY_SEE[name]
    state = made()[0]
    state = state.get("module", state)
    ask = dict(tokenizer=WORDS, kind=None if name in LAYOUTS else next(kind for kind in LAYOUTS if name.startswith(kind)))
    weights = sorted(key for key, value in state.items() if value.ndim > 1 and re.search(r"(blocks?|layers?|stages|features)\W?.*weight", key) and "lm_head" not in key and "self_attn" not in key)
    lost = weights[len(weights) // 2]
    for change, words in (({lost: None}, "half of"), ({"adapter.weight": torch.ones(2, 2)}, "adapter.weight"), ({lost: state[lost][:-1]}, "shape|half of")):
        torch.save({key: value for key, value in (state | change).items() if value is not None}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=words):
            import_checkpoint(tmp_path / "model.pt", tmp_path / "run", **ask)
    torch.save({"model": state, "args": Calls(tmp_path / "mark")}, tmp_path / "model.pt")
    with pytest.raises(UnsafeFile, match="Nothing of it was run"):
        import_checkpoint(tmp_path / "model.pt", tmp_path / "run", **ask)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


# ---------------------------------------------------------------- methods of medvis: renamed only


@pytest.fixture
def small_eyes(monkeypatch):
    "ResNet-50 and ViT-B/16 of one block a stage, under the same names."
    def eye(layer="layer4", upsample=None):
        return ResNetEncoder(ResNet(Bottleneck, [1, 1, 1, 1]), Preprocessing(64, 1.0), layer, upsample and 96)

    monkeypatch.setitem(IMAGE_ENCODERS, "resnet50", eye)
    monkeypatch.setitem(IMAGE_ENCODERS, "vit_base_patch16_224", lambda: ViTEncoder(timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=0), Preprocessing(64, 1.0)))


def two_layers(width, hidden=48, out=16, conv=False, affine_end=False):
    "Linear, BatchNorm, ReLU, Linear (, BatchNorm without weights)."
    head = {"0.weight": linear(hidden, width), "0.bias": torch.randn(hidden), "1.weight": torch.randn(hidden), "1.bias": torch.randn(hidden), "1.running_mean": torch.randn(hidden), "1.running_var": torch.rand(hidden) + 0.5,
            "1.num_batches_tracked": torch.tensor(3), "3.weight": linear(out, hidden), "3.bias": torch.randn(out)}
    if not affine_end:
        head |= {"4.running_mean": torch.randn(out), "4.running_var": torch.rand(out) + 0.5, "4.num_batches_tracked": torch.tensor(3)}
    return {name: value[..., None] if conv and value.ndim == 2 else value for name, value in head.items()}


def through(head, x):
    "What the layers of `two_layers` make of vectors."
    flat = {name: value.squeeze(-1) if value.ndim == 3 else value for name, value in head.items()}
    x = F.linear(x, flat["0.weight"], flat["0.bias"])
    x = (x - flat["1.running_mean"]) / (flat["1.running_var"] + 1e-5).sqrt() * flat["1.weight"] + flat["1.bias"]
    x = F.linear(x.relu(), flat["3.weight"], flat["3.bias"])
    return (x - flat["4.running_mean"]) / (flat["4.running_var"] + 1e-5).sqrt() if "4.running_mean" in flat else x


def phantom_batch(method):
    pairs = Pairs(small_phantom(4, size=64), method.tokenizer, method.preprocessing, method.sampling)
    return collate([pairs[i] for i in range(3)])


def summed_words(tokens, index):
    "A word is the sum of its pieces."
    return torch.stack([torch.stack([tokens[b, index[b] == w].sum(0) for w in range(int(index.max()) + 1)]) for b in range(len(tokens))])


@torch.no_grad()
@pytest.mark.parametrize("eye", ["vit", "resnet"])
def test_mgca(eye, tmp_path, small_eyes):
    torch.manual_seed(0)
    network = with_numbers(timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=0)) if eye == "vit" else resnet()
    text, (wide, deep) = bert(), (64, 64) if eye == "vit" else (2048, 1024)
    heads = {"img_encoder_q.global_embed.head.": two_layers(wide), "img_encoder_q.local_embed.head.": two_layers(deep, conv=True), "text_encoder_q.global_embed.head.": two_layers(64), "text_encoder_q.local_embed.head.": two_layers(64, conv=True)}
    state = under("img_encoder_q.model.", body_of(network)) | under("text_encoder_q.model.", {name: value for name, value in old_bert(text).items() if "token_type" not in name})
    state |= {"text_encoder_q.model.encoder.layer.0.crossattention.self.query.weight": torch.ones(3, 3), "word_local_atten_layer.in_proj_weight": torch.ones(48, 16), "prototype_layer.weight": torch.randn(20, 16)}
    for prefix, head in heads.items():
        state |= under(prefix, head)
    torch.save({"state_dict": state, "hyper_parameters": {"use_local_atten": False}, "optimizer_states": [{}], "epoch": 3}, tmp_path / "vit_base.ckpt")
    run = import_checkpoint(tmp_path / "vit_base.ckpt", tmp_path / "run", tokenizer=WORDS)
    method = load_method(run)
    batch = phantom_batch(method)
    text.embeddings.token_type_embeddings.weight.zero_()       # BLIP's BERT has none
    tokens = text(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    if eye == "vit":
        x = network.forward_features(batch.image)
        whole, local = x[:, 0], x[:, 1:]
    else:
        third, fourth = stages(network, F.interpolate(batch.image, size=(96, 96), mode="bilinear", align_corners=True))
        whole, local = fourth.mean((2, 3)), cells(third)
    torch.testing.assert_close(method.embed_image(batch.image), through(heads["img_encoder_q.global_embed.head."], whole), **CLOSE)
    torch.testing.assert_close(method.embed_text(batch), through(heads["text_encoder_q.global_embed.head."], tokens[:, 0]), **CLOSE)
    words = through(heads["text_encoder_q.local_embed.head."], summed_words(tokens, batch.word_index))
    regions = through(heads["img_encoder_q.local_embed.head."], local)
    maps = method.correspondence(batch)
    wanted = F.normalize(regions, dim=-1) @ F.normalize(words, dim=-1).mT
    torch.testing.assert_close(maps.words[maps.word_mask[:, None].expand_as(maps.words)], wanted[maps.word_mask[:, None].expand_as(wanted)], **CLOSE)
    assert method.config.learned_attention is False and run.manifest["data"]["fit"] == "pad" and len(method.prototypes) == 20


@torch.no_grad()
@pytest.mark.parametrize("block", [Bottleneck, BasicBlock])
def test_gloria(block, tmp_path, small_eyes):
    torch.manual_seed(1)
    network, text = resnet((2, 2, 2, 2) if block is BasicBlock else (1, 1, 1, 1), block), bert(4)
    deep, wide = (1024, 2048) if block is Bottleneck else (256, 512)
    whole_head, bias, local_head = linear(64, wide), torch.randn(64), linear(64, deep)
    state = under("gloria.img_encoder.model.", network.state_dict()) | under("gloria.text_encoder.model.", old_bert(text))
    state |= {"gloria.img_encoder.global_embedder.weight": whole_head, "gloria.img_encoder.global_embedder.bias": bias, "gloria.img_encoder.local_embedder.weight": local_head[..., None, None]}
    torch.save({"state_dict": state}, tmp_path / "chexpert_resnet50.ckpt")
    method = load_method(import_checkpoint(tmp_path / "chexpert_resnet50.ckpt", tmp_path / "run", tokenizer=WORDS))
    batch = phantom_batch(method)
    side = 96 if block is Bottleneck else 299
    third, fourth = stages(network, F.interpolate(batch.image, size=(side, side), mode="bilinear", align_corners=True))
    torch.testing.assert_close(method.embed_image(batch.image)[0], F.linear(fourth.mean((2, 3)), whole_head, bias), **CLOSE)
    torch.testing.assert_close(method.embed_image(batch.image)[1], cells(third) @ local_head.T, **CLOSE)
    hidden = text(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
    tokens = torch.stack(hidden[-4:]).sum(0)
    found = method.read(batch)
    torch.testing.assert_close(found.words, summed_words(tokens, batch.word_index), atol=5e-5, rtol=1e-5)


@torch.no_grad()
def test_lovt(tmp_path, small_eyes):
    torch.manual_seed(2)
    network, text, hidden, out = resnet(), bert(), 48, 16
    heads = {side: {grain: two_layers({"a": 2048, "b": 64}[side], hidden, out, affine_end=True) for grain in ("local", "global")} for side in "ab"}
    pools = {"a": torch.nn.MultiheadAttention(2048, 8, batch_first=True), "b": torch.nn.MultiheadAttention(64, 8, batch_first=True)}
    state = under("model_a.encoder.feature_extractor.backbone_layers.", body_of(network)) | under("model_b.encoder.language_model.", old_bert(text)) | {"chexpert_bin_1.weight": torch.ones(2)}
    names = {"0": "projection_before", "1": "norm", "3": "projection_after"}
    for side, head in heads.items():
        state |= under(f"model_{side}.encoder.global_aggregator.attention.", with_numbers(pools[side]).state_dict())
        for grain, layers in head.items():
            state |= {f"model_{side}.project_{grain}.{names[name[0]]}{name[1:]}": value[..., None] if grain == "local" and value.ndim == 2 else value for name, value in layers.items()}
    layers = {name: (linear(out, out), torch.randn(out)) for name in ("key_projection", "value_projection", "output_projection")}
    for name, (weight, bias) in layers.items():
        state |= {f"ll_attention.{name}.weight": weight, f"ll_attention.{name}.bias": bias}
    state |= under("ll_attention.norm.", torch.nn.BatchNorm1d(out).state_dict())
    torch.save({"state_dict": state}, tmp_path / "pretrain-epoch=0003.ckpt")
    method = load_method(import_checkpoint(tmp_path / "pretrain-epoch=0003.ckpt", tmp_path / "run", tokenizer=WORDS))
    batch = phantom_batch(method)
    local = cells(stages(network, batch.image)[1])
    pooled = pools["a"](local.mean(1, keepdim=True), local, local)[0][:, 0]
    torch.testing.assert_close(method.embed_image(batch.image), through(heads["a"]["global"], pooled), **CLOSE)
    tokens = text(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    sentence = torch.stack([tokens[b, batch.sentence_index[b] == 0].max(0).values for b in range(3)])
    key = lambda x: F.linear(x, *layers["key_projection"])
    wanted = torch.einsum("bnd,bd->bn", key(through(heads["a"]["local"], local)), key(through(heads["b"]["local"], sentence))) / math.sqrt(out)
    torch.testing.assert_close(method.correspondence(batch).sentences[:, :, 0], wanted, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- all of them


def test_every_layout_has_a_test():
    tested = {make.__name__.removesuffix("_swin").replace("_", "-") for make in DUAL} | {re.split("[ ,]", name)[0] for name in ONLY_SEE}
    tested |= {"dinov2", "torchvision-resnet", "timm-vit", "timm", "mgca", "gloria", "lovt", "carzero", "radzero"}
    assert tested == LAYOUTS.keys()


def test_size_and_half_precision(tmp_path):
    content, see, _, more, size = biomedclip(tmp_path)
    half = {name: value.half() if value.is_floating_point() else value for name, value in content.items()}
    torch.save(half, tmp_path / "half.pt")
    method = load_method(import_checkpoint(tmp_path / "half.pt", tmp_path / "run", size=96, **more))
    assert method.embed_regions(torch.rand(1, 3, 96, 96))[1] == (6, 6) and next(method.parameters()).dtype == torch.float32
