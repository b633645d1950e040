"""How does the time of the leak guard grow with the number of images, and does it find by bands what it finds pair by pair?

`python benchmarks/guard.py --images FOLDER ... --out benchmarks/guard.csv` (a quarter of an hour; without a folder of radiographs, phantoms). Synthetic images have the mean and the covariance of
the local contrast of those given, each near to one of them, so that hashes lie as near to each other as real ones; the table says how near. They are split 80/10/10, and every split is compared
with every other, all 31 pairs of views, in processor time of one thread."""
import argparse
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import json  # noqa: E402
import resource  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from itertools import combinations  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from medvis.core.machine import describe_machine  # noqa: E402
from medvis.data import leaks  # noqa: E402
from medvis.data.images import read_image, to_square  # noqa: E402
from medvis.data.phantom import Phantom  # noqa: E402

SIZE = 128  # side of the images
OWN, TYPICAL = 0.5, 0.45  # share of a synthetic image's variance that is its own, not that of the one it is near to; how much images differ in how far they are from the mean
ENDINGS = (".png", ".jpg", ".jpeg")


def read_images(folders: Sequence[Path]) -> np.ndarray:
    "(n, SIZE, SIZE) uint8: all pictures below some folders, or 1 000 phantoms."
    if not folders:
        phantom = Phantom(SIZE, seed=3)
        return np.stack([phantom[number].image for number in range(1000)])
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix.lower() in ENDINGS]
    return np.stack([to_square(read_image(file), SIZE) for file in files])


def synthesise(real: leaks.Prints, count: int, views: int = 15, seed: int = 0) -> leaks.Prints:
    "Prints of `count` images that do not exist; they have hashes of the whole and of so many views, and neither thumbnails nor pixels."
    detail, random = leaks._detail(real.thumbnails).reshape(len(real.rows), -1), np.random.default_rng(seed)
    mean = detail.mean(0)
    spread = np.linalg.svd(detail - mean, full_matrices=False)[1:]
    spread = (spread[0] / np.sqrt(len(detail)))[:, None] * spread[1]
    aspects, hashes = np.ones(256), []
    for start in range(0, count, 256):
        noise = random.standard_normal((256, len(spread)), np.float32) @ spread
        near = (detail - mean)[random.integers(len(detail), size=256)]
        far = np.exp(TYPICAL * random.standard_normal((256, 1)))
        some = (mean + far * (np.sqrt(1 - OWN) * near + np.sqrt(OWN) * noise)).reshape(-1, 32, 32).astype(np.float32)
        parts = leaks._parts(aspects)[[0, *np.arange(1, 16)[::-1][:views]]]
        hashes.append(np.stack([leaks._difference_hash(some, part) for part in parts]).swapaxes(1, 2))
    hashes = np.ascontiguousarray(np.concatenate(hashes, axis=2)[..., :count])
    return leaks.Prints(real.pixels, np.arange(count), np.empty((count, 0)), np.empty((0, count, 4)), hashes)


def part(prints: leaks.Prints, chosen: slice) -> leaks.Prints:
    return leaks.Prints(prints.pixels, prints.rows[chosen], prints.thumbnails[chosen], prints.parts[:, chosen], np.ascontiguousarray(prints.hashes[..., chosen]))


def compare(prints: leaks.Prints, count: int, plain: int | None = None) -> tuple[float, int]:
    "Seconds and candidates of `count` images in three splits, as the guard does it, or with every pair compared up to `plain`."
    ends = [0, round(0.8 * count), round(0.9 * count), count]
    splits = [part(prints, slice(low, high)) for low, high in zip(ends, ends[1:])]
    usual, leaks._PLAIN = leaks._PLAIN, leaks._PLAIN if plain is None else plain
    try:
        start = time.process_time()
        found = sum(len(some) for a, b in combinations(splits, 2) for some in leaks._candidates(a, b))
        of_all = 31 / (2 * len(prints.hashes) - 1)
        return (time.process_time() - start) * of_all, round(found * of_all)
    finally:
        leaks._PLAIN = usual


def apart(hashes: np.ndarray) -> dict[str, float]:
    "Quantiles of the bits in which the hashes of two images differ."
    random = np.random.default_rng(0)
    i, j = random.integers(hashes.shape[1], size=(2, 1_000_000))
    bits = np.bitwise_count(hashes[:, i[i != j]] ^ hashes[:, j[i != j]]).sum(0)
    return {f"{100 * share:g} %": float(np.quantile(bits, share)) for share in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5)}


def both_ways(real: leaks.Prints) -> dict:
    "What is proposed and found among real images, pair by pair and by bands."
    answers, usual = {}, leaks._PLAIN
    for name, plain in (("pair by pair", 10**9), ("by bands", 0)):
        leaks._PLAIN = plain
        proposed = {tuple(row) for some in leaks._candidates(real, real) for row in some.tolist() if row[0] < row[1]}
        found = leaks.near_duplicates(real, real)
        answers[name] = proposed, {(row.row_a, row.row_b) for row in found.itertuples() if row.row_a < row.row_b}
    leaks._PLAIN = usual
    (every, found), (some, found_too) = answers.values()
    bits = {row: int(np.bitwise_count(real.hashes[row[2], :, row[0]] ^ real.hashes[row[3], :, row[1]]).sum()) for row in every}
    bits = {row: min(value, leaks._BITS - value) for row, value in bits.items()}
    recall = {}
    for low, high in ((0, 15), (16, 20), (21, 23), (24, 26)):
        of = [row for row, value in bits.items() if low <= value <= high]
        recall[f"{low} to {high} bits apart"] = {"proposed pair by pair": len(of), "by bands": len(some.intersection(of))}
    return {"images": len(real.rows), "found pair by pair": len(found), "found by bands": len(found & found_too), "found by bands only": len(found_too - found), "proposed": recall}


def looks(real: leaks.Prints) -> dict[str, float]:
    "Milliseconds of a pair that is laid upon each other, on 32 pixels of memory and on 64 of the images, and how many of each there are among real images."
    candidates = np.concatenate(list(leaks._candidates(real, real)))
    candidates = candidates[candidates[:, 0] < candidates[:, 1]]
    start = time.process_time()
    near = leaks._most_alike(leaks._best([leaks._look(real, real, candidates[first : first + 256]) for first in range(0, len(candidates), 256)]))
    first, start = time.process_time() - start, time.process_time()
    for some in range(0, len(near), 256):
        leaks._look_closely(real, real, near[some : some + 256])
    return {"candidates": len(candidates), "ms each": 1000 * first / len(candidates), "closely": len(near), "ms each, closely": 1000 * (time.process_time() - start) / max(len(near), 1)}


def measure(real: leaks.Prints, counts: Sequence[int], most_plain: int, views: int, repeats: int) -> Iterator[dict[str, float]]:
    "One line a number of images."
    prints, before, first = synthesise(real, max(counts), views), None, None
    print("bits apart, real", apart(real.hashes[0]), "synthetic", apart(prints.hashes[0]), flush=True)
    for count in counts:
        seconds, found = (median(values) for values in zip(*(compare(prints, count) for _ in range(repeats))))
        line = {"images": count, "seconds": seconds, "candidates": found}
        for name, of in (("slope", "seconds"), ("slope of candidates", "candidates")):
            line[name] = np.log(line[of] / before[of]) / np.log(count / before["images"]) if before else np.nan
        first = first or line
        line["slope from the smallest"] = np.log(seconds / first["seconds"]) / np.log(count / first["images"]) if before else np.nan
        line["seconds, pair by pair"], line["candidates, pair by pair"] = compare(prints, count, 10**9) if count <= most_plain else (np.nan, np.nan)
        before = line
        yield line | {"peak memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="folders of radiographs")
    parser.add_argument("--counts", type=int, nargs="*", default=[25_000, 50_000, 100_000, 200_000, 400_000])
    parser.add_argument("--plain", type=int, default=50_000, help="the most images that are compared pair by pair too")
    parser.add_argument("--views", type=int, default=15, help="of 15 views, so many are compared with the whole; times and candidates are scaled up to 15")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    asked, lines = parser.parse_args(), []
    pixels = read_images(asked.images)
    start = time.process_time()
    real = leaks.take_prints(pixels, np.arange(len(pixels)))
    prints = 1000 * (time.process_time() - start) / len(pixels)
    found = both_ways(real)
    print(json.dumps(found), flush=True)
    laid = looks(real)
    print(json.dumps(laid), flush=True)
    for line in measure(real, asked.counts, asked.plain, asked.views, asked.repeats):
        lines.append(line)
        pd.DataFrame(lines).round(3).to_csv(asked.out, index=False)
        print(line, flush=True)
    told = {"prints, ms an image": prints, "real images": found, "laid upon each other": laid, "bits apart, real": apart(real.hashes[0]), "bits apart, synthetic": apart(synthesise(real, 20_000, 0).hashes[0]), "views": asked.views}
    asked.out.with_suffix(".json").write_text(json.dumps(told | describe_machine(), indent=1) + "\n")
