"""The phantom draws what it drew: runs and tables are compared over years, so a study of one seed stays that study.

Pictures are kept as means of 4 x 4 pixels in `golden/phantom.npz`; the last bits of a float may round a pixel up or down, no more.
Write it anew, where the phantom is changed on purpose, with `python tests/test_phantom_pictures.py`."""
from pathlib import Path

import numpy as np
import pytest

from medvis.data.phantom import FINDINGS, Phantom

KEPT = Path(__file__).parent / "golden" / "phantom.npz"
STUDIES = 160


def blocks(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape
    return picture.astype(float).reshape(height // 4, 4, width // 4, 4).mean((1, 3))


def drawn() -> dict[str, np.ndarray]:
    studies = [Phantom(size=64, seed=0)[index] for index in range(STUDIES)]
    areas = [[sum(int(f.mask.sum()) for f in study.findings if f.name == name) for name in FINDINGS] for study in studies]
    return {"blocks": np.round(np.stack([blocks(study.image) for study in studies])).astype(np.uint8), "areas": np.array(areas, np.uint16),
            "text": np.array([sum(map(ord, study.report)) for study in studies], np.uint32)}


@pytest.fixture(scope="module")
def now() -> dict[str, np.ndarray]:
    return drawn()


@pytest.mark.parametrize("what, room", [("blocks", 1), ("areas", 4), ("text", 0)])
def test_the_phantom_is_what_it_was(what, room, now):
    with np.load(KEPT, allow_pickle=False) as kept:
        far = abs(now[what].astype(int) - kept[what].astype(int))
    far = far.reshape(len(far), -1).max(1)
    assert (far <= room).all(), f"studies {np.flatnonzero(far > room)[:9].tolist()} differ in their {what} by up to {far.max()}"


def test_every_finding_is_among_them(now):
    assert ((now["areas"] > 0).sum(0) >= 2).all(), dict(zip(FINDINGS, (now["areas"] > 0).sum(0).tolist()))


if __name__ == "__main__":
    np.savez_compressed(KEPT, **drawn())
