"""Captioners: nothing is told ahead, padding is nothing, the image counts; their runs go through every door."""
from dataclasses import replace

import pytest
import torch

from medvis.data.pairs import Sample, collate, tokenise
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.encoders.text import text_encoder
from medvis.evaluate.retrieve import retrieve
from medvis.methods import METHODS
from medvis.methods.method import phantom_tokenizer
from medvis.objectives.captions import caption_likelihood, coverage_loss
from medvis.studies.show import show_run
from medvis.train import TrainConfig, create_method, fit
from medvis.widgets.study import Studies

CAPTIONERS = ("caption-lstm", "caption-transformer")
TEXTS = [["Small left pleural effusion.", "The heart is enlarged."], ["No pneumothorax."], [], ["Hydropneumothorax on the left.", "Clear lungs.", "No edema."]]


@pytest.fixture(scope="module")
def tokenizer():
    return phantom_tokenizer(60)


@pytest.fixture(scope="module", params=CAPTIONERS)
def method(request, tokenizer):
    torch.manual_seed(0)
    return METHODS[request.param].from_preset("tiny", tokenizer).eval().requires_grad_(False)


@pytest.fixture
def batch(method):
    generator = torch.Generator().manual_seed(1)
    return collate([Sample(i, i, torch.rand(1, 64, 64, generator=generator), tokenise(text, method.tokenizer, punctuation=True)) for i, text in enumerate(TEXTS)])


def token_scores(method, batch):
    "Log-likelihood of every token behind the first, and where was looked for it."
    words, targets, _ = method.embed_text(batch)
    logits, attention = method.text_decoder(method.embed_image(batch.image), words)
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0], attention


def test_a_later_word_changes_nothing_before_it(method, batch):
    said, looks = token_scores(method, batch)
    for place in range(2, batch.input_ids.shape[1] - 1):
        ids = batch.input_ids.clone()
        ids[:, place] = (ids[:, place] + 7) % len(method.tokenizer)
        other, looked = token_scores(method, replace(batch, input_ids=ids))
        torch.testing.assert_close(other[:, :place - 1], said[:, :place - 1], rtol=0, atol=1e-6)     # tokens 1 .. place - 1
        torch.testing.assert_close(looked[:, :place], looks[:, :place], rtol=0, atol=1e-6)           # the look for it, too, is before it
        assert (other[:, place - 1] != said[:, place - 1]).all() and (other[:, place] != said[:, place]).any(), "itself, and what follows it"


def test_the_map_of_a_word_does_not_know_the_words_behind_it(method, batch):
    found, last = method.correspondence(batch), int(batch.word_index[0].max())
    ids = batch.input_ids.clone()
    ids[0, batch.word_index[0] == last] = batch.input_ids[0, 1]
    other = method.correspondence(replace(batch, input_ids=ids))
    torch.testing.assert_close(other.words[0, :, :last + 1], found.words[0, :, :last + 1])
    ids[0, batch.word_index[0] == 0] = batch.input_ids[3, 1]
    assert not torch.allclose(method.correspondence(replace(batch, input_ids=ids)).words[0, :, 2:last + 1], found.words[0, :, 2:last + 1], atol=1e-7)


def test_padding_is_nothing(method, batch):
    longer = replace(batch, **{name: torch.nn.functional.pad(getattr(batch, name), (0, 9), value=fill) for name, fill in (
        ("input_ids", 5), ("attention_mask", 0), ("word_index", -1), ("sentence_index", -1))})
    for name, part in method(batch).parts.items():
        torch.testing.assert_close(method(longer).parts[name], part)
    found, padded = method.correspondence(batch), method.correspondence(longer)
    torch.testing.assert_close(padded.words, found.words)
    torch.testing.assert_close(padded.sentences, found.sentences)
    regions = method.embed_image(batch.image)
    torch.testing.assert_close(method.similarity(regions, method.embed_text(longer)), method.similarity(regions, method.embed_text(batch)))
    alone = collate([Sample(1, 1, batch.image[1], tokenise(TEXTS[1], method.tokenizer, punctuation=True))])
    torch.testing.assert_close(method.correspondence(alone).words[0], found.words[1, :, :int(found.word_mask[1].sum())])


def test_maps_are_shares_whatever_the_grain(method, batch):
    "A word of many pieces, and a sentence of many words, looked as much as any other: the means, by hand. Trained on sentences, it reads each alone."
    alone = collate([Sample(i, i, batch.image[3], tokenise([text], method.tokenizer, punctuation=True)) for i, text in enumerate(TEXTS[3])])
    found, looks = method.correspondence(batch), token_scores(method, alone)[1]
    words, sentences = batch.word_index[3], batch.sentence_index[3]
    assert method.text_unit == "sentence" and (torch.bincount(words[words >= 0]) > 1).any(), "a word of several pieces"
    for sentence in range(3):
        start, own = (sentences == sentence).nonzero()[0], words[sentences == sentence].unique()
        by_hand = torch.stack([looks[sentence, (words == word).nonzero()[:, 0] - start].mean(0) for word in own])
        torch.testing.assert_close(found.words[3, :, own].exp().T, by_hand)
        torch.testing.assert_close(found.sentences[3, :, sentence].exp(), by_hand.mean(0))


def test_an_even_look_is_asked_for_by_its_weight(tokenizer, batch):
    torch.manual_seed(0)
    lstm = METHODS["caption-lstm"].from_preset("tiny", tokenizer, coverage=0.5).eval()
    words, _, mask = lstm.embed_text(batch)
    looks = lstm.text_decoder(lstm.embed_image(batch.image), words)[1]
    losses = lstm(batch)
    torch.testing.assert_close(losses.parts["coverage"], 0.5 * coverage_loss(looks, mask).detach())
    torch.testing.assert_close(losses.total.detach(), losses.parts["caption"] + losses.parts["coverage"])


def test_the_image_counts(method, batch):
    moved = replace(batch, image=batch.image.roll(1, 0))
    assert (method(moved).parts["caption"] - method(batch).parts["caption"]).abs() > 1e-5
    found, other = method.correspondence(batch), method.correspondence(moved)
    assert not torch.allclose(other.words, found.words, atol=1e-6)
    table = method.similarity(method.embed_image(batch.image), method.embed_text(batch))
    torch.testing.assert_close(method.similarity(method.embed_image(moved.image), method.embed_text(moved)), table.roll(1, 0))


def test_pairs_are_scored_in_any_chunks(method, batch):
    regions, text = method.embed_image(batch.image), method.embed_text(batch)
    table, config = method.similarity(regions[:3], text), method.config
    assert table.shape == (3, 4)
    try:
        for chunk in (1, 5, 12, 100):
            method.config = replace(config, chunk=chunk)
            torch.testing.assert_close(method.similarity(regions[:3], text), table)
    finally:
        method.config = config
    words, targets, mask = text
    for i in range(3):
        for j in range(4):
            logits = method.text_decoder(regions[i:i + 1], words[j:j + 1])[0]
            inside = mask[j:j + 1]
            torch.testing.assert_close(table[i, j], caption_likelihood(logits[inside], targets[j:j + 1][inside], inside)[0])


def test_logits_are_computed_only_where_they_are_read(method, batch):
    "The widest layer sees the valid tokens for a loss and a likelihood, one token an image for a caption, and none for a map."
    asked, tokens = [], int(batch.attention_mask[:, 1:].sum())
    hook = method.text_decoder.tell.register_forward_hook(lambda layer, given, said: asked.append(said[..., 0].numel()))
    try:
        method.correspondence(batch)
        assert asked == []
        method(batch)
        method.similarity(method.embed_image(batch.image), method.embed_text(batch))
        assert asked == [tokens, 4 * tokens] and tokens < batch.attention_mask[:, 1:].numel()
        method.caption(batch.image, longest=3)
        assert asked[2:] == [4, 4, 4]
    finally:
        hook.remove()


def test_what_is_said_is_the_likeliest_token_every_time(method, batch):
    said, tokens = method.caption(batch.image, longest=6), method.tokenizer
    assert len(said) == 4 and said == [method.caption(batch.image[i:i + 1], longest=6)[0] for i in range(4)]
    regions = method.embed_image(batch.image[:1])
    ids = [tokens.cls_token_id]
    while len(ids) < 7 and ids[-1] != tokens.sep_token_id:
        row = torch.tensor([ids])
        words = method.text_encoder.body(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state
        ids.append(int(method.text_decoder(regions, words)[0][0, -1].argmax()))
    assert said[0] == tokens.decode(ids, skip_special_tokens=True)


def test_nothing_is_said_behind_the_end(method, batch):
    bias, end = method.text_decoder.tell.bias, method.tokenizer.sep_token_id
    kept = float(bias[end])
    bias[end] = 1e3
    try:
        assert method.caption(batch.image, longest=5) == [""] * 4
    finally:
        bias[end] = kept


def test_the_loss_reaches_the_attention_and_both_sides(method, batch):
    "The loss reaches every part of the attention, the image network and the word vectors."
    method.requires_grad_(True)
    try:
        method(batch).total.backward()
        asking = [name for name, _ in method.text_decoder.named_children() if name in ("query", "key", "energy", "gate")]
        for ask in asking or ["layers.0.multihead_attn", "layers.1.multihead_attn"]:
            grads = [p.grad for name, p in method.text_decoder.named_parameters() if name.startswith(ask)]
            assert grads and all(grad.abs().sum() > 0 for grad in grads), ask
        assert all(p.grad.abs().sum() > 0 for p in method.image_encoder.body.layer4.parameters())
        assert method.text_encoder.body.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    finally:
        method.zero_grad()
        method.requires_grad_(False)


def test_layers_of_the_text_encoder_are_refused(tokenizer):
    for name in CAPTIONERS:
        with pytest.raises(ValueError, match="text_layers is 1.*expected 0 layers"):
            METHODS[name].from_preset("tiny", tokenizer, text_layers=1)
        with pytest.raises(ValueError, match="text_layers is None"):
            METHODS[name].from_preset("tiny", tokenizer, text_layers=None)


@pytest.mark.parametrize("frozen", [False, True])
def test_words_of_a_folder_are_its_own(tokenizer, tmp_path, frozen):
    "Of a pre-trained text encoder a captioner takes the word vectors, and leaves them as they are if it is told to."
    whole = text_encoder("tiny-bert", tokenizer)
    whole.body.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    method = METHODS["caption-lstm"].from_preset("tiny", text=str(tmp_path), freeze_text="all" if frozen else 0)
    body = method.text_encoder.body
    assert body.config.num_hidden_layers == 0 and not any("encoder.layer" in name for name, _ in body.named_parameters())
    torch.testing.assert_close(body.embeddings.word_embeddings.weight, whole.body.embeddings.word_embeddings.weight)
    assert {p.requires_grad for p in body.parameters()} == {not frozen}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("captions") / "pack", studies=60, size=64, workers=0, progress=False))


@pytest.mark.parametrize("name", CAPTIONERS)
def test_a_run_goes_through_every_door(name, data, tmp_path):
    method = create_method(name, "tiny", data=data)
    run = fit(method, data, TrainConfig.of(method, tmp_path / "run", epochs=1, batch_size=16, progress=False))
    again = run.method()
    assert all(torch.equal(value, method.state_dict()[key]) for key, value in run.method("last").state_dict().items())
    assert {"caption"} <= set(run.metrics.columns) and {"image_std", "attention_entropy"} <= set(run.diagnostics.columns)
    table = retrieve(run, data, resamples=5)
    assert table[table.metric == "median rank"].value.notna().all()
    view = Studies(run, data)[0]
    shares = next(iter(view.runs.values()))
    assert shares.temperature == 1 and torch.allclose(torch.as_tensor(shares.scores["words"]).float().exp().sum(1), torch.ones(len(shares.scores["words"])), atol=1e-4)
    page = show_run(run, out=tmp_path / "page.html").read_text()
    assert f"{name} tiny" in page and "Point at a word" in page and "Pointing game" in page
    film = again.preprocessing.transform()(torch.from_numpy(data.image(0).copy())[None, None])
    (short,), (long,) = (again.caption(film, longest=count) for count in (1, 8))
    assert short and long.startswith(short) and all(len(again.tokenizer.encode(said, add_special_tokens=False)) <= count for said, count in ((short, 1), (long, 8)))
