"""What preparing costs and what it saves, side by side in one run: `python benchmarks/prepare.py` (about two minutes).

1. Images a second: `medvis prepare folder` with 0 and 2 workers, beside a plain one-process loop of Pillow that does nothing but decode, resize and pad.
2. Peak memory of preparing small films with reports, in three splits that the guard compares, at a tenth of `many` and at `many`.
3. Reading a random batch: from the Pack, beside decoding and resizing its JPEGs on the fly as the published loaders do (Pillow decode, area resize, pad: MGCA)."""
import argparse
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from medvis.data.pack import Pack  # noqa: E402
from medvis.data.phantom import Phantom  # noqa: E402

SIZE, BATCH = 256, 64
PREPARE = """
import sys, time
from medvis.data.sets.folder import FOLDER, _FolderConfig
from medvis.data.source import BuildConfig, prepare_source
if __name__ == "__main__":
    root, out, workers, size = sys.argv[1:]
    start = time.perf_counter()
    prepare_source(FOLDER, _FolderConfig(root, require_report=False), BuildConfig(out, size=int(size), workers=int(workers), progress=False))
    seconds = time.perf_counter() - start
    print(seconds, next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)   # ru_maxrss would be the parent's
"""


def write_radiographs(folder: Path, count: int, side: int) -> Path:
    "The folder, with `count` JPEGs of the phantom in it, blown up to `side` pixels, with noise of their own, and their table; all for training."
    folder.mkdir(parents=True)
    phantom, noise = Phantom(256), np.random.default_rng(0)
    films = [np.asarray(Image.fromarray(phantom[index].image).resize((side, side * 5 // 6), Image.Resampling.BICUBIC), np.int16) for index in range(16)]
    for number in range(count):
        film = films[number % 16] + noise.integers(-6, 7, (side * 5 // 6, side), np.int16)
        Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    pd.DataFrame({"image_path": [f"{number}.jpg" for number in range(count)], "patient_id": range(count), "split": "train"}).to_csv(folder / "table.csv", index=False)
    return folder


def write_studies(folder: Path, count: int) -> Path:
    "The folder, with `count` studies in it: a film of 64 pixels that is like no other, a report of the phantom (some eight sentences), and their table; a tenth validate and a tenth test."
    folder.mkdir(parents=True)
    reports, rows, noise = [Phantom(64)[number].report for number in range(50)], [], np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(noise.integers(0, 256, (10, 10), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        rows.append((f"{number}.png", number, {8: "validate", 9: "test"}.get(number % 10, "train"), reports[number % 50]))
    pd.DataFrame(rows, columns=["image_path", "patient_id", "split", "report"]).to_csv(folder / "table.csv", index=False)
    return folder


def decode(path: Path) -> np.ndarray:
    "What a published loader does for each image of each epoch: decode, grey, longer side to 256, pad."
    with Image.open(path) as picture:
        picture = picture.convert("L")
        scale = SIZE / max(picture.size)
        small = np.asarray(picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.BOX))
    square = np.zeros((SIZE, SIZE), np.uint8)
    top, left = (SIZE - small.shape[0]) // 2, (SIZE - small.shape[1]) // 2
    square[top:top + small.shape[0], left:left + small.shape[1]] = small
    return square


def prepare_apart(root: Path, out: Path, workers: int, size: int = SIZE) -> tuple[float, float]:
    "Seconds and peak memory (MB, of the main process) of preparing in a process of its own."
    script = out.with_suffix(".py")
    script.write_text(PREPARE)
    told = subprocess.run([sys.executable, script, root, out, str(workers), str(size)], capture_output=True, text=True, check=True).stdout.split()
    return float(told[-2]), float(told[-1])


def seconds_a_batch(read, batches: list[np.ndarray]) -> float:
    "Mean time of reading a batch."
    start = time.perf_counter()
    for rows in batches:
        read(rows)
    return (time.perf_counter() - start) / len(batches)


def compare(images: int, many: int) -> dict:
    "All three measurements."
    folder, found = Path(tempfile.mkdtemp()), {}
    for side in (512, 2000):
        root = write_radiographs(folder / str(side), images, side)
        paths = [root / f"{number}.jpg" for number in range(images)]
        start = time.perf_counter()
        for path in paths:
            decode(path)
        rates = {"plain Pillow loop": images / (time.perf_counter() - start)}
        for workers in (0, 2):
            rates[f"medvis, {workers} workers"] = images / prepare_apart(root, folder / f"pack-{side}-{workers}", workers)[0]
        pack = Pack(folder / f"pack-{side}-0")
        row = {int(name[:-4]): number for number, name in enumerate(pack.image_table["path"])}
        batches = [np.random.default_rng(seed).choice(images, min(BATCH, images), replace=False) for seed in range(5)]
        fly = seconds_a_batch(lambda rows: torch.from_numpy(np.stack([decode(paths[one]) for one in rows])), batches)
        packed = seconds_a_batch(lambda rows: torch.from_numpy(pack.images[[row[one] for one in rows]]), batches * 20)
        found[side] = {"images a second": rates, "ms a batch, on the fly": 1e3 * fly, "ms a batch, Pack": 1e3 * packed, "ratio": fly / packed}
        print(f"{side} px: " + ", ".join(f"{name} {rate:.0f} images/s" for name, rate in rates.items()) +
              f"; a batch of {len(batches[0])}: on the fly {1e3 * fly:.1f} ms, Pack {1e3 * packed:.2f} ms, {fly / packed:.0f} times", flush=True)
    memory = {}
    for count in (many // 10, many):
        memory[count] = prepare_apart(write_studies(folder / f"many-{count}", count), folder / f"many-pack-{count}", 0, 64)[1]
    found["peak memory, MB"] = memory
    print("peak memory: " + ", ".join(f"{count} images {megabytes:.0f} MB" for count, megabytes in memory.items()), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=200, help="of each size")
    parser.add_argument("--many", type=int, default=10000, help="images of the larger memory measurement")
    parser.add_argument("--out", default="", help="JSON file of the results")
    given = parser.parse_args()
    found = compare(given.images, given.many)
    if given.out:
        Path(given.out).write_text(json.dumps(found, indent=1))
