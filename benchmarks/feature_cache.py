"""What keeping the features of a frozen encoder saves: one protocol (4 learning rates on one run, then 3 runs) with and without it, side by side.

`python benchmarks/feature_cache.py` runs the tiny encoder; `--image resnet50 --size 224` a full-size one (hours on a CPU). The predictions must be the same."""
import argparse
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import json  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from medvis.data.prepare import PhantomConfig, prepare_phantom  # noqa: E402
from medvis.data.tasks import phantom_task  # noqa: E402
from medvis.encoders.image import image_encoder  # noqa: E402
from medvis.evaluate.predictions import load_predictions  # noqa: E402
from medvis.evaluate.protocol import PROTOCOLS, run_protocol  # noqa: E402


def compare(image: str, size: int, studies: int, epochs: int, heads: list[str]) -> dict[str, dict[str, float]]:
    "CPU seconds with and without the cache, and their ratio, for each protocol."
    found, folder = {}, Path(tempfile.mkdtemp())
    pack = prepare_phantom(PhantomConfig(folder / "phantom", studies=studies, size=size, progress=False))
    tasks = {"tiny-linear": phantom_task(pack, "labels", progress=False), "tiny-seg-linear": phantom_task(pack, "masks", ["Pleural Effusion"], progress=False)}
    torch.manual_seed(0)
    encoder = image_encoder(image, size=size, crop=1.0).eval()
    for name in heads:
        protocol = replace(PROTOCOLS[name], lrs=(1e-1, 3e-2, 1e-2, 3e-3), seeds=(0, 1, 2), fractions=(1.0,), epochs=epochs, patience=None)
        seconds, told = {}, {}
        for cache in (True, False):
            start = time.process_time()
            table = run_protocol({image: encoder}, tasks[name], protocol, folder / f"{name}-{cache}", cache=cache, progress=False)
            seconds["cached" if cache else "uncached"] = time.process_time() - start
            told[cache] = [load_predictions(folder / f"{name}-{cache}" / "runs" / run / "predictions.npz").predicted for run in table["run"].unique()]
        assert all(np.array_equal(*pair) for pair in zip(told[True], told[False], strict=True)), "the predictions differ"
        found[name] = {**seconds, "ratio": seconds["uncached"] / seconds["cached"]}
        print(f"{name} on {image} at {size} pixels, {studies} studies, 4 rates x 3 runs of {epochs} epochs: cached {seconds['cached']:.1f} s, "
              f"uncached {seconds['uncached']:.1f} s of CPU, {found[name]['ratio']:.1f} times; predictions equal to the last bit", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, value in (("image", "tiny_resnet"), ("size", 64), ("studies", 150), ("epochs", 20), ("out", "")):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--heads", nargs="+", default=["tiny-linear", "tiny-seg-linear"])
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = compare(**given)
    if out:
        Path(out).write_text(json.dumps(found, indent=1))
