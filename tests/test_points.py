"""The options of mixture-mi that make a sentence say where it is: computed a second time with plain loops, and off without a trace."""
import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medvis.core.randomness import seeded
from medvis.data.pack import Pack
from medvis.data.pairs import Pairs, Sample, collate, read_batch, tokenise
from medvis.data.preprocessing import AUGMENTATIONS, Preprocessing
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.sampling import FLIPS, Sampling
from medvis.data.targets import PHRASES, RELATIVES, exchange_side, merge_targets, mirror_sentence, possible_sides, sentence_side, sentence_targets
from medvis.encoders.image import image_encoder, register_encoder
from medvis.encoders.tower import FrozenEncoder
from medvis.methods.method import Method, add_up, phantom_tokenizer
from medvis.methods.mixture_mi import MixtureMI, _Asked, _has_side_negative, _report_findings
from medvis.objectives.mutual_information import cpc_bound
from medvis.train import TrainConfig, loop
from test_resume import die_at_call, in_process, same_run

ALL = dict(region_prior="side", side_words="remove", side_negatives=0.7, finding_phrases=1.3, mask_identical=True)
KEPT = dict(ALL, side_words="keep")
REPORTS = [
    ["There is a small left pleural effusion.", "No pneumothorax.", "Right lower lobe atelectasis."],
    ["Large right effusion.", "No pneumothorax.", "Possible nodule."],
    [],
    ["Both lungs are clear.", "No left pleural effusion.", "Lingular atelectasis."],
    ["Left pneumonia.", "Right basilar opacity.", "Small right pneumothorax.", "Right apical scar, no left scar.", "Possible left scar."],
    ["Left apical pneumothorax with bilateral effusions.", "The heart is enlarged."],
]
PATIENTS = [0, 1, 2, 3, 0, 1]


@pytest.fixture(scope="module")
def tokenizer():
    return phantom_tokenizer(200)


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Pack:
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("data") / "pack", studies=120, progress=False))


def batch_of(reports, tokenizer, patients=None):
    images = torch.rand(len(reports), 1, 64, 64, generator=torch.Generator().manual_seed(3)).double()
    return collate([Sample(i, patients[i] if patients else i, images[i], tokenise(said, tokenizer)) for i, said in enumerate(reports)])


def method_of(tokenizer, **changes) -> MixtureMI:
    torch.manual_seed(0)
    return MixtureMI.from_preset("tiny", tokenizer, hidden=32, dim=16, **changes).double().eval()


def silenced(sentence: str) -> str:
    return " ".join(word for word in sentence.rstrip(".").split() if word.lower() not in ("left", "right", "both", "bilateral"))


def by_loops(method: MixtureMI, batch, reports) -> dict[str, float]:
    "The side negatives and the phrases, one sentence, region and image at a time."
    config, keep = method.config, method.config.side_words == "keep"
    encoded = method.image_encoder(batch.image)
    regions = torch.nn.functional.normalize(method.critic.image(encoded.regions), dim=-1)
    w, number = encoded.grid[1], encoded.regions.shape[1]

    def vector(text):
        alone = collate([Sample(0, 0, torch.zeros(1), tokenise([text if keep else silenced(text)], method.tokenizer))])
        read = super(MixtureMI, method).read_sentences(alone).sentences[:, 0]
        return torch.nn.functional.normalize(method.critic.text(read), dim=-1)[0]

    def score(image, text, side):
        weights = [1.0] * number
        for n in range(number):
            x = n % w
            if config.region_prior == "side" and ((side == "left" and x < w / 2) or (side == "right" and x >= w / 2)):
                weights[n] = config.prior_floor
        cosines = [float(regions[image, n] @ vectors[text]) for n in range(number)]
        return math.log(sum(a * math.exp(c / config.temperature) for a, c in zip(weights, cosines)) / sum(weights))

    other = {"left": "right", "right": "left"}

    def free(report, finding, side):
        "Whether a report says nothing, not even a doubt, of this finding or a relative of it on the other side."
        there = [(name, where) for one in report for name, (status, where, _) in sentence_targets(one).items() if status != "negated"]
        return not any(name == finding or name in RELATIVES[finding] for name, where in there if where in (other[side], "bilateral"))

    said = [(i, text) for i, report in enumerate(reports) for text in report]
    phrases = {finding: ways[0] for finding, ways in PHRASES.items()}
    vectors = {text: vector(text) for text in {*(text for _, text in said), *phrases.values(), *(exchange_side(text) or text for _, text in said)}}
    negatives, sided, asked = 0.0, 0, 0.0
    for i, text in said:
        own = score(i, text, sentence_side(text))
        spoken = [name for name, (status, where, _) in sentence_targets(text).items() if where and status != "negated"]
        if sentence_side(text) in other and all(free(reports[i], name, sentence_side(text)) for name in spoken) and (not keep or exchange_side(text)):
            side = other[sentence_side(text)] if config.region_prior == "side" else None
            negative = score(i, exchange_side(text) if keep else text, side)
            negatives += math.log(1 + math.exp(negative - own))
            sided += 1
    for finding, phrase in phrases.items():
        targets = [merge_targets(map(sentence_targets, report)) for report in reports]
        states = [one.get(finding) for one in targets]
        without = [j for j, one in enumerate(targets) if one.get(finding, ["negated"])[0] == "negated" and not any(one.get(name, [""])[0] in ("asserted", "uncertain") for name in RELATIVES[finding])]
        for i, state in enumerate(states):
            if state and state[0] == "asserted":
                side = state[1] if state[1] in other and config.region_prior == "side" and free(reports[i], finding, state[1]) else None
                rivals = [score(i, phrase, side)] + [score(j, phrase, side) for j in without if config.negatives == "all" or batch.patient_id[j] != batch.patient_id[i]]
                rivals += [score(i, phrase, other[side])] if side else []
                asked += math.log(sum(map(math.exp, rivals))) - rivals[0]
    return {"side_negatives": config.side_negatives * negatives / sided, "finding_phrases": config.finding_phrases * asked / len(reports)}


@pytest.mark.parametrize("changes", [ALL, KEPT, dict(KEPT, region_prior="uniform"), dict(ALL, prior_floor=0.3), dict(ALL, negatives="all")], ids=["removed", "kept", "uniform", "floor", "all negatives"])
@torch.no_grad()
def test_losses_are_those_of_plain_loops(tokenizer, changes):
    method, batch = method_of(tokenizer, **changes), batch_of(REPORTS, tokenizer, PATIENTS)
    found, wanted = method(batch).parts, by_loops(method, batch, REPORTS)
    for name in ("side_negatives", "finding_phrases"):
        assert wanted[name] > 0.01 and math.isclose(found[name], wanted[name], abs_tol=1e-6), name
    sides = [sentence_side(text) for report in REPORTS for text in report]
    assert [sides.count(side) for side in ("left", "right", "bilateral")] == [4, 5, 0], "one of each kind: one-sided, denied, lingular, on several sides"
    plain = method_of(tokenizer, **{**changes, "side_negatives": 0.0, "finding_phrases": 0.0})
    assert math.isclose(plain(batch).total, found["mutual_information"], abs_tol=1e-6), "what else is read changes nothing in evaluation"


@torch.no_grad()
def test_bounds_have_the_prior_and_no_repeated_sentence(tokenizer):
    "One sentence a report, so that both bounds can be written down from the table of loops."
    reports = [["Small left effusion."], ["Small right effusion."], ["No pneumothorax."], ["No pneumothorax."], ["The heart is enlarged."]]
    method, batch = method_of(tokenizer, **ALL), batch_of(reports, tokenizer)
    single = {}
    encoded = method.image_encoder(batch.image)
    regions, read = torch.nn.functional.normalize(method.critic.image(encoded.regions), dim=-1), method.read_sentences(batch).sentences[:, 0]
    texts = torch.nn.functional.normalize(method.critic.text(read), dim=-1)
    assert torch.allclose(texts[0], texts[1]), "without their side words they are read alike"
    for i in range(5):
        for j in range(5):
            weight = torch.ones(16, 16).double()
            if j == 0:
                weight[:, :8] = 0.05
            if j == 1:
                weight[:, 8:] = 0.05
            single[i, j] = math.log(float((weight.flatten() * (regions[i] @ texts[j] * 10).exp()).sum() / weight.sum()))
    same = [{0, 1}, {0, 1}, {2, 3}, {2, 3}, {4}]
    bounds = 0.0
    for i in range(5):
        rows = [single[i, j] for j in range(5) if j == i or j not in same[i]]
        columns = [single[j, i] for j in range(5) if j == i or j not in same[i]]
        for rivals in (rows, columns):
            bounds += single[i, i] - math.log(sum(map(math.exp, rivals)) / len(rivals))
    scores = torch.tensor([[single[i, j] for j in range(5)] for i in range(5)])
    valid = torch.tensor([[j == i or j not in same[i] for j in range(5)] for i in range(5)])
    wanted = -(cpc_bound(scores, valid) + cpc_bound(scores.T, valid.T)) / 2
    assert math.isclose(method(batch).parts["mutual_information"], wanted, abs_tol=1e-6)
    assert math.isclose(wanted, -bounds / 5 / 2, abs_tol=1e-6)


@pytest.mark.parametrize("words", ["keep", "remove"])
@torch.no_grad()
def test_what_the_report_says_beside_the_sample_is_no_negative(tokenizer, words):
    "It used to be one: with one sentence an image, four of five that the other report says too."
    method = method_of(tokenizer, mask_identical=True, side_words=words)
    batch = batch_of([["Small left effusion."], ["No pneumothorax."], ["The heart is enlarged."]], tokenizer)
    batch = replace(batch, reports=[["Small left effusion.", "no  pneumothorax"], ["No pneumothorax.", "Small right effusion."], ["The heart is enlarged."]])
    pairs = _Asked(method.config, batch, torch.arange(3), False).pairs(None)
    alike = words == "remove"       # the right effusion reads like the left one
    assert pairs.tolist() == [[True, False, True], [not alike, True, True], [True, True, True]]
    rows = torch.tensor([0, 1, 2])
    scores = method.critic.scores(method.image_encoder(batch.image).regions.flatten(0, 1), method.read_sentences(batch).sentences[:, 0])
    mixed = scores.unflatten(0, (3, -1)).exp().mean(1).log()[rows]
    wanted = -(cpc_bound(mixed, pairs) + cpc_bound(mixed.T, pairs.T)) / 2
    assert math.isclose(method(batch).parts["mutual_information"], wanted, abs_tol=1e-6)


@torch.no_grad()
def test_the_weight_of_one_sided_sentences_does_not_change_with_what_is_sampled_beside_them(tokenizer):
    method = method_of(tokenizer, region_prior="side", side_negatives=1.0)
    few, many = (batch_of([["Small left effusion.", *rest], ["Right nodule.", *rest]], tokenizer) for rest in ([], ["No pneumothorax.", "The heart is enlarged."]))
    losses = [method(replace(batch, image=batch.image)).parts["side_negatives"] for batch in (few, many)]
    assert losses[0] > 0.1 and math.isclose(*losses, abs_tol=1e-6)


@pytest.mark.parametrize("report", [
    ["There are pleural effusions.", "The left effusion is larger."],
    ["Multiple nodules throughout the lungs.", "The largest nodule is in the left lung."],
    ["Diffuse interstitial opacities.", "Opacity is densest in the left lung."]])
def test_what_is_on_both_sides_without_saying_so_has_no_side(report):
    "Neither a side negative nor a one-sided phrase; of one nodule they are as before."
    finding = next(iter(sentence_targets(report[1])))
    column = list(PHRASES).index(finding)
    assert not _has_side_negative(report[1], possible_sides(report), True)
    assert _report_findings([report])[0][0, column] == 0 and _report_findings([report[1:]])[0][0, column] == 2
    assert _has_side_negative(report[1], possible_sides(report[1:]), True)


def test_a_blunted_angle_is_no_image_without_effusion():
    column = list(PHRASES).index("Pleural Effusion")
    said = ["Blunting of the left costophrenic angle.", "The costophrenic angle is blunted.", "No blunting of the costophrenic angles.", "Normal."]
    asserted, absent = (found[:, column].tolist() for found in _report_findings([[one] for one in said]))
    assert asserted == [-1] * 4 and absent == [False, False, True, True]


@pytest.mark.parametrize("changes", [ALL, KEPT], ids=["removed", "kept"])
@torch.no_grad()
def test_order_and_padding_change_nothing(tokenizer, changes):
    method, batch = method_of(tokenizer, **changes), batch_of(REPORTS, tokenizer)
    samples = [Sample(i, i, image, tokenise(said, tokenizer)) for i, (image, said) in enumerate(zip(batch.image, REPORTS))]
    wanted = method(batch).parts
    for turned in (samples[::-1], [samples[k] for k in (2, 4, 0, 5, 3, 1)]):
        for name, value in method(collate(turned)).parts.items():
            assert math.isclose(value, wanted[name], abs_tol=1e-9), name
    longer = collate([*samples[:-1], replace(samples[-1], report=tokenise([*REPORTS[-1], "Nothing else is seen."], tokenizer))])
    cut = [t.clone() for t in (longer.input_ids, longer.attention_mask, longer.word_index, longer.sentence_index)]
    off = longer.sentence_index == 2
    off[:-1] = False
    for tensor, fill in zip(cut, (0, 0, -1, -1)):
        tensor[off] = fill
    padded = replace(longer, input_ids=cut[0], attention_mask=cut[1], word_index=cut[2], sentence_index=cut[3], sentences=batch.sentences, reports=batch.reports)
    assert math.isclose(method(padded).total, method(batch).total, abs_tol=1e-9)


def test_the_prior_keeps_the_other_half_quiet(tokenizer):
    "With a floor of 0 no region of the other half learns from a one-sided sentence."
    method = method_of(tokenizer, **dict(ALL, prior_floor=0.0, side_negatives=0.0, finding_phrases=0.0))
    regions = torch.nn.Parameter(torch.randn(2, 256, method.image_encoder.region_dim).double())
    method.image_encoder.forward = lambda image: type("Seen", (), {"regions": regions, "grid": (16, 16)})
    method(batch_of([["Small left effusion."], ["Left lower lobe nodule."]], tokenizer)).total.backward()
    moved = regions.grad.view(2, 16, 16, -1).abs().sum(-1)
    assert (moved[:, :, :8] == 0).all() and (moved[:, :, 8:] > 0).all(), "the patient's left is the image's right"


@torch.no_grad()
def test_a_map_is_the_raw_cosine(tokenizer):
    "Neither prior nor losses change what is displayed; sentences that differ in the side alone are read alike if side words are removed."
    plain, asked, removed = (method_of(tokenizer, **changes) for changes in ({}, KEPT, ALL))
    batch = batch_of([["Small left effusion."], ["Small right effusion."]], tokenizer)
    for name in ("words", "sentences"):
        assert torch.equal(getattr(plain.correspondence(batch), name), getattr(asked.correspondence(batch), name))
    turned = batch_of([["Small right effusion."], ["Small left effusion."]], tokenizer)
    found, other = removed.correspondence(batch), removed.correspondence(turned)
    assert torch.allclose(found.sentences, other.sentences) and torch.allclose(found.words, other.words)
    assert found.words.shape == plain.correspondence(batch).words.shape and found.word_mask.all()
    assert torch.allclose(found.words[:, :, 1], found.sentences[:, :, 0]), "a word that is not read stands for its sentence"
    assert torch.allclose(removed.embed_text(batch)[0], removed.embed_text(turned)[0])
    last = removed.correspondence(batch_of([["Effusion on the left."]], tokenizer))
    same = [torch.allclose(last.words[:, :, word], last.sentences[:, :, 0]) for word in range(last.words.shape[2])]
    assert same == [False, False, False, True], "only the word that is not read"


def test_side_negatives_without_another_side_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no other side"):
        method_of(tokenizer, side_words="remove", side_negatives=1.0)
    textless = replace(batch_of(REPORTS, tokenizer), sentences=[])
    with pytest.raises(ValueError, match="make it with collate"):
        method_of(tokenizer, **ALL)(textless)


class Before(MixtureMI):
    "mixture-mi as it was without options, written out with no helper of theirs."

    def forward(self, batch):
        image, read = self.image_encoder(batch.image), Method.read_sentences(self, batch)
        owner = read.sentence_mask.nonzero()[:, 0]
        each = self.critic.scores(image.regions.flatten(0, 1), read.sentences[read.sentence_mask]).unflatten(0, image.regions.shape[:2])
        highest = each.detach().amax(1)
        scores = ((each - highest[:, None]).exp().mean(1).log() + highest)[owner]
        patients = batch.patient_id[owner]
        pairs = (patients[:, None] != patients) | torch.eye(len(owner), dtype=torch.bool)
        return add_up(mutual_information=-(cpc_bound(scores, pairs) + cpc_bound(scores.T, pairs.T)) / 2)


def trained(kind, pack, tokenizer, run, training=None, **changes):
    torch.manual_seed(0)
    method = kind.from_preset("tiny", tokenizer, hidden=32, dim=16, **changes)
    settings = {"epochs": 2, "batch_size": 16, "progress": False, "device": "cpu", **(training or {})}
    loop.fit(method, pack, TrainConfig.of(method, run, **settings))
    return (run / "last.safetensors").read_bytes()


def test_without_options_the_weights_are_the_same_to_the_last_bit(pack, tokenizer, tmp_path):
    assert trained(MixtureMI, pack, tokenizer, tmp_path / "now") == trained(Before, pack, tokenizer, tmp_path / "before")


LOSSES = {"region_prior": ("side", set()), "side_words": ("remove", set()), "mask_identical": (True, set()), "side_negatives": (1.0, {"side_negatives"}), "finding_phrases": (1.0, {"finding_phrases"})}


@pytest.mark.parametrize("option", LOSSES)
@torch.no_grad()
def test_each_option_does_what_it_says_and_nothing_else(pack, tokenizer, option):
    "Either the bounds change, or a loss is added to the bounds as they were."
    pairs, (value, added) = Pairs(pack, tokenizer, method_of(tokenizer).preprocessing, Sampling(augment="none")), LOSSES[option]
    batch = read_batch(pairs, range(12))
    batch = replace(batch, image=batch.image.double())
    plain, asked = method_of(tokenizer)(batch).parts, method_of(tokenizer, **{option: value})(batch).parts
    assert asked.keys() - plain.keys() == added and plain.keys() == {"mutual_information"}
    assert math.isclose(asked["mutual_information"], plain["mutual_information"], abs_tol=1e-9) == bool(added)
    assert all(asked[name] > 0.01 for name in added)


def test_a_mirrored_pair_is_the_pair_in_a_mirror(pack, tokenizer):
    "Exactly: the picture turned, left and right exchanged, nothing else."
    preprocessing = method_of(tokenizer).preprocessing
    plain, both = (Pairs(pack, tokenizer, preprocessing, Sampling(augment="mgca", mirror=mirror), "train", True, 5) for mirror in (False, True))
    seen = set()
    for i in range(len(plain)):
        one, other, turned = plain[1, i], both[1, i], both.mirrored(i, 1)
        seen.add(turned)
        assert torch.equal(other.image, one.image.flip(-1) if turned else one.image)
        said = [mirror_sentence(text) for text in one.whole] if turned else one.whole
        assert other.whole == said and other.report.sentences == said[: len(other.report.sentences)]
        if turned:
            sides = [[sentence_side(text) for text in sample.whole] for sample in (one, other)]
            swap = {"left": "right", "right": "left"}
            assert sides[1] == [swap.get(side, side) for side in sides[0]]
    assert seen == {True, False}


@pytest.mark.parametrize("lost", ["Lingular consolidation.", "Consolidation in the right middle lobe.", "Consolidation at the cardiac apex.", "Consolidation, mild levoscoliosis."])
def test_a_report_that_cannot_be_mirrored_is_shown_whole(pack, tokenizer, lost):
    "It used to be shown mirrored and without the sentence, so that what this asserts counted as absent."
    odd = Pack(pack.path)
    odd.studies["sentences"] = [["Left effusion.", lost, "The heart is normal."]] * len(odd.studies)
    settings = method_of(tokenizer).preprocessing, Sampling(augment="none", mirror=True, most_sentences=1), "train", True
    pairs = Pairs(odd, tokenizer, *settings)
    column = list(PHRASES).index("Consolidation")
    for batch in (read_batch(pairs, [(epoch, i) for i in range(8)]) for epoch in range(4)):
        asserted, absent = _report_findings(batch.reports)
        assert not absent[:, column].any() and (asserted[:, column] >= 0).all()
    assert not any(pairs.mirrored(i, epoch) for i in range(8) for epoch in range(4))
    odd.studies["sentences"] = [["Left effusion.", "The heart is normal."]] * len(odd.studies)
    pairs = Pairs(odd, tokenizer, *settings)
    assert {pairs.mirrored(i, epoch) for i in range(8) for epoch in range(4)} == {True, False}, "what can be said of both is no hindrance"


def flips(augment: str) -> bool:
    "Whether an augmentation shows a picture with a bright left half as one with a bright right half, in forty draws."
    bright = torch.zeros(1, 64, 64, dtype=torch.uint8)
    bright[..., :32] = 200
    transform = Preprocessing(size=48, channels=1).transform(augment)
    with seeded(3):
        views = torch.stack([transform(bright) for _ in range(40)])
    return bool((views[..., 24:].mean((1, 2, 3)) > views[..., :24].mean((1, 2, 3))).any())


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_flip_of_the_picture_alone_is_refused_where_sides_are_read(pack, tokenizer, tmp_path, augment):
    assert flips(augment) == (augment in FLIPS)
    settings = dict(augment=augment, epochs=1, batch_size=48, progress=False, device="cpu")
    if augment not in FLIPS:
        assert trained(MixtureMI, pack, tokenizer, tmp_path / "run", dict(settings, mirror=True), **ALL)
        return
    for door in (Sampling, lambda **changes: TrainConfig(run=tmp_path, **changes)):
        with pytest.raises(ValueError, match=f"augment '{augment}' mirrors"):
            door(augment=augment, mirror=True)
    for option in (dict(region_prior="side"), dict(side_negatives=0.5)):
        with pytest.raises(ValueError, match=f"MixtureMI takes the side .* augment '{augment}' mirrors"):
            trained(MixtureMI, pack, tokenizer, tmp_path / "run", settings, **option)
    assert not (tmp_path / "run").exists()
    trained(MixtureMI, pack, tokenizer, tmp_path / "run", settings, side_words="remove", finding_phrases=1.0)


@pytest.mark.parametrize("changes", [ALL, KEPT], ids=["removed", "kept"])
def test_frozen_text_gives_the_same_losses_and_is_read_once(tokenizer, changes):
    method, plain = (method_of(tokenizer, **changes, freeze_text=some) for some in ("all", 2))
    batch = batch_of(REPORTS, tokenizer)
    wanted = plain(batch).parts
    for name, value in method(batch).parts.items():
        assert math.isclose(value, wanted[name], abs_tol=1e-6), name
    memory, body = method.text_encoder.memory, method.text_encoder.body
    read, calls, real = len(memory.texts), [], body.forward
    body.forward = lambda **inputs: calls.append(1) or real(**inputs)
    method.train()(batch)
    assert not method.text_encoder.training and method.critic.training, "without dropout"
    assert len(calls) == len(memory.texts) - read, "only phrases that were not drawn before"
    method.load_state_dict(method.state_dict())
    assert method.eval()(batch_of([[], []], tokenizer)).total == 0
    assert method.text_encoder.memory is memory, "the same weights, loaded anew"
    with torch.no_grad():
        next(body.parameters()).add_(1)
    assert method(batch_of([[], []], tokenizer)).total == 0
    assert len(method.text_encoder.memory.texts) == 1 < read, "other weights read otherwise"


@register_encoder("toy_frozen_points")
def toy_frozen_points(layer: str = "layer3", coordinates: bool = True):
    "A frozen tower that costs nothing."
    return FrozenEncoder(image_encoder("tiny_resnet_fine"), width=16, coordinates=coordinates)


class Asked(MixtureMI):
    "All options, for the runs that are killed."

    @classmethod
    def from_preset(cls, preset, tokenizer=None, **changes):
        return super().from_preset(preset, tokenizer, image="toy_frozen_points", coordinates=False, freeze_text="all", **ALL, **changes)


FORMS = {"augmented": ("mgca", 0), "kept maps": ("none", 2)}        # augment, and the stores that such runs leave: the plain and the mirrored view


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_with_all_options_resumes_exactly(pack, tokenizer, tmp_path, form):
    augment, stores = FORMS[form]
    changes = dict(mirror=True, most_sentences=4, swap=0.0, epochs=2, augment=augment)
    pack = Pack(shutil.copytree(pack.path, tmp_path / "pack"))
    assert in_process(pack.path, tokenizer, tmp_path / "whole", kind=Asked, **changes) == 0
    sabotage = die_at_call(loop._Trainer, "take_step", 9)
    assert in_process(pack.path, tokenizer, tmp_path / "run", sabotage, kind=Asked, **changes) == -signal.SIGKILL
    assert in_process(pack.path, tokenizer, tmp_path / "run", kind=Asked, **changes) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    kept = list(Path(f"{pack.path}.features").glob("*/about.json"))
    assert len(kept) == stores == len({json.loads(file.read_text())["augment"] for file in kept})


def test_kept_maps_of_a_mirrored_view_are_those_of_the_mirrored_image(pack, tokenizer):
    from medvis.encoders.frozen import cache_images
    method = MixtureMI.from_preset("tiny", tokenizer, image="toy_frozen_points")
    tower = method.image_encoder.tower
    settings = dict(sampling=Sampling(augment="none", mirror=True), split="train", train=True, seed=2)
    live = Pairs(pack, tokenizer, tower.preprocessing, **settings)
    kept = Pairs(pack, tokenizer, tower.preprocessing, maps=cache_images(tower, pack, views=2, augment="mirror"), **settings)
    for i in range(6):
        with torch.no_grad():
            seen = method.image_encoder.tower_features(live[0, i].image[None])[0]
        torch.testing.assert_close(kept[0, i].image, seen, atol=5e-3, rtol=5e-3)
    assert {live.mirrored(i) for i in range(6)} == {True, False}
