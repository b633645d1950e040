"""How much of a batch of reports is padding, and what does a training step cost where texts of like length are read together, by fused attention?

`python benchmarks/text.py --out text.csv` counts for methods that read text, at the batch size and image of its preset `paper` with BERT-base, the share of tokens that is padding and the
floating-point operations of a step (exact, without computing them), as one padded batch and in runs. With `--old FOLDER`, a checkout of medvis as it was, steps of LoVT and MGCA are taken as well, here and there
in turn, in processor time of one thread. A checkout is made by `git worktree add FOLDER 3fc8b14`."""
import argparse
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from unittest import mock  # noqa: E402

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

from medvis.data.pairs import Batch, Sample, collate, tokenise  # noqa: E402
from medvis.data.phantom import Phantom  # noqa: E402
from medvis.encoders.text import train_tokenizer  # noqa: E402
from medvis.methods import METHODS  # noqa: E402
from medvis.methods.method import Method  # noqa: E402

COUNTED = ("convirt", "clip", "gloria", "lovt", "mgca", "global-mi", "local-mi", "mixture-mi")
STEPS = ("lovt", "mgca")
HERE = Path(__file__).resolve()


def said(count: int) -> list[list[str]]:
    "The sentences of this many phantom reports."
    phantom = Phantom(size=64, seed=0)
    return [[sentence.text for sentence in phantom[i].sentences] for i in range(count)]


def preset(name: str) -> str:
    "That of the paper; mixture-mi is in none."
    return "paper" if "paper" in METHODS.find(name).presets else "full"


def build(name: str, tokenizer) -> Method:
    "A method as its paper has it, with random weights."
    kind = METHODS.find(name)
    deep = {} if name.startswith("caption") else dict(text="bert-base")
    return kind.from_preset(preset(name), tokenizer, image_weights=None, **deep).train()


def batch_of(method: Method, size: int, reports: list[list[str]]) -> Batch:
    "A batch of noise with these reports, cut or chosen from as the method's recipe says."
    s, side, samples = method.sampling, method.preprocessing.size, []
    for i, sentences in enumerate(reports[:size]):
        sentences = sentences[i % len(sentences):][:1] if s.sentences == "one" else sentences
        report = tokenise(sentences, method.tokenizer, s.max_tokens, s.punctuation, s.overflow)
        samples.append(Sample(i, i, torch.zeros(method.preprocessing.channels, side, side), report))
    return collate(samples)


def padding(method: Method, batch: Batch, cost: float) -> tuple[float, int]:
    "Share of the tokens read that are padding, and the runs, where one more run costs this many tokens."
    from medvis.encoders import text as reading
    texts = batch.texts()
    if method.text_unit == "sentence" and method.sampling.sentences != "one":
        texts = reading.sentences_apart(method.tokenizer, texts)[0]
    kept, reading._RUN = reading._RUN, cost
    runs, reading._RUN = reading.reading_runs(texts[:, 1].sum(1)), kept
    return 1 - int(texts[:, 1].sum()) / sum(rows * width for rows, width in runs), len(runs)


class Operations(TorchDispatchMode):
    "Counts those of matrix products, convolutions and attention."
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, count = func(*args, **(kwargs or {})), flop_registry.get(func.overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def operations(name: str, tokenizer, size: int, reports: list[list[str]], cost: float) -> float:
    "Floating-point operations of a step, forward and backward, in 10^9 a pair; nothing is computed."
    from medvis.encoders import text as reading
    with torch.device("meta"):
        method = build(name, tokenizer)
    batch = batch_of(method, size, reports).to("meta")
    kept, reading._RUN = reading._RUN, cost
    plain = mock.patch("torch.autocast", lambda *_, **__: nullcontext())      # which there is not for tensors without numbers
    with plain, Operations() as counter:
        method(batch).total.backward()
    reading._RUN = kept
    return counter.total / size / 1e9


def counted(reports: list[list[str]], tokenizer, names: list[str]) -> Iterator[dict[str, object]]:
    "One line a method."
    for name in names:
        with torch.device("meta"):
            method = build(name, tokenizer)
        size = METHODS.find(name).presets[preset(name)][1].get("batch_size", 32)
        batch = batch_of(method, size, reports)
        (before, _), (after, runs) = (padding(method, batch, cost) for cost in (10 ** 9, 256))
        line = {"method": name, "batch": size, "padding": before, "in runs": after, "runs": runs}
        whole, cut = (operations(name, tokenizer, size, reports, cost) for cost in (10 ** 9, 256))
        yield line | {"GFLOP a pair": whole, "in runs, GFLOP a pair": cut, "step less, %": 100 * (1 - cut / whole)}


def take_steps(name: str, size: int) -> None:
    "Answer each line of the input by the processor time of a step, in seconds a pair."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reports = said(256)
    method = build(name, train_tokenizer(sentence for report in reports for sentence in report))
    method.start_epoch(1)
    batch = batch_of(method, size, reports)
    batch.image.normal_()
    for _ in sys.stdin:
        method.zero_grad()
        start = time.process_time()
        losses = method(batch)
        losses.total.backward()
        print((time.process_time() - start) / size, float(losses.total.detach()), flush=True)


def measured(old: Path, size: int, repeats: int) -> Iterator[dict[str, object]]:
    "Steps of the checkout and of this code in turn."
    for name in STEPS:
        order = [sys.executable, str(HERE), "--steps", name, "--batch", str(size)]
        sides = {side: subprocess.Popen(order, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}) for side, folder in (("before", old), ("now", HERE.parent.parent))}
        spent: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side, process in sides.items():
                process.stdin.write("\n")
                process.stdin.flush()
                spent[side].append(float(process.stdout.readline().split()[0]))
        for process in sides.values():
            process.stdin.close()
            process.wait()
        before, now = (median(spent[side]) for side in ("before", "now"))
        yield {"method": name, "batch": size, "before, s a pair": before, "now, s a pair": now, "less, %": 100 * (1 - now / before), "each": spent}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--old", type=Path, help="a checkout of medvis to compare with")
    parser.add_argument("--batch", type=int, default=16, help="pairs of a step that is taken")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=COUNTED, choices=COUNTED, help="those whose operations are counted")
    parser.add_argument("--steps", choices=STEPS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.steps:
        take_steps(asked.steps, asked.batch)
        raise SystemExit
    from medvis.core.machine import describe_machine
    lines, steps, reports = [], [], said(256)
    tokenizer = train_tokenizer(sentence for report in reports for sentence in report)
    for line in counted(reports, tokenizer, asked.methods):
        lines.append(line)
        pd.DataFrame(lines).round(3).to_csv(asked.out, index=False)
        print(line, flush=True)
    for line in measured(asked.old.resolve(), asked.batch, asked.repeats) if asked.old else ():
        steps.append(line)
        print(line, flush=True)
    asked.out.with_suffix(".json").write_text(json.dumps({"steps taken": steps, **describe_machine()}, indent=1) + "\n")
