"""What does a training step cost beside its encoders, at the shapes of the papers?

`python benchmarks/steps.py --out benchmarks/steps.csv [--methods convirt lovt] [--device cuda]`. Encoders are run forward for a whole batch, once, and what they are given and return is kept. Then *the rest*
(heads, attention, losses) is trained on what they returned, for the whole batch; and the encoders alone on a few of its rows, whose time is scaled up. Both count forward and backward. On a GPU the
encoders are timed on all rows. Kept activations are the bytes of all tensors that autograd keeps, weights apart, for a whole step on a few rows, beside the encoders alone."""
from tables import arguments, keep  # isort: skip

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from medvis.data.pairs import Batch
from medvis.methods import METHODS
from medvis.methods.method import Method, phantom_tokenizer
from medvis.methods.settings import find_settings
from medvis.testing import tiny_batch

SENTENCES = ("The heart is mildly enlarged and the mediastinal contours are unchanged since the prior study.", "There is a small left pleural effusion with adjacent atelectasis.", "No pneumothorax is seen.",
             "Patchy opacity in the right lower lobe may reflect pneumonia or aspiration.", "The pulmonary vasculature is mildly congested.", "No acute osseous abnormality.")
CASES = {"local-mi": ("paper", 8), "convirt": ("paper", 32), "clip": ("paper", 32), "lovt": ("paper", 32), "mgca": ("paper", 32), "gloria": ("paper", 48), "mixture-mi": ("full", 32)}
GOALS = {"local-mi": 1.03, "gloria": 1.06}


def tensors(value: Any) -> list[Tensor]:
    "All tensors within features, tuples and dictionaries."
    if isinstance(value, Tensor):
        return [value]
    inside = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else list(value.values()) if isinstance(value, dict) else value
    return [one for part in inside for one in tensors(part)] if isinstance(inside, (list, tuple)) else []


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    "The same with every tensor changed."
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value):
        return replace(value, **{field.name: changed(getattr(value, field.name), change) for field in fields(value) if field.init})
    if isinstance(value, (list, tuple)):
        return type(value)(changed(part, change) for part in value)
    return {key: changed(part, change) for key, part in value.items()} if isinstance(value, dict) else value


def make(name: str, preset: str, batch: int, size: int | None, device: str) -> tuple[Method, Batch]:
    "A method with random weights, and a batch as large as its preset's: pictures of noise, reports of one sentence or of six, as it reads them."
    kind, (config, recipe) = METHODS.find(name), find_settings(name)[1][preset]
    asked = find_settings(name)[0](**config)
    weights = {"image_weights": None, "text_weights": False, "text": "bert-base" if "/" in getattr(asked, "text", "") else getattr(asked, "text", "")}
    weights = {key: value for key, value in weights.items() if hasattr(asked, key)}
    method = kind.from_preset(preset, phantom_tokenizer(60), **weights).train()
    one = recipe.get("sentences") == "one"
    texts = [(SENTENCES[row % 6],) if one else SENTENCES for row in range(batch)]
    method.start_run(1000)
    method.start_epoch(0)
    return method.to(device), tiny_batch(method, texts, list(range(batch)), size or method.preprocessing.size).to(device)


@contextmanager
def encoders_that(method: Method, act: Callable[[str, nn.Module, Callable, tuple, dict], Any]) -> Iterator[None]:
    "Within it, the encoders of a method do something else when they are called."
    parts = {name: encoder for name in ("image_encoder", "text_encoder") if (encoder := getattr(method, name, None)) is not None}
    kept = {name: (vars(encoder).get("forward"), encoder.forward) for name, encoder in parts.items()}
    for name, encoder in parts.items():
        encoder.forward = lambda *given, name=name, encoder=encoder, **more: act(name, encoder, kept[name][1], given, more)
    try:
        yield
    finally:
        for name, encoder in parts.items():
            del encoder.forward
            if kept[name][0] is not None:
                encoder.forward = kept[name][0]


def record(method: Method, batch: Batch) -> list[tuple]:
    "What the encoders are given and what they return, call by call, in a step of a batch."
    calls = []

    def act(name: str, encoder: nn.Module, read: Callable, given: tuple, more: dict) -> Any:
        answer = read(*given, **more)
        calls.append((read, given, more, changed(answer, Tensor.detach)))
        return answer

    with torch.no_grad(), encoders_that(method, act):
        method(batch)
    return calls


def rest(method: Method, batch: Batch, calls: list[tuple]) -> None:
    "Heads and losses alone, forward and backward, from what the encoders returned."
    answers = iter(calls)

    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_() if value.is_floating_point() else value

    with encoders_that(method, lambda *call: changed(next(answers)[3], leaf)):
        method(batch).total.backward()


def encoders(calls: list[tuple], rows: int | None) -> None:
    "The encoders alone, forward and backward, on the first rows of what they were given; None = all."
    for read, given, more, _ in calls:
        given, more = (changed(part, lambda value: value[:rows]) if rows else part for part in (given, more))
        total = sum(value.float().sum() for value in tensors(read(*given, **more)) if value.requires_grad)
        if isinstance(total, Tensor):
            total.backward()


def seconds(work: Callable[[], Any], device: str) -> float:
    "Processor time of one thread, or the time of the GPU."
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def kept_bytes(method: nn.Module, work: Callable[[], Any]) -> int:
    "Bytes that autograd keeps for the backward pass, weights and buffers apart; each storage once."
    own = {value.untyped_storage().data_ptr() for value in (*method.parameters(), *method.buffers())}
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        work()
    return sum(seen.values())


def measure(name: str, preset: str, size: int, rows: int, repeats: int, device: str = "cpu", pixels: int | None = None) -> dict[str, float]:
    "One line: a method at its paper's batch."
    method, batch = make(name, preset, size, pixels, device)
    calls = record(method, batch)
    some = rows if device == "cpu" and rows < size else None
    scale = size / some if some else 1
    ways = {"rest": lambda: rest(method, batch, calls), "encoders": lambda: encoders(calls, some)}
    spent = [{way: seconds(work, device) for way, work in ways.items()} for _ in range(repeats + 1)][1:]
    ms = {way: 1000 * median(one[way] for one in spent) * (scale if way == "encoders" else 1) for way in ways}
    few_method, few = make(name, preset, min(size, max(rows, 2)), pixels, device)
    few_calls = record(few_method, few)
    whole = kept_bytes(few_method, lambda: few_method(few).total.backward())
    alone = kept_bytes(few_method, lambda: encoders(few_calls, None))
    return {"method": name, "preset": preset, "batch": size, "encoders, ms": ms["encoders"], "rest, ms": ms["rest"], "step / encoders": 1 + ms["rest"] / ms["encoders"], "goal": GOALS.get(name, 1.05),
            "kept rows": min(size, max(rows, 2)), "kept, MB": whole / 2**20, "kept / encoders": whole / max(alone, 1)}


if __name__ == "__main__":
    asked = arguments(__doc__, methods=tuple(CASES), rows=4, repeats=2, device="cpu")
    torch.set_num_threads(1)
    keep((measure(name, *CASES[name], asked.rows, asked.repeats, asked.device) for name in asked.methods), asked.out, rows=asked.rows, repeats=asked.repeats, device=asked.device)
