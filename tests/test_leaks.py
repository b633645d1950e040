"""The leak guard beyond its notebook: properties, scale, awkward inputs."""
import re
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from medvis.data import leaks
from medvis.data.files import DataError
from medvis.data.phantom import Phantom

PHANTOMS = Phantom(size=128, seed=5)
PIXELS = np.stack([PHANTOMS[index].image for index in range(40)])


def table(count: int, splits: dict[str, int], prefix: str = "") -> pd.DataFrame:
    "One image a patient, splits one after another."
    return pd.DataFrame({"patient_id": [f"{prefix}p{row}" for row in range(count)], "split": [name for name, size in splits.items() for _ in range(size)],
                         "image_id": [f"{prefix}i{row}" for row in range(count)], "sha256": [f"{prefix}{row:060x}" for row in range(count)]})


def found(frame: pd.DataFrame) -> list[tuple]:
    return list(frame[["kind", "split_a", "item_a", "split_b", "item_b"]].itertuples(index=False, name=None))


def changed(image: np.ndarray, change: str) -> np.ndarray:
    picture = Image.fromarray(image)
    out = {"equalised": ImageOps.equalize, "inverted": ImageOps.invert, "larger": lambda p: p.resize((256, 256), Image.Resampling.BICUBIC),
           "wide border": lambda p: ImageOps.expand(p, (40, 10), 0), "white border": lambda p: ImageOps.expand(p, 12, 255),
           "darker": lambda p: p.point(lambda value: value // 3), "squashed": lambda p: p.resize((128, 90), Image.Resampling.BOX),
           "crop": lambda p: p.crop((4, 1, 126, 122))}[change](picture)
    return np.asarray(ImageOps.pad(out, (128, 128), Image.Resampling.BOX))


@pytest.mark.parametrize("change", ["equalised", "inverted", "larger", "wide border", "white border", "darker", "squashed", "crop"])
def test_copies_in_other_clothes_are_found_in_either_direction(change):
    pixels = PIXELS.copy()
    for copy, of in ((30, 2), (31, 3), (36, 4), (25, 35)):
        pixels[copy] = changed(PIXELS[of], change)
    named = found(leaks.leaks_within(table(40, {"train": 30, "validate": 5, "test": 5}), pixels))
    assert sorted(named) == sorted([("near duplicate", "train", "i2", "validate", "i30"), ("near duplicate", "train", "i3", "validate", "i31"),
                                    ("near duplicate", "train", "i4", "test", "i36"), ("near duplicate", "train", "i25", "test", "i35")])


def test_other_chests_of_every_size_are_not_called_the_same():
    for size in (64, 256):
        pixels = np.stack([Phantom(size=size, seed=9)[index].image for index in range(30)])
        assert len(leaks.leaks_within(table(30, {"train": 15, "validate": 5, "test": 10}), pixels)) == 0, size


def test_images_without_content_are_no_copies_of_each_other_but_the_same_file_is_seen():
    pixels, rows = np.zeros((12, 32, 32), np.uint8), table(12, {"train": 6, "test": 6})
    pixels[3:9] = 200
    assert len(leaks.leaks_within(rows, pixels)) == 0
    rows.loc[[1, 10], "sha256"] = "same"
    assert found(leaks.leaks_within(rows, pixels)) == [("same file", "train", "i1", "test", "i10")]


def test_blank_ids_and_blank_hashes_are_nobody():
    rows = table(40, {"train": 20, "test": 20}).assign(patient_id="", sha256="")
    assert len(leaks.leaks_within(rows, PIXELS)) == 0


def test_a_patient_is_named_once_and_splits_stand_in_order():
    rows = table(40, {"test": 10, "validate": 10, "train": 20})
    rows.loc[[0, 1, 2, 12, 13, 30, 31, 32], "patient_id"] = "p"
    assert found(leaks.leaks_within(rows, PIXELS)) == [("patient", "train", "p", "validate", "p"), ("patient", "train", "p", "test", "p"),
                                                      ("patient", "validate", "p", "test", "p")]


def test_between_two_packs_only_train_against_the_rest_counts():
    rows, other = table(40, {"train": 20, "validate": 10, "test": 10}), table(20, {"train": 5, "validate": 5, "test": 10}, "o")
    pixels = np.stack([Phantom(size=64, seed=77)[index].image for index in range(20)])
    small = [np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BOX)) for image in PIXELS]
    pixels[0], pixels[1], pixels[6], pixels[7], pixels[12], pixels[13] = (small[row] for row in (3, 33, 4, 24, 5, 35))
    assert found(leaks.leaks_between(rows, PIXELS, other, pixels)) == [
        ("near duplicate", "test", "i33", "train", "oi1"), ("near duplicate", "train", "i4", "validate", "oi6"), ("near duplicate", "train", "i5", "test", "oi12")]
    assert found(leaks.leaks_between(rows, PIXELS, other, pixels, both=False)) == [("near duplicate", "test", "i33", "train", "oi1")]
    other.loc[[2, 8], "patient_id"] = ["p25", "p7"]
    named = found(leaks.leaks_between(rows, PIXELS, other, pixels[::-1].copy()))
    assert [name for name in named if name[0] == "patient"] == [("patient", "validate", "p25", "train", "p25"), ("patient", "train", "p7", "validate", "p7")]


def test_nothing_to_compare():
    rows = table(40, {"train": 40})
    for frame in (leaks.leaks_within(rows, PIXELS), leaks.leaks_between(rows, PIXELS, rows, PIXELS), leaks.leaks_within(rows[:0], PIXELS[:0])):
        assert tuple(frame.columns) == leaks.LEAK_COLUMNS and len(frame) == 0
        assert leaks.leaks_summary(frame) == {"patient": 0, "same file": 0, "near duplicate": 0, "offenders": []}


def test_tables_that_do_not_fit_are_refused():
    rows = table(40, {"train": 40})
    with pytest.raises(ValueError, match="40 rows of images, but 39 images"):
        leaks.leaks_within(rows, PIXELS[:39])
    with pytest.raises(ValueError, match=re.escape("lacks the column(s) ['sha256']")):
        leaks.leaks_between(rows, PIXELS, rows.drop(columns="sha256"), PIXELS)


def test_the_order_of_rows_and_the_blocks_do_not_matter(monkeypatch):
    pixels, rows = PIXELS.copy(), table(40, {"train": 20, "validate": 8, "test": 12})
    pixels[33], pixels[22] = changed(PIXELS[1], "equalised"), changed(PIXELS[37], "crop")
    expected = set(found(leaks.leaks_within(rows, pixels)))
    assert len(expected) == 2
    order = np.random.default_rng(0).permutation(40)
    assert set(found(leaks.leaks_within(rows.iloc[order], pixels[order]))) == expected
    a, b = leaks.take_prints(pixels, np.arange(20), block=3), leaks.take_prints(pixels, np.arange(20, 40))
    whole = np.concatenate(list(leaks._candidates(a, b)))
    pieces = np.concatenate(list(leaks._candidates(a, b, block=(3, 7))))
    assert {tuple(row) for row in whole.tolist()} == {tuple(row) for row in pieces.tolist()}
    pd.testing.assert_frame_equal(leaks.near_duplicates(a, b), leaks.near_duplicates(a, b, block=2), atol=1e-5)


@pytest.mark.parametrize("change", ["equalised", "inverted", "larger", "wide border", "darker", "squashed", "crop"])
def test_bands_find_what_pairs_find(change, monkeypatch):
    "Whole and whole, whole and part, either side the larger, turned over or not"
    copies = leaks.take_prints(np.stack([changed(image, change) for image in PIXELS[:12]]), np.arange(12))
    originals = leaks.take_prints(PIXELS, np.arange(40))
    for a, b in ((originals, copies), (copies, originals)):
        wanted = leaks.near_duplicates(a, b)
        monkeypatch.setattr(leaks, "_PLAIN", 0)
        found = leaks.near_duplicates(a, b)
        monkeypatch.undo()
        assert len(wanted) >= 9
        assert found[["row_a", "row_b"]].equals(wanted[["row_a", "row_b"]])
        assert np.abs(found.distance - wanted.distance).max() < 0.02      # another view of the same pair may have been the best


def test_bands_propose_nothing_that_is_far_and_all_that_is_near():
    "Of hashes of the phantom: each once, none that is not near, and all of those to 10 bits apart; of all, four of five"
    hashes, random = leaks.take_prints(PIXELS, np.arange(40)).hashes[0], np.random.default_rng(0)
    some = np.tile(hashes, 30)
    flips = np.zeros((some.shape[1], 256), bool)
    for row, count in zip(flips, random.integers(0, 27, len(flips)), strict=True):
        row[random.permutation(leaks._BITS)[:count]] = True
    flips[::2, :leaks._BITS] ^= True
    other = some ^ np.packbits(flips.reshape(-1, 64, 4).swapaxes(1, 2), axis=2).view(np.uint64)[..., 0].T
    wanted, found = (list(zip(*(column.tolist() for column in pairs), strict=True)) for pairs in (leaks._close(hashes, other), leaks._by_bands(hashes, other, leaks._choose_bands(other))))
    assert len(set(found)) == len(found) and set(found) <= set(wanted) and {sign for *_, sign in found} == {1, -1}
    apart = {(i, j, sign): min(bits := int(np.bitwise_count(hashes[:, i] ^ other[:, j]).sum()), leaks._BITS - bits) for i, j, sign in wanted}
    missed = set(wanted) - set(found)
    assert min((apart[one] for one in missed), default=99) > 10 and len(missed) < 0.2 * len(wanted)


def test_a_crowd_is_not_a_square():
    "600 images that are one: each is compared with 200 of them, and not with all; another image is found among them"
    hashes = leaks.take_prints(PIXELS, np.arange(40)).hashes[0]
    crowd = np.repeat(hashes[:, :1], 600, axis=1)
    both = np.concatenate([crowd, hashes[:, 5:6]], axis=1)
    i, j, _ = leaks._by_bands(both, both, leaks._choose_bands(hashes))
    assert len(i) == 600 * leaks._CROWD + 1 and set(i[:-1]) == set(range(600)) and (i[-1], j[-1]) == (600, 600)


@pytest.mark.parametrize("plain", [leaks._PLAIN, 0])
def test_what_is_laid_upon_each_other_grows_with_the_images(plain, monkeypatch):
    "60 and 50 copies of one image are 3 000 pairs: each is laid upon 16 in detail, and all are named, and so is one copy of another image"
    random = np.random.default_rng(0)
    copies = (PIXELS[:1] + random.integers(0, 3, (110, 1, 1)) + random.integers(0, 2, (110, *PIXELS.shape[1:]))).clip(0, 255).astype(np.uint8)
    a = leaks.take_prints(np.concatenate([copies[:60], PIXELS[5:6]]), np.arange(61))
    b = leaks.take_prints(np.concatenate([copies[60:], PIXELS[5:6]]), np.arange(51))
    looked, look = [], leaks._look_closely
    monkeypatch.setattr(leaks, "_PLAIN", plain)
    monkeypatch.setattr(leaks, "_look_closely", lambda a, b, near: looked.append(len(near)) or look(a, b, near))
    found = leaks.near_duplicates(a, b)
    assert len(found) == sum(looked) <= leaks._NEAREST * (60 + 50) + 1
    assert set(found.row_a) == set(range(61)) and set(found.row_b) == set(range(51)) and found.iloc[-1, :2].tolist() == [60, 50]


def test_the_nearest_of_each_are_kept():
    "As counted pair by pair"
    random = np.random.default_rng(0)
    pairs = np.unique(random.integers(0, 40, (1200, 2)), axis=0)
    distance = random.permutation(len(pairs))
    kept = leaks._nearest(*pairs.T, distance)
    nearer = [[sum((pairs[:, side] == pair[side]) & (distance < own)) for side in (0, 1)] for pair, own in zip(pairs, distance, strict=True)]
    assert kept.tolist() == [min(counts) < leaks._NEAREST for counts in nearer] and 0 < kept.mean() < 1


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("words", [2, 4])
@pytest.mark.parametrize("flips", [0, 9, leaks._HALF_REACH - 1, leaks._HALF_REACH, leaks._HALF_REACH + 1, leaks._REACH - 1, leaks._REACH, leaks._REACH + 1, 39])
def test_candidates_are_those_of_a_plain_loop(flips, words, turned):
    "Near are hashes that differ in at most REACH bits, HALF_REACH of them in the first two words, or in all but so many; so of HALF_REACH changed bits none hides an image"
    hashes, noise = leaks.take_prints(PIXELS, np.arange(40)).hashes[0], np.zeros(256, bool)
    noise[np.random.default_rng(flips).permutation(np.flatnonzero(np.arange(leaks._BITS) % 4 < words))[:flips]] = True      # in the first words only, or in all
    noise[:leaks._BITS] ^= turned
    other = hashes ^ np.packbits(noise.reshape(64, 4).T, axis=1).copy().view(np.uint64)
    half, apart = (np.array([[sum(int(x ^ y).bit_count() for x, y in zip(hashes[:part, a], other[:part, b], strict=True)) for b in range(40)] for a in range(40)]) for part in (2, 4))
    near = (np.minimum(apart, leaks._BITS - apart) <= leaks._REACH) & (np.minimum(half, leaks._HALF_BITS - half) <= leaks._HALF_REACH)
    i, j, sign = leaks._close(hashes, other)
    assert list(zip(i, j, strict=True)) == list(zip(*np.nonzero(near), strict=True)) and (sign == np.where(apart[i, j] > leaks._BITS / 2, -1, 1)).all()
    assert near.diagonal().all() if flips <= leaks._HALF_REACH else words == 4 and flips <= leaks._REACH or not near.diagonal().any()


def test_any_gamma_border_and_inversion():
    "Nearly all of 80 random changes are seen through, and none is taken for another image"
    random, base, found = np.random.default_rng(0), leaks.take_prints(PIXELS, np.arange(40)), 0
    for _ in range(80):
        row, gamma, (left, top), turn = int(random.integers(40)), random.uniform(0.5, 2), random.integers(0, 31, 2), random.integers(2)
        image = (255 * (PIXELS[row] / 255.0) ** gamma).round().astype(np.uint8)
        image = np.pad(255 - image if turn else image, ((top, 0), (left, 5)))
        copy = np.asarray(ImageOps.pad(Image.fromarray(image), (128, 128), Image.Resampling.BOX))[None]
        near = leaks.near_duplicates(base, leaks.take_prints(copy, np.arange(1)))
        assert near.row_a.tolist() in ([row], [])
        found += len(near)
    assert found >= 77


def test_memory_stays_flat(tmp_path):
    "A memory map of 64 MB is looked at with a few"
    images = np.memmap(tmp_path / "images.u8", np.uint8, "w+", shape=(1024, 256, 256))
    random = np.random.default_rng(0)
    for row in range(len(images)):
        images[row] = np.asarray(Image.fromarray(random.integers(0, 256, (9, 9), np.uint8)).resize((256, 256), Image.Resampling.BICUBIC))
    images[1000] = images[5]
    images.flush()
    pixels = np.memmap(tmp_path / "images.u8", np.uint8, "r", shape=images.shape)
    tracemalloc.start()
    a, b = leaks.take_prints(pixels, np.arange(800), block=64), leaks.take_prints(pixels, np.arange(800, 1024), block=64)
    near = leaks.near_duplicates(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert near[["row_a", "row_b"]].values.tolist() == [[5, 1000]] and near.distance[0] < 1e-3
    assert peak < 24e6, peak


def test_the_refusal_names_some_and_counts_all():
    rows = pd.DataFrame([("near duplicate", "train", f"a{n}", "test", f"b{n}", 0.01 * n) for n in range(9)], columns=list(leaks.LEAK_COLUMNS))
    with pytest.raises(DataError) as error:
        leaks.refuse(rows, "packs/nih against packs/rsna")
    message = str(error.value)
    assert message.startswith("packs/nih against packs/rsna: ") and "9 x near duplicate" in message and "a5 (train) = b5 (test); and 3 more" in message
    assert "a6" not in message and "--allow-leaks" in message
    assert leaks.leaks_summary(rows, 2)["offenders"] == [["near duplicate", "train", "a0", "test", "b0", 0.0], ["near duplicate", "train", "a1", "test", "b1", 0.01]]
