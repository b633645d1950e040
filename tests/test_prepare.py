"""Preparing real files: what comes in any shape goes out right, damage is named or rejected, and a kill leaves no mark."""
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from folders import folder_pack, picture_pack
from PIL import Image
from test_pack import contents, kill_when, parts

from medvis.data.files import DataError
from medvis.data.sets.folder import FOLDER, _FolderConfig, _plan_folder
from medvis.data.images import ImageError, read_image, to_square
from medvis.data.preprocessing import AUGMENTATIONS, Preprocessing
from medvis.data.pack import Pack
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.reports import ReportRules
from medvis.data.source import check_source, describe_pack

REPORT = "FINDINGS: The lungs are clear. IMPRESSION: Normal chest."


def gradient(height: int = 48, width: int = 40) -> np.ndarray:
    return (np.add.outer(np.arange(height) * 2, np.arange(width) * 3) % 256).astype(np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    "Eight images a.png .. h.png in a folder, a gradient and seven that are noise"
    for seed, name in enumerate("abcdefgh"):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 40), dtype=np.uint8) if seed else gradient()).save(tmp_path / f"{name}.png")
    return tmp_path


def rows(**columns) -> pd.DataFrame:
    "A good table of eight rows, with columns changed"
    good = {"image_path": [f"{name}.png" for name in "abcdefgh"], "report": REPORT, "patient_id": [f"{i:03d}" for i in range(8)]}
    return pd.DataFrame({name: value for name, value in {**good, **columns}.items() if value is not None})


def prepared(folder: Path, table: pd.DataFrame | None = None, **changes) -> Pack:
    if table is not None:
        table.to_csv(folder / "table.csv", index=False)
    return folder_pack(folder / "table.csv", folder / "pack", **{"size": 32, **changes})


# images

def dicom(path: Path, pixels: np.ndarray, **tags) -> Path:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


RAMP = np.arange(64 * 64).reshape(64, 64)      # 0 .. 4095: 12 bits


def test_dicom(tmp_path):
    plain = read_image(dicom(tmp_path / "a.dcm", RAMP))
    assert plain.dtype == np.uint8 and plain.min() == 0 and plain.max() == 255 and (np.diff(plain.ravel().astype(int)) >= 0).all()
    inverted = read_image(dicom(tmp_path / "b.dcm", RAMP, PhotometricInterpretation="MONOCHROME1"))
    assert np.abs(plain.astype(int) + inverted - 255).max() <= 1
    windowed = read_image(dicom(tmp_path / "c.dcm", RAMP, WindowCenter=2048, WindowWidth=1024))
    assert windowed[:20].max() == 0 and windowed[-20:].min() == 255 and 100 < windowed[32, 0] < 156
    rescaled = read_image(dicom(tmp_path / "d.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=3096, WindowWidth=2048))
    assert np.abs(rescaled.astype(int) - windowed).max() <= 1
    assert (read_image(dicom(tmp_path / "nosuffix", RAMP)) == plain).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("stored", "allocated"), [(8, 8), (10, 16), (12, 16), (16, 16)])
def test_dicom_depths(stored, allocated, signed, tmp_path):
    "The full range of each depth becomes the full range of grey, whatever the number of bits"
    low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    pixels = np.linspace(low, high, 64 * 64).round().astype(int).reshape(64, 64)
    bits = {"BitsAllocated": allocated, "BitsStored": stored, "HighBit": stored - 1, "PixelRepresentation": int(signed)}
    path = dicom(tmp_path / "a.dcm", RAMP, **bits, PixelData=pixels.astype(f"<{'i' if signed else 'u'}{allocated // 8}").tobytes())
    expected = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    assert np.abs(read_image(path) - expected).max() <= 1


def compressed(path: Path, syntax: str, pixels: np.ndarray) -> Path:
    "An 8-bit DICOM in a compressed transfer syntax; baseline JPEG, as RSNA's are, by Pillow, the others by pydicom's encoders"
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(dicom(path, pixels, BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=pixels.tobytes()))
    if syntax != "JPEGBaseline8Bit":
        dataset.compress(getattr(pydicom.uid, syntax))
    else:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        dataset.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(("syntax", "apart"), [("JPEGBaseline8Bit", 4), ("JPEG2000Lossless", 0), ("RLELossless", 0)])
def test_compressed_dicom(syntax, apart, tmp_path):
    pixels = gradient(64, 64)
    pixels[0, 0], pixels[0, 1] = 0, 255
    found = read_image(compressed(tmp_path / "a.dcm", syntax, pixels))
    assert np.abs(found.astype(int) - pixels)[8:, 8:].mean() <= apart and found.shape == pixels.shape


@pytest.mark.parametrize(("pixels", "tags", "complaint"), [
    (np.stack([RAMP, RAMP]), {}, "DICOM with 2 frames, expected one"),
    (RAMP, {"PixelData": b"\0" * 100}, "cannot be decoded"),
    (RAMP, {"Rows": 4000}, "cannot be decoded"),
])
def test_damaged_dicom(pixels, tags, complaint, tmp_path):
    with pytest.raises(ImageError, match=f"a.dcm: .*{complaint}"):
        read_image(dicom(tmp_path / "a.dcm", pixels, **tags))


def test_dicom_without_pixels(tmp_path):
    import pydicom
    path = dicom(tmp_path / "a.dcm", RAMP)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)
    with pytest.raises(ImageError, match="DICOM without pixel data"):
        read_image(path)


def test_dicom_needs_the_extra(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"pip install medvis\[dicom\]"):
        read_image(path)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I;16", "I", "F"])
def test_modes_give_the_same_grey(mode, tmp_path):
    grey = np.where(np.add.outer(np.arange(30), np.arange(20)) % 7 < 3, 0, 255).astype(np.uint8)
    picture = Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 16) if mode[0] in "IF" else \
        Image.fromarray(grey).convert(mode)
    picture.save(tmp_path / "a.tiff")
    assert (read_image(tmp_path / "a.tiff") == grey).all()


@pytest.mark.parametrize(("name", "data", "complaint"), [
    ("a.png", b"", "file is empty"),
    ("a.png", b"not an image", "not a known image format"),
    ("a.dcm", b"not an image", "not a known image format"),
    ("a.jpg", "jpeg:200", "cannot be decoded|not a known"),
    ("a.jpg", "jpeg:-100", "cannot be decoded: JPEG without an end"),
    ("a.png", "png:60", "cannot be decoded"),
    ("a.png", "tiny", "has 1 x 1 pixels"),
])
def test_damaged_images(name, data, complaint, tmp_path):
    path = tmp_path / name
    if isinstance(data, str):
        kind, _, length = data.partition(":")
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64) if length else (1, 1), dtype=np.uint8)).save(path)
        data = path.read_bytes()[: int(length)] if length else path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(ImageError, match=complaint) as error:
        read_image(path)
    assert str(path) in str(error.value) and str(tmp_path) not in error.value.reason and " at 0x" not in error.value.reason


def test_directory_and_missing_file(tmp_path):
    with pytest.raises(ImageError, match="cannot be opened: Is a directory"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="file not found"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (33, 77), (20, 20), (3, 500)])
@pytest.mark.parametrize("size", [16, 65])
def test_squares(shape, size):
    image = np.full(shape, 200, np.uint8)
    square = to_square(image, size)
    inside = np.argwhere(square == 200)
    low, high = inside.min(0), inside.max(0) + 1
    assert square.shape == (size, size) and set(np.unique(square)) <= {0, 200}
    assert (high - low).max() == size and tuple(high - low) == tuple(max(1, n * size // max(shape)) for n in shape)
    assert ((size - high) - low >= 0).all() and ((size - high) - low <= 1).all()        # floor at the left and top
    assert (to_square(image, size, "stretch") == 200).all()


def test_area_averaging_keeps_the_mean():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
    assert np.abs(to_square(noise, 64) - noise.reshape(64, 8, 64, 8).mean((1, 3))).max() <= 1     # Pillow rounds between its two passes


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("augment", [*AUGMENTATIONS])
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing(size, augment, channels):
    image = torch.from_numpy(gradient(256, 256))[None]
    preprocessing = Preprocessing(size=size, channels=channels, mean=0.4, std=0.2)
    for transform in (preprocessing.transform(augment), preprocessing.transform()):
        out = transform(image)
        assert out.shape == (channels, size, size) and out.dtype == torch.float32 and out.isfinite().all()
        assert -2 - 1e-5 <= out.min() and out.max() <= 3 + 1e-5


def test_mgca_crops_are_windows_of_the_resized_image():
    image = torch.from_numpy(gradient(256, 256))[None]
    crop = Preprocessing(size=224, channels=1, mean=0.0, std=1.0).transform("mgca")(image)[0] * 255
    windows = torch.from_numpy(gradient(256, 256)).float().unfold(0, 224, 1).unfold(1, 224, 1)
    assert any(torch.allclose(crop, windows[i, j], atol=1e-3) for i in range(33) for j in range(33))


def test_lovt_flips_half_of_the_time():
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[:, :, :32] = 255
    augment = Preprocessing(size=64, crop=1.0, channels=1).transform("lovt")
    torch.manual_seed(0)
    left = [bool((view := augment(image))[..., :32].mean() > view[..., 32:].mean()) for _ in range(200)]
    assert 70 < sum(left) < 130


@pytest.mark.parametrize("bad", [dict(size=0), dict(crop=0.0), dict(crop=1.5), dict(channels=2), dict(std=0.0)])
def test_bad_preprocessing(bad):
    with pytest.raises(ValueError, match="expected size >= 1"):
        Preprocessing(**bad)


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="unknown augmentation 'moco'; choose from mgca, lovt, local-mi, simclr, pixelpro, none"):
        Preprocessing().transform("moco")


# tables

@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".csv.gz"])
def test_table_formats(ending, folder):
    table, path = rows(Edema=[1, 0, -1, None] * 2), folder / f"table{ending}"
    table.to_parquet(path) if ending == ".parquet" else table.to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    pack = folder_pack(path, folder / "pack", size=32, label_columns=("Edema",))
    pack.verify()
    assert len(pack) == 8 and pack.studies.patient_id.tolist() == [f"{i:03d}" for i in range(8)]
    assert pack.labels.Edema.fillna(9).tolist() == [1, 0, -1, 9] * 2
    assert pack.studies.sentences[0] == ["The lungs are clear.", "Normal chest."]
    assert (pack.image(0)[:, 3:29] == to_square(gradient(), 32)[:, 3:29]).all() and pack.image_table.width.unique().tolist() == [40]


def test_bom_and_crlf_inside_reports(folder):
    text = "x\r\n FINDINGS: Größe normal.\r\n \r\n IMPRESSION: Clear lungs."
    rows(report=text).to_csv(folder / "table.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    pack = prepared(folder)
    assert pack.studies.sentences[0] == ["Größe normal.", "Clear lungs."] and pack.image_table.path[0] == "a.png"


def test_studies_of_several_rows(folder):
    table = rows(study_id=[1, 1, 2, 3, 3, 3, 4, 4], patient_id=None, report=[REPORT, "", REPORT, None, None, REPORT, REPORT, REPORT],
                 split=["train", "train", "val", "Test", "test", "testing", "dev", "validation"])
    pack = prepared(folder, table)
    assert pack.studies.image_rows.tolist() == [[0, 1], [2], [3, 4, 5], [6, 7]] and pack.studies.study_id.tolist() == list("1234")
    assert pack.studies.split.tolist() == ["train", "validate", "test", "validate"] and pack.studies.patient_id.tolist() == list("1234")
    assert (pack.studies.report == REPORT).all()


def test_paths_as_windows_writes_them(folder):
    (folder / "images").mkdir()
    (folder / "a.png").rename(folder / "images/a.png")
    rows(image_path=["images\\a.png"] + [f"{name}.png" for name in "bcdefgh"]).to_csv(folder / "table.csv", index=False)
    pd.DataFrame([["images/a.png", "Mass", 1, 2, 3, 4]], columns=["image_path", "label", "x1", "y1", "x2", "y2"]).to_csv(folder / "boxes.csv", index=False)
    facts, problems = check_source(FOLDER, _FolderConfig(folder, boxes=folder / "boxes.csv"))
    assert facts["files"] == 8 and problems == []


def test_classes_filter_and_no_reports(folder):
    table = rows(report=None, source=["x"] * 6 + ["y"] * 2, kind=["normal", "viral", "bacterial", None, "viral", "normal", "other", "other"])
    pack = prepared(folder, table, where="source == 'x'", class_column="kind", require_report=False)
    assert len(pack) == 6 and pack.labels.columns.tolist() == ["bacterial", "normal", "viral"]
    assert pack.labels.fillna(9).astype(int).values.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0], [9, 9, 9], [0, 0, 1], [0, 1, 0]]
    assert pack.studies.sentences.map(len).sum() == 0 and (pack.studies.report == "").all()


def test_splits_are_made_by_patient(tmp_path):
    names = [f"{i}.png" for i in range(400)]
    pd.DataFrame({"image_path": names, "report": REPORT, "patient_id": [i // 4 for i in range(400)]}).to_csv(tmp_path / "t.csv", index=False)
    items = _plan_folder(_FolderConfig(tmp_path, table=tmp_path / "t.csv")).items
    splits = pd.DataFrame(items).groupby("patient").split.agg(["nunique", "first"])
    assert (splits["nunique"] == 1).all() and 70 <= (splits["first"] == "train").sum() <= 90
    again = _plan_folder(_FolderConfig(tmp_path, table=tmp_path / "t.csv", split_seed=1)).items
    assert [i["split"] for i in again] != [i["split"] for i in items]


WRONG = {
    "no image column": (rows(image_path=None), {}, r"table.csv: no column 'image_path' \(image_column\); the table has report, patient_id"),
    "no report column": (rows(report=None), {}, "no column 'report' with reports; name it with report_column, or turn require_report off"),
    "named column": (rows(), {"study_column": "exam"}, r"no column 'exam' \(study_column\)"),
    "label column": (rows(), {"label_columns": ("Edema",)}, r"no column 'Edema' \(label_columns\)"),
    "class column": (rows(), {"class_column": "kind"}, r"no column 'kind' \(class_column\)"),
    "label value": (rows(Edema=[1, 0, "yes", 0] * 2), {"label_columns": ("Edema",)}, "row 3, column 'Edema': label is 'yes'; expected 1"),
    "label number": (rows(Edema=[1, 0, 2, 0] * 2), {"label_columns": ("Edema",)}, "row 3, column 'Edema': label is '2"),
    "split value": (rows(split=["train"] * 7 + ["holdout"]), {}, "row 8: split is 'holdout'; expected train, validate or test"),
    "split blank": (rows(split=["train"] * 7 + [None]), {}, "row 8: split is blank"),
    "patient blank": (rows(patient_id=["p"] * 7 + [None]), {}, "row 8: column 'patient_id' is blank"),
    "same image twice": (rows(image_path=["a.png", "b.png", "./a.png"] + [f"{n}.png" for n in "cdefg"]), {}, "rows 1 and 3 name the same image, a.png"),
    "path up": (rows(image_path=["a.png", "../b.png"] + [f"{n}.png" for n in "cdefgh"]), {}, "row 2: path '../b.png' leads out of the folder"),
    "path away": (rows(image_path=["/etc/passwd"] + [f"{n}.png" for n in "bcdefgh"]), {}, "row 1: path '/etc/passwd' leads out"),
    "path up, as Windows writes it": (rows(image_path=["x\\..\\..\\a.png"] + [f"{n}.png" for n in "bcdefgh"]), {}, "row 1: path .* leads out of the folder"),
    "two reports": (rows(study_id=[1] * 8, patient_id="p", report=[REPORT] * 7 + ["Other."]), {}, "study 1: rows 1 and 8 give it different values of report"),
    "two patients": (rows(study_id=[1] * 8), {}, "study 1: rows 1 and 2 give it different values of patient"),
    "leak": (rows(patient_id=list("aabbccdd"), split=["train", "test"] + ["train"] * 6), {}, r"the same patients or images are on both sides \(1 x patient\): patient a \(train\) = a \(test\)"),
    "no rows": (rows().head(0), {}, "table.csv has no rows"),
    "filter": (rows(), {"where": "nonsense == 1"}, "the filter 'nonsense == 1' fails: .*the table has image_path"),
    "nothing left": (rows(), {"where": "patient_id == 'x'"}, "no rows where patient_id == 'x'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tables(kind, folder):
    table, changes, complaint = WRONG[kind]
    before = {path.name for path in folder.iterdir()} | {"table.csv"}
    with pytest.raises(ValueError, match=complaint) as error:
        prepared(folder, table, **changes)
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - before
    assert written == ({"pack.partial/pack.leaks.csv"} if kind == "leak" else set()) and "lungs" not in str(error.value)      # no report text in the message


@pytest.mark.parametrize(("name", "data", "complaint"), [
    ("t.csv", b"", "t.csv is empty"),
    ("t.csv", b"image_path,report\na.png,x\nb.png,x,y,z\n", "t.csv, line 3: 4 fields, expected 2"),
    ("t.csv", "image_path,report\na.png,größer\n".encode("latin-1"), "t.csv, line 2: not UTF-8 text"),
    ("t.parquet", b"PAR1 is not enough", "t.parquet: "),
    ("t.parquet", b"", "t.parquet: "),
    ("t.xlsx", b"PK", "expected a .csv, .tsv .* or .parquet file"),
])
def test_unreadable_tables(name, data, complaint, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=complaint):
        folder_pack(tmp_path / name, tmp_path / "pack")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_table_or_root(folder):
    with pytest.raises(DataError, match="none.csv: no such file"):
        folder_pack(folder / "none.csv", folder / "pack")
    with pytest.raises(DataError, match="nowhere: no such folder. Your own data"):
        prepared(folder, rows(), root=folder / "nowhere")
    (folder / "table.csv").rename(folder / "table.tsv")
    with pytest.raises(DataError, match="table.tsv: no column 'image_path'"):
        picture_pack(FOLDER, _FolderConfig(folder), folder / "pack")
    (folder / "table.tsv").unlink()
    with pytest.raises(DataError, match="there is no table.csv or table.csv.gz or table.tsv"):
        picture_pack(FOLDER, _FolderConfig(folder), folder / "pack")


def test_bad_files_and_reports_are_rejects(folder):
    jpeg = folder / "a.jpg"
    Image.fromarray(gradient(200, 200)).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    (folder / "b.png").write_bytes(b"")
    (folder / "c.png").write_text("hello")
    (folder / "d.png").unlink()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    paths = ["a.jpg", "b.png", "c.png", "d.png", "loop.png", None, "g.png", "h.png"]
    table = rows(image_path=paths, report=[REPORT] * 6 + ["IMPRESSION: ___.", REPORT])
    pack = prepared(folder, table, max_rejects=0.9)
    reasons, codes = (dict(zip(pack.rejects["item"], pack.rejects[column], strict=True)) for column in ("reason", "code"))
    assert reasons.pop("a.jpg").startswith("cannot be decoded: JPEG without an end")
    assert reasons == {"b.png": "file is empty", "c.png": "not a known image format", "d.png": "file not found",
                       "loop.png": "cannot be opened: Too many levels of symbolic links", "row 6": "the path '' does not lead to a file below the folder of the data set",
                       "g.png": "report: fewer than 3 words"}
    assert codes == {**dict.fromkeys(("a.jpg", "b.png", "c.png", "loop.png"), "unreadable-image"), "d.png": "missing-file", "row 6": "bad-row", "g.png": "short-report"}
    assert pack.manifest["rejected"] == {"bad-row": 1, "missing-file": 1, "short-report": 1, "unreadable-image": 4}
    assert pack.studies.study_id.tolist() == ["h.png"] and not pack.rejects.reason.str.contains(str(folder)).any()


def test_wrong_root_is_an_error_not_an_empty_pack(folder):
    (folder / "other").mkdir()
    with pytest.raises(ValueError, match=r"8 of 8 images did not get in \(8 x file not found\)"):
        prepared(folder, rows(), root=folder / "other")
    assert not (folder / "pack").exists()


def test_rules_reach_the_pack(folder):
    pack = prepared(folder, rows(), rules=ReportRules(sections=("impression",), min_words=2))
    assert pack.studies.sentences[0] == ["Normal chest."] and pack.manifest["rules"]["sections"] == ["impression"]


def test_summary_tells_rules_from_damage(folder):
    (folder / "d.png").write_bytes(b"")
    reports = [REPORT, "IMPRESSION: Clear.", "COMPARISON: None.", REPORT, "", *[REPORT] * 3]
    lines = [line.split(maxsplit=1)[1] for line in describe_pack(prepared(folder, rows(report=reports), rules=ReportRules(min_words=5), max_rejects=0.9)).splitlines()]
    assert [line for line in lines if line.startswith(("dropped by rule", "rejected"))] == [
        "rejected: report: empty report", "dropped by rule: report: no wanted section", "dropped by rule: report: fewer than 5 words",
        "rejected: image that cannot be read: empty, cut off, damaged or of an unknown format"]


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("medvis.data.build._START", -1)
    for workers in (0, 2):
        prepare_phantom(PhantomConfig(tmp_path / str(workers), studies=150, workers=workers, progress=False))
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_killed_and_resumed_folder(tmp_path):
    "A real process, killed in the middle of real JPEGs"
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for index in range(320):
        Image.fromarray(noise.integers(0, 255, (300, 400), dtype=np.uint8)).save(tmp_path / "images" / f"{index}.jpg")
    (tmp_path / "images" / "7.jpg").write_bytes(b"broken")
    pd.DataFrame({"image_path": [f"images/{i}.jpg" for i in range(320)], "report": REPORT}).to_csv(tmp_path / "t.csv", index=False)
    command = [sys.executable, "-c", "import sys; from medvis.cli.start import main; sys.exit(main())",
               "prepare", "folder", "--root", str(tmp_path), "--table", str(tmp_path / "t.csv"), "--no-progress", "--size", "64", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_when(subprocess.Popen([*command, str(killed)], stderr=subprocess.PIPE, text=True), lambda: parts(killed) >= 1)
    assert parts(killed) < 5 and not killed.exists()
    for out in (whole, killed):
        folder_pack(tmp_path / "t.csv", out, size=64)
    assert contents(whole) == contents(killed) and len(Pack(killed)) == 319
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "killed", "t.csv", "whole"]


def test_command_line():
    parsed = tyro.cli(_FolderConfig, args="--root r --table t.csv --label-columns A B --where x==1 --no-require-report --rules.min-words 5".split())
    assert parsed == _FolderConfig(Path("r"), table=Path("t.csv"), label_columns=("A", "B"), where="x==1", require_report=False, rules=ReportRules(min_words=5))
    with pytest.raises(ValueError, match="studies is 0"):
        prepare_phantom(PhantomConfig(Path("o"), studies=0))


# what people's tables look like

@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "parquet"])
def test_words_that_pandas_takes_for_gaps(ending, folder):
    words = ["None", "NA", "null", "nan", "N/A", "NaN", "", "normal"]
    table = rows(kind=words, study_id=["NA", "null", "None", "nan", "n/a", "NULL", "<NA>", "8"])
    path = folder / f"table.{ending}"
    table.to_parquet(path) if ending == "parquet" else table.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    pack = folder_pack(path, folder / "pack", size=32, class_column="kind")
    assert pack.labels.columns.tolist() == sorted(set(words) - {""})
    assert pack.studies["study_id"].tolist() == table["study_id"].tolist()
    assert [row.idxmax() if row.notna().any() else "" for _, row in pack.labels.iterrows()] == words


@pytest.mark.parametrize("column", ["study_id", "patient_id"])
def test_a_blank_id_alone_is_blank(column, folder):
    with pytest.raises(DataError, match=f"row 3: column '{column}' is blank"):
        prepared(folder, rows(**{column: ["NA", "None", "", *"defgh"]}))


def test_a_report_longer_than_the_csv_module_likes(folder):
    long = "FINDINGS: " + "The lungs are clear. " * 7000
    pack = prepared(folder, rows(report=[long, *7 * [REPORT]]))
    assert pack.studies["report"][0] == long.strip() and len(long) > 140_000


@pytest.mark.parametrize("named", ["link", "real"])
@pytest.mark.parametrize("root", ["link", "real"])
def test_absolute_paths_and_links(named, root, folder, tmp_path_factory):
    (beside := tmp_path_factory.mktemp("links") / "link").symlink_to(folder)
    places = {"link": beside, "real": folder}
    rows(image_path=[str(places[named] / f"{name}.png") for name in "abcdefgh"]).to_csv(folder / "table.csv", index=False)
    pack = folder_pack(places[root] / "table.csv", folder / "pack", size=32)
    assert pack.image_table["path"].tolist() == [f"{name}.png" for name in "abcdefgh"]


def test_a_name_that_only_looks_the_same_is_told(folder):
    (folder / "a.png").rename(folder / "cafe\u0301.png")
    (folder / "b.png").rename(folder / "B.PNG")
    pack = prepared(folder, rows(image_path=["caf\u00e9.png", "b.png", *(f" ./{name}.png " for name in "cdefgh")]), max_rejects=0.5)
    assert len(pack) == 6
    for reason, there in zip(pack.rejects["reason"], ("cafe\u0301.png", "B.PNG"), strict=True):
        assert reason.startswith("file not found") and f"{there!r}, whose name only looks the same" in reason


def test_a_table_is_found_from_the_root_too(folder, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    rows().to_csv(folder / "mine.csv", index=False)
    assert len(_plan_folder(_FolderConfig(folder, table=Path("mine.csv"))).items) == 8
    rows().head(3).to_csv("mine.csv", index=False)      # that of the working folder comes first
    assert len(_plan_folder(_FolderConfig(folder, table=Path("mine.csv"))).items) == 3
    with pytest.raises(DataError, match="from the working folder, then from the root") as error:
        _plan_folder(_FolderConfig(folder, table=Path("Yours.csv")))
    assert str(folder / "Yours.csv") in str(error.value) and str(Path("Yours.csv").absolute()) in str(error.value)


def test_an_option_added_to_an_unfinished_build(folder):
    table = rows(report=["", "", "", *5 * [REPORT]])
    for changes in ({}, {"view_column": "report"}):     # nothing is kept of the first: nobody need delete anything
        with pytest.raises(ValueError, match="max_rejects=0.2 allows"):
            prepared(folder, table, **changes)
    (folder / "pack.partial" / "parts" / "000000.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"read\.view_column was 'report' and is 'view'.*--fresh"):
        prepared(folder, max_rejects=0.5)
    assert len(prepared(folder, fresh=True, max_rejects=0.5)) == 5 and not (folder / "pack.partial").exists()


def test_workers_of_a_cluster_draw_the_same_pack_though_one_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed")
    alone = prepare_phantom(PhantomConfig(out=tmp_path / "alone", studies=200, progress=False))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster.scheduler_address) as client:
            killed = next(iter(client.run(os.getpid).values()))
        killer = threading.Timer(1.0, os.kill, (killed, signal.SIGKILL))
        killer.start()
        config = PhantomConfig(out=tmp_path / "together", studies=200, progress=False, scheduler=cluster.scheduler_address)
        together = prepare_phantom(config)
        killer.join()
    assert together.manifest["hash"] == alone.manifest["hash"] and len(together) == 200
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.lock"))
