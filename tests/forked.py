"""Processes that train together, forked from this one: none of them has to import anything."""
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FORK = multiprocessing.get_context("fork")


def _begin(work: Callable, *args) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)     # of what was trained before the fork
    work(*args)


def _launch(said: Path, count: int, work: Callable, *args) -> None:
    "What torchrun does, but that its processes are forked."
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
    torch.set_num_threads(1)
    config = LaunchConfig(1, 1, count, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork")
    elastic_launch(config, _begin)(work, *args)


def work_together(said: Path, count: int, work: Callable, *args, ends: bool = True, seconds: float = 150) -> str:
    "What so many processes print that all do this work; they end by themselves, and well if `ends`."
    launcher = FORK.Process(target=_launch, args=(said, count, work, *args))
    launcher.start()
    launcher.join(seconds)
    launcher.terminate()        # if it hangs
    launcher.join(30)
    assert launcher.exitcode == (0 if ends else 1), launcher.exitcode
    return said.read_text()
