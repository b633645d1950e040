"""A study whose cells take no time, for workers of other processes: they import it by name."""
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medvis.studies import Study


def measure(cell, settings, folder):
    "A number of its own for each cell; a cell called slow waits, the first time, for somebody to kill it."
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{cell.task}.visits", "a") as file:
        file.write(f"{os.getpid()}\n")
    if settings.get("waits") and len((folder / f"{cell.task}.visits").read_text().split()) == 1:
        time.sleep(120)
        raise TimeoutError("nobody killed this worker")
    value = np.random.default_rng(cell.seed).normal() + settings["shift"]
    return pd.DataFrame({"measure": ["value", "threads"], "value": [value, float(torch.get_num_threads())]})


def make(out: Path, packs=None, scale="paper", waits: bool = False, **changes) -> Study:
    variants = {"a": {"shift": 0.0}, "b": {"shift": 1.0}, **({"slow": {"shift": 2.0, "waits": True}} if waits else {})}
    return Study("toy", out, measure, **{"variants": variants, "seeds": (0, 1), "tasks": ("first", "second"), **changes})


def visits(study: Study) -> dict[str, list[int]]:
    "Cell -> process ids of those who began to fill it."
    found = (study.out / "work").rglob("*.visits")
    return {f"{path.parent.name}-{path.stem}": [int(pid) for pid in path.read_text().split()] for path in found}
