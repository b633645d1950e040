"""Does a training process grow? `python benchmarks/memory.py --out benchmarks/memory.csv` trains ConVIRT, preset tiny, on small phantoms for 2 000 steps and notes the memory that the process holds (some three minutes)."""
from tables import arguments, keep  # isort: skip

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from medvis.testing import small_phantom
from medvis.train import create_method, fit, loop

PAGE = 4096 / 2**20


def held() -> float:
    "Resident memory of this process, MB."
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def watch(steps: int) -> list[tuple[int, float]]:
    "Step and memory, every twentieth of a training; checkpoints, validation and diagnostics are as always."
    seen, optimise, count = [], loop._optimise, [0]

    def counted(*given, **more):
        count[0] += 1
        if count[0] % max(steps // 20, 1) == 0:
            seen.append((count[0], held()))
        return optimise(*given, **more)

    pack = small_phantom(200, 64)
    rows = int((pack.studies["split"] == "train").sum())
    method = create_method("convirt", "tiny", pack, hidden=32, dim=16)
    loop._optimise = counted
    try:
        with tempfile.TemporaryDirectory() as place:
            fit(method, pack, Path(place) / "run", epochs=-(-steps // (rows // 8)), batch_size=8, progress=False, device="cpu")
    finally:
        loop._optimise = optimise
    return seen


def measure(steps: int) -> Iterator[dict]:
    start = time.process_time()
    seen = watch(steps)
    first = next(memory for step, memory in seen if step >= steps // 4)
    for step, memory in seen:
        yield {"step": step, "memory, MB": memory, "against a quarter of the way": memory / first}
    late = np.array([pair for pair in seen if pair[0] >= steps // 4])
    print(f"{np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000:+.2f} MB per 1 000 steps after the first quarter; {time.process_time() - start:.0f} s of one thread")


if __name__ == "__main__":
    asked = arguments(__doc__, steps=2000)
    torch.set_num_threads(1)
    keep(measure(asked.steps), asked.out, steps=asked.steps)
