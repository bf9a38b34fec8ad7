"""EXIF orientations: one rule for all tools."""

import json

import lightning
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.annotation_files import VALID

from detector.data.check_dataset import check_dataset
from detector.data.dataset import CocoDetection
from detector.data.images import AMBIGUOUS_ORIENTATION, OVERRULED_ORIENTATION, read_image, read_image_with_remarks
from detector.errors import DataError
from detector.pretrained.image_tensors import image_tensor
from detector.training.data import CocoDataModule

ORIENTATION = 0x0112
# What a viewer does with the stored pixels, [H, W, 3], from the EXIF standard's table of rows and columns.
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


def write(path, orientation, height=8, width=12):
    """An image with an EXIF orientation; its stored pixels, [H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:4, :6, 0], pixels[4:, 6:, 1], pixels[:4, 6:, 2] = 255, 200, 150
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(path.suffix, {})
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return pixels


def same(image, pixels):
    """Whether an image [3, H, W] has these pixels [H, W, 3], but for JPEG's losses."""
    values = image.permute(1, 2, 0).numpy().astype(int)
    return values.shape == pixels.shape and abs(values - pixels).max() < 60


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(8, 12), (12, 12)])
def test_pixels_are_turned_as_the_setting_says(tmp_path, suffix, orientation, shape):
    path = tmp_path / f"image.{suffix}"
    stored = write(path, orientation, *shape)
    upright = UPRIGHT[orientation](stored)
    assert same(read_image(path), upright)
    assert same(read_image(path, orientation="stored"), stored)
    for pixels in (stored, upright):  # the annotation's size decides where it can
        size = (pixels.shape[1], pixels.shape[0])
        told = stored.shape != upright.shape
        assert same(read_image(path, size=size), pixels if told else upright)
        assert same(read_image(path, size=size, orientation="stored"), pixels if told else stored)
    with pytest.raises(DataError):
        read_image(path, size=(12, 9))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_of_pillow_are_turned_as_files_are(tmp_path, suffix, orientation):
    path = tmp_path / f"image.{suffix}"
    write(path, orientation)
    with Image.open(path) as image:
        opened = image_tensor(image)
        pass
    with Image.open(path) as image:
        stored = image_tensor(image, orientation="stored")
    assert torch.equal(opened, read_image(path))
    assert torch.equal(stored, read_image(path, orientation="stored"))
    with Image.open(path) as image:
        assert same(opened, np.asarray(ImageOps.exif_transpose(image)).astype(int))


@pytest.mark.parametrize(("orientation", "height", "width", "setting", "said"), [
    (3, 8, 12, "upright", "turned upright"),
    (3, 8, 12, "stored", "taken as stored"),
    (6, 12, 12, "upright", "turned upright"),
    (6, 8, 12, "upright", "taken as stored"),  # the annotation's size says so
    (6, 12, 8, "stored", "turned upright"),
    (6, 12, 8, "upright", None),
    (6, 8, 12, "stored", None),
    (1, 8, 12, "upright", None),
    (9, 8, 12, "upright", None),  # there is none of that number
])  # fmt: skip
def test_images_that_may_be_labelled_otherwise_are_remarked(tmp_path, orientation, height, width, setting, said):
    stored = (12, 12) if height == width else (8, 12)
    write(tmp_path / "image.jpg", orientation, *stored)
    _, remarks = read_image_with_remarks(tmp_path / "image.jpg", size=(width, height), orientation=setting)
    assert [remark.rpartition(": ")[2] for remark in remarks] == ([said] if said else [])
    told = height != width and orientation == 6
    assert all(
        remark.startswith(f"{OVERRULED_ORIENTATION if told else AMBIGUOUS_ORIENTATION} {orientation}: ")
        for remark in remarks
    )


def red_square(root, orientation):
    """A red square on blue, labelled in the upright picture of a COCO folder with one image."""
    upright = np.zeros((30, 30, 3), dtype=np.uint8)
    upright[..., 2] = 255
    upright[2:10, 4:12] = (255, 0, 0)
    # Stored so that a viewer shows it upright: by the inverse of what it does.
    numbers = UPRIGHT[orientation](np.arange(900).reshape(30, 30))
    stored = upright.reshape(-1, 3)[np.argsort(numbers.reshape(-1))].reshape(30, 30, 3)
    for name in ("train2017", "val2017"):
        (root / name).mkdir(parents=True)
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.fromarray(stored).save(root / name / "a.png", exif=exif)
        box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [4, 2, 8, 8], "area": 64}
        data = VALID | {"images": [{"id": 1, "file_name": "a.png", "width": 30, "height": 30}], "annotations": [box]}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(data))
    return root / "annotations" / "instances_train2017.json"


@pytest.mark.parametrize("orientation", range(2, 9))
def test_labels_of_the_upright_picture_meet_its_pixels(tmp_path, orientation):
    annotations = red_square(tmp_path, orientation)
    image, target = CocoDetection(tmp_path / "train2017", annotations)[0]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert image[:, y1:y2, x1:x2].mean(dim=(1, 2)).tolist() == [1, 0, 0]
    assert torch.equal((image * 255).byte(), image_tensor(tmp_path / "train2017" / "a.png"))  # what predict sees


@pytest.mark.parametrize("setting", ["upright", "stored"])
def test_check_and_the_start_of_a_training_say_where_it_matters(tmp_path, setting, caplog):
    annotations = red_square(tmp_path, 3)
    found = check_dataset(annotations, tmp_path / "train2017", orientation=setting)
    (note,) = [problem for problem in found.findings if "both orientations" in problem.kind]
    assert note.level == "note"
    assert "a.png" in note.message
    data = CocoDataModule(root=str(tmp_path), workers=0, orientation=setting)
    data.trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.setup("fit")
    of_split = [note for note in data.notes if "EXIF orientation" in note]
    assert all(note in caplog.text for note in of_split)
    assert [note.partition(":")[0] for note in of_split] == ["train2017", "val2017"]
    assert all("a.png" in note and setting in note for note in of_split)
    turned = data.val_set[0][0][:, 4, 6].tolist()  # within the labelled box
    assert turned == ([1, 0, 0] if setting == "upright" else [0, 0, 1])
