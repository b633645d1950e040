"""Which dialect SIIM's codes are written in, and what eight-bit DICOM shows: nothing is read the wrong way in silence."""
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medvis.data.annotations import encode_rle
from medvis.data.files import DataError
from medvis.data.images import read_image
from medvis.data.sets.plans import write_dicom
from medvis.data.sets.rsna import RSNA, _RsnaConfig
from medvis.data.sets.siim import SIIM, _SiimConfig, _check_dialect, _code_dialect
from medvis.data.source import BuildConfig, check_source, prepare_source

pydicom = pytest.importorskip("pydicom")
FRAME = 1024
SHORT = "200001 5 201021 9"         # two neighbouring columns if absolute; both readings end inside


def ellipse(rng: np.random.Generator) -> np.ndarray:
    "A piece anywhere in the frame, at least two columns wide; one in three has a bite taken out of it."
    (x, y), (wide, high) = rng.uniform(50, FRAME - 50, 2), rng.uniform([4, 4], [300, 700])
    rows, columns = np.ogrid[:FRAME, :FRAME]
    mask = ((rows - y) / high * 2) ** 2 + ((columns - x) / wide * 2) ** 2 <= 1
    if rng.random() < 1 / 3:
        mask = mask & ~(((rows - y) / high * 3) ** 2 + ((columns - x - wide / 4) / wide * 3) ** 2 <= 1)
    return mask


def write(root: Path, codes: list[str], name: str = "train-rle.csv", images: bool = False) -> Path:
    root.mkdir(exist_ok=True)
    (root / name).write_text("ImageId, EncodedPixels\n" + "".join(f"film{place}, {code}\n" for place, code in enumerate(codes)))
    if images:
        (root / "png").mkdir()
        for place in range(len(codes)):
            Image.fromarray(np.random.default_rng(place).integers(0, 256, (64, 64), np.uint8)).save(root / "png" / f"film{place}.png")
    return root


# SIIM's dialects

@pytest.mark.parametrize("pieces", [1, 2])
def test_every_code_of_several_runs_tells_its_dialect(pieces):
    rng = np.random.default_rng(pieces)
    for _ in range(60):
        mask = np.any([ellipse(rng) for _ in range(pieces)], axis=0)
        for relative, name in ((True, "relative"), (False, "absolute")):
            code = encode_rle(mask, relative)
            assert _code_dialect(code) == (name if code.count(" ") > 1 else ""), code


@pytest.mark.parametrize("code", ["-1", "", "5 5", "0 5", "5 5 5", "x 5 9 1", "-5 5 9 1", "5.0 5 9 1", "1 9 1048577 9", "100 5 1015 9", f"1 1 {10**30} 1", "٣ x ٣ 1"])
def test_a_code_that_may_be_both_or_is_none_tells_nothing(code):
    assert _code_dialect(code) == ""


@pytest.mark.parametrize("file", ["train-rle.csv", "stage_2_train.csv"])
@pytest.mark.parametrize("codes", [[SHORT, "-1", "-1"], [SHORT, "7 3", "-1", "x"]])
def test_short_absolute_codes_are_not_read_as_gaps(tmp_path, file, codes):
    root = write(tmp_path / "siim", codes, file, images=True)
    with pytest.raises(DataError, match=rf"^{file}: 1 of 1 run-length codes .*absolute \(such as line 2\).*read it with --absolute"):
        SIIM.plan(_SiimConfig(root))
    assert "read it with --absolute" in " ".join(check_source(SIIM, _SiimConfig(root))[1])
    if "x" not in codes:
        pack = prepare_source(SIIM, _SiimConfig(root, absolute=True), BuildConfig(tmp_path / "pack", size=64, progress=False))
        place = pack.image_table["image_id"].tolist().index("film0")
        assert len(pack) == 3 and pack.mask(place)[0][:, 12].any() and not pack.mask(place)[0][:, 13:].any()        # columns 195 and 196 of 1024


@pytest.mark.parametrize("relative", [True, False])
def test_a_table_in_the_other_dialect_stops_before_any_pixel(tmp_path, relative):
    rng = np.random.default_rng(0)
    root = write(tmp_path, [encode_rle(ellipse(rng), relative) for _ in range(12)] + ["-1"] * 20)
    assert len(SIIM.plan(_SiimConfig(root, absolute=not relative)).items) == 32
    with pytest.raises(DataError, match="leave out --absolute" if relative else "read it with --absolute"):
        SIIM.plan(_SiimConfig(root, absolute=relative))
    facts, problems = check_source(SIIM, _SiimConfig(root, absolute=relative))
    assert facts == {} and "--absolute" in problems[0]


@pytest.mark.parametrize("relative", [True, False])
def test_a_code_that_strayed_in_costs_its_image(tmp_path, relative):
    rng = np.random.default_rng(1)
    codes = [encode_rle(ellipse(rng), relative) for _ in range(12)]
    codes[5] = encode_rle(ellipse(rng), not relative) if relative is False else SHORT
    root = write(tmp_path / "siim", codes, images=True)
    config = _SiimConfig(root, absolute=not relative)
    assert any("other dialect" in line and "film5" in line for line in check_source(SIIM, config)[1])
    pack = prepare_source(SIIM, config, BuildConfig(tmp_path / "pack", size=64, progress=False))
    assert pack.rejects["item"].tolist() == ["film5"] and len(pack) == 11
    assert pack.rejects["reason"][0].startswith("train-rle.csv, line 7: run-length code written in the other dialect")


@pytest.mark.parametrize(("strange", "stops"), [(8, False), (9, True), (10, True)])
def test_nine_of_ten_stop_the_table(strange, stops):
    rng = np.random.default_rng(2)
    codes = [encode_rle(ellipse(rng), relative=place >= strange) for place in range(10)] + ["-1", "3 4"]
    table = pd.DataFrame({"EncodedPixels": codes})
    if stops:
        with pytest.raises(DataError, match=f"{strange} of 10 "):
            _check_dialect(table)
    else:
        _check_dialect(table)


# RSNA's boxes

def test_boxes_in_parts_of_the_image_are_no_boxes_of_a_pixel(tmp_path):
    (tmp_path / "stage_2_train_labels.csv").write_text("patientId,x,y,width,height,Target\na,0.25,0.14,0.2,0.37,1\nb,,,,,0\nc,264,152,1,1,1\n")
    first, *others = RSNA.plan(_RsnaConfig(tmp_path)).items
    assert "line 2: width is '0.2'" in first["rejects"][0][1] and not any("rejects" in item for item in others)


# Eight bits in DICOM

FILM = np.linspace(50, 200, 32 * 40).round().astype(np.uint8).reshape(32, 40)


def film(path: Path, inverted: bool = False, **tags) -> np.ndarray:
    "What is seen of `FILM`, stored with these tags."
    write_dicom(path / "a.dcm", FILM, "1.2.3", inverted=inverted)
    dataset = pydicom.dcmread(path / "a.dcm")
    for name, value in tags.items():
        setattr(dataset, name, value)
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    (path / "b.dcm").write_bytes(out.getvalue())
    return read_image(path / "b.dcm")


NOTHING = [{"RescaleSlope": "1", "RescaleIntercept": "0"}, {"RescaleSlope": "1.0", "RescaleIntercept": "-0"}, {"RescaleSlope": "1"}, {"WindowCenter": "128", "WindowWidth": "256"},
           {"WindowCenter": "127.5", "WindowWidth": "255"}, {"WindowCenter": "127", "WindowWidth": "255"}, {"WindowCenter": None, "WindowWidth": None},
           {"WindowCenter": ["128", "90"], "WindowWidth": ["256", "40"]}, {"WindowCenter": "127.5", "WindowWidth": "255", "VOILUTFunction": "LINEAR_EXACT"},
           {"RescaleSlope": "1", "RescaleIntercept": "0", "WindowCenter": "128", "WindowWidth": "256"}]


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("tags", NOTHING, ids=str)
def test_tags_that_ask_for_nothing_change_nothing(tmp_path, tags, inverted):
    assert np.array_equal(film(tmp_path, inverted), FILM)
    assert np.array_equal(film(tmp_path, inverted, **tags), FILM)


SOMETHING = [{"RescaleSlope": "2", "RescaleIntercept": "0"}, {"RescaleSlope": "1", "RescaleIntercept": "-1024"}, {"WindowCenter": "125", "WindowWidth": "100"},
             {"WindowCenter": ["125", "128"], "WindowWidth": ["100", "256"]}, {"WindowCenter": "128", "WindowWidth": "256", "VOILUTFunction": "SIGMOID"}]


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("tags", SOMETHING, ids=str)
def test_tags_that_ask_for_something_are_followed_and_stretched(tmp_path, tags, inverted):
    seen = film(tmp_path, inverted, **tags)
    assert seen.min() == 0 and seen.max() == 255 and (np.diff(seen.ravel().astype(int)) >= 0).all()
    if tags.get("WindowCenter") == "125" and not inverted:
        assert (seen[FILM <= 74] == 0).all() and (seen[FILM >= 176] == 255).all() and 120 < seen[FILM == 125].mean() < 136


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_a_slope_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be decoded"):
        film(tmp_path, RescaleSlope="nan", RescaleIntercept="0")


def test_recipes_of_mgca_tell_that_it_scales():
    assert all(any("maximum is 255" in note for note in data_set.recipes[name].notes) for data_set, name in ((RSNA, "mgca"), (RSNA, "mgca-boxes"), (SIIM, "mgca")))
