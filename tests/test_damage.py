"""Damage to the files of every data set: an error that names the file, a reject that names the item, or no harm at all; never a wrong row in silence.

Each kind of damage is done to a fresh copy of the phantom in a data set's format. What is read is compared with what the undamaged copy holds: everything that
gets in must be exactly as there, and everything that does not must be told of. The outcome that is expected stands beside each kind:
    SAME    nothing changes           REJECT  some images do not get in, and rejects name them
    RULE    a rule of the recipe drops some images, and counts them           ERROR   nothing is read; the message says which file (row, column) is wrong
"""
import csv
import gzip
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate

from medvis.data.build import StudyRecord
from medvis.data.sets.registry import DATASETS, command_config, simulate, prepare_data
from medvis.data.files import DataError
from medvis.data.leaks import refuse
from medvis.data.phantom import Phantom, patient_number
from medvis.data.source import BuildConfig, ReadConfig, Source, check_source, _files_of, _find_shared_patients, read_study

SAME, REJECT, RULE, ERROR = "same", "reject", "rule", "error"
SIZE, STUDIES, SEED = 64, 6, 1


@dataclass(frozen=True)
class Damage:
    name: str                       # unique within its data set
    do: Callable[[Path], None]      # to the files below a root
    outcome: str
    message: str = ""                  # regular expression that is found in the error, or in a reject
    alike: bool = False             # grey values may differ a little (they are stored otherwise)
    renamed: bool = False           # the name of an image is what is damaged, so the reject cannot bear it


# ---- doing damage. Files are hard links to those of the undamaged copy, so nothing is written in place.

def one(root: Path, pattern: str, number: int = 0) -> Path:
    return sorted(root.glob(pattern))[number]


def put(path: Path, data: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def edit(pattern: str, change: Callable[[bytes], bytes], number: int = 0) -> Callable[[Path], None]:
    "Change the bytes of a file, those inside if it is packed."
    def do(root: Path) -> None:
        path = one(root, pattern, number)
        packed = path.suffix == ".gz"
        data = change(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        put(path, gzip.compress(data) if packed else data)
    return do


def raw(pattern: str, change: Callable[[bytes], bytes], number: int = 0) -> Callable[[Path], None]:
    "Change the bytes of a file as it lies there."
    def do(root: Path) -> None:
        path = one(root, pattern, number)
        put(path, change(path.read_bytes()))
    return do


def rows(pattern: str, change: Callable[[list[list[str]]], list[list[str]]], **options) -> Callable[[Path], None]:
    "Change the rows of a csv file; the first is the header."
    def do(data: bytes) -> bytes:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n", **options).writerows(change(list(csv.reader(io.StringIO(data.decode()), skipinitialspace=True))))
        return out.getvalue().encode()
    return edit(pattern, do)


def cell(pattern: str, row: int, column: str, value: str) -> Callable[[Path], None]:
    def change(table: list[list[str]]) -> list[list[str]]:
        table[row][table[0].index(column)] = value
        return table
    return rows(pattern, change)


def lines(pattern: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    return edit(pattern, lambda data: "".join(line + "\n" for line in change(data.decode().splitlines())).encode())


def swap(pattern: str, make: Callable[[Path], None], number: int = 0) -> Callable[[Path], None]:
    "Remove a file and make something in its place."
    def do(root: Path) -> None:
        path = one(root, pattern, number)
        path.unlink()
        make(path)
    return do


def no_permission(path: Path) -> None:
    put(path, b"x")
    path.chmod(0)


def without(column: str) -> Callable[[list[list[str]]], list[list[str]]]:
    return lambda table: [[value for name, value in zip(table[0], row, strict=True) if name != column] for row in table]


# ---- damage to any file, any table, any picture

def to_any_file(pattern: str, outcome: str, message: str, number: int = 0) -> list[Damage]:
    name = pattern.rpartition("/")[2]
    kinds = {
        "is missing": swap(pattern, lambda path: None, number), "is empty": raw(pattern, lambda data: b"", number), "is a folder": swap(pattern, Path.mkdir, number),
        "is a loop of links": swap(pattern, lambda path: path.symlink_to(path.name), number),
        "is a link to nowhere": swap(pattern, lambda path: path.symlink_to("nowhere/at/all"), number),
        "is random bytes": raw(pattern, lambda data: np.random.default_rng(3).bytes(5000), number),
        "is a web page": raw(pattern, lambda data: b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n", number),
    }
    if os.geteuid():    # root may read everything
        kinds["may not be read"] = swap(pattern, no_permission, number)
    sharper = {"is missing": rf"\bno .*({message})|({message}).*no such file", "is empty": rf"({message}).*(is empty|not a zip file)", "is a folder": rf"({message}).*cannot be read"} if outcome == ERROR else {}
    return [Damage(f"{name} {kind}", do, outcome, sharper.get(kind, message)) for kind, do in kinds.items()]


def to_table(pattern: str, columns: Iterable[str], message: str = "", packed: bool = True) -> list[Damage]:
    "Kinds of damage that any csv table may have; `columns` are those that are needed."
    name, columns = pattern.rpartition("/")[2], list(columns)
    message = message or re.escape(name.partition(".csv")[0].strip("*"))
    harmless = {
        "begins with a byte order mark": edit(pattern, lambda data: b"\xef\xbb\xbf" + data), "has CRLF line ends": edit(pattern, lambda data: data.replace(b"\n", b"\r\n")),
        "has another column": rows(pattern, lambda table: [[*row, "note" if row is table[0] else "x"] for row in table]),
        "has its columns in another order": rows(pattern, lambda table: [row[::-1] for row in table]),
        "has blank lines": lines(pattern, lambda table: [*table[:2], "", *table[2:], "", ""]),
        "has no line end at its end": edit(pattern, lambda data: data.rstrip(b"\n")),
        "has blanks around its cells": rows(pattern, lambda table: [[f"  {value} " for value in row] for row in table]),
        "has every cell in quotation marks": rows(pattern, lambda table: table, quoting=csv.QUOTE_ALL),
        "has a line feed in a cell that nobody reads": rows(pattern, lambda table: [[*row, "note" if row is table[0] else "two\nlines"] for row in table]),
    }
    harmful = {     # kind -> what is done, what is told
        "is UTF-16": (edit(pattern, lambda data: data.decode().encode("utf-16")), "not UTF-8"), "has a NUL byte": (edit(pattern, lambda data: data[:-4] + b"\0" + data[-4:]), "NUL"),
        "has a Latin-1 letter": (edit(pattern, lambda data: data.rstrip(b"\n") + b" M\xfcller\n"), "not UTF-8"),
        "has a quotation mark that is not closed": (edit(pattern, lambda data: data.replace(b"\n", b'\n"', 1)), "quotation mark"),
        "has a line that is too short": (lines(pattern, lambda table: [*table[:-1], table[-1].rpartition(",")[0]]), r"line \d+: \d+ fields, expected \d+"),
        "has a line that is too long": (lines(pattern, lambda table: [*table[:-1], table[-1] + ",1,2,3,4"]), r"line \d+: \d+ fields, expected \d+"),
        "has longer lines than its header": (lines(pattern, lambda table: [table[0], *(f"{line},7" for line in table[1:])]), r"line \d+: \d+ fields, expected \d+"),
        "has only a header": (lines(pattern, lambda table: table[:1]), "no rows"), "has semicolons": (edit(pattern, lambda data: data.replace(b",", b";")), "no column|quotation mark"),
        "has a column twice": (rows(pattern, lambda table: [[*row, row[table[0].index(columns[0])]] for row in table]), "more than once"),
        "is cut off in its last line": (edit(pattern, lambda data: data.rstrip(b"\n").rpartition(b",")[0]), r"line \d+: \d+ fields, expected \d+"),
    }
    if packed:
        harmful |= {kind: (swapped_gz(pattern, change), "cannot be read") for kind, change in {
            "is packed and cut off": lambda data: data[:-12], "is said to be packed and is not": gzip.decompress, "is packed, with a wrong check sum": lambda data: data[:-8] + b"\1\2\3\4" + data[-4:]}.items()}
        harmless |= {"is packed": swapped_gz(pattern, lambda data: data)}
    found = [Damage(f"{name} {kind}", do, SAME) for kind, do in harmless.items()]
    found += [Damage(f"{name} {kind}", do, ERROR, f"({message}).*({cause})") for kind, (do, cause) in harmful.items()]
    return found + [Damage(f"{name} has no column {column}", rows(pattern, without(column)), ERROR, f"no column .*{re.escape(column)}") for column in columns]


def swapped_gz(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    "The file, packed, in place of itself."
    def do(root: Path) -> None:
        path = one(root, pattern)
        data = path.read_bytes() if path.suffix == ".gz" else gzip.compress(path.read_bytes(), mtime=0)
        path.unlink()
        put(path if path.suffix == ".gz" else path.with_name(path.name + ".gz"), change(data))
    return do


def as_picture(change: Callable[[Image.Image], Image.Image], kind: str = "PNG", **options) -> Callable[[bytes], bytes]:
    def do(data: bytes) -> bytes:
        out = io.BytesIO()
        with Image.open(io.BytesIO(data)) as picture:
            change(picture.convert("L")).save(out, kind, **options)
        return out.getvalue()
    return do


def bomb(data: bytes) -> bytes:
    "The header of a PNG of 60 000 x 60 000 pixels, with little behind it."
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(60001 * 40))) + chunk(b"IEND", b"")


def turned(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.ROTATE_90)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def frames(data: bytes) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        first = picture.convert("L")
    first.save(out, "TIFF", save_all=True, append_images=[first.point(lambda value: 255 - value)] * 2)
    return out.getvalue()


def to_picture(pattern: str, name: str, number: int = 0, masked: bool = False) -> list[Damage]:
    "Damage to a PNG or JPEG; pictures are recognised by what is in them, not by their names. One that is `masked` by a file may not be turned without it."
    kinds = {
        "is cut off in the middle": (lambda data: data[:len(data) // 2], REJECT), "has only a header": (lambda data: data[:40], REJECT),
        "claims 60 000 x 60 000 pixels": (bomb, REJECT), "is a single pixel": (as_picture(lambda picture: picture.crop((0, 0, 1, 1))), REJECT),
        "is a packed picture": (gzip.compress, REJECT), "is a PDF": (lambda data: b"%PDF-1.4\n" + data[:200], REJECT),
        "has its bytes changed to text": (lambda data: data.decode("latin-1").encode("utf-8"), REJECT),
        "is in colour": (as_picture(lambda picture: picture.convert("RGB")), SAME), "has an alpha channel": (as_picture(lambda picture: picture.convert("RGBA")), SAME),
        "has a grey alpha channel": (as_picture(lambda picture: picture.convert("LA")), SAME), "has a palette": (as_picture(lambda picture: picture.convert("P")), SAME),
        "is a BMP": (as_picture(lambda picture: picture, "BMP"), SAME), "is a TIFF of three frames": (frames, SAME),
        "is turned, and says so": (as_picture(turned, exif=orientation(6)), REJECT if masked else SAME),
        "is mirrored, and says so": (as_picture(lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), exif=orientation(2)), REJECT if masked else SAME),
        "has bytes behind its end": (lambda data: data + b"\0" * 500, SAME),
    }
    found = [Damage(f"{name} {kind}", raw(pattern, lambda data, change=change: change(data), number), outcome, "cannot be decoded|not a known image|1 x 1|EXIF orientation" * (outcome == REJECT))
             for kind, (change, outcome) in kinds.items()]
    found.append(Damage(f"{name} is CMYK", raw(pattern, as_picture(lambda picture: Image.merge("CMYK", [picture.point(lambda value: 255 - value)] * 3 + [Image.new("L", picture.size)]), "TIFF"), number), SAME, alike=True))
    found.append(Damage(f"{name} has 16 bits", raw(pattern, as_picture(lambda picture: Image.fromarray(np.asarray(picture).astype(np.uint16) * 256)), number), SAME, alike=True))
    return found + [replace(damage, name=damage.name.replace(pattern.rpartition("/")[2], name)) for damage in to_any_file(pattern, REJECT, "", number)]


def dicom(change: Callable, pattern: str = "**/*.dcm") -> Callable[[Path], None]:
    "Change the data set of the first DICOM file, of 8 bit, not compressed."
    def do(data: bytes) -> bytes:
        of = pydicom.dcmread(io.BytesIO(data))
        out = io.BytesIO()
        change(of)
        pydicom.dcmwrite(out, of, enforce_file_format=False, implicit_vr=False, little_endian=True)
        return out.getvalue()
    return raw(pattern, do)


def to_depth(of, stored: int, signed: bool = False, factor: int = 1) -> None:
    pixels = np.frombuffer(of.PixelData, np.uint8)[:of.Rows * of.Columns].astype(np.int32) * factor - (1000 if signed else 0)
    of.BitsAllocated, of.BitsStored, of.HighBit, of.PixelRepresentation = 16, stored, stored - 1, int(signed)
    of.PixelData = pixels.astype("<i2" if signed else "<u2").tobytes()


def to_colour(of) -> None:
    pixels = np.frombuffer(of.PixelData, np.uint8)[:of.Rows * of.Columns]
    of.SamplesPerPixel, of.PhotometricInterpretation, of.PlanarConfiguration = 3, "RGB", 0
    of.PixelData = np.repeat(pixels, 3).tobytes()


def encapsulated(of, syntax: str) -> None:
    of.file_meta.TransferSyntaxUID = syntax
    of.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(300)])
    of["PixelData"].is_undefined_length = True


def setting(**values) -> Callable:
    return lambda of: [setattr(of, name, value) for name, value in values.items()]


def to_dicom(pattern: str) -> list[Damage]:
    def three_frames(of) -> None:
        of.NumberOfFrames, of.PixelData = 3, of.PixelData * 3

    kinds = {
        "has no pixels": (lambda of: delattr(of, "PixelData"), REJECT), "has three frames": (three_frames, REJECT),
        "has half of its pixels": (lambda of: setattr(of, "PixelData", of.PixelData[:len(of.PixelData) // 4 * 2]), REJECT),
        "claims twice the rows": (lambda of: setattr(of, "Rows", 2 * of.Rows), REJECT), "has no rows": (setting(Rows=0), REJECT), "does not tell its columns": (lambda of: delattr(of, "Columns"), REJECT),
        "does not tell how grey values count": (lambda of: delattr(of, "PhotometricInterpretation"), REJECT),
        "has a slope that is no number": (setting(RescaleSlope="nan", RescaleIntercept="0"), REJECT),
        "has a transfer syntax that nobody knows": (lambda of: setattr(of.file_meta, "TransferSyntaxUID", "1.2.3.4.5"), REJECT),
        "is said to be JPEG 2000 and is not": (partial(encapsulated, syntax="1.2.840.10008.1.2.4.90"), REJECT),
        "is said to be JPEG-LS and is not": (partial(encapsulated, syntax="1.2.840.10008.1.2.4.80"), REJECT),
        "is said to be run-length coded and is not": (partial(encapsulated, syntax="1.2.840.10008.1.2.5"), REJECT),
        "is said to be MPEG": (partial(encapsulated, syntax="1.2.840.10008.1.2.4.102"), REJECT),
        "has 12 of 16 bits": (partial(to_depth, stored=12, factor=16), SAME), "has 16 bits": (partial(to_depth, stored=16, factor=250), SAME),
        "has 16 bits with a sign": (partial(to_depth, stored=16, signed=True, factor=9), SAME), "is in colour": (to_colour, SAME),
        "has a rescale slope": (setting(RescaleSlope="2.5", RescaleIntercept="-1024"), SAME), "lacks patient and date": (lambda of: delattr(of, "PatientID"), SAME),
    }
    found = [Damage(f"DICOM {kind}", dicom(change, pattern), outcome, "cannot be decoded" * (outcome == REJECT), outcome == SAME) for kind, (change, outcome) in kinds.items()]
    found += [Damage("DICOM is cut off in its pixels", raw(pattern, lambda data: data[:len(data) // 2]), REJECT, "cannot be decoded"),
              Damage("DICOM is cut off in its header", raw(pattern, lambda data: data[:300]), REJECT, "cannot be decoded"),
              Damage("DICOM is a black PNG", raw(pattern, lambda data: png(np.zeros((9, 9), np.uint8))), REJECT, "blank|were drawn on"),
              Damage("DICOM without its first 128 bytes", raw(pattern, lambda data: data[128:]), SAME)]
    return found + [replace(damage, name=damage.name.replace("*.dcm", "DICOM")) for damage in to_any_file(pattern, REJECT, "")]


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def of_cells(pattern: str, row: int, table: dict[str, dict[str, str]], outcome: str = REJECT, message: str = "", renamed: bool = False) -> list[Damage]:
    "column -> what is wrong with it -> value; COLUMN in what is told stands for its name"
    name = pattern.rpartition("/")[2]
    return [Damage(f"{name}: {column} is {kind}", cell(pattern, row, column, value), outcome, message.replace("COLUMN", re.escape(column)), renamed=renamed)
            for column, kinds in table.items() for kind, value in kinds.items()]


LABEL = {"2": "2", "nan": "nan", "infinite": "inf", "a word": "yes", "one half": "0.5", "-2": "-2", "a date": "2020-01-01", "a formula": "=1+1"}
NUMBER = {"nan": "nan", "infinite": "inf", "a word": "left", "huge": "1e300", "a date": "1/2", "negative": "-50", "in commas": "1 000"}
PATHS = {"blank": "", "absolute": "/etc/passwd", "led out": "../../../etc/passwd", "led out by backslashes": "..\\..\\secret.png", "nowhere": "train/none.png",
         "of a drive": "C:\\images\\1.png", "a folder": ".", "very long": "a" * 5000 + ".png"}


# ---- the data sets

JPG = "mimic-cxr-jpg/2.0.0/"
META, SPLIT, CHEX = (JPG + f"mimic-cxr-2.0.0-{kind}.csv.gz" for kind in ("metadata", "split", "chexpert"))
REPORTS = "mimic-cxr/2.0.0/mimic-cxr-reports.zip"
IDS = {"blank": "", "a word": "abc", "nan": "nan", "led out": "../../x", "in another form": "12345", "a formula": "=A1", "of another": "59999999"}


def members(change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Callable[[Path], None]:
    "Change what is in the zip of reports."
    def do(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, text in change(held).items():
                archive.writestr(name, text)
        return out.getvalue()
    return raw(REPORTS, do)


def first(change: Callable[[bytes], bytes]) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda held: {name: change(text) if place == 0 else text for place, (name, text) in enumerate(held.items())}


def flag(data: bytes, offset: int, bit: int) -> bytes:
    "Set a bit of the flags of the first member of a zip, in both of its headers."
    data = bytearray(data)
    for mark, shift in ((b"PK\3\4", offset), (b"PK\1\2", offset + 2)):
        data[data.index(mark) + shift] |= bit
    return bytes(data)


def mimic() -> list[Damage]:
    found = to_table(META, ("dicom_id", "subject_id", "study_id", "ViewPosition"), "metadata") + to_table(SPLIT, ("dicom_id", "subject_id", "study_id", "split"), "split")
    found += to_table(CHEX, ("subject_id", "study_id", "Edema", "Pneumonia", "Support Devices"), "chexpert")
    for path, message in ((META, "metadata"), (SPLIT, "split"), (CHEX, "chexpert"), (REPORTS, "reports")):
        found += to_any_file(path, ERROR, message)
    found += to_picture("**/*.jpg", "picture", 0)
    for path in (META, SPLIT):
        kind = path.rpartition("-")[2].partition(".")[0]
        found += of_cells(path, 1, {"dicom_id": IDS}, REJECT, "is not in the split table") + of_cells(path, 1, {"subject_id": IDS, "study_id": IDS}, REJECT, "has another patient or study in the split table")
        found.append(Damage(f"{path.rpartition('/')[2]} has a line twice", lines(path, lambda table: [*table, table[1]]), REJECT, "is more than once in"))
        found.append(Damage(f"{path.rpartition('/')[2]} lacks a line", lines(path, lambda table: [table[0], *table[2:]]), REJECT, f"is not in the {kind} table"))
    found += of_cells(SPLIT, 1, {"split": {"blank": "", "valid": "valid", "in capitals": "TRAIN", "a number": "1", "nan": "nan"}}, REJECT, "split is not train")
    found += of_cells(META, 1, {"ViewPosition": {"blank": "", "unknown": "SWIMMERS", "nan": "nan"}}, RULE)
    found += of_cells(CHEX, 1, {"Edema": LABEL, "Support Devices": LABEL}, REJECT, "COLUMN: a label is .*; expected (a number|1, 0, -1)")
    found += of_cells(CHEX, 1, {"subject_id": {"of another patient": "11234567", "blank": "", "a word": "abc"}}, REJECT, "another patient")
    return found + [
        Damage("an image is in another split than its patient", cell(SPLIT, 3, "split", "validate"), REJECT, "its study has more than one split"),
        Damage("labels have a line twice", lines(CHEX, lambda table: [*table, table[1]]), REJECT, "has more than one row in the table of labels"),
        Damage("reports are cut off", raw(REPORTS, lambda data: data[:len(data) // 2]), ERROR, "reports"),
        Damage("a report is not in the zip", members(lambda held: dict(list(held.items())[1:])), REJECT, "not in the zip"),
        Damage("a report is empty", members(first(lambda text: b"")), REJECT, "blank"), Damage("a report is blanks", members(first(lambda text: b" \n ")), REJECT, "blank"),
        Damage("a report is not UTF-8", members(first(lambda text: text + b"M\xfcller")), REJECT, "not UTF-8"),
        Damage("a report has a NUL byte", members(first(lambda text: text + b"\0")), REJECT, "NUL"),
        Damage("a report is UTF-16", members(first(lambda text: text.decode().encode("utf-16"))), REJECT, "not UTF-8|NUL"),
        Damage("a report is encrypted", raw(REPORTS, lambda data: flag(data, 6, 1)), REJECT, "cannot be read"),
        Damage("a report has a wrong check sum", raw(REPORTS, lambda data: data.replace(b"CHEST", b"CHAST", 1) if b"CHEST" in data else data[:150] + b"~" + data[151:]), REJECT, "cannot be read"),
        Damage("a report is there twice", members(lambda held: {**held, "other/" + next(iter(held)): b"x"}), ERROR, "one of each"),
        Damage("reports stand under another folder", members(lambda held: {"mimic/" + name: text for name, text in held.items()}), SAME),
        Damage("reports stand beside others that lead out", members(lambda held: {**held, "../../../etc/x.txt": b"x", "files/notes.md": b"x"}), SAME),
    ]


GRADES = ("regex_report", "expert_report", "consensus_image")


def edema() -> list[Damage]:
    found = []
    for kind in GRADES:
        path = f"mimic-cxr-pe-severity/{kind}_edema_severity.csv"
        found += to_table(path, ("subject_id", "study_id", "edema_severity", *(["dicom_id"] if kind == GRADES[2] else [])), kind)
        found += to_any_file(path, ERROR, kind)
        grade = {"4": "4", "-1": "-1", "a half": "0.5", "blank": "", "nan": "nan", "a word": "mild", "infinite": "inf"}
        row = 4 if kind == GRADES[0] else 1     # of the report grades, one that the experts do not correct
        found += of_cells(path, row, {"edema_severity": grade}, REJECT, "edema grade")
        found.append(Damage(f"{kind} has a line twice", lines(path, lambda table, row=row: [*table, table[row]]), REJECT, "more than one edema grade"))
        found += of_cells(path, row, {"subject_id": {"of another patient": "10000000"}}, REJECT, "another patient")
    return found


def chexpert() -> list[Damage]:
    found = []
    for part in ("train", "valid"):
        found += to_table(f"{part}.csv", ("Path", "Frontal/Lateral", "AP/PA", "Edema", "Support Devices"), f"{part}.csv") + to_any_file(f"{part}.csv", ERROR, f"{part}.csv")
        found += of_cells(f"{part}.csv", 1, {"Path": {**PATHS, "without its release": "train/patient00001/study1/view1_frontal.jpg", "led out and back": f"CheXpert-v1.0-small/../{part}/patient00001/study1/view1_frontal.jpg"}}, REJECT, "Path is")
        found += of_cells(f"{part}.csv", 1, {"Edema": LABEL, "No Finding": LABEL}, REJECT, "COLUMN is .*; expected (a number|1, 0, -1)")
        found += of_cells(f"{part}.csv", 1, {"AP/PA": {"unknown": "XX", "a number": "1"}, "Frontal/Lateral": {"blank": "", "the other": "Lateral", "unknown": "Oblique"}}, REJECT, "COLUMN is '")
        found.append(Damage(f"{part}.csv has a line twice", lines(f"{part}.csv", lambda table: [*table, table[1]]), REJECT, "more than one line"))
    found.append(Damage("train.csv has a study with two labels", cell("train.csv", 2, "Edema", "1.0"), REJECT, "differ in the label"))
    found.append(Damage("a study is in train.csv and in valid.csv", lines("train.csv", lambda table: [*table, table[1].replace("patient00001/study1", "patient00003/study1")]), REJECT))
    return found + to_picture("train/**/*.jpg", "picture")


BOX = {"nan": "nan", "infinite": "inf", "a word": "left", "huge": "1e300", "negative": "-50", "a date": "1/2", "outside": "5000"}
LINES_RSNA, CLASSES_RSNA = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"


def rsna() -> list[Damage]:
    found = to_table(LINES_RSNA, ("patientId", "x", "y", "width", "height", "Target")) + to_any_file(LINES_RSNA, ERROR, "stage_2_train_labels")
    found += to_table(CLASSES_RSNA, ("patientId", "class"))
    found += of_cells(LINES_RSNA, 2, {name: {**BOX, "blank": ""} for name in ("x", "y", "width", "height")} | {"Target": {**LABEL, "blank": ""}}, REJECT, "line 3: COLUMN is '")
    found += of_cells(LINES_RSNA, 2, {"width": {"0": "0"}, "height": {"0": "0.0"}}, REJECT, "line 3: COLUMN is '") + of_cells(LINES_RSNA, 2, {"Target": {"0": "0"}}, REJECT, "line 3: Target is 0, but x is")
    found += of_cells(LINES_RSNA, 1, {"x": {"given": "3"}}, REJECT, "line 2: Target is 0, but x is") + of_cells(LINES_RSNA, 1, {"Target": {"1": "1"}}, REJECT, "line 2: x is ''") + of_cells(LINES_RSNA, 1, {"Target": {"-1": "-1"}}, REJECT, "line 2: Target is")
    found += of_cells(LINES_RSNA, 2, {"patientId": {"led out": "../../../etc/passwd", "unknown": "nobody", "that of another": "00000000-aaaa-4000-8000-000000000000"}}, REJECT)
    found += of_cells(LINES_RSNA, 2, {"patientId": {"blank": ""}}, ERROR, "line 3: patientId is blank")
    found += of_cells(CLASSES_RSNA, 1, {"class": {"blank": "", "unknown": "Sick", "contrary": "Lung Opacity"}, "patientId": {"blank": "", "unknown": "nobody"}}, REJECT, "class_info.csv: class is")
    found += [Damage("a box is there twice", lines(LINES_RSNA, lambda table: [*table, table[2]]), REJECT, "twice"),
              Damage("an image is healthy twice", lines(LINES_RSNA, lambda table: [*table, table[1]]), REJECT, "twice"),
              Damage("an image is ill and healthy", lines(LINES_RSNA, lambda table: [*table, table[2].split(",")[0] + ",,,,,0"]), REJECT, "differs"),
              Damage("classes disagree", lines(CLASSES_RSNA, lambda table: [*table, table[1].split(",")[0] + ",Normal"]), REJECT, "class"),
              Damage("an image is there twice", lambda root: (root / "stage_2_train_images" / "more").mkdir(), SAME)]
    return found + to_dicom("stage_2_train_images/*.dcm")


RLE = "train-rle.csv"


def siim() -> list[Damage]:
    codes = {"expected pairs": {"odd": "5 10 15", "in commas": "5;10", "-2": "-2", "0": "0"}, "ends at pixel": {"past the end": "1048570 100"}, "no pixels": {"a run of nothing": "5 0"}, "EncodedPixels is blank": {"blank": ""},
             "whole numbers": {"negative": "5 -10", "-1 and more": "-1 5", "a word": "5 ten", "not whole": "5.5 10", "nan": "nan nan", "in hexadecimal": "0x5 0xA", "huge": "1 99999999999999999999", "far past the end": "0 1048577"}}
    found = to_table(RLE, ("ImageId", "EncodedPixels")) + to_any_file(RLE, ERROR, "train-rle")
    found += [damage for message, kinds in codes.items() for damage in of_cells(RLE, 2, {"EncodedPixels": kinds}, REJECT, message)]
    found += of_cells(RLE, 2, {"ImageId": {"blank": ""}}, ERROR, "line 3: ImageId is blank") + of_cells(RLE, 1, {"ImageId": {"led out": "../../../etc/passwd", "unknown": "1.2.3"}}, REJECT, renamed=True)
    found += [Damage("a piece is there twice", lines(RLE, lambda table: [*table, table[2]]), SAME), Damage("an image is healthy twice", lines(RLE, lambda table: [*table, table[1]]), REJECT, "twice"),
              Damage("an image is ill and healthy", lines(RLE, lambda table: [*table, table[2].split(",")[0] + ", -1"]), REJECT, "one says -1")]
    return found + to_dicom("dicom-images-train/*/*/*.dcm")


def covidx() -> list[Damage]:
    found = to_picture("train/*.png", "picture")
    for part in ("train", "test"):
        path = f"{part}_COVIDx9A.txt"
        found += to_any_file(path, ERROR, f"{part}_COVIDx")
        word = lambda place, value, path=path: lines(path, lambda table: [" ".join([*table[0].split()[:place], value, *table[0].split()[place + 1:]]), *table[1:]])  # noqa: E731
        found += [Damage(f"{path}: the class is {kind}", word(2, value), REJECT, "class") for kind, value in {"unknown": "flu", "of version 6": "positive", "nan": "nan", "a number": "1", "in capitals": "NORMAL"}.items()]
        found += [Damage(f"{path}: the name is {kind}", word(1, value), REJECT, renamed=kind in ("nowhere", "very long")) for kind, value in PATHS.items() if value]
        found += [Damage(f"{path} has a line of one word", lines(path, lambda table: [table[0].split()[0], *table[1:]]), REJECT, "fields"),
                  Damage(f"{path} has a line twice", lines(path, lambda table: [*table, table[0]]), REJECT, "more than once"),
                  Damage(f"{path} begins with a byte order mark", edit(path, lambda data: b"\xef\xbb\xbf" + data), SAME), Damage(f"{path} has CRLF", edit(path, lambda data: data.replace(b"\n", b"\r\n")), SAME),
                  Damage(f"{path} has blank lines", lines(path, lambda table: ["", *table, ""]), SAME), Damage(f"{path} is UTF-16", edit(path, lambda data: data.decode().encode("utf-16")), ERROR, f"{path}.*not UTF-8"),
                  Damage(f"{path} has a NUL byte", edit(path, lambda data: data + b"\0"), ERROR, f"{path}.*NUL"), Damage(f"{path} has a Latin-1 letter", edit(path, lambda data: data + b"\xfc\n"), ERROR, f"{path}.*not UTF-8"),
                  Damage(f"{path} is a csv table", edit(path, lambda data: b"name,label\na.png,1\n"), ERROR, f"{path}: no line is of the form")]
    found.append(Damage("the test list is of version 6", lambda root: put(root / "test_COVIDx9A.txt", (root / "test_COVIDx6.txt").read_bytes()), ERROR, "are they of the same version"))
    return found


def object_cxr() -> list[Damage]:
    found = to_picture("train/*.jpg", "picture", 1)
    shapes = {"a word": "rectangle", "of another type": "3 1 1 5 5", "a rectangle of three numbers": "0 1 2 3", "a polygon of two corners": "2 1 1 5 5", "a polygon of seven numbers": "2 1 1 5 5 3 3 7", "nan": "0 nan 1 5 5",
              "infinite": "0 1 1 inf 5", "without extent": "0 5 5 5 9", "with corners exchanged": "0 9 9 5 5", "outside": "0 1 1 500 20", "negative": "1 -40 1 5 5", "in commas": "0,1,1,5,5", "one good, one bad": "0 1 1 9 9;0 1 1",
              "an empty piece": "0 1 1 9 9;", "huge": "0 1 1 1e300 5", "a type only": "2"}
    marked = {"train": 2, "dev": 2}     # lines with something drawn: one of nothing but commas is a blank line
    for part, column in (("train", "image_name"), ("dev", "image_path")):
        found += to_table(f"{part}.csv", ("annotation", column), f"{part}.csv") + to_any_file(f"{part}.csv", ERROR, part)
        found += of_cells(f"{part}.csv", 1, {"annotation": shapes}, REJECT, "shape|polygon|box|corner")
        names = {"does not lead": {kind: value for kind, value in PATHS.items() if kind not in ("nowhere", "very long")}, "is a path": {"nowhere": PATHS["nowhere"]}, "listed more than once": {"that of another": "00001.jpg"}, "": {"very long": PATHS["very long"]}}
        for message, kinds in (names if part == "train" else {"does not lead": {"blank": ""}, "not found": {"nowhere": "none.jpg"}}).items():
            found += of_cells(f"{part}.csv", marked[part], {column: kinds}, REJECT, message, renamed=True)
        found.append(Damage(f"{part}.csv has a line twice", lines(f"{part}.csv", lambda table: [*table, table[1]]), REJECT, "more than once"))
    return found


ENTRIES, BOXES_NIH = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"


def nih() -> list[Damage]:
    found = to_table(ENTRIES, ("Image Index", "Finding Labels", "Patient ID", "View Position"), "Data_Entry_2017") + to_any_file(ENTRIES, ERROR, "Data_Entry")
    found += of_cells(ENTRIES, 1, {"Image Index": {**PATHS, "unknown": "00000009_000.png"}}, ERROR, "Data_Entry_2017|train_val_list")
    found += of_cells(ENTRIES, 1, {"Finding Labels": {"blank": "", "unknown": "Flu", "a finding twice": "Mass|Mass", "none and one": "No Finding|Mass", "with a bar too many": "Mass|"},
                                   "Patient ID": {"blank": "", "that of another": "2", **{kind: NUMBER[kind] for kind in ("nan", "infinite", "a word", "negative")}},
                                   "View Position": {"blank": "", "unknown": "LL"}}, REJECT, "COLUMN (is|has|names)")
    found.append(Damage("an image has two lines", lines(ENTRIES, lambda table: [*table, table[1]]), REJECT, "same image"))
    table = lambda place, value: lines(BOXES_NIH, lambda rows: [rows[0], ",".join([*rows[1].split(",")[:place], value, *rows[1].split(",")[place + 1:]])])  # noqa: E731
    found += [Damage(f"{BOXES_NIH}: field {place} is {kind}", table(place, value), REJECT, "outside of its image" if kind == "outside" else "BBox_List|box") for place in (2, 3, 4, 5) for kind, value in BOX.items()]
    found += [Damage(f"{BOXES_NIH}: field {place} is 0", table(place, "0"), REJECT, "no extent") for place in (4, 5)]
    found += [Damage(f"{BOXES_NIH}: the finding is {kind}", table(1, value), REJECT, "Finding Label is '") for kind, value in {"blank": "", "unknown": "Flu", "without boxes": "Hernia"}.items()]
    found += [Damage(f"{BOXES_NIH}: the image is {kind}", table(0, value), ERROR, "BBox_List.* that Data_Entry_2017 does not have") for kind, value in {"blank": "", "unknown": "00000009_000.png", "led out": "../x.png"}.items()]
    found += [Damage(f"{BOXES_NIH} {kind}", do, ERROR, "BBox_List") for kind, do in {
        "has a line that is too short": lines(BOXES_NIH, lambda rows: [rows[0], rows[1].rpartition(",")[0]]), "has a line that is too long": lines(BOXES_NIH, lambda rows: [rows[0], rows[1] + ",1,,,,,"]),
        "has a filled spare field": lines(BOXES_NIH, lambda rows: [rows[0], rows[1] + ",1"]), "is UTF-16": edit(BOXES_NIH, lambda data: data.decode().encode("utf-16")),
        "is empty": edit(BOXES_NIH, lambda data: b""), "has only a header": lines(BOXES_NIH, lambda rows: rows[:1]), "is a folder": swap(BOXES_NIH, Path.mkdir), "is random bytes": edit(BOXES_NIH, lambda data: bytes(range(256)) * 9),
        "has a column less": lines(BOXES_NIH, lambda rows: [rows[0].replace(",y,", ","), rows[1]]), "is a web page": edit(BOXES_NIH, lambda data: b"<html>\n</html>")}.items()]
    for name, other in (("train_val_list.txt", "00000003_000.png"), ("test_list.txt", "00000001_000.png")):
        found += to_any_file(name, ERROR, name)
        found += [Damage(f"{name} {kind}", do, ERROR, message) for kind, message, do in (
            ("names an image twice", "is in the list already", lines(name, lambda rows: [*rows, rows[0]])), ("names an unknown image", f"{name} are not in", lines(name, lambda rows: [*rows, "00000099_000.png"])),
            ("lacks an image", f"{name} are not in", lines(name, lambda rows: [*rows[1:], "00000099_001.png"])), ("names an image of the other", "in train_val_list.txt and in test_list.txt", lines(name, lambda rows, other=other: [*rows, other])),
            ("has commas", f"{name}.*fields, expected 1", lines(name, lambda rows: [",".join([*rows, "x"])])), ("is UTF-16", f"{name}.*not UTF-8", edit(name, lambda data: data.decode().encode("utf-16"))), ("has a NUL byte", f"{name}.*NUL", edit(name, lambda data: data + b"\0\n")))]
        found += [Damage(f"{name} has CRLF", edit(name, lambda data: data.replace(b"\n", b"\r\n")), SAME), Damage(f"{name} has blank lines", lines(name, lambda rows: ["", *rows, ""]), SAME),
                  Damage(f"{name} begins with a byte order mark", edit(name, lambda data: b"\xef\xbb\xbf" + data), SAME)]
    swapped = lambda root: [put(root / name, data) for name, data in zip(("test_list.txt", "train_val_list.txt"), [(root / name).read_bytes() for name in ("train_val_list.txt", "test_list.txt")])] and None  # noqa: E731
    found.append(Damage("the two lists are exchanged", swapped, ERROR, "are the two lists exchanged"))
    return found + to_picture("images_001/images/*.png", "picture")


def labelme(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def do(data: bytes) -> bytes:
        table = json.loads(data)
        return json.dumps(change(table) or table).encode()
    return edit("covid_rural_annot/jpgs/jsons/*.json", do)


def shape(key: str, value: object) -> Callable[[Path], None]:
    return labelme(lambda table: table["shapes"][0].update({key: value}))


def covid_rural() -> list[Damage]:
    mask, notes = "covid_rural_annot/pngs_masks/*.png", "covid_rural_annot/jpgs/jsons/*.json"
    found = to_picture("covid_rural_annot/jpgs/*.jpg", "picture", masked=True)
    points = {"nan": [[float("nan"), 1], [5, 5], [9, 1]], "infinite": [[float("inf"), 1], [5, 5], [9, 1]], "outside": [[500, 1], [5, 5], [9, 1]], "negative": [[-50, 1], [5, 5], [9, 1]], "two": [[1, 1], [5, 5]], "words": [["a", "b"]] * 3,
              "of three numbers": [[1, 2, 3]] * 3, "not a list": "1 2 3 4 5 6", "null": None, "ragged": [[1, 2], [3], [4, 5]], "an object": {"x": 1}}
    found += [Damage(f"the corners of a lung are {kind}", shape("points", value), REJECT) for kind, value in points.items()]
    found += [Damage(f"the label of a lung is {kind}", shape("label", value), REJECT, "json") for kind, value in {"unknown": "liver", "blank": "", "null": None, "a number": 3, "a list": ["right_lung"]}.items()]
    found += [Damage("a lung is a circle", shape("shape_type", "circle"), REJECT, "json"), Damage("labelme file has no shapes", labelme(lambda table: table.pop("shapes") and None), REJECT, "labelme"),
              Damage("labelme file is a list", labelme(lambda table: [1, 2]), REJECT, "labelme"), Damage("labelme file has shapes that are a number", labelme(lambda table: table.update(shapes=3)), REJECT, "labelme"),
              Damage("labelme file has shapes that are words", labelme(lambda table: table.update(shapes=["lung"])), REJECT, "labelme"),
              Damage("labelme file is cut off", edit(notes, lambda data: data[:400]), REJECT, "json"), Damage("labelme file is very deep", edit(notes, lambda data: b"[" * 100000), REJECT, "json"),
              Damage("labelme file is UTF-16", edit(notes, lambda data: data.decode().encode("utf-16")), REJECT, "json"), Damage("labelme file has a NUL byte", edit(notes, lambda data: data[:50] + b"\0" + data[50:]), REJECT, "json"),
              Damage("labelme file begins with a byte order mark", edit(notes, lambda data: b"\xef\xbb\xbf" + data), SAME), Damage("labelme file lacks the picture", labelme(lambda table: table.update(imageData=None)), SAME),
              Damage("labelme file is empty", edit(notes, lambda data: b""), REJECT, "json"), Damage("labelme file is a folder", swap(notes, Path.mkdir), REJECT, "json")]
    masks = {"of another size": lambda old: np.zeros((9, 9), np.uint8), "of exchanged sides": lambda old: np.zeros((old.shape[0] // 2, old.shape[1]), np.uint8), "of other values": lambda old: old * 7, "of many values": lambda old: np.arange(old.size).reshape(old.shape).astype(np.uint8),
             "of three channels": lambda old: np.stack([old] * 3, -1), "of 16 bits": lambda old: old.astype(np.uint16) * 300}
    ill = 1     # the second image has an opacity
    found += [Damage(f"mask is {kind}", raw(mask, lambda data, make=make: png(make(np.array(Image.open(io.BytesIO(data)).convert("L")))), ill), REJECT, "mask") for kind, make in masks.items()]
    found += [Damage("mask is of 0 and 255", raw(mask, lambda data: png(np.array(Image.open(io.BytesIO(data)).convert("L")) * 255), ill), SAME),
              Damage("mask is of one bit", raw(mask, lambda data: bits(np.array(Image.open(io.BytesIO(data)).convert("L"))), ill), SAME)]
    found += [replace(damage, name=damage.name.replace("*.png", "mask")) for damage in to_any_file(mask, REJECT, "", ill) if not damage.name.endswith(("missing", "nowhere"))]
    found += [Damage("mask is cut off", raw(mask, lambda data: data[:-30], ill), REJECT, r"\.png: cannot"), Damage("mask claims 60 000 x 60 000 pixels", raw(mask, bomb, ill), REJECT, r"\.png: cannot")]
    found += [Damage("an image has another name", lambda root: os.rename(one(root, "covid_rural_annot/jpgs/*.jpg"), root / "covid_rural_annot/jpgs/picture.jpg"), REJECT, "form"),
              Damage("there is no folder of masks", lambda root: os.rename(root / "covid_rural_annot/pngs_masks", root / "covid_rural_annot/masks"), ERROR, "pngs_masks"),
              Damage("there is no folder of images", lambda root: os.rename(root / "covid_rural_annot/jpgs", root / "covid_rural_annot/jpegs"), ERROR, "jpgs")]
    return found


def bits(mask: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(mask > 0).save(out, "PNG")
    return out.getvalue()


XML, LAUGHS = "ecgen-radiology/*.xml", b'<?xml version="1.0"?>\n<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">' + b"".join(
    b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(1, 9)) + b"]>\n<eCitation><uId id=\"CXR1\"/>&i;</eCitation>"


def pack_xml(change: Callable[[bytes], bytes], evil: str = "") -> Callable[[Path], None]:
    "The reports as the archive that is published, changed; perhaps with a member that leads out."
    def do(root: Path) -> None:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for path in sorted(root.glob(XML)):
                archive.add(path, f"ecgen-radiology/{path.name}")
                path.unlink()
            if evil:
                member = tarfile.TarInfo(evil)
                member.size = 4
                archive.addfile(member, io.BytesIO(b"evil"))
        put(root / "NLMCXR_reports.tgz", change(out.getvalue()))
    return do


def codes(change: Callable[[bytes], bytes], number: str = "2") -> Callable[[Path], None]:
    "The structured report of study 2, changed, or as that of another number beside it."
    def do(root: Path) -> None:
        with tarfile.open(root / "radrestruct.tgz") as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}
        files[f"radrestruct/{number}.json"] = change(files["radrestruct/2.json"])
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        put(root / "radrestruct.tgz", out.getvalue())
    return do


def openi() -> list[Damage]:
    found = [replace(damage, name=damage.name.replace("*.xml", "report")) for damage in to_any_file(XML, REJECT, "xml") if not damage.name.endswith("missing")]
    harmful = {
        "is cut off": lambda data: data[:len(data) // 2], "has a tag that is not closed": lambda data: data.replace(b"</uId>", b"").replace(b"</AbstractText>", b"", 1), "has a bare ampersand": lambda data: data.replace(b"<MeSH", b"Tom & Jerry<MeSH"),
        "is an entity bomb": lambda data: LAUGHS, "reads a file": lambda data: b'<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><eCitation><uId id="CXR1"/>&f;</eCitation>', "names a DTD": lambda data: b'<!DOCTYPE e SYSTEM "http://127.0.0.1/x.dtd">' + data.partition(b"?>")[2],
        "is not UTF-8": lambda data: data.replace(b"<MeSH", b"M\xfcller<MeSH"), "has an encoding that nobody knows": lambda data: data.replace(b"utf-8", b"klingon"), "has a NUL byte": lambda data: data.replace(b"<MeSH", b"\0<MeSH"),
        "has no uId": lambda data: re.sub(rb"<uId[^>]*/>", b"", data), "has a uId of another form": lambda data: re.sub(rb'uId id="\w+"', b'uId id="../../x"', data), "has the uId of another": lambda data: re.sub(rb'uId id="\w+"', b'uId id="CXR2"', data),
        "has a section twice": lambda data: data.replace(b'Label="FINDINGS"', b'Label="IMPRESSION"'), "has an unknown section": lambda data: data.replace(b'Label="FINDINGS"', b'Label="RECIPE"'), "is JSON": lambda data: b'{"a": 1}',
        "names an image that leads out": lambda data: re.sub(rb'parentImage id="[^"]+"', b'parentImage id="../../etc/passwd"', data), "names an image that is not there": lambda data: re.sub(rb'parentImage id="CXR1_', b'parentImage id="CXR1_IM-7777_', data),
        "has two megabytes": lambda data: data.replace(b"<MeSH", b" " * 2_000_000 + b"<MeSH"), "has two roots": lambda data: data + b"<x/>",
    }
    found += [Damage(f"report {kind}", edit(XML, change), REJECT) for kind, change in harmful.items()]
    found += [Damage(f"report {kind}", edit(XML, change), SAME) for kind, change in {
        "begins with a byte order mark": lambda data: b"\xef\xbb\xbf" + data, "has CRLF": lambda data: data.replace(b"\n", b"\r\n"), "has remarks": lambda data: data.replace(b"<MeSH", b"<!-- x --><MeSH", 1), "is UTF-16": lambda data: data.decode().replace("utf-8", "utf-16").encode("utf-16"),
        "has elements that nobody reads": lambda data: data.replace(b"</eCitation>", b"<note>x</note></eCitation>"), "names an image twice": lambda data: re.sub(rb"(<parentImage.*?</parentImage>)", rb"\1\1", data, flags=re.S)}.items()]
    found += [Damage("report names no image", edit(XML, lambda data: re.sub(rb"<parentImage.*</parentImage>", b"", data, flags=re.S)), RULE), Damage("reports are packed", pack_xml(lambda data: data), SAME),
              Damage("the archive of reports leads out", pack_xml(lambda data: data, "../../evil.txt"), SAME), Damage("the archive of reports has a report that leads out", pack_xml(lambda data: data, "../../evil.xml"), REJECT, "evil"),
              Damage("the archive of reports is cut off", pack_xml(lambda data: data[:len(data) // 2]), ERROR, "NLMCXR_reports"), Damage("the archive of reports is empty", pack_xml(lambda data: b""), ERROR, "NLMCXR_reports"),
              Damage("the archive of reports is no archive", pack_xml(lambda data: b"x" * 3000), ERROR, "NLMCXR_reports"), Damage("the archive of reports has a wrong check sum", pack_xml(lambda data: data[:-8] + bytes(8)), ERROR, "NLMCXR_reports"),
              Damage("there are no reports", lambda root: [path.unlink() for path in root.glob(XML)] and None, ERROR, "no reports"), Damage("there are no pictures", lambda root: [path.unlink() for path in root.glob("NLMCXR_png/*")] and None, ERROR, "pictures"),
              Damage("two pictures have the same name", lambda root: put(root / "NLMCXR_png" / "CXR1_IM-0001-1001.jpg", b"x"), ERROR, "are the same picture"),
              *(Damage(f"a structured report {kind}", codes(change), REJECT, message) for kind, change, message in (
                  ("is cut off", lambda data: data[:len(data) // 2], "radrestruct/2.json: no structured report"), ("is empty", lambda data: b"", "radrestruct/2.json"), ("is not UTF-8", lambda data: data.replace(b"nodule", b"n\xf6dule"), "radrestruct/2.json"),
                  ("is nested too deeply", lambda data: b"[" * 200_000, "radrestruct/2.json"), ("has two megabytes", lambda data: data + b" " * 2_000_000, "expected at most"), ("is no list", lambda data: b'{"area": "thorax"}', "expected a list of areas"),
                  ("names an unknown finding", lambda data: data.replace(b'"nodule"', b'"module"', 1), "module', which is no finding"), ("has an area twice", lambda data: data[:-1] + b"," + data[1:], "answered twice"),
                  ("names a region by a number", lambda data: re.sub(rb'"body_region": \[[^]]*\]', b'"body_region": [7]', data.replace(b'"instances": []', b'"instances": [{"body_region": ["apex"]}]', 1)), "expected lists of words"))),
              Damage("the structured reports have one that nobody wrote", codes(lambda data: data, "777"), REJECT, "CXR777: in radrestruct.tgz, but not among the reports"), Damage("the structured reports have one twice", codes(lambda data: data, "02"), REJECT, "another file of Rad-ReStruct has its number"),
              Damage("the structured reports have a list of questions with the same number", codes(lambda data: b"[]", "../val_qa_pairs/2"), SAME),
              Damage("the structured reports are cut off", raw("radrestruct.tgz", lambda data: data[:len(data) // 2]), ERROR, "radrestruct.tgz"), Damage("the structured reports are no archive", raw("radrestruct.tgz", lambda data: b"x" * 3000), ERROR, "radrestruct.tgz"),
              Damage("the table of projections is not UTF-8", lambda root: put(root / "indiana_projections.csv", b"uid,filename,projection\n1,1_IM-0001-1001.dcm.png,Fr\xf6ntal\n"), ERROR, "indiana_projections.csv, line 2: not UTF-8"),
              Damage("the table of projections lacks a column", lambda root: put(root / "indiana_projections.csv", "uid,filename\n1,1_IM-0001-1001.dcm.png\n"), ERROR, "indiana_projections.csv: no column 'projection'")]
    return found + to_picture("NLMCXR_png/CXR1_*.png", "picture")


def other_patient(table: list[list[str]]) -> list[list[str]]:
    "The first image is of a patient whose images have another split."
    patient, split = table[0].index("patient_id"), table[0].index("split")
    table[1][patient] = next(row[patient] for row in table[2:] if row[split] != table[1][split])
    return table


def folder() -> list[Damage]:
    needed = ("image_path", "report", "Edema")
    found = [damage for damage in to_table("table.csv", needed, "table.csv") if not damage.name.endswith("blanks around its cells")] + [Damage(one.name, one.do, ERROR, "table.csv") for one in to_any_file("table.csv", ERROR, "")]
    found += of_cells("table.csv", 1, {"Edema": {kind: value for kind, value in LABEL.items() if kind != "nan"}, "image_path": {kind: PATHS[kind] for kind in ("led out", "led out by backslashes", "of a drive", "a folder")}, "split": {"blank": "", "unknown": "holdout", "a number": "1", "nan": "nan"}, "patient_id": {"blank": ""}, "study_id": {"blank": ""}}, ERROR, "row 1")
    found += of_cells("table.csv", 1, {"image_path": {kind: PATHS[kind] for kind in ("nowhere", "very long", "blank")}}, ERROR, "no image 'images/0.png'")
    found.append(Damage("a patient is in two splits", rows("table.csv", other_patient), ERROR, "1 x patient"))
    found += [Damage("table.csv names an image twice", cell("table.csv", 2, "image_path", "images/0.png"), ERROR, "same image"), Damage("table.csv has a line twice", rows("table.csv", lambda table: [*table, table[1]]), ERROR, "same image"),
              Damage("a study has two patients", cell("table.csv", 2, "study_id", "phantom-0000000"), ERROR, "different values"), Damage("table.csv leads to another place by an absolute path", cell("table.csv", 1, "image_path", "/etc/passwd"), ERROR, "leads out")]
    found += to_table("boxes.csv", ("image_path", "label", "x1", "y1", "x2", "y2"), "boxes.csv", packed=False) + to_any_file("boxes.csv", ERROR, "boxes.csv")
    found += of_cells("boxes.csv", 1, {name: {kind: BOX[kind] for kind in ("nan", "infinite", "a word", "a date")} for name in ("x1", "y1", "x2", "y2")}, ERROR, "boxes.csv, line 2")
    found += of_cells("boxes.csv", 1, {"x1": {"negative": "-50", "right of x2": "63", "huge": "1e300"}, "x2": {"outside": "5000", "left of x1": "0"}, "y2": {"outside": "64000"}}, REJECT, "box")
    found += of_cells("boxes.csv", 1, {"image_path": {"blank": "", "unknown": "images/99.png", "led out": "../../x"}, "label": {"blank": ""}}, ERROR, "boxes.csv, line 2|leads out")
    found += to_table("masks.csv", ("image_path", "label", "mask_path"), "masks.csv", packed=False) + to_any_file("masks.csv", ERROR, "masks.csv")
    found += of_cells("masks.csv", 1, {"image_path": {"blank": "", "unknown": "images/99.png"}, "label": {"blank": ""}, "mask_path": {"blank": "", "led out": "../../x.png", "absolute": "/etc/passwd"}}, ERROR, "masks.csv|leads out")
    found += of_cells("masks.csv", 1, {"mask_path": {"nowhere": "masks/none.png", "an image": "images/0.png", "a folder": "masks"}}, REJECT, "mask|png")
    found += [Damage("mask is of another size", raw("masks/*.png", lambda data: png(np.zeros((9, 9), np.uint8))), REJECT, "mask"), Damage("mask is of other values", raw("masks/*.png", lambda data: png(np.full((64, 64), 7, np.uint8))), REJECT, "mask")]
    return found + to_picture("images/0.png", "picture", masked=True) + to_dicom("images/*.dcm")


def class_folder() -> list[Damage]:
    found = to_picture("train/NORMAL/*.jpeg", "picture")
    return [replace(damage, outcome=SAME if damage.name.endswith("missing") else damage.outcome) for damage in found if not damage.name.endswith(("is missing", "is a folder"))] + [
        Damage("a picture is of a patient of the test set", lambda root: os.link(one(root, "train/NORMAL/*.jpeg"), root / "train" / "NORMAL" / one(root, "test/*/*.jpeg").name), ERROR, "1 x patient"),
        Damage("a picture does not tell its patient", lambda root: os.rename(one(root, "train/NORMAL/*.jpeg"), root / "train" / "NORMAL" / "scan.jpeg"), REJECT, "patient", renamed=True),
        Damage("notes lie among the pictures", lambda root: put(root / "train" / "NORMAL" / "notes.txt", "x"), SAME), Damage("hidden files lie among the pictures", lambda root: put(root / "train" / "NORMAL" / "._IM-0001.jpeg", "x"), SAME),
        Damage("a folder leads to itself", lambda root: (root / "train" / "NORMAL" / "loop").symlink_to(root / "train"), SAME), Damage("an empty folder of a class", lambda root: (root / "train" / "OTHER").mkdir(), SAME),
        Damage("a class is written in other capitals", lambda root: os.rename(root / "test" / "NORMAL", root / "test" / "Normal"), ERROR, "differ in capital letters"),
        Damage("masks lie among the pictures", lambda root: shutil.copytree(root / "test" / "NORMAL", root / "train" / "NORMAL" / "masks") and None, ERROR, "a folder of masks"),
        Damage("there is nothing", lambda root: [os.rename(root / part, root.parent / part) for part in ("train", "val", "test")], ERROR, "no study"),
    ]


# ---- undamaged copies, and how each is read


TABLES = {"mimic-cxr": mimic, "mimic-edema": edema, "chexpert": chexpert, "rsna": rsna, "siim": siim, "covidx": covidx, "object-cxr": object_cxr, "nih": nih, "covid-rural": covid_rural, "openi": openi,
          "folder": folder, "class-folder": class_folder}


OPTIONS = {"folder": lambda root: dict(label_columns=("Edema",), boxes=root / "boxes.csv", masks=root / "masks.csv"), "class-folder": lambda root: dict(patients="kermany")}


def reading(name: str, root: Path, **changes) -> ReadConfig:
    return DATASETS[name].config(root, **OPTIONS.get(name, lambda root: {})(root), **changes)


def plan(name: str, root: Path) -> Source:
    "The plan, if no patient of it is in two splits."
    source = DATASETS[name].plan(reading(name, root))
    refuse(_find_shared_patients(source), name)
    return source


@dataclass
class Content:
    images: dict[str, dict]             # id -> all that is told of it
    rejects: list[tuple[str, str, str]]
    dropped: int
    studies: dict[tuple, StudyRecord]   # item of the plan and identity of its files -> what was read


def identity(item: dict, root: Path) -> tuple:
    "An item and the files it names: untouched files of a copy are those of the original."
    return json.dumps(item, sort_keys=True), *((name, (root / name).stat().st_ino if os.path.isfile(root / name) else 0) for name in _files_of(item))


def read(name: str, root: Path, unchanged: dict[tuple, StudyRecord]) -> Content:
    "Everything that would get into a Pack; what is `unchanged`, because nothing about it changed, is not read again."
    source = plan(name, root)
    found = Content({}, [], sum(source.dropped.values()) + sum(source.settings.get("beside", {}).values()), {})
    for item in source.items:
        key = identity(item, root)
        study = found.studies[key] = unchanged[key] if key in unchanged else read_study(json.loads(json.dumps(item)), root, SIZE, "pad")
        found.rejects += study.rejects
        for image in study.images:
            assert image.image_id not in found.images, f"{image.image_id} is there twice"
            masks = image.masks and {what: None if mask is None else np.asarray(mask).tobytes() for what, mask in image.masks.items()}
            found.images[image.image_id] = {
                "study": study.study_id, "patient": study.patient_id, "split": study.split, "labels": study.labels, "grades": study.grades, "coded": study.coded, "report": " ".join(study.report.split()), "view": image.view, "boxes": image.boxes and sorted(image.boxes),
                "masks": masks, "pixels": image.pixels}
    return found


def differs(found: dict, true: dict, alike: bool) -> list[str]:
    "What is told of an image that is not true."
    wrong = [what for what in true if what != "pixels" and found[what] != true[what]]
    same = np.corrcoef(found["pixels"].ravel(), true["pixels"].ravel())[0, 1] > 0.999 if alike else (found["pixels"] == true["pixels"]).all()
    return wrong if same else [*wrong, "pixels"]


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> Callable[[str], tuple[Path, Content]]:
    done = {}

    def get(name: str) -> tuple[Path, Content]:
        if name not in done:
            studies = {"mimic-edema": 20, "object-cxr": 20}.get(name, STUDIES)
            root = tmp_path_factory.mktemp(name) / "files"
            root.mkdir()
            numbers = (index for index in count() if DATASETS[name].follow_ups or patient_number(SEED, index) == index)
            DATASETS[name].simulate(root, [Phantom(SIZE, SEED)[index] for index in islice(numbers, studies)])      # the damage is to what these show
            done[name] = root, read(name, root, {})
            assert done[name][1].images and not done[name][1].rejects
        return done[name]
    return get


def copy(source: Path, target: Path) -> Path:
    "The same files, as hard links."
    for path in sorted(source.rglob("*")):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target / path.relative_to(source))
    return target


def quiet(message: str, truth: Content) -> bool:
    "Whether a message keeps the reports to itself."
    return not any(sentence.strip() in message for facts in truth.images.values() for sentence in re.split("[.:\n]", facts["report"]) if len(sentence) > 30)


def verdict(name: str, damage: Damage, root: Path, truth: Content) -> tuple[str, str]:
    "The outcome, and what was said; AssertionError for a wrong row or one that went in silence."
    try:
        found = read(name, root, truth.studies)
    except DataError as error:
        assert quiet(str(error), truth), "a report stands in the error"
        return ERROR, str(error)
    message = "\n".join(f"{item}: {reason}" for item, reason, _ in found.rejects)
    assert quiet(message, truth), "a report stands in a reject"
    for image, facts in found.images.items():
        assert image in truth.images, f"{image} is invented"
        if facts["coded"] is None and f"{facts['study']}: " in message:      # a damaged structured report costs the codes alone
            facts["coded"] = truth.images[image]["coded"]
        assert not (wrong := differs(facts, truth.images[image], damage.alike)), f"wrong in silence: {wrong} of {image}"
    missing = [image for image in truth.images if image not in found.images]
    if not missing:
        return (REJECT if found.rejects else SAME), message
    assert len({truth.images[image]["study"] for image in missing}) <= 2, f"{missing} are lost: more than a study, and one that it is taken for"
    if not found.rejects:
        assert found.dropped > truth.dropped, f"{missing} went in silence"
        return RULE, ""
    for image in missing:
        names = (image, truth.images[image]["study"])
        assert any(part and part in message for part in names) or re.search(r"\bline \d|\.xml|row \d", message) or damage.renamed and len(found.rejects) >= len(missing), f"nobody tells of {image}"
    return REJECT, message


ALL = {name: {damage.name: damage for damage in make()} for name, make in TABLES.items()}
IDS_OF_ALL = [(name, kind) for name, damages in ALL.items() for kind in damages]


def test_there_are_200_kinds_of_damage_and_1000_cases():
    "A kind is what is done, whatever it is done to: `x1 is nan` and `y1 is nan` are one, and `has no column Edema` is one with all columns."
    for name, make in TABLES.items():
        assert len(make()) == len(ALL[name]), f"{name}: a name is there twice"
    kinds = {re.sub(r"^.*? (?=(is|are|has|have|lacks|names|begins|claims|does|leads|lie|stand) )|(?<=has no column) .*", "", kind) for _, kind in IDS_OF_ALL}
    assert len(kinds) >= 200 and len(IDS_OF_ALL) >= 1000


@pytest.mark.parametrize("name, kind", IDS_OF_ALL)
def test_damage(name, kind, undamaged, tmp_path):
    damage, (source, truth) = ALL[name][kind], undamaged(name)
    root = copy(source, tmp_path / "files")
    damage.do(root)
    outcome, message = verdict(name, damage, root, truth)
    assert outcome == damage.outcome, f"expected {damage.outcome}, found {outcome}: {message[:600]}"
    assert re.search(damage.message, message), f"expected {damage.message!r} in: {message[:600]}"
    if outcome != SAME:
        _, problems = check_source(DATASETS[name], reading(name, root))
        assert outcome != ERROR or any(re.search(damage.message, problem) for problem in problems), f"medvis data check tells {problems}"


@pytest.mark.parametrize("name, patterns", [("mimic-cxr", ["**/*.jpg"]), ("openi", ["ecgen-radiology/*.xml", "NLMCXR_png/CXR2_*.png"]), ("covid-rural", ["**/jsons/*.json", "**/jpgs/*AR-00000005*.jpg"])])
def test_packs_of_damaged_files_hold_the_rest(name, patterns, undamaged, tmp_path):
    "From end to end: what is damaged is in `rejects`, all else as in the Pack of the undamaged files."
    source, _ = undamaged(name)
    damaged, options = copy(source, tmp_path / "files"), command_config(DATASETS[name])
    for pattern in patterns:
        raw(pattern, lambda data: data[:len(data) // 3])(damaged)
    whole, rest = (prepare_data(options(DATASETS[name].config(root), BuildConfig(tmp_path / pack, size=SIZE, max_rejects=1, allow_leaks=True, progress=False)))
                   for root, pack in ((source, "whole"), (damaged, "rest")))
    assert len(rest.rejects) >= len(patterns) and not len(whole.rejects) and 0 < len(rest) < len(whole)
    places = {image: row for row, image in enumerate(whole.image_table["image_id"])}
    for row, (image, study) in enumerate(zip(rest.image_table["image_id"], rest.image_table["study"], strict=True)):
        other = whole.image_table["study"][places[image]]
        assert (rest.images[row] == whole.images[places[image]]).all()
        assert rest.labels.iloc[study].equals(whole.labels.iloc[other]) and rest.studies["sentences"][study] == whole.studies["sentences"][other]
        assert rest.studies["split"][study] == whole.studies["split"][other]


REFUSED = {     # recipe -> what is told of 30 studies, and the options with which they are taken; None if they lack a file, or films with one finding alone
    ("chexpert", "mgca"): ("(retrieval)", {"retrieval": 0, "validation": 8}), ("chexpert", "lovt"): ("(validation)", {"validation": 8}), ("chexpert", "mgca-5x200"): ("(retrieval)", None), ("rsna", "mgca-boxes"): ("(held_out)", {"held_out": 4}),
    ("nih", "lovt"): ("(no_findings)", {"no_findings": 1}), ("covidx", "mgca"): ("--allow-leaks", {}), ("openi", "frontal"): ("indiana_projections.csv", None), ("openi", "r2gen"): ("annotation.json", None)}


@pytest.fixture(scope="module")
def thirty(tmp_path_factory) -> Callable[[str], Path]:
    "Thirty studies in the format of a data set"
    @cache
    def get(name: str) -> Path:
        root = tmp_path_factory.mktemp(name) / "files"
        simulate(name, root, studies=30)
        return root
    return get


@pytest.mark.parametrize("name, recipe", [(name, recipe) for name, data_set in DATASETS.items() for recipe in data_set.recipes])
def test_every_recipe_prepares_or_tells_what_to_change(name, recipe, thirty, tmp_path):
    def prepare(allow_leaks=False, **options):
        return prepare_data(command_config(DATASETS[name])(reading(name, thirty(name), recipe=recipe, **options), BuildConfig(tmp_path / "pack", size=64, progress=False, allow_leaks=allow_leaks)))

    message, options = REFUSED.get((name, recipe), ("", {}))
    _, problems = check_source(DATASETS[name], reading(name, thirty(name), recipe=recipe))
    assert any(message in problem for problem in problems) if message else not problems
    if message:
        with pytest.raises(DataError, match=re.escape(message)):
            prepare()
    if options is not None:
        pack = prepare(allow_leaks=bool(message), **options)
        assert len(pack) and not len(pack.rejects) and pack.manifest["source"]["read"]["recipe"] == recipe


@pytest.mark.parametrize("name", DATASETS)
def test_an_unknown_recipe_is_told_the_known_ones(name, thirty, tmp_path):
    with pytest.raises(DataError, match=f"choose from {', '.join(DATASETS[name].recipes)}"):
        prepare_data(command_config(DATASETS[name])(reading(name, thirty(name), recipe="convirt"), BuildConfig(tmp_path / "pack")))


def scribble(data: bytes, random: np.random.Generator) -> bytes:
    "Change a byte, or take out, double or insert a few."
    at, length = int(random.integers(len(data))), int(random.integers(1, 40))
    part = data[at:at + length]
    new = (bytes([int(random.integers(256))]) + part[1:], b"", part * 2, random.bytes(length) + part, part[::-1])[int(random.integers(5))]
    return data[:at] + new + data[at + length:]


@pytest.mark.parametrize("name", TABLES)
def test_scribbled_files_never_end_in_the_depths(name, undamaged, tmp_path):
    "Random damage to random files, fixed seeds. A changed digit cannot be told from a true one, so only this is asked for: a clear error, or images that exist."
    source, truth = undamaged(name)
    files = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    tables = [file for file in files if not file.endswith((".jpg", ".jpeg", ".png", ".dcm"))] or files
    for seed in range(8):
        random = np.random.default_rng(seed)
        root, chosen = copy(source, tmp_path / str(seed)), str(random.choice(tables if seed % 4 else files))
        (edit if seed % 2 else raw)(chosen, partial(scribble, random=random))(root)
        try:
            found = read(name, root, truth.studies)
        except DataError as error:
            assert quiet(str(error), truth), f"seed {seed}, {chosen}"
        else:
            assert all(facts["pixels"].shape == (SIZE, SIZE) for facts in found.images.values()) and all(reason and code != "other" for _, reason, code in found.rejects)
        check_source(DATASETS[name], reading(name, root))
