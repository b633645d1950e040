"""What every method learns at a preset: its loss, a linear probe beside its own network before training, retrieval in both directions, and processor seconds a step.

`python benchmarks/baselines.py --data PACK --runs runs --out baselines.csv` trains what is not trained yet (a killed run goes on), one line a method."""
import argparse
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import json  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import pandas as pd  # noqa: E402

from medvis.core.machine import describe_machine  # noqa: E402
from medvis.data.pack import Pack  # noqa: E402
from medvis.evaluate import linear_probe, paired_gain  # noqa: E402
from medvis.evaluate.retrieve import retrieve  # noqa: E402
from medvis.methods import list_methods, list_presets  # noqa: E402
from medvis.methods.settings import methods_with_text  # noqa: E402
from medvis.train import Run, TrainConfig, create_method, fit  # noqa: E402
from medvis.train.diagnostics import CollapseWarning  # noqa: E402

ENDS = 10  # steps that the loss is averaged over at the start and at the end
FRACTIONS = (0.01, 0.1, 1.0)


def steps_of(folder: Path) -> int:
    "Steps that are in a run's log; 0 if there is none."
    return int(Run(folder).metrics["step"].max()) if (folder / "metrics.jsonl").exists() else 0


def train(name: str, preset: str, data: Pack, runs: Path) -> tuple[Run, dict[str, float]]:
    "The run of a method; its steps, and of those made by this process the processor seconds of one and the warnings of collapse."
    before, start = steps_of(runs / name), time.process_time()
    method = create_method(name, preset, data, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(method, data, TrainConfig.of(method, runs / name, seed=0, progress=False))
    steps, seconds = steps_of(runs / name), time.process_time() - start
    collapsed = sum(issubclass(one.category, CollapseWarning) for one in caught)
    return run, {"steps": steps, "seconds a step": seconds / (steps - before) if steps > before else float("nan"), "collapse warnings": collapsed}


def losses(run: Run) -> dict[str, float]:
    "The mean loss of the first and the last steps, and of the first and the best validation."
    log = run.metrics
    steps, seen = (log["loss"][log["split"] == split] for split in ("train", "validate"))
    return {"first": steps[:ENDS].mean(), "last": steps[-ENDS:].mean(), "validated first": seen.iloc[0], "validated best": seen.min()}


def probed(run: Run, data: Pack, out: Path) -> dict[str, float]:
    "Macro AUROC at each share of labels, that of the same network before training, and the paired gain with its interval over patients."
    table = linear_probe({"run": run}, data, FRACTIONS, out=out, cache=out / "features")
    macro = table[table["finding"] == "macro"].set_index(["encoder", "fraction"])["auroc"]
    gains = paired_gain(pd.read_parquet(out / "predictions.parquet")).set_index("fraction")
    found = {}
    for share in FRACTIONS:
        gain, low, high = gains.loc[share, ["gain", "low", "high"]]
        here = {"": macro["run", share], "untrained": macro["random-init", share], "gain": gain, "low": low, "high": high}
        found |= {f"probe {share:.0%} {what}".strip(): value for what, value in here.items()}
    return found


def ranked(run: Run, data: Pack) -> dict[str, float]:
    "Median rank of the own report and of the own image, and what chance gives."
    table = retrieve(run, data, resamples=1)
    at = table[(table["relevant"] == "same study") & (table["metric"] == "median rank")].set_index("direction")
    ranks = {f"median rank {direction}": float(value) for direction, value in at["value"].items()}
    return ranks | {"rank by chance": float(at["chance"].iloc[0])}


def measure(name: str, preset: str, data: Pack, runs: Path) -> dict[str, object]:
    "One line of the table; from its file if it is there."
    file = runs / f"{name}.json"
    if not file.exists():
        run, spent = train(name, preset, data, runs)
        line = {"method": name, "preset": preset, **spent, **losses(run)}
        line |= probed(run, data, runs / f"{name}-probe") | (ranked(run, data) if name in methods_with_text() else {})
        file.write_text(json.dumps(line, indent=1, default=float))
    return json.loads(file.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--methods", nargs="+", default=None)
    asked = parser.parse_args()
    pack, lines = Pack(asked.data), []
    asked.runs.mkdir(parents=True, exist_ok=True)
    for method in asked.methods or [name for name in list_methods() if asked.preset in list_presets(name)]:
        lines.append(measure(method, asked.preset, pack, asked.runs))
        pd.DataFrame(lines).round(4).to_csv(asked.out, index=False)
        print(lines[-1], flush=True)
    asked.out.with_suffix(".json").write_text(json.dumps({"data": pack.manifest["hash"], "studies": len(pack.studies), "seed": 0, **describe_machine()}, indent=1) + "\n")
