"""Does training in bfloat16 (autocast) learn what training in single precision learns? Per method: last losses, probe in both, and whether that of bf16 lies in the interval of the other.

`python benchmarks/bf16.py --out benchmarks/bf16.csv` makes a phantom and trains each method twice for a few epochs; on a GPU where there is one."""
import argparse
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import json  # noqa: E402
import time  # noqa: E402
from itertools import product  # noqa: E402
from pathlib import Path  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402

import pandas as pd  # noqa: E402

from medvis.core.machine import describe_machine  # noqa: E402
from medvis.data.pack import Pack  # noqa: E402
from medvis.data.prepare import PhantomConfig, prepare_phantom  # noqa: E402
from medvis.evaluate import linear_probe  # noqa: E402
from medvis.methods.settings import SETTINGS  # noqa: E402
from medvis.train import Run, create_method, fit  # noqa: E402

METHODS = tuple(SETTINGS)


def trained(name: str, precision: str, data: Pack, folder: Path, epochs: int, seed: int) -> tuple[Run, float]:
    "The run of a method from the first weights of a seed, and its processor seconds."
    start = time.process_time()
    run = fit(create_method(name, "tiny", data, seed=seed), data, folder, epochs=epochs, seed=seed, precision=precision, progress=False)
    return run, time.process_time() - start


def compare(name: str, data: Pack, folder: Path, epochs: int, seed: int) -> dict[str, object]:
    "One line of the table."
    line, runs = {"method": name, "seed": seed}, {}
    for precision in ("no", "bf16"):
        runs[precision], seconds = trained(name, precision, data, folder / f"{name}-{seed}-{precision}", epochs, seed)
        losses = runs[precision].metrics.query("split == 'train'").loss
        line |= {f"{precision} first loss": losses.iloc[0], f"{precision} last losses": losses[-5:].mean(), f"{precision} seconds": seconds, "steps": len(losses)}
    table = linear_probe(runs, data, (1.0,), out=folder / f"{name}-{seed}-probe", cache=folder / "features")
    macro = table[table["finding"] == "macro"].set_index("encoder")
    single, half = macro.loc["no"], macro.loc["bf16"]
    return line | {"no probe": single.auroc, "low": single.low, "high": single.high, "bf16 probe": half.auroc, "within": bool(single.low <= half.auroc <= single.high)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    asked, lines = parser.parse_args(), []
    with TemporaryDirectory() as room:
        pack = prepare_phantom(PhantomConfig(out=Path(room, "pack"), studies=asked.studies, size=64, seed=3, progress=False))
        for method, seed in product(asked.methods, asked.seeds):
            lines.append(compare(method, pack, Path(room), asked.epochs, seed))
            pd.DataFrame(lines).round(4).to_csv(asked.out, index=False)
            print(lines[-1], flush=True)
        about = {"data": pack.manifest["hash"], "studies": asked.studies, "epochs": asked.epochs, **describe_machine()}
    asked.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
