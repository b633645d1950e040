"""Do 1, 2 and 4 processes make the same step of the same batch, and what does it cost?

`python benchmarks/processes.py --out benchmarks/processes.csv`: preset tiny, gloo, processes forked on this machine, the same batch shared out. Time of a step is the wall clock between barriers, and the
processor time of all processes; equality is that of the loss and the largest gradient in float64, encoders without dropout and batch statistics."""
from tables import arguments, keep  # isort: skip

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from steps import SENTENCES
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from medvis.methods import METHODS
from medvis.methods.method import Method, phantom_tokenizer
from medvis.testing import tiny_batch
from medvis.train import TrainConfig, loop
from medvis.train.processes import make_accelerator

METHODS_SHOWN = ("convirt", "clip", "lovt", "mgca", "local-mi", "gloria", "mixture-mi")


def make(name: str, words) -> Method:
    torch.manual_seed(0)
    method = METHODS.find(name).from_preset("tiny", words).double()
    method.start_run(10)
    method.start_epoch(1)
    method.train()
    for encoder in (method.image_encoder, method.text_encoder):
        encoder.eval()
    return method


def share(method: Method, samples: int):
    "The rows of this process, in double precision."
    from dataclasses import fields

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    batch = tiny_batch(method, [SENTENCES[: 1 + row % 6] for row in range(samples)], list(range(samples)))
    rows = torch.arange(samples).tensor_split(world)[rank]

    def taken(value):
        if isinstance(value, torch.Tensor):
            return value[rows].double() if value.is_floating_point() else value[rows]
        if isinstance(value, dict):
            return {key: taken(part) for key, part in value.items()}
        return [value[row] for row in rows] if isinstance(value, list) and value else value

    return type(batch)(**{field.name: taken(getattr(batch, field.name)) for field in fields(batch)})


def work(out: Path, names: tuple[str, ...], samples: int, repeats: int) -> None:
    "In each process: the steps of every method."
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator, found = make_accelerator(TrainConfig(run=out, device="cpu"), unused_parameters=True), {}
    words = phantom_tokenizer(60)
    for name in names:
        method = make(name, words)
        batch, network, spent = share(method, samples), accelerator.prepare(method), []
        for _ in range(repeats + 1):
            network.zero_grad()
            accelerator.wait_for_everyone()
            wall, cpu = time.perf_counter(), time.process_time()
            losses = loop._learn(network, batch, accelerator, 5, 1, None if accelerator.num_processes > 1 else 1.0)
            spent.append((time.perf_counter() - wall, time.process_time() - cpu))
        wall, cpu = (torch.tensor([median(values)], dtype=torch.float64) for values in zip(*spent[1:]))
        if dist.is_initialized():
            dist.all_reduce(cpu)
        gradients = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
        found[name] = {"wall": wall.item(), "cpu": cpu.item(), "loss": losses.total.item(), "gradients": gradients}
    if accelerator.is_main_process:
        torch.save(found, out / "found.pt")


def launch(count: int, *given) -> None:
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    if count == 1:
        work(*given)
        return
    config = LaunchConfig(1, 1, count, run_id="benchmark", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork")
    elastic_launch(config, work)(*given)


def measure(names: tuple[str, ...], counts: tuple[int, ...], samples: int, repeats: int) -> Iterator[dict]:
    "One line a method and number of processes."
    answers = {}
    for count in counts:
        out = Path(tempfile.mkdtemp())
        process = multiprocessing.get_context("fork").Process(target=launch, args=(count, out, names, samples, repeats))
        process.start()
        process.join()
        answers[count] = torch.load(out / "found.pt")
    for name in names:
        one = answers[counts[0]][name]
        largest = max(float(gradient.abs().max()) for gradient in one["gradients"].values())
        for count in counts:
            this = answers[count][name]
            apart = max(float((this["gradients"][key] - gradient).abs().max()) for key, gradient in one["gradients"].items())
            yield {"method": name, "processes": count, "batch": samples, "wall, ms a step": 1000 * this["wall"], "processor, ms a step": 1000 * this["cpu"],
                   "loss apart": abs(this["loss"] - one["loss"]) / abs(one["loss"]), "gradients apart": apart / largest}


if __name__ == "__main__":
    asked = arguments(__doc__, methods=METHODS_SHOWN, counts=(1, 2, 4), samples=32, repeats=5)
    keep(measure(tuple(asked.methods), tuple(asked.counts), asked.samples, asked.repeats), asked.out, samples=asked.samples, repeats=asked.repeats)
