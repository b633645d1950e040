"""Every setting that a method accepts counts: another value changes a loss, weights, what learns or a map, or it is refused in words; so is a value of a wrong type."""
from contextlib import suppress
from dataclasses import replace
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

from medvis.methods import METHODS
from medvis.methods.method import phantom_tokenizer
from medvis.testing import tiny_batch
from medvis.train import TrainConfig

HOUSE = [name for name, kind in METHODS.items() if kind.__module__.startswith("medvis.")]
ELSEWHERE = {"image_weights", "text", "text_weights"}       # files of weights: tests/test_weights.py, tests/test_captions.py
PIECES = {"chunk", "score_memory"}      # how much at a time: memory and time alone, and the same numbers (tests/test_mutual_information.py, tests/test_tokens.py, tests/test_captions.py)
VALUES = {"image": ["tiny_vit"], "layer": ["layer2"], "upsample": [96], "coordinates": [False], "local_grid": ["8x8x128"], "text_layers": [1], "freeze_text": [1, "all"],
          "classes": [("Edema", "Fracture")], "released_words": [40], "heads": [2], "clip_share": [0.3], "summed_layers": [1], "map_channels": [5], "uncertain": ["positive", "negative", ("positive",) * 9], "blank": ["ignore"]}
BESIDE = {      # what another setting must be for this one to mean something
    ("gloria", "dim"): dict(project_text=True), ("lovt", "pool"): dict(local_weights=False), ("mixture-mi", "prior_floor"): dict(region_prior="side"),
    ("gloria", "text_layers"): dict(summed_layers=1)}
REFUSABLE = {"layer", "upsample", "coordinates", "local_grid", "text_layers"}       # a network that has no such thing says so
TEXTS = (("No pleural effusion.",), ("Mild cardiomegaly.", "Left pneumothorax."), ("The heart is enlarged.",), ("Left pneumothorax.",), ("Small right pleural effusion.", "Clear lungs."), ())


@pytest.fixture(scope="module")
def words():
    return phantom_tokenizer(60)


def make(name, words, **changes):
    torch.manual_seed(0)
    kind = METHODS[name]
    return kind.from_preset("tiny", words if kind.reads_text else None, **changes)


def batch_of(method):
    batch = tiny_batch(method, TEXTS)
    for place, values in enumerate(batch.labels.values()):
        values[place % 6], values[(place + 1) % 6] = -1, torch.nan
    return replace(batch, study_id=torch.tensor([0, 0, 1, 2, 3, 4]), patient_id=torch.tensor([0, 0, 0, 1, 2, 3]), labels=batch.labels)


def numbers(parts) -> list:
    "All tensors and plain values of what a method answered, in turn."
    if isinstance(parts, dict):
        return [one for key, value in parts.items() for one in (key, *numbers(value))]
    if isinstance(parts, (tuple, list)):
        return [one for part in parts for one in numbers(part)]
    return [parts.detach().clone() if isinstance(parts, torch.Tensor) else parts]


def answers(method) -> list:
    "What a method says of a batch, what it learns from it in two steps, and what learns at all."
    batch = batch_of(method)
    found = [numbers(method.state_dict())]
    torch.manual_seed(1)
    method.start_run(10)
    method.start_epoch(1)
    learns = {name: p.requires_grad for name, p in method.named_parameters()}
    for _ in range(2):
        method.zero_grad()
        losses = method.train()(batch)
        found += numbers(losses.parts)
        losses.total.backward()
        with torch.no_grad():
            for p in method.parameters():
                p.sub_(0 if p.grad is None else 0.05 * p.grad)
        method.after_step()
    found += numbers(learns)
    method.eval()
    with torch.no_grad():
        features = method.image_encoder(batch.image)
        found += numbers([method(batch).parts, method.state_dict(), features.regions, features.whole])
        for ask in (lambda: vars(method.correspondence(batch)), lambda: vars(method.align(batch)), lambda: method.similarity(method.embed_image(batch.image), method.embed_text(batch))):
            with suppress(NotImplementedError, TypeError, RuntimeError):       # regions of another width than the heads'
                found += numbers(ask())
    return numbers(found)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
    return type(a) is type(b) and a == b


def parts(hint) -> list:
    return [part for one in get_args(hint) for part in parts(one)] if get_origin(hint) is Union or isinstance(hint, type(int | None)) else [hint]


def others(setting, hint, value) -> list:
    "Values that a setting can have beside its own."
    if setting in VALUES:
        return [other for other in VALUES[setting] if other != value]
    words = [word for part in parts(hint) if get_origin(part) is Literal for word in get_args(part)]
    if words:
        return [word for word in words if word != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, tuple):
        return [tuple(2 * one for one in value)]
    return [value * 2 if value else type(value)(1)] if isinstance(value, int) else [value / 3 + 0.05]


@pytest.mark.parametrize("name", HOUSE)
def test_every_setting_counts(name, words):
    kind, before, counted = METHODS[name], {}, 0
    own = kind.Config(**kind.presets["tiny"][0])
    for setting, hint in get_type_hints(kind.Config).items():
        if hint is type(None) or setting in ELSEWHERE | PIECES:
            continue
        beside = BESIDE.get((name, setting), {})
        if repr(beside) not in before:
            before[repr(beside)] = answers(make(name, words, **beside))
        plain = before[repr(beside)]
        for other in others(setting, hint, getattr(own, setting)):
            changes = {**beside, setting: other} | ({"layer": None} if setting == "image" else {})
            try:
                changed, counted = answers(make(name, words, **changes)), counted + 1
            except ValueError as error:
                assert setting in REFUSABLE and (f"has no {setting}: leave it out" in str(error) or f"{setting} is {other}" in str(error)), error
                continue
            assert len(plain) != len(changed) or not all(map(same, plain, changed)), f"{name}: {setting}={other!r} changes nothing"
    assert counted > 3 and all(map(same, before["{}"], answers(make(name, words)))), "the same settings say the same"


WRONG = {int: 1.5, float: "much", bool: 1, str: 3.5, tuple: 32}


@pytest.mark.parametrize("name", HOUSE)
def test_a_value_of_a_wrong_type_is_refused_in_words(name, words):
    kind = METHODS[name]
    for setting, hint in get_type_hints(kind.Config).items():
        plain = [get_origin(part) or part for part in parts(hint)]
        wrong = object() if Literal in plain else WRONG.get(plain[0], 5)
        for preset in kind.presets:
            with pytest.raises(ValueError, match=f"{setting} .*expected|{setting} .*has no meaning"):
                kind.from_preset(preset, words, **{setting: wrong})
        if Literal in plain:
            with pytest.raises(ValueError, match=f"unknown {setting} of {kind.__name__} 'nonsense'; choose from"):
                kind.from_preset("tiny", words, **{setting: "nonsense"})


def test_the_judge_needs_two_widths(words):
    with pytest.raises(ValueError, match=r"hidden of ContrastiveBinary is 32; expected \(a whole number, a whole number\)"):
        METHODS["contrastive-binary"].from_preset("tiny", words, hidden=32)


def test_training_settings_of_a_wrong_type_are_refused_in_words(tmp_path):
    for setting, hint in get_type_hints(TrainConfig).items():
        wrong = WRONG.get(get_origin(parts(hint)[0]) or parts(hint)[0], 5)
        if setting != "run":
            with pytest.raises(ValueError, match=setting):
                TrainConfig(run=tmp_path, **{setting: wrong})
