"""Reading image files: modes, depths, frames, orientations, limits and damage."""

import json
import os
import struct
import zlib

import lightning
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.annotation_files import VALID

from detector.data.check_dataset import check_dataset
from detector.data.images import AMBIGUOUS_ORIENTATION, OVERRULED_ORIENTATION, read_image, read_image_with_remarks
from detector.errors import ImageError, SizeError
from detector.pretrained.image_tensors import image_tensor
from detector.training.data import CocoDataModule


def chunks(*parts: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def png(*more: tuple[bytes, bytes], width=8, height=6) -> bytes:
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return chunks(head, *more, (b"IDAT", zlib.compress(bytes(9 * 6))), (b"IEND", b""))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1", "I;16"])
def test_any_mode_is_read_as_rgb(tmp_path, mode):
    values = np.linspace(0, 255, 48).reshape(6, 8)
    if mode == "I;16":
        image = Image.fromarray((values * 257).astype(np.uint16))
    else:
        image = Image.fromarray(values.astype(np.uint8)).convert("RGB").convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    pixels = read_image(path, size=(8, 6))
    assert pixels.shape == (3, 6, 8)
    assert pixels.dtype == torch.uint8
    if mode in ("L", "LA", "RGBA", "I;16"):
        assert (pixels[0].double() - torch.from_numpy(values)).abs().max() <= 1.01


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    ("largest", "bits"), [(0, 8), (255, 8), (256, 10), (1024, 12), (4095, 12), (4096, 14), (16384, 16), (65535, 16)]
)
def test_16_bits_are_scaled_by_those_in_use(tmp_path, largest, bits, suffix):
    values = np.linspace(0, largest, 48).astype(np.uint16).reshape(6, 8)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(values).save(path)
    pixels, remarks = read_image_with_remarks(path)
    assert pixels.tolist() == [(values.astype(int) * 256 // 2**bits).tolist()] * 3
    assert [str(bits) in remark for remark in remarks] == [True] * (largest > 0 and bits < 16)


def test_floats_are_scaled_if_they_lie_in_0_to_1(tmp_path):
    path = tmp_path / "image.tif"
    grey = np.arange(48).reshape(6, 8) * 5
    for values, expected, scaled in ((grey / 255, grey, True), (grey, grey, False), (grey * 0, grey * 0, True)):
        Image.fromarray(values.astype(np.float32)).save(path)
        pixels, remarks = read_image_with_remarks(path)
        assert pixels.tolist() == [expected.tolist()] * 3
        assert ["floats" in remark for remark in remarks] == [True] * scaled


@pytest.mark.parametrize(
    "values",
    [
        np.float32([-0.1, 1]),
        np.float32([0, 255.5]),
        np.float32([0, np.nan]),
        np.float32([0, np.inf]),
        np.int32([-1024, 3000]),
        np.int32([0, 65536]),
    ],
)
def test_values_that_are_no_colours_are_refused(tmp_path, values):
    path = tmp_path / "image.tif"
    Image.fromarray(values.reshape(1, 2)).save(path)
    kind = "floats" if values.dtype == np.float32 else "integers"
    with pytest.raises(ImageError, match=f"^{path}: .*{kind} from .* to "):
        read_image(path)


def test_dark_colours_of_16_bits_are_remarked(tmp_path):
    """Pillow reads only their upper halves."""
    path = tmp_path / "image.png"
    for largest, dark in ((4095, True), (2**14, False)):
        row = b"\0" + struct.pack(">24H", *[0] * 21, largest, 0, largest // 2)
        head = (b"IHDR", struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0))
        path.write_bytes(chunks(head, (b"IDAT", zlib.compress(row * 6)), (b"IEND", b"")))
        pixels, remarks = read_image_with_remarks(path)
        assert pixels.max() == largest >> 8
        assert ["dark" in remark for remark in remarks] == [True] * dark


FRAMES = {"gif": "GIF", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "avif": "AVIF", "mpo": "MPO"}


@pytest.mark.parametrize("suffix", FRAMES)
def test_the_first_of_several_frames_is_read_and_others_are_remarked(tmp_path, suffix):
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow reads no {suffix}")
    first, second = (Image.new("RGB", (64, 48), color) for color in ("red", "blue"))
    several, single = tmp_path / f"several.{suffix}", tmp_path / f"single.{suffix}"
    first.save(several, FRAMES[suffix], save_all=True, append_images=[second])
    first.save(single, "JPEG" if suffix == "mpo" else FRAMES[suffix])
    for path in (several, single):
        pixels, remarks = read_image_with_remarks(path)
        assert (pixels.float() - torch.tensor([255.0, 0, 0])[:, None, None]).abs().max() < 20
        # The second view of a phone's photograph is not worth a remark.
        assert ["frames" in remark for remark in remarks] == [True] * (path == several and suffix != "mpo")


def test_damage_behind_the_first_frame_does_not_matter(tmp_path):
    path = tmp_path / "image.gif"
    frames = [Image.new("L", (16, 12), grey) for grey in (10, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    content = path.read_bytes()
    read = 0
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        try:
            pixels = read_image(path)
        except ImageError:
            continue
        assert pixels.shape == (3, 12, 16)
        read += 1
    assert read > 5


def test_broken_files_are_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "eps.jpg").write_bytes(eps)  # Pillow would run Ghostscript
    for name in ("cut", "text", "folder", "pipe", "eps", "none"):
        with pytest.raises(ImageError, match=rf"{name}\.jpg"):
            read_image(tmp_path / f"{name}.jpg")


def test_one_limit_of_the_size_without_a_warning(tmp_path, recwarn):
    path = tmp_path / "image.png"
    path.write_bytes(png())
    assert read_image(path).shape == (3, 6, 8)
    for width in (9_000, 15_000, 60_000):  # Pillow only warns about the first two
        path.write_bytes(png(width=width, height=10_000))
        with pytest.raises(ImageError, match=r"image\.png.*limit"):
            read_image(path)
    assert not recwarn.list


def test_max_pixels_sets_the_limit_for_one_image(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    Image.new("RGB", (30, 20)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow itself refuses more than 200
    for options in ({}, {"max_pixels": 599}, {"max_pixels": 299}):
        with pytest.raises(ImageError, match=r"image\.png.*max_pixels"):
            read_image(path, **options)
        assert Image.MAX_IMAGE_PIXELS == 100
    assert read_image(path, max_pixels=600).shape == (3, 20, 30)
    with pytest.raises(ImageError):
        read_image(tmp_path / "nothing.png", max_pixels=600)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_broken_exif_data_is_ignored(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png((b"eXIf", b"MM\0*")))
    assert torch.equal(read_image(path, size=(8, 6)), read_image(path))


ORIENTATION = 0x0112
# What a viewer does with stored pixels [H, W, 3], from the EXIF standard's table of rows and columns.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}


def write_oriented(path, orientation, height=8, width=12):
    """Write an image with an EXIF orientation, and return its stored pixels, [H, W, 3]."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:4, :6, 0], pixels[4:, 6:, 1], pixels[:4, 6:, 2] = 255, 200, 150
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(path.suffix, {})
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return pixels


def same(image, pixels):
    """Whether an image [3, H, W] has these pixels [H, W, 3], apart from JPEG's losses."""
    values = image.permute(1, 2, 0).numpy().astype(int)
    return values.shape == pixels.shape and abs(values - pixels).max() < 60


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(8, 12), (12, 12)])
def test_exif_orientations(tmp_path, suffix, orientation, shape):
    path = tmp_path / f"image.{suffix}"
    stored = write_oriented(path, orientation, *shape)
    upright = UPRIGHT[orientation](stored)
    for setting, expected in (("upright", upright), ("stored", stored)):
        assert same(read_image(path, orientation=setting), expected)
        for pixels in (stored, upright):  # the annotated size decides where it can
            size = (pixels.shape[1], pixels.shape[0])
            decides = stored.shape != upright.shape
            assert same(read_image(path, size=size, orientation=setting), pixels if decides else expected)
        with Image.open(path) as image:  # PIL images are turned like files
            assert torch.equal(image_tensor(image, orientation=setting), read_image(path, orientation=setting))
    with Image.open(path) as image:
        assert same(read_image(path), np.asarray(ImageOps.exif_transpose(image)))
    with pytest.raises(SizeError, match=r"12x9"):
        read_image(path, size=(12, 9))


@pytest.mark.parametrize(("orientation", "height", "width", "setting", "start", "end"), [
    (3, 8, 12, "upright", AMBIGUOUS_ORIENTATION, "turned upright"),
    (3, 8, 12, "stored", AMBIGUOUS_ORIENTATION, "taken as stored"),
    (6, 12, 12, "upright", AMBIGUOUS_ORIENTATION, "turned upright"),
    (6, 8, 12, "upright", OVERRULED_ORIENTATION, "taken as stored"),
    (6, 12, 8, "stored", OVERRULED_ORIENTATION, "turned upright"),
    (6, 12, 8, "upright", None, None),
    (6, 8, 12, "stored", None, None),
    (1, 8, 12, "upright", None, None),
    (9, 8, 12, "upright", None, None),  # undefined
])  # fmt: skip
def test_doubtful_orientations_are_remarked(tmp_path, orientation, height, width, setting, start, end):
    write_oriented(tmp_path / "image.jpg", orientation, *((12, 12) if height == width else (8, 12)))
    _, remarks = read_image_with_remarks(tmp_path / "image.jpg", size=(width, height), orientation=setting)
    assert remarks == ([f"{start} {orientation}: {end}"] if start else [])


@pytest.mark.parametrize("setting", ["upright", "stored"])
def test_check_and_training_mention_doubtful_orientations(tmp_path, setting):
    box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 4, 4], "area": 16}
    content = VALID | {"images": [{"id": 1, "file_name": "a.png", "width": 12, "height": 8}], "annotations": [box]}
    (tmp_path / "annotations").mkdir()
    for name in ("train2017", "val2017"):
        (tmp_path / name).mkdir()
        stored = write_oriented(tmp_path / name / "a.png", 3)
        annotations = tmp_path / "annotations" / f"instances_{name}.json"
        annotations.write_text(json.dumps(content))
    found = check_dataset(annotations, tmp_path / "val2017", orientation=setting)
    (note,) = [finding for finding in found.findings if "both orientations" in finding.kind]
    assert note.level == "note"
    assert "a.png" in note.message
    data = CocoDataModule(root=str(tmp_path), workers=0, orientation=setting)
    data.trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.setup("fit")
    notes = [note for note in data.notes if "EXIF orientation" in note]
    assert [note.partition(":")[0] for note in notes] == ["train2017", "val2017"]
    assert all("a.png" in note and setting in note for note in notes)
    image, _ = data.val_set[0]
    assert same((image * 255).byte(), UPRIGHT[3](stored) if setting == "upright" else stored)
