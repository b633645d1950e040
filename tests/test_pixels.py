"""Grey levels, geometry and completeness: what a file says is seen, and half a file is none."""
import io

import numpy as np
import pytest
from PIL import Image

from medvis.data.annotations import _read_mask
from medvis.data.files import DataError
from medvis.data.images import ImageError, decode_image
from medvis.data.source import _read_item_image

pydicom = pytest.importorskip("pydicom")
TISSUE = np.linspace(500, 1500, 64 * 64).round().astype(np.int64).reshape(64, 64)


def dicom(pixels: np.ndarray, signed: bool = False, leave_out: tuple = (), meta: bool = True, bits: int = 16, **tags) -> bytes:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.DigitalXRayImageStorageForPresentation, "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", int(signed)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelData = pixels.astype(f"<{'i' if signed else 'u'}{bits // 8}").tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    for name in leave_out:
        delattr(dataset, name)
    out = io.BytesIO()
    if meta:
        dataset.save_as(out, enforce_file_format=False)
        return out.getvalue()
    del dataset.file_meta
    dataset.save_as(out, implicit_vr=True, little_endian=True, enforce_file_format=False)
    return out.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize(("signed", "tags", "pad"), [
    (False, {"PixelPaddingValue": 65535}, 65535), (False, {"PixelPaddingValue": 0}, 0), (True, {"PixelPaddingValue": -2000}, -2000),
    (False, {"PixelPaddingValue": 65535, "PixelPaddingRangeLimit": 65000}, 65200), (True, {"PixelPaddingValue": -3000, "PixelPaddingRangeLimit": -1000}, -1500),
    (False, {"PixelPaddingValue": 4095, "WindowCenter": 1000, "WindowWidth": 1000}, 4095)])
def test_padding_is_black_and_out_of_range(inverted, signed, tags, pad):
    pixels = TISSUE.copy()
    pixels[:16] = pad
    seen = decode_image(dicom(pixels, signed, PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2", **tags), "a")
    assert (seen[:16] == 0).all() and seen[16:].min() == 0 and seen[16:].max() == 255 and len(np.unique(seen[16:])) > 200


def as_png(pixels):
    return saved(Image.fromarray(pixels.astype(np.uint16)), "PNG")


def as_tiff(pixels):
    return saved(Image.fromarray(pixels.astype(np.uint16)), "TIFF")


@pytest.mark.parametrize("write", [dicom, as_png, as_tiff])
def test_a_marker_does_not_decide_the_range(write):
    pixels = TISSUE.copy()
    pixels[:6, :6] = 65535
    seen = decode_image(write(pixels), "a")
    assert len(np.unique(seen)) > 150 and (seen[:6, :6] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_picture_and_mask_are_turned_alike(tmp_path, kind):
    block = np.zeros((40, 60), np.uint8)
    block[5:15, 10:40] = 255
    exif = Image.Exif()
    for orientation in (3, 6):
        exif[0x0112] = orientation
        (tmp_path / "a").write_bytes(saved(Image.fromarray(block), kind, exif=exif))
        (tmp_path / "m").write_bytes(saved(Image.fromarray(block), "PNG", exif=exif))
        (tmp_path / "plain").write_bytes(saved(Image.fromarray(block), "PNG"))
        record = _read_item_image({"id": "a", "path": "a", "masks": {"x": {"file": "m"}}}, tmp_path, 60, "pad")
        assert np.array_equal(record.masks["x"], record.pixels > 127)
        with pytest.raises(DataError, match=f"EXIF orientation 1 for an image with orientation {orientation}"):
            _read_item_image({"id": "a", "path": "a", "masks": {"x": {"file": "plain"}}}, tmp_path, 60, "pad")
    with pytest.raises(DataError, match="EXIF orientation 6 for an image with orientation 1"):
        _read_item_image({"id": "a", "path": "plain", "masks": {"x": {"file": "m"}}}, tmp_path, 60, "pad")
    assert _read_mask(tmp_path / "m", 40, 60).shape == (60, 40)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128), np.uint8))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}, {"optimize": True}])
def test_half_a_jpeg_is_none(options):
    exif = Image.Exif()
    exif[0x010E] = b"thumbnail \xff\xd9"
    for image in (NOISE, Image.merge("RGB", [NOISE] * 3)):
        whole = saved(image, "JPEG", exif=exif, **options)
        half = len(whole) // 2
        for broken in (whole[:half] + bytes(half), whole[:half], whole[:half] + b"\xff\xd9", whole[:-40] + b"\xff\xd9", whole[:-2]):
            with pytest.raises(ImageError, match="cannot be decoded"):
                decode_image(broken, "a.jpg")
        assert np.array_equal(decode_image(whole + bytes(500), "a.jpg"), np.asarray(Image.open(io.BytesIO(whole)).convert("L")))


def test_half_a_png_or_jpeg_in_dicom_is_none():
    for data in (saved(NOISE, "PNG"), saved(NOISE, "TIFF", compression="tiff_lzw")):
        for broken in (data[:len(data) // 2], data[:len(data) // 2] + bytes(len(data) // 2)):
            with pytest.raises(ImageError):
                decode_image(broken, "a.png")
    jpeg = saved(NOISE, "JPEG")
    for frame, whole in ((jpeg, True), (jpeg[:3000] + b"\xff\xd9", False), (jpeg[:3000] + bytes(len(jpeg) - 3000), False)):
        dataset = pydicom.dcmread(io.BytesIO(dicom(np.asarray(NOISE), bits=8)), force=True)
        dataset.PixelData = pydicom.encaps.encapsulate([frame])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
        out = io.BytesIO()
        dataset.save_as(out, enforce_file_format=False)
        if whole:
            assert decode_image(out.getvalue(), "a").shape == (128, 128)
        else:
            with pytest.raises(ImageError, match="JPEG"):
                decode_image(out.getvalue(), "a")


def png16(planes: np.ndarray, colour: int) -> bytes:
    "A PNG of 16 bits a channel, which Pillow cannot write: (H, W, C), colour type 2 (RGB), 4 (grey and alpha) or 6"
    import struct
    import zlib
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in planes)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", planes.shape[1], planes.shape[0], 16, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_colour_of_sixteen_bits_is_as_its_grey(colour, channels):
    planes = np.repeat(TISSUE[..., None], channels, 2)
    assert np.array_equal(decode_image(png16(planes, colour), "a"), decode_image(as_png(TISSUE), "a"))


def test_sign_and_white_zero_are_kept():
    shifted = TISSUE - 1000
    for kind in (np.float32, np.int32):
        seen = decode_image(saved(Image.fromarray(shifted.astype(kind)), "TIFF"), "a").astype(int)
        assert seen[0, 0] == 0 and seen[-1, -1] == 255 and len(np.unique(seen)) > 200
    white = decode_image(saved(Image.fromarray(TISSUE.astype(np.uint16)), "TIFF", tiffinfo={262: 0}), "a").astype(int)
    assert white[0, 0] == 255 and white[-1, -1] == 0 and len(np.unique(white)) > 200


def test_incomplete_dicom_is_read_as_parsed():
    wanted = decode_image(dicom(TISSUE), "a.dcm")
    empty = dict.fromkeys(["RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelPaddingValue"])
    for data in (dicom(TISSUE, meta=False), dicom(TISSUE, **empty), dicom(TISSUE, RescaleSlope=["1", "1"], RescaleIntercept=["0", "0"]), dicom(TISSUE, WindowCenter=1000),
                 dicom(TISSUE, leave_out=("SamplesPerPixel",)), dicom(TISSUE, leave_out=("PixelRepresentation", "HighBit", "BitsStored")),
                 dicom(TISSUE, RescaleSlope=1), dicom(TISSUE, WindowCenter=0, WindowWidth=0)):
        for name in ("a.dcm", "a", "a.png"):
            assert np.array_equal(decode_image(data, name), wanted)
    assert np.array_equal(decode_image(saved(NOISE, "PNG"), "a.dcm"), np.asarray(NOISE))
    for name in ("Rows", "PhotometricInterpretation", "PixelData"):
        with pytest.raises(ImageError, match="DICOM without") as error:
            decode_image(dicom(TISSUE, leave_out=(name,)), "a")
        assert "Error" not in error.value.reason


@pytest.mark.parametrize("grey", [0, 7, 255])
def test_blank_pictures_are_rejected(tmp_path, grey):
    for data in (saved(Image.new("L", (90, 64), grey), "PNG"), dicom(np.full((64, 90), grey))):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ImageError, match="blank"):
            _read_item_image({"id": "a", "path": "a"}, tmp_path, 32, "pad")
