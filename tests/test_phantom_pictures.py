"""The phantom draws what it drew: runs and tables are compared over years, so a study of one seed stays that study.

Pictures are kept as means of 4 x 4 pixels in `golden/phantom.npz`; the last bits of a float may round a pixel up or down, no more.
Write it anew, where the phantom is changed on purpose, with `python tests/test_phantom_pictures.py`."""
from pathlib import Path

import numpy as np
import pytest

from medvis.data.phantom import FINDINGS, Phantom
from medvis.data.phantom.anatomy import Patient, Pose, attenuation, build_chest, expose, sample_patient, sample_pose, stream
from medvis.data.phantom.findings import STATES, _TUBES, Planted, paint, sample_findings, sample_state
from medvis.data.phantom.report import read_labels

KEPT = Path(__file__).parent / "golden" / "phantom.npz"
STUDIES = 160
LAYERS = ("wall", "below", "lung", "centre", "depth", "bone", "vessel", "extra")


def blocks(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape
    return picture.astype(float).reshape(height // 4, 4, width // 4, 4).mean((1, 3))


def drawn() -> dict[str, np.ndarray]:
    studies = [Phantom(size=64, seed=0)[index] for index in range(STUDIES)]
    areas = [[sum(int(f.mask.sum()) for f in study.findings if f.name == name) for name in FINDINGS] for study in studies]
    return {"blocks": np.round(np.stack([blocks(study.image) for study in studies])).astype(np.uint8), "areas": np.array(areas, np.uint16),
            "text": np.array([sum(map(ord, study.report)) for study in studies], np.uint32)}


def chests() -> dict[str, np.ndarray]:
    "What healthy chests are made of, and their exposures: the default body, and some that are drawn."
    bodies = [(Patient(), Pose()), *((sample_patient(stream(0, 0, k)), sample_pose(stream(0, 1, k), k % 2 == 1)) for k in range(7))]
    made = [build_chest(patient, pose, 64) for patient, pose in bodies]
    layers = np.stack([[blocks(getattr(chest, name)) for name in LAYERS] for chest in made])
    return {"layers": layers.clip(-9, 9).astype(np.float32), "exposed": np.stack([blocks(expose(attenuation(chest), chest.pose)) for chest in made]).round().astype(np.uint8)}


def sharp() -> np.ndarray:
    "A part of a large exposure, pixel by pixel: only there is the blur of the focus seen."
    pose = Pose(blur=0.0035, noise=0.03, border=(0.1, 0.0, 0.0, 0.0))
    return expose(attenuation(build_chest(Patient(), pose, 256)), pose)[16:96, 16:112]


def shapes() -> dict[str, np.ndarray]:
    "Every finding and every kind, in one body: what it adds, and its area."
    places = [(side, zone) for side in ("left", "right", "both") for zone in ("upper", "lower")]
    specs = [Planted(name, side, zone, 1 + k % 3) for name in FINDINGS[1:-1] for k, (side, zone) in enumerate(places)]
    specs += [Planted("Support Devices", side, zone, 1 + (zone == "upper"), kind=kind) for kind in _TUBES for side, zone in places[:3]]
    specs += [Planted("Foreign Object", "left", "upper", 3, kind=kind, angle=angle) for kind in ("button", "coin", "clip", "necklace", "bullet") for angle in (0, 0.7)]
    before, added, areas = attenuation(build_chest(Patient(), Pose(), 64)), [], []
    for spec in [Planted("Nodule"), Planted("Edema"), *specs]:
        chest = build_chest(Patient(), Pose(), 64)
        areas.append(paint(chest, spec).sum())
        added.append(blocks(attenuation(chest) - before))
    return {"added": np.array(added, np.float32), "area": np.array(areas, np.uint16)}


def placed(draws: int = 250) -> np.ndarray:
    "What patients of each state have, where, and how much of it: sums over the drawn."
    rows = []
    for number, state in enumerate(STATES):
        found = [spec for k in range(draws) for spec in sample_findings(stream(number, 7, k), state)]
        numbers = np.array([[FINDINGS.index(f.name), f.severity, f.down, f.out, f.extent, f.angle, f.key % 997, *(sum(map(ord, text)) for text in (f.side, f.zone, f.kind))] for f in found])
        rows.append([len(found), *numbers.sum(0), *np.bincount(numbers[:, 0].astype(int), minlength=len(FINDINGS))])
    drawn = [list(STATES).index(sample_state(stream(9, 7, k))) for k in range(4 * draws)]
    return np.array([[*row, count] for row, count in zip(rows, np.bincount(drawn, minlength=len(STATES)))], np.float64)


def labelled(studies: int = 60) -> np.ndarray:
    "What the reports say, of the present, the absent and the doubtful: 9 is not mentioned."
    said = [read_labels(Phantom(size=64, seed=2)[index].sentences) for index in range(studies)]
    return np.array([[9 if labels[name] is None else labels[name] for name in FINDINGS] for labels in said], np.int8)


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


def test_chests_are_what_they_were():
    with np.load(KEPT, allow_pickle=False) as kept:
        for name, found in chests().items():
            room = 1 if name == "exposed" else 2e-3
            assert abs(found.astype(float) - kept[name]).max() <= room, name


def test_the_large_are_as_sharp_as_they_were():
    with np.load(KEPT, allow_pickle=False) as kept:
        far = abs(sharp().astype(int) - kept["sharp"])
    assert far.max() <= 1 and (far > 0).mean() < 0.002


def test_findings_look_as_they_did():
    found = shapes()
    with np.load(KEPT, allow_pickle=False) as kept:
        assert abs(found["added"] - kept["added"]).max() <= 2e-3 and abs(found["area"].astype(int) - kept["area"]).max() <= 4


def test_patients_have_what_they_had():
    with np.load(KEPT, allow_pickle=False) as kept:
        np.testing.assert_allclose(placed(), kept["placed"], rtol=1e-6)


def test_reports_say_what_they_said():
    with np.load(KEPT, allow_pickle=False) as kept:
        assert (labelled() == kept["labels"]).all()
    assert {-1, 0, 1, 9} == set(np.unique(labelled(20)))


if __name__ == "__main__":
    np.savez_compressed(KEPT, **drawn(), **chests(), **shapes(), sharp=sharp(), placed=placed(), labels=labelled())
