"""Batches that are read in chunks, and blocks that are computed again: the same losses, gradients, statistics and random numbers as without, in less memory."""
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from forked import work_together
from medvis.methods import METHODS
from medvis.methods.method import Method, phantom_tokenizer
from medvis.methods.settings import SETTINGS
from medvis.testing import PeakBytes, raises, small_phantom, tiny_batch
from medvis.train import TrainConfig, create_method, fit, large_batches
from medvis.train.large_batches import on_small_memory
from medvis.train.processes import make_accelerator
from test_gathered import CASES as GATHERED, TEXTS, alone, differ, learn, make as in_evaluation, some_rows

CASES = GATHERED | {name: (name, {}) for name in SETTINGS if name not in GATHERED} | {
    "supervised": ("supervised", dict(classes=("Edema", "Fracture"))),
    "mgca, vit": ("mgca", dict(image="tiny_vit", layer=None)),
    "lovt, vit": ("lovt", dict(image="tiny_vit", layer=None)),
    "gloria, some frozen": ("gloria", dict(freeze_text=1, summed_layers=1)),
    "convirt, all text frozen": ("convirt", dict(freeze_text="all")),
}
NAMED = ("convirt", "lovt", "mgca", "gloria", "local-mi", "mixture-mi", "mixture-mi, all that is asked")


@pytest.fixture(scope="module")
def words():
    return phantom_tokenizer(60)


def make(case: str, words) -> tuple[Method, object]:
    "A method in double precision and in training mode, with dropout, and a batch of nine."
    name, changes = CASES[case]
    torch.manual_seed(0)
    kind = METHODS.find(name)
    method = kind.from_preset("tiny", words if kind.reads_text else None, **changes).double()
    method.start_run(10)
    method.start_epoch(1)
    return method.train(), some_rows(method, 9)


def over_chunks(encoder: nn.Module, most: int):
    "What an encoder makes of chunks, in one plain graph."
    read = encoder.forward

    def read_all(*inputs):
        if len(inputs[0]) <= most:
            return read(*inputs)
        count = -(-len(inputs[0]) // most)
        parts = [read(*piece) for piece in zip(*(one.tensor_split(count) for one in inputs))]

        def rows(name: str):
            values = [getattr(part, name) for part in parts]
            if not isinstance(values[0], torch.Tensor):
                return values[0]
            room = torch.zeros(len(inputs[0]), *map(max, *(value.shape[1:] for value in values)), dtype=values[0].dtype)
            start = 0
            for value in values:
                room[(slice(start, start := start + len(value)), *map(slice, value.shape[1:]))] = value
            return room

        return type(parts[0])(**{field.name: rows(field.name) for field in fields(parts[0])})

    return read_all


@contextmanager
def plain_chunks(method: Method, most: int) -> Iterator[None]:
    kinds = {type(method.image_encoder), type(method.text_encoder)} - {type(None)}
    encoders = [part for part in method.modules() if type(part) in kinds]
    for encoder in encoders:
        encoder.forward = over_chunks(encoder, most)
    yield
    for encoder in encoders:
        del encoder.forward


def step(method: Method, batch, way=nullcontext()) -> dict[str, torch.Tensor]:
    "Losses, gradients, statistics and the next random number."
    method.zero_grad()
    torch.manual_seed(5)
    with way:
        losses = method(batch)
        losses.total.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": losses.total.detach(), **losses.parts, **gradients, **{name: b.clone() for name, b in method.named_buffers()}, "next": torch.rand(1)}


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 5
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("most", (1, 2, 4))
@pytest.mark.parametrize("case", CASES)
def test_chunks_are_what_one_graph_over_them_is(case, most, words):
    "With dropout, with batch statistics of the chunks, which move once; what has no gradient there has none here."
    (one, batch), (other, _) = make(case, words), make(case, words)
    if most == 1 and any(isinstance(part, nn.BatchNorm2d) for part in one.modules()):
        batch = replace(batch, image=batch.image.repeat(1, 1, 2, 2))     # one image of one cell has no variance
    wanted = step(other, batch, plain_chunks(other, most))
    assert_same(step(one, batch, on_small_memory(one, most)), wanted)
    assert not any("forward" in vars(part) for part in one.modules() if part in (one.image_encoder, one.text_encoder))


@pytest.mark.parametrize("case", CASES)
def test_chunks_are_the_plain_batch(case, words):
    "Where nothing is drawn, and no statistics are taken, in the encoders."
    name, changes = CASES[case]
    batch = some_rows(make(case, words)[0], 9)
    wanted = step(in_evaluation(name, words, **changes), batch)
    for most, recompute in ((4, False), (1, False), (3, True)):
        method = in_evaluation(name, words, **changes)
        assert_same(step(method, batch, on_small_memory(method, most, recompute)), wanted)


@pytest.mark.parametrize("case", CASES)
def test_blocks_that_are_computed_again_are_the_same(case, words):
    "With dropout and batch statistics, to the last bit; alone, and within chunks."
    (one, batch), (other, _) = make(case, words), make(case, words)
    for most in (None, 4):
        found = step(one, batch, on_small_memory(one, most, recompute=True))
        wanted = step(other, batch, on_small_memory(other, most))
        assert found.keys() == wanted.keys() and [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


FAULTS = {"other random numbers": ("_drawn_from", lambda states, device: nullcontext()), "statistics move twice": ("_kept", lambda buffers: nullcontext())}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reading_that_is_not_the_same_is_seen(fault, words, monkeypatch):
    (one, batch), (other, _) = make("mgca", words), make("mgca", words)
    wanted = step(other, batch, plain_chunks(other, 4))
    monkeypatch.setattr(large_batches, *FAULTS[fault])
    with pytest.raises(AssertionError, match="not close"):
        assert_same(step(one, batch, on_small_memory(one, 4)), wanted)


@pytest.mark.parametrize("case", ["mixture-mi, all that is asked", "mgca", "lovt"])
def test_mixed_precision(case, words):
    "As one graph over the chunks: no gradient is lost where a weight is used both in chunks and at once."
    found = []
    for way in (plain_chunks, on_small_memory):
        method, batch = make(case, words)
        method, batch = method.float(), replace(batch, image=batch.image.float())
        method.zero_grad()
        torch.manual_seed(5)
        with way(method, 4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = method(batch).total
            loss.backward()
        found.append((loss, {name: p.grad for name, p in method.named_parameters() if p.grad is not None}))
    (loss, wanted), (own, gradients) = found
    assert abs(own - loss) < 1e-6 * abs(loss) and gradients.keys() == wanted.keys()
    size = sum(float(g.square().sum()) for g in wanted.values()) ** 0.5
    gap = sum(float((gradients[name] - g).square().sum()) for name, g in wanted.items()) ** 0.5
    assert gap < 0.01 * size


def together(out: Path) -> None:
    "The same on two processes, which have unequal parts of the batch, and read them in chunks."
    words, found = phantom_tokenizer(60), {}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = make_accelerator(TrainConfig(run=out, device="cpu"), unused_parameters=True)
    for case in NAMED:
        name, changes = CASES[case]
        method = in_evaluation(name, words, **changes)
        with on_small_memory(method, 2, recompute=case == "mgca"):
            found[case] = learn(method, some_rows(method, 9, rank, world), accelerator, None)
    torch.save(found, out / f"{rank}.pt")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("processes")
    work_together(out / "said.txt", 2, together, out, seconds=300)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", NAMED)
def test_chunks_of_several_processes_are_one_batch(case, of_two, words):
    wanted = alone(CASES[case][0], words, CASES[case][1], 9)
    assert len(wanted) > 5 and [differ(found[case], wanted) for found in of_two] == [[], []]


def test_chunks_need_statistics_of_their_own(tmp_path):
    with raises(ValueError, "encoder_chunk", "batch_norm"):
        TrainConfig(run=tmp_path, encoder_chunk=2, batch_norm="all processes")
    with raises(ValueError, "encoder_chunk is 0; expected at least 1"):
        TrainConfig(run=tmp_path, encoder_chunk=0)


class Stopped(Exception):
    pass


def test_a_run_in_chunks_goes_on_as_if_it_had_not_stopped(tmp_path):
    "With gradients added up over batches; a run whose blocks are computed again is the same run."
    data = small_phantom(40)

    def train(name: str, each_epoch=None, **changes) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        method = create_method("mgca", "tiny", data=data)
        run = fit(method, data, tmp_path / name, each_epoch, epochs=2, batch_size=8, accumulate=2, encoder_chunk=3, device="cpu", progress=False, **changes)
        return run.method("last").state_dict()

    def stop(run) -> None:
        raise Stopped

    wanted = train("whole")
    with pytest.raises(Stopped):
        train("stopped", stop)
    found = train("stopped", recompute=True)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    with raises(ValueError, "holds another run", "encoder_chunk"):
        fit(create_method("mgca", "tiny", data=data), data, tmp_path / "whole", epochs=2, batch_size=8, accumulate=2, encoder_chunk=4, device="cpu", progress=False)


def test_eight_times_the_batch_in_the_same_memory(words):
    "The most that is alive at once, weights aside; of the other methods, at the size of the papers: benchmarks/large_batches.py."
    method = METHODS.find("convirt").from_preset("tiny", words).train()

    def most(pairs: int, chunk: int | None = None) -> int:
        batch = tiny_batch(method, [TEXTS[i % 9] for i in range(pairs)], list(range(pairs)), size=256)
        method.zero_grad()
        with on_small_memory(method, chunk), PeakBytes() as peak:
            method(batch).total.backward()
        return peak.most

    assert most(64, chunk=2) < most(8) < most(64) / 6
