"""Reading COCO's layout: what is mapped, dropped, turned, refused."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.coco_folders import dataset, load
from torchvision.transforms import v2

from detector.data.annotations import read_annotations
from detector.data.dataset import CocoDetection, as_float
from detector.data.images import read_image, read_image_with_remarks
from detector.errors import DataError, ImageError


def test_categories_with_gaps_are_mapped_and_back(tmp_path):
    dataset(tmp_path)
    data = load(tmp_path)
    assert data.category_ids == [3, 7]
    assert data.category_names == ["dog", "cat"]
    assert data.image_ids == [4, 9]
    _, target = data[0]
    assert target["labels"].tolist() == [2, 1]
    assert [data.category_ids[label - 1] for label in target["labels"]] == [7, 3]


def test_crowds_and_empty_boxes_are_left_out_and_counted(tmp_path):
    dataset(tmp_path)
    data = load(tmp_path)
    _, target = data[0]
    # The second box reaches beyond the image and is cut there.
    assert target["boxes"].tolist() == [[1, 2, 11, 7], [5, 5, 30, 15]]
    assert len(data.annotations.ids) == 5  # the evaluation sees all of them


def test_image_without_objects(tmp_path):
    dataset(tmp_path)
    image, target = load(tmp_path)[1]
    assert image.shape == (3, 20, 30)
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["image_id"] == 9
    assert type(image) is torch.Tensor
    assert type(target["boxes"]) is torch.Tensor


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path):
    dataset(tmp_path)
    flip = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.ColorJitter(0.5)])
    data = load(tmp_path, transform=flip, seed=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = {(epoch, index): data[epoch, index] for epoch in range(8) for index in range(2)}
    assert torch.equal(state, torch.get_rng_state())  # the surroundings are left alone
    torch.manual_seed(5)
    for key in reversed(list(first)):
        again = data[key]
        assert torch.equal(first[key][0], again[0])
        assert torch.equal(first[key][1]["boxes"], again[1]["boxes"])
    boxes = {tuple(first[epoch, 0][1]["boxes"][0].tolist()) for epoch in range(8)}
    assert boxes == {(1.0, 2.0, 11.0, 7.0), (19.0, 2.0, 29.0, 7.0)}  # as it is, and flipped with its box
    other = load(tmp_path, transform=flip, seed=2)
    assert any(not torch.equal(first[epoch, 0][0], other[epoch, 0][0]) for epoch in range(8))


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
    ("largest", "bits"),
    [(0, 8), (1, 8), (255, 8), (256, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 14), (16384, 16), (65535, 16)],
)
def test_16_bits_that_hold_fewer_are_scaled_by_those(tmp_path, largest, bits, suffix):
    values = np.linspace(0, largest, 48).astype(np.uint16).reshape(6, 8)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(values).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    pixels, remarks = read_image_with_remarks(path)
    expected = [[int(value) * 256 // 2**bits for value in row] for row in values]
    assert pixels.tolist() == [expected] * 3
    said = [f"values of 16 bits or more that use at most {bits}, scaled by those {bits}"]
    assert remarks == (said if largest > 0 and bits < 16 else [])
    assert torch.equal(pixels, read_image(path))


def test_floats_are_scaled_if_they_lie_in_0_to_1(tmp_path):
    path = tmp_path / "image.tif"
    grey = np.arange(48).reshape(6, 8) * 5
    for values, remark in ((grey / 255, "floats from 0 to 1, scaled to 0 to 255"), (grey, None), (grey * 0, "floats")):
        Image.fromarray(values.astype(np.float32)).save(path)
        pixels, remarks = read_image_with_remarks(path)
        assert pixels.tolist() == [(grey * 0 if values.max() == 0 else grey).tolist()] * 3
        assert len(remarks) == (remark is not None)
        assert remark is None or remarks[0].startswith(remark)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.float32([-0.1, 1]), r"floats from -0\.1 to 1: 0 to 1 or 0 to 255 are read; scale them, or save it with 8"),
        (np.float32([0, 255.5]), r"floats from 0 to 255\.5: "),
        (np.float32([0, np.nan]), "floats from nan to nan: "),
        (np.float32([0, np.inf]), "floats from 0 to inf: "),
        (np.int32([-1024, 3000]), "integers from -1024 to 3000: 0 to 65535 are read; save it with 8 or 16 bits"),
        (np.int32([0, 65536]), "integers from 0 to 65536: "),
    ],
)
def test_values_that_are_no_colours_are_refused(tmp_path, values, reason):
    path = tmp_path / "image.tif"
    Image.fromarray(values.reshape(1, 2)).save(path)
    with pytest.raises(DataError, match=f"^{path}: the image has {reason}"):
        read_image(path)


def test_12_bits_are_read_for_training_as_for_predicting(tmp_path):
    dataset(tmp_path)
    values = np.random.default_rng(0).integers(0, 4096, (20, 30), dtype=np.uint16)
    values[0, 0] = 4095
    Image.fromarray(values).save(tmp_path / "images" / "a.png")
    image, _ = load(tmp_path)[0]
    assert torch.equal((image * 255).round().to(torch.uint8), read_image(tmp_path / "images" / "a.png"))
    assert (image[0] * 255).round().tolist() == (values // 16).tolist()


def test_dark_colours_of_16_bits_are_said(tmp_path):
    """Pillow has no mode for them, and gives the upper half of each."""
    path = tmp_path / "image.png"
    for largest, said in ((4095, True), (2**14, False)):
        row = b"\0" + struct.pack(">24H", *[0] * 21, largest, 0, largest // 2)
        head = (b"IHDR", struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0))
        path.write_bytes(chunks(head, (b"IDAT", zlib.compress(row * 6)), (b"IEND", b"")))
        pixels, remarks = read_image_with_remarks(path)
        assert pixels.max() == largest >> 8
        assert remarks == ["dark colours of 16 bits, of which only the upper 8 are read; save them with 8"] * said


FRAMES = {"gif": "GIF", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "avif": "AVIF", "mpo": "MPO"}


@pytest.mark.parametrize("suffix", FRAMES)
def test_of_several_frames_the_first_is_taken_and_that_is_said(tmp_path, suffix):
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow reads no {suffix}")
    first, second = (Image.new("RGB", (64, 48), color) for color in ("red", "blue"))
    several, single = tmp_path / f"several.{suffix}", tmp_path / f"single.{suffix}"
    first.save(several, FRAMES[suffix], save_all=True, append_images=[second])
    first.save(single, "JPEG" if suffix == "mpo" else FRAMES[suffix])
    for path in (several, single):
        pixels, remarks = read_image_with_remarks(path)
        pixels = pixels.float()
        assert (pixels - torch.tensor([255.0, 0, 0])[:, None, None]).abs().max() < 20
        said = path == several and suffix != "mpo"  # of a phone's second view nobody wants to hear
        assert remarks == ["several frames or pages, of which the first was taken"] * said


def test_what_is_broken_behind_the_first_frame_does_not_matter(tmp_path):
    path = tmp_path / "image.gif"
    frames = [Image.new("L", (64, 48), grey) for grey in (10, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    content = path.read_bytes()
    read = 0
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        try:
            pixels = read_image(path)
        except DataError:
            continue
        assert torch.equal(read_image_with_remarks(path)[0], pixels)
        read += 1
    assert read > 10


def rotated(path: Path, orientation: int) -> torch.Tensor:
    """Write a JPEG of 16x8 stored pixels with an EXIF orientation; its pixels as stored."""
    values = np.zeros((8, 16, 3), dtype=np.uint8)
    values[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(path, exif=exif, quality=95)
    return torch.from_numpy(values).permute(2, 0, 1)


def test_annotated_size_decides_about_exif_orientation(tmp_path):
    path = tmp_path / "image.jpg"
    stored = rotated(path, 6)  # a viewer turns it by 90 degrees: 8 wide, 16 high
    as_stored = read_image(path, size=(16, 8))
    assert (as_stored.int() - stored.int()).abs().max() < 30
    upright = read_image(path, size=(8, 16))
    assert (upright.int() - stored.rot90(-1, (1, 2)).int()).abs().max() < 30
    assert torch.equal(read_image(path), upright)
    with pytest.raises(DataError, match=r"image\.jpg.*16x8.*says 9x9"):
        read_image(path, size=(9, 9))


def test_broken_images_are_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:700])
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    for path, reason in ((cut, "cut off"), (text, "cannot be read"), (tmp_path / "none.jpg", "no such image")):
        with pytest.raises(DataError, match=rf"{path.name}.*{reason}"):
            read_image(path)


def png(*more: tuple[bytes, bytes], width=8, height=6) -> bytes:
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return chunks(head, *more, (b"IDAT", zlib.compress(bytes(9 * 6))), (b"IEND", b""))


def chunks(*parts: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def test_one_limit_to_an_images_size_without_a_warning(tmp_path, recwarn):
    path = tmp_path / "image.png"
    path.write_bytes(png())
    assert read_image(path).shape == (3, 6, 8)
    for width in (9_000, 15_000, 60_000):  # Pillow warns of the first two, and reads them
        path.write_bytes(png(width=width, height=10_000))
        with pytest.raises(DataError, match=r"image\.png.*(limit of 89,478,485|exceeds limit)"):
            read_image(path)
    assert not recwarn.list


def test_max_pixels_is_another_limit_for_one_image(tmp_path, monkeypatch, recwarn):
    path = tmp_path / "image.png"
    Image.new("RGB", (30, 20)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow itself refuses more than 200
    for options, reason in (
        ({}, r"Image size \(600 pixels\) exceeds limit of 200 pixels"),
        ({"max_pixels": 599}, "the image has 30x20 pixels, .* limit of 599"),
        ({"max_pixels": 299}, r"Image size \(600 pixels\) exceeds limit of 598 pixels"),
    ):
        with pytest.raises(ImageError, match=f"^{path}: {reason}.*max_pixels"):
            read_image(path, **options)
        assert Image.MAX_IMAGE_PIXELS == 100
    assert read_image(path, max_pixels=600).shape == (3, 20, 30)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(DataError, match="no such image"):
        read_image(tmp_path / "nothing.png", max_pixels=600)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert not recwarn.list


def test_a_file_that_is_no_photograph_is_not_given_to_other_programs(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"  # which Ghostscript would run
    with pytest.raises(DataError, match=r"image\.jpg: cannot be read as an image"):
        read_image(path)


def test_exif_data_that_is_cut_off(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png((b"eXIf", b"MM\0*")))
    assert torch.equal(read_image(path, size=(8, 6)), read_image(path))  # no orientation can be told


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(DataError, match=r"image\.png.*no regular file"):
        read_image(tmp_path / "image.png")


IMAGE = {"id": 1, "file_name": "a.png", "width": 30, "height": 20}
BOX = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}


def test_files_that_are_no_annotations(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(DataError, match=r"a\.json: no such file"):
        read_annotations(path)
    content = json.dumps(dataset(tmp_path))
    for text in ("", "[1, 2]", "3", content[: len(content) // 2], '{"images": []}', "\x00\xff"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"a\.json"):
            read_annotations(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.json"):
        read_annotations(path)
    with pytest.raises(DataError, match="no such image folder"):
        CocoDetection(tmp_path / "nowhere", tmp_path / "annotations.json")


def test_real_micrographs(bccd):
    data = CocoDetection(bccd / "val", bccd / "annotations" / "instances_val.json")
    assert data.category_names == ["WBC", "RBC", "Platelets"]
    assert (len(data), len(data.annotations.ids)) == (87, 1137)
    image, target = data[0]
    assert image.shape == (3, 480, 640)
    assert target["boxes"].amax() <= 640


def test_speck_that_loses_its_size_in_the_transform_is_left_out(tmp_path):
    speck = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [29.999998, 2, 1e-6, 4]}
    dataset(tmp_path, images=[IMAGE], annotations=[speck, {**BOX, "id": 2}])
    data = load(tmp_path, transform=v2.Resize([4, 5]))
    _, target = data[0]
    assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    assert len(target["boxes"]) == len(target["labels"])


def test_real_coco(coco_cc):
    """A genuine subset of COCO: ids with gaps, crowds, images without objects."""
    folder = coco_cc
    data = CocoDetection(folder / "val2017", folder / "annotations" / "instances_val2017.json")
    assert len(data.category_ids) == 80
    assert data.category_ids[-1] == 90
    crowds = data.annotations.crowds.sum()
    assert crowds == 8
    assert data.counts().sum() + crowds == len(data.annotations.ids) == 560
    for index in (0, len(data) - 1):
        image, target = data[index]
        info = data.annotations.image(*data.annotations.find([int(target["image_id"])]))
        assert image.shape == (3, info["height"], info["width"])


def test_images_in_bytes_are_those_in_floats(tmp_path):
    dataset(tmp_path)
    crop = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(8)])
    data = load(tmp_path, transform=crop)
    for index in range(2):
        (floats, target), (sent, same) = data[3, index], data.as_bytes()[3, index]
        assert sent.dtype == torch.uint8
        assert torch.equal(as_float(sent), floats)
        assert all(torch.equal(target[name], same[name]) for name in target)
        assert sent.untyped_storage().nbytes() == sent.nbytes  # not that of the whole image
