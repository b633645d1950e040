"""Time the phantom on one core: whole studies (picture, masks, report), first ones left out. Run it on a quiet machine: `python benchmarks/phantom.py`."""
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import time  # noqa: E402

import numpy as np  # noqa: E402

from medvis.data.phantom import Phantom  # noqa: E402


def milliseconds(size: int, studies: int, warm: int) -> np.ndarray:
    "Time of each of `studies` studies."
    phantom, times = Phantom(size), []
    for index in range(warm + studies):
        start = time.perf_counter()
        phantom[index]
        times.append(1000 * (time.perf_counter() - start))
    return np.array(times[warm:])


if __name__ == "__main__":
    for size, studies, warm in ((64, 2000, 300), (128, 400, 50), (256, 150, 50), (512, 40, 10)):
        times = milliseconds(size, studies, warm)
        low, median, high = np.percentile(times, (10, 50, 90))
        print(f"{size}²: minimum {times.min():.2f} ms, 10 % {low:.2f}, median {median:.2f}, mean {times.mean():.2f}, 90 % {high:.2f}")
