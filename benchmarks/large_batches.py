"""How large a batch fits into the memory of a small one, what does it cost, and how do the objectives grow?

`python benchmarks/large_batches.py --out benchmarks/large_batches.csv` measures side by side, on one thread:
*encoders*, for each method with local-mi's ResNet-256 at 256 px and a small BERT: the most memory that a step of 8 pairs takes at a time, that of 64 pairs whose encoders read two at a time (`encoder_chunk=2`), and the
processor time a pair of both at 16 pairs; *objectives*, time and memory against batch, words and regions, as slopes of logarithms against the size of their table of scores (1 = in proportion).
Memory is the bytes of all tensors that are alive at a time, without weights. On a GPU the same is `torch.cuda.max_memory_allocated`."""
import argparse
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import json  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from medvis.core.machine import describe_machine  # noqa: E402
from medvis.methods import METHODS  # noqa: E402
from medvis.methods.method import Method, phantom_tokenizer  # noqa: E402
from medvis.objectives.mixture import CosineCritic, mixture_scores  # noqa: E402
from medvis.objectives.mutual_information import Discriminator, cpc_bound, local_scores, region_scores, reselect_negatives, select_regions  # noqa: E402
from medvis.objectives.tokens import gloria_loss, token_alignment_loss  # noqa: E402
from medvis.testing import PeakBytes, tiny_batch  # noqa: E402
from medvis.train.large_batches import on_small_memory  # noqa: E402

SMALL, LARGE, TIMED, CHUNK = 8, 64, 16, 2      # pairs
TEXTS = (("No pleural effusion.",), ("Mild cardiomegaly.", "Clear lungs."), ("Small left pleural effusion.", "The heart is enlarged.", "No pneumothorax."), ("Left pneumothorax.",))
NAMES = ("convirt", "lovt", "mgca", "gloria", "local-mi", "mixture-mi")
AXES = {"batch": (12, 24, 48, 96), "words": (12, 24, 48, 96), "regions": (49, 100, 196, 361)}
USUAL = {"batch": 32, "words": 24, "regions": 100}


def step(method: Method, pairs: int, chunk: int | None) -> Callable[[], None]:
    "Forward and backward pass of a batch."
    batch = tiny_batch(method, [TEXTS[i % len(TEXTS)] for i in range(pairs)], list(range(pairs)), size=256)

    def work() -> None:
        method.zero_grad()
        with on_small_memory(method, chunk):
            method(batch).total.backward()

    return work


def memory(work: Callable[[], object]) -> float:
    "The most MB at a time."
    with PeakBytes() as peak:
        work()
    return peak.most / 1e6


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def encoders() -> Iterator[dict]:
    "One line a method."
    words = phantom_tokenizer()
    for name in NAMES:
        torch.manual_seed(0)
        room = {"score_memory": 32.0} if name in ("gloria", "local-mi", "mixture-mi") else {}
        method = METHODS.find(name).from_preset("tiny", words, image="resnet256", layer=None, **room).train()
        plain, few, many = (memory(step(method, *size)) for size in ((SMALL, None), (TIMED, CHUNK), (LARGE, CHUNK)))
        slope = max((many - few) / (LARGE - TIMED), 1e-9)
        spent = [seconds(step(method, TIMED, chunk)) / TIMED for chunk in (None, CHUNK)]
        yield {"what": "encoders", "name": name, f"MB, {SMALL} pairs": plain, f"MB, {LARGE} pairs in chunks": many,
               "times the pairs in the same memory": (LARGE + (plain - many) / slope) / SMALL, "s a pair": spent[0], "s a pair in chunks": spent[1], "slower by": spent[1] / spent[0]}


def objectives() -> dict[str, tuple[Callable[[int, int, int], tuple[Callable[[], Tensor], list[Tensor]]], Callable[[int, int, int], int]]]:
    "Name -> what makes (loss, leaves) from batch, words and regions, and how many scores they have."
    def vectors(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    def gloria(memory: float | None):
        def make(B, W, N):
            regions, words, mask = vectors(B, N, 64), vectors(B, W, 64), torch.ones(B, W, dtype=torch.bool)
            return lambda: gloria_loss(regions, words, mask, memory=memory), [regions, words]
        return make

    def judged(memory: float | None, every: bool):
        def make(B, W, N):
            judge, regions, sentence = Discriminator(64, 64, (64, 32)), vectors(B, N, 64), vectors(B, 64)

            def loss() -> Tensor:
                index = select_regions(judge, regions, sentence, memory)
                index = reselect_negatives(region_scores(judge, regions, sentence, memory), index) if every else index
                return -cpc_bound(local_scores(judge, regions, sentence, index, memory))
            return loss, [regions, sentence, *judge.parameters()]
        return make

    def mixture(memory: float | None):
        def make(B, W, N):
            critic, regions, sentence = CosineCritic(64, 64, 64, 64), vectors(B, N, 64), vectors(B, 64)
            return lambda: -cpc_bound(mixture_scores(critic, regions, sentence, memory)), [regions, sentence, *critic.parameters()]
        return make

    def cta(B, W, N):
        regions, words, mask = vectors(B, N, 64), vectors(B, W, 64), torch.ones(B, W, dtype=torch.bool)
        return lambda: token_alignment_loss(regions, words, mask, 0.1), [regions, words]

    return {"gloria": (gloria(None), lambda B, W, N: B * B * W * N), "gloria, 64 MB": (gloria(64), lambda B, W, N: B * B * W * N),
            "local-mi": (judged(None, False), lambda B, W, N: B * (B + N)), "local-mi, 16 MB": (judged(16, False), lambda B, W, N: B * (B + N)),
            "local-mi, negatives' best regions, 16 MB": (judged(16, True), lambda B, W, N: B * B * N),
            "mixture-mi": (mixture(None), lambda B, W, N: B * B * N), "mixture-mi, 1 MB": (mixture(1), lambda B, W, N: B * B * N), "mgca, tokens": (cta, lambda B, W, N: B * N * (N + 2 * W) + B * W * W)}


def growth(repeats: int) -> Iterator[dict]:
    "One line an objective and axis: slopes of time and of memory."
    for name, (make, scores) in objectives().items():
        for axis, values in AXES.items():
            if axis == "words" and name.split(",")[0] not in ("gloria", "mgca"):
                continue
            sizes, works = [], []
            for value in values:
                shape = USUAL | {axis: value}
                torch.manual_seed(0)
                loss, leaves = make(*shape.values())
                sizes.append(scores(*shape.values()))
                works.append(lambda loss=loss, leaves=leaves: torch.autograd.grad(loss(), leaves))
            spent = [median(column) for column in zip(*([seconds(work) for work in works] for _ in range(repeats)))]
            held = [memory(work) for work in works]
            slopes = {of: float(np.polyfit(np.log(sizes), np.log(found), 1)[0]) for of, found in (("time", spent), ("memory", held))}
            yield {"what": "objective", "name": name, "axis": axis, "scores": f"{sizes[0]}-{sizes[-1]}", "slope of time": slopes["time"], "slope of memory": slopes["memory"],
                   "ms, largest": 1000 * spent[-1], "MB, largest": held[-1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    asked, lines = parser.parse_args(), []
    torch.set_num_threads(1)
    for part in (encoders(), growth(asked.repeats)):
        for line in part:
            lines.append(line)
            pd.DataFrame(lines).round(3).to_csv(asked.out, index=False)
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}, flush=True)
    noted = {"pairs": [SMALL, LARGE, TIMED, CHUNK], "repeats": asked.repeats, "CPU seconds": round(time.process_time()), **describe_machine()}
    asked.out.with_suffix(".json").write_text(json.dumps(noted, indent=1) + "\n")
