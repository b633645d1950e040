"""Texts read in runs of like length, and by fused attention, are read as they were: same features, losses and gradients."""
from dataclasses import replace

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

from medvis.encoders import text as reading
from medvis.encoders.text import TextEncoder, encode_sentences, text_encoder
from medvis.methods import METHODS
from medvis.methods.method import phantom_tokenizer
from medvis.methods.settings import methods_with_text
from medvis.testing import tiny_batch

TEXTS = (("No pleural effusion.",), ("Mild cardiomegaly.", "Clear lungs.", "No pneumothorax."), (), ("Left pneumothorax.",), ("Clear lungs.",),
         ("Small left pleural effusion.", "The heart is enlarged.", "Right lower lobe consolidation with a small right pleural effusion.", "No pneumothorax."))
PARTS = ("tokens", "words", "word_mask", "sentences", "sentence_mask", "whole", "word_weights")
WAYS = dict(plain={}, weights=dict(word_weights=True), layers=dict(summed_layers=2, whole="mean-all"), pooler=dict(whole="pooler"), released=dict(released_words=112), largest=dict(words="max", whole="max"))


@pytest.fixture(scope="module")
def tokenizer():
    return phantom_tokenizer(200)


@pytest.fixture
def runs(monkeypatch):
    "How many runs a text encoder reads, and how much they cost beyond their tokens."
    read = []
    kept = reading.reading_runs
    monkeypatch.setattr(reading, "reading_runs", lambda lengths: read.append(kept(lengths)) or read[-1])
    return read, lambda cost: monkeypatch.setattr(reading, "_RUN", cost)


def inputs_of(method) -> tuple[torch.Tensor, ...]:
    batch = tiny_batch(method, TEXTS)
    return batch.input_ids, batch.attention_mask, batch.word_index, batch.sentence_index


def forced_eager(encoder: TextEncoder) -> TextEncoder:
    "As all text encoders were: no layer is fused, whatever the mask."
    encoder.body.config._attn_implementation = "eager"
    return encoder


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["reports", "sentences"])
@pytest.mark.parametrize("way", WAYS)
def test_features_are_those_of_one_padded_batch_and_eager_attention(way, alone, dtype, near, tokenizer, runs):
    torch.manual_seed(0)
    encoder = text_encoder("tiny-bert", tokenizer, **WAYS[way]).eval().to(dtype)
    inputs = inputs_of(METHODS.find("convirt").from_preset("tiny", tokenizer))
    read, cost = runs
    found = []
    for each in (10 ** 6, 0, 0):
        cost(each)
        if len(found) == 2:
            forced_eager(encoder)
        encoder.zero_grad()
        text = encode_sentences(encoder, *inputs) if alone else encoder(*inputs)
        parts = {name: getattr(text, name) for name in PARTS}
        sum(part.sin().sum() for name, part in parts.items() if part is not None and part.is_floating_point() and name != "tokens").backward()
        parts["tokens"] = parts["tokens"] * ((inputs[3] >= 0) if alone else inputs[1])[..., None]
        found.append(parts | {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert len(read[0]) == 1 < len(read[1]) == len(read[2])
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, part in found[0].items():
            torch.testing.assert_close(other[name], part, atol=near * (10 if name not in PARTS else 1), rtol=near, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("name", methods_with_text())
def test_losses_and_gradients_are_those_of_one_batch(name, tokenizer, runs):
    "In float64, in training mode without dropout."
    torch.manual_seed(0)
    method = METHODS.find(name).from_preset("tiny", tokenizer).double()
    for module in method.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    method.train().start_epoch(1)
    batch, found = tiny_batch(method, TEXTS), []
    batch = replace(batch, image=batch.image.double())
    read, cost = runs
    for each in (10 ** 6, 0):
        cost(each)
        method.zero_grad()
        torch.manual_seed(1)
        losses = method(batch)
        losses.total.backward()
        found.append({"loss": losses.total.detach(), **losses.parts, **{key: p.grad for key, p in method.named_parameters() if p.grad is not None}})
    assert len(read[0]) == 1 < len(read[-1])
    largest = max(float(part.abs().max()) for part in found[0].values())
    for key, part in found[0].items():
        torch.testing.assert_close(found[1][key], part, atol=1e-10 * largest, rtol=1e-6, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("cost", [0, 10 ** 6], ids=["runs", "one run"])
def test_dropout_in_training_is_drawn_again_alike(cost, tokenizer, runs):
    "The same seed gives the same bits, which a resumed run needs; another gives others, in fused attention too."
    runs[1](cost)
    encoder = text_encoder("tiny-bert", tokenizer)
    for layer in encoder.body.encoder.layer:
        layer.attention.self.dropout.p, layer.output.dropout.p, layer.attention.output.dropout.p = 0.3, 0.0, 0.0
    encoder.body.embeddings.dropout.p = 0.0
    inputs, told = inputs_of(METHODS.find("convirt").from_preset("tiny", tokenizer)), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        told.append(encoder.train()(*inputs).tokens)
    assert torch.equal(told[0], told[1]) and not torch.allclose(told[0], told[2], atol=1e-3)


def test_only_the_layer_whose_attention_is_read_is_not_fused(tokenizer, monkeypatch):
    calls = []
    kept = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *given, **how: calls.append(1) or kept(*given, **how))
    inputs = inputs_of(METHODS.find("convirt").from_preset("tiny", tokenizer))
    for pooling, fused in (({}, 2), (dict(word_weights=True), 1), (dict(released_words=112), 1)):
        calls.clear()
        text_encoder("tiny-bert", tokenizer, **pooling)(*inputs)
        assert len(calls) == fused


def test_words_are_pooled_only_where_a_method_asks(tokenizer, monkeypatch):
    pooled, kept = [], reading.pool_tokens
    monkeypatch.setattr(reading, "pool_tokens", lambda tokens, index, *how: pooled.append(index) or kept(tokens, index, *how))
    for name, words in (("lovt", False), ("convirt", False), ("clip", False), ("local-mi", False), ("mixture-mi", False), ("gloria", True), ("mgca", True)):
        pooled.clear()
        method = METHODS.find(name).from_preset("tiny", tokenizer)
        batch = tiny_batch(method, TEXTS)
        method(batch)
        assert any(index is batch.word_index for index in pooled) == words, name


def test_a_body_of_another_kind_is_read_as_it_wants(tokenizer, runs):
    "Its layers cannot be told apart: it gets the mask of its padding, and makes all its attention by itself."
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=2, n_heads=2, pad_token_id=tokenizer.pad_token_id)
    config._attn_implementation = "eager"
    encoder = TextEncoder(DistilBertModel(config), tokenizer, word_weights=True).eval()
    inputs = inputs_of(METHODS.find("convirt").from_preset("tiny", tokenizer))
    runs[1](0)
    found = encoder(*inputs)
    for i, length in enumerate(inputs[1].sum(1).tolist()):
        alone = encoder(*(row[i:i + 1, :length] for row in inputs))
        torch.testing.assert_close(alone.tokens[0], found.tokens[i, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.word_weights[0], found.word_weights[i, :alone.word_weights.shape[1]], atol=1e-5, rtol=1e-5)


def test_a_body_that_is_spread_over_processes_is_called_once(tokenizer, runs):
    "Each call gathers its weights from all processes, whose texts may be cut otherwise."
    runs[1](0)
    encoder = text_encoder("tiny-bert", tokenizer).eval()
    inputs, calls = inputs_of(METHODS.find("convirt").from_preset("tiny", tokenizer)), []
    encoder.body.register_forward_hook(lambda *_: calls.append(1))
    wanted = encoder(*inputs).whole
    assert len(calls) > 1
    layer = encoder.body.encoder.layer[0]
    layer.__class__ = type("Spread", (torch.distributed.fsdp.FSDPModule, type(layer)), {})
    calls.clear()
    torch.testing.assert_close(encoder(*inputs).whole, wanted, atol=1e-5, rtol=1e-5)
    assert len(calls) == 1
