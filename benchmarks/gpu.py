"""What does this machine's GPU make of it? All in one run of at most ten minutes, on one GPU, for whoever has one.

`python benchmarks/gpu.py --out gpu.csv` writes a line as soon as it is measured, and leaves out what no longer fits into `--minutes`; send the .csv and the .json. `--device cpu --quick 1` runs all of it
with the smallest networks, to see that it runs (half a minute). Give the host a few cores: `--workers 8`.

copy: host to device, pinned.  develop: augmentation of batches on the device.  loader: pairs that arrive on the device, developed.  step: a whole training step, in fp32 and bf16, with its peak memory, beside
heads and losses / encoders (as benchmarks/steps.py).  waits: how often a step makes the host wait.  objective: beside its published form (as benchmarks/objectives.py).  batch: the largest that fits."""
from tables import arguments, keep  # isort: skip

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator

import objectives
import steps
import torch
from loading import samples

from medvis.data.loader import BatchLoader
from medvis.data.pairs import Batch, collate
from medvis.encoders.text import train_tokenizer
from medvis.methods.method import Method
from medvis.testing import small_phantom


class Place:
    "The device, and what is measured on it: the presets of the papers, or the smallest."

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.cases = {name: ("tiny", 6) for name in ("convirt", "mgca")} if quick else dict(steps.CASES)
        self.pixels, self.repeats = (64, 1) if quick else (None, 5)

    def seconds(self, work: Callable[[], object]) -> float:
        "The median of some repeats, after one that does not count."
        return sorted(steps.seconds(work, self.device) for _ in range(self.repeats + 1))[(self.repeats + 1) // 2]

    def peak(self) -> float:
        "GB since it was asked last; not known of a CPU."
        if self.device == "cpu":
            return float("nan")
        most = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return most


def copy(place: Place) -> Iterator[dict]:
    size = 2**24 if place.quick else 2**28
    host = torch.empty(size, dtype=torch.uint8)
    for name, data in {"pageable": host, **({"pinned": host.pin_memory()} if place.device != "cpu" else {})}.items():
        yield {"part": "copy", "what": name, "unit": "GB/s", "value": size / 1e9 / place.seconds(lambda: data.to(place.device, copy=True))}


def develop(place: Place) -> Iterator[dict]:
    pack = small_phantom(64, 64 if place.quick else 256)
    words = train_tokenizer(said for sentences in pack.studies["sentences"] for said in sentences)
    for method in ("mgca", "lovt", "local-mi", "simclr"):
        pairs = samples(method, pack, words)
        rows = min(len(pairs), 32)
        raw = collate([pairs.raw(i) for i in range(rows)]).to(place.device)
        yield {"part": "develop", "what": method, "unit": "pairs/s", "value": rows / place.seconds(lambda: pairs.develop(raw))}


def loader(place: Place, workers: int) -> Iterator[dict]:
    pack = small_phantom(120 if place.quick else 600, 64 if place.quick else 256)
    words = train_tokenizer(said for sentences in pack.studies["sentences"] for said in sentences)
    pairs = samples("mgca", pack, words)
    pairs.learn_words()
    for count in dict.fromkeys((0, workers)):
        batches = BatchLoader({"train": pairs}, place.device, count)
        keys = [list(range(start, min(start + 32, len(pairs)))) for start in range(0, len(pairs), 32)]
        read = lambda epoch: [batch for batch in batches("train", [[(epoch, row) for row in some] for some in keys])]
        read(0)
        start = time.perf_counter()
        for epoch in range(place.repeats):
            read(epoch)
        if place.device != "cpu":
            torch.cuda.synchronize()
        yield {"part": "loader", "what": f"mgca, {count} workers", "unit": "pairs/s", "value": place.repeats * len(pairs) / (time.perf_counter() - start)}


def learn(method: Method, batch: Batch, optimizer: torch.optim.Optimizer, precision: torch.dtype) -> None:
    optimizer.zero_grad()
    with torch.autocast(batch.image.device.type, precision, enabled=precision != torch.float32):
        total = method(batch).total
    total.backward()
    optimizer.step()


def step(place: Place) -> Iterator[dict]:
    for name, (preset, size) in place.cases.items():
        method, batch = steps.make(name, preset, size, place.pixels, place.device)
        optimizer = torch.optim.AdamW(method.parameters(), fused=place.device != "cpu")
        for label, precision in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            place.peak()
            seconds = place.seconds(lambda: learn(method, batch, optimizer, precision))
            yield {"part": "step", "what": f"{name}, batch {size}, {label}", "unit": "ms", "value": 1000 * seconds, "GB": place.peak()}
        if place.device != "cpu":
            yield {"part": "waits", "what": name, "unit": "a step", "value": waits(lambda: learn(method, batch, optimizer, torch.float32))}
        del method, batch, optimizer
        yield {"part": "step", "what": f"{name}, batch {size}", "unit": "step / encoders", "value": steps.measure(name, preset, size, size, place.repeats, place.device, place.pixels)["step / encoders"]}


def waits(work: Callable[[], object]) -> int:
    "How often some work makes the host wait for the device."
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def objective(place: Place) -> Iterator[dict]:
    for name, size in {"pair scores": 64, "word pooling": 72, "GLoRIA local": 48, "Sinkhorn": 144}.items():
        with torch.device(place.device):
            forms, leaves = objectives.case(name, 8 if place.quick else size, place.quick)
            ms = {form: 1000 * place.seconds(lambda: objectives.learn(of, leaves)) for form, of in forms.items()}
        yield {"part": "objective", "what": name, "unit": "published / ours", "value": ms["published"] / ms["ours"]}


def batch(place: Place) -> Iterator[dict]:
    "Doubled until memory is full; on a CPU twice."
    name, (preset, size) = next(iter(place.cases.items())) if place.quick else ("convirt", ("paper", 32))
    fits = 0
    with contextlib.suppress(torch.OutOfMemoryError):
        while size <= (12 if place.device == "cpu" else 4096):
            method, given = steps.make(name, preset, size, place.pixels, place.device)
            learn(method, given, torch.optim.AdamW(method.parameters()), torch.bfloat16)
            fits, size = size, 2 * size
    yield {"part": "batch", "what": f"{name}, bf16, fits", "unit": "pairs", "value": fits}


def measure(place: Place, workers: int, minutes: float) -> Iterator[dict]:
    "Line by line, until the time is over."
    end = time.monotonic() + 60 * minutes
    for part in (copy(place), develop(place), loader(place, workers), step(place), objective(place), batch(place)):
        for line in part:
            yield line
            if time.monotonic() > end:
                yield {"part": "end", "what": "the time is over; the rest was left out"}
                return


if __name__ == "__main__":
    asked = arguments(__doc__, device="cuda", quick=0, workers=4, minutes=8.0)
    torch.set_num_threads(1 if asked.device == "cpu" else torch.get_num_threads())
    keep(measure(Place(asked.device, bool(asked.quick)), asked.workers, asked.minutes), asked.out, device=asked.device, quick=asked.quick, workers=asked.workers)
