"""Calibrate and time the leak guard: how many altered copies are found, and how alike different radiographs get.

`python benchmarks/leaks.py --images images.csv [--share 0.3]`: a table with columns image_path (relative to it), patient_id, split_group and width; without it, phantoms of 256 pixels.
`python benchmarks/leaks.py --images images.csv --time 217000 27000`: what each stage takes on one core, and what that comes to for Packs of these sizes.
"""
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import argparse  # noqa: E402
import io  # noqa: E402
import resource  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

from medvis.data import leaks  # noqa: E402
from medvis.data.images import read_image, to_square  # noqa: E402
from medvis.data.phantom import Phantom  # noqa: E402

SIZE = 256


def picture(change: Callable[[Image.Image], Image.Image]) -> Callable:
    "A change of a Pillow image as one of an array."
    return lambda image, random: np.asarray(change(Image.fromarray(image)).convert("L"))


def jpeg(quality: int) -> Callable:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)
    return picture(change)


def shrink(share: float, by: Image.Resampling) -> Callable:
    return picture(lambda image: image.resize((max(32, round(image.width * share)), max(32, round(image.height * share))), by))


def gamma(power: float) -> Callable:
    return lambda image, random: (255 * (image / 255.0) ** power).round().astype(np.uint8)


def window(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    low, high = np.percentile(image, [10, 95])
    return (255 * ((image - low) / max(high - low, 1)).clip(0, 1)).astype(np.uint8)


def pad(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    height, width = image.shape
    return np.pad(image, ((height // 10, height // 10), (width // 5, width // 20)))


def crop(share: float, centre: bool = False) -> Callable:
    def change(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        height, width = (round(side * share) for side in image.shape)
        top, left = ((whole - part) // 2 if centre else random.integers(0, whole - part + 1)
                     for whole, part in zip(image.shape, (height, width), strict=True))
        return image[top:top + height, left:left + width]
    return change


def centre_square(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    side = min(image.shape)
    top, left = ((whole - side) // 2 for whole in image.shape)
    return image[top:top + side, left:left + side]


def chain(*changes: Callable) -> Callable:
    def change(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        for one in changes:
            image = one(image, random)
        return image
    return change


CHANGES = {
    "none": lambda image, random: image, "JPEG 30": jpeg(30), "JPEG 10": jpeg(10), "half, Lanczos": shrink(1 / 2, Image.Resampling.LANCZOS),
    "half, nearest": shrink(1 / 2, Image.Resampling.NEAREST), "quarter, box": shrink(1 / 4, Image.Resampling.BOX), "gamma 0.5": gamma(0.5), "gamma 2": gamma(2.0), "equalised": picture(ImageOps.equalize),
    "window 10-95 %": window, "inverted": picture(ImageOps.invert), "padded": pad, "stretched": None, "centre square": centre_square,
    "crop 95 %": crop(0.95), "crop 90 %": crop(0.9), "crop 85 %": crop(0.85), "crop 80 %": crop(0.8), "centre 90 %": crop(0.9, True), "centre 80 %": crop(0.8, True),
    "equalised, crop 95 %, JPEG 50": chain(picture(ImageOps.equalize), crop(0.95), jpeg(50)), "gamma 2, inverted, padded": chain(gamma(2.0), picture(ImageOps.invert), pad),
}


def read(table: Path | None, share: float) -> tuple[pd.DataFrame, list[np.ndarray]]:
    "The images, and patient, group and width of each."
    if table is None:
        studies = [Phantom(SIZE, seed=11)[index] for index in range(round(600 * share))]
        return pd.DataFrame({"patient_id": [study.patient_id for study in studies], "group": [study.patient_id for study in studies], "width": SIZE}), [study.image for study in studies]
    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    rows = rows.assign(group=rows.split_group, width=rows.width.astype(int))
    return rows, [read_image(table.parent / path) for path in rows.image_path]


def without_threshold(a: leaks.Prints, b: leaks.Prints) -> pd.DataFrame:
    "Near duplicates with whatever correlation the close look finds: columns row_a, row_b, distance."
    same, leaks.SAME = leaks.SAME, -1.0
    try:
        return leaks.near_duplicates(a, b)
    finally:
        leaks.SAME = same


def different(rows: pd.DataFrame, pixels: np.ndarray) -> None:
    "How alike the most alike pairs get: of one patient (or group), of two."
    prints = leaks.take_prints(pixels, np.arange(len(pixels)))
    start = time.perf_counter()
    pairs = without_threshold(prints, prints)
    pairs = pairs[pairs.row_a < pairs.row_b]
    print(f"\n{len(pixels) * (len(pixels) - 1) // 2} pairs of images compared in {time.perf_counter() - start:.0f} s; most alike, as correlation (same from {leaks.SAME}):")
    group, small = rows.group.to_numpy(), rows.width.to_numpy() < 128
    one = group[pairs.row_a] == group[pairs.row_b]
    tiny = small[pairs.row_a] & small[pairs.row_b]
    for name, chosen in (("one patient", one & ~tiny), ("one patient, 64 pixels", one & tiny), ("two patients", ~one & ~tiny), ("two patients, 64 pixels", ~one & tiny)):
        best = pairs[chosen].nsmallest(14, "distance")
        print(f"  {name:24s} {int(chosen.sum()):5d} looked at closely, {int((pairs[chosen].distance <= 1 - leaks.SAME).sum()):3d} called the same: ", " ".join(f"{1 - d:.3f}" for d in best.distance))
        if "image_path" in rows:
            for pair in best[best.distance <= 1 - leaks.SAME].itertuples():
                print(f"    {1 - pair.distance:.3f} {rows.image_path[pair.row_a]} = {rows.image_path[pair.row_b]}")


def changed(images: list[np.ndarray], pixels: np.ndarray, chosen: np.ndarray, what: str) -> None:
    "The share of images that are found again after each change, and how often another image is named."
    base = leaks.take_prints(pixels, np.arange(len(pixels)))
    twins = without_threshold(base, base)
    twins = set(zip(twins.row_a[twins.distance < 1 - leaks.SAME], twins.row_b[twins.distance < 1 - leaks.SAME], strict=True))
    print(f"\n{len(chosen)} of {len(pixels)} images, {what}, changed, squared to {SIZE} pixels, and looked for among all; quantiles of the correlation of those that a hash proposed")
    print(f"{'change':32s}  proposed   found    1 %    5 %   50 %   others named (not twins)")
    for name, change in CHANGES.items():
        random = np.random.default_rng(0)
        squares = np.stack([to_square(images[i] if change is None else change(images[i], random), SIZE, "pad" if change else "stretch") for i in chosen])
        pairs = without_threshold(base, leaks.take_prints(squares, np.arange(len(squares))))
        right = pairs.row_a.to_numpy() == chosen[pairs.row_b]
        same = pairs.distance.to_numpy() <= 1 - leaks.SAME
        wrong = sum((a, b) not in twins for a, b in zip(pairs.row_a[same & ~right], chosen[pairs.row_b[same & ~right]], strict=True))
        low, fifth, middle = np.percentile(1 - pairs.distance[right], [1, 5, 50]) if right.any() else (np.nan,) * 3
        print(f"{name:32s}  {right.sum() / len(chosen):7.3f}  {(right & same).sum() / len(chosen):6.3f}  {low:5.2f}  {fifth:5.2f}  {middle:5.2f}   {wrong}", flush=True)


def timing(pixels: np.ndarray, many: int, few: int) -> None:
    "The three stages on these images, and what they come to for two Packs of other sizes."
    start = time.process_time()
    prints = leaks.take_prints(pixels, np.arange(len(pixels)))
    each = (time.process_time() - start) / len(pixels)
    candidates = np.concatenate(list(leaks._candidates(prints, prints)))
    candidates = candidates[candidates[:, 0] != candidates[:, 1]]
    rate, start = len(candidates) / len(pixels) ** 2, time.process_time()
    for first in range(0, len(candidates), 1024):
        leaks._look(prints, prints, candidates[first:first + 1024])
    look = (time.process_time() - start) / max(len(candidates), 1)
    hashes, random = np.ascontiguousarray(np.tile(prints.hashes[0], 12)[:, :16384]), np.random.default_rng(0)
    noise = np.bitwise_and.reduce(random.integers(0, 2**64, (3, *hashes.shape), dtype=np.uint64))      # one bit of eight turned over: no pair is the same
    others, start = hashes ^ noise, time.process_time()
    for row in range(0, 2048, 64):
        for column in range(0, 16384, 8192):
            leaks._close(hashes[:, row:row + 64], others[:, column:column + 8192])
    close, pairs = (time.process_time() - start) / 2048 / hashes.shape[1], many * few
    views = 2 * len(prints.hashes) - 1
    print(f"\nprints {1000 * each:.2f} ms an image; hashes {1e9 * close:.2f} ns a pair of views; {rate:.1e} candidates a pair, {1000 * look:.2f} ms each; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB"
          f"\n{many} x {few}: prints {each * (many + few) / 60:.1f} min, {views} pairs of views {views * close * pairs / 60:.1f} min, candidates {rate * look * pairs / 60:.1f} min; "
          f"prints take {(many + few) * (32 * 32 + prints.hashes.nbytes // len(pixels) + prints.parts.nbytes // len(pixels)) / 2**20:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=None)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--time", type=int, nargs=2, default=None, metavar=("MANY", "FEW"))
    options = parser.parse_args()
    rows, images = read(options.images, options.share)
    pixels = np.stack([to_square(image, SIZE) for image in images])
    if options.time:
        timing(pixels, *options.time)
    else:
        different(rows, pixels)
        for small in (False, True):
            rest = np.flatnonzero((rows.width < 128) == small)
            if len(rest):
                changed(images, pixels, np.sort(np.random.default_rng(1).choice(rest, round(options.share * len(rest)), replace=False)),
                        "64 pixels wide" if small else "larger than 128 pixels")
