"""What the benchmarks share: one thread, processor time, medians of interleaved repeats, and where tables go. Import it before torch."""
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402


def arguments(text: str | None, **defaults: Any) -> argparse.Namespace:
    "What was asked for: --out, and an option of each default."
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="table.csv; facts of the machine go beside it, as .json")
    for name, value in defaults.items():
        many = isinstance(value, (list, tuple))
        kind = type(value[0]) if many else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, **({"nargs": "*"} if many else {}))
    return parser.parse_args()


def keep(lines: Iterable[dict], out: Path, **facts: Any) -> None:
    "Write a table as its lines come, and print them; then what else was found, and the machine."
    import pandas as pd

    from medvis.core.machine import describe_machine

    kept: list[dict] = []
    for line in lines:
        kept.append(line)
        pd.DataFrame(kept).to_csv(out, index=False, float_format="%.6g")
        print(line, flush=True)
    out.with_suffix(".json").write_text(json.dumps(facts | describe_machine(), indent=1) + "\n")


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def side_by_side(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    "Median processor seconds of each, taken in turn so that a busy minute falls on all; the first round does not count."
    spent = [{name: cpu_seconds(work) for name, work in works.items()} for _ in range(repeats + 1)][1:]
    return {name: median(one[name] for one in spent) for name in works}


def command_seconds(argv: Sequence[str]) -> float:
    "Processor seconds of a command, with all processes that it starts and waits for."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
