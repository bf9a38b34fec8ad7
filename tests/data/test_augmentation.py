"""Transforms of torchvision's v2, by name: the boxes stay where the objects are, whatever is drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from detector.data.dataset import CocoDetection
from detector.errors import DataError
from detector.training.data import CocoDataModule

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
BOXES = [(12, 20, 40, 30), (70, 5, 25, 60), (60, 70, 50, 22)]  # x, y, width, height


@pytest.fixture
def root(tmp_path):
    """Rectangles, each of the colour of its class, in four equal images."""
    pixels = np.full((100, 120, 3), 128, np.uint8)
    for (x, y, width, height), color in zip(BOXES, COLORS):
        pixels[y : y + height, x : x + width] = color
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 120, "height": 100} for i in range(1, 5)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("red", "green", "blue"), start=1)],
        "annotations": [
            {"id": 10 * i + label, "image_id": i, "category_id": label, "bbox": list(box)}
            for i in range(1, 5)
            for label, box in enumerate(BOXES, start=1)
        ],
    }
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        for i in range(1, 5):
            Image.fromarray(pixels).save(tmp_path / split / f"{i}.png")
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def items(root, *, epochs=5, **settings):
    data = CocoDataModule(str(root), **settings).split("train2017", train=True)
    return [data[epoch, index] for epoch in range(epochs) for index in range(len(data))]


def extent(image, label):
    """The box around the pixels that are nearly of a class's colour, or nothing."""
    color = torch.tensor(COLORS[label - 1]) / 255
    rows, columns = torch.where((image - color[:, None, None]).abs().amax(0) < 0.45)
    if not len(rows):
        return None
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomHorizontalFlip(0.5),
        v2.RandomVerticalFlip(0.5),
        v2.RandomShortestSize([60, 100, 150], 400),
        v2.ScaleJitter((200, 200), (0.5, 2.0)),
        v2.RandomCrop((70, 80)),
        v2.RandomIoUCrop(),
        v2.RandomZoomOut(fill=0.5, p=0.5),
        v2.RandomAffine(0, translate=(0.3, 0.3)),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_boxes_follow_the_objects(root, transform):
    found = set()
    for image, target in items(root, augmentation=[transform], min_size=None):
        height, width = image.shape[1:]
        assert image.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1
        assert len(target["boxes"]) == len(target["labels"])
        boxes = target["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        found.add((height, width, *boxes.flatten().round().int().tolist()))
        for box, label in zip(boxes, target["labels"].tolist()):
            visible = extent(image, label)
            # Specks, and edges that are mixed with the ground, may be of no class's colour.
            if visible is None:
                assert (box[2:] - box[:2]).min() < 4
            else:
                assert (visible - box).abs().max() <= 2.5, (type(transform).__name__, label)
    assert len(found) > 1


def test_colours_change_and_boxes_do_not(root):
    plain = items(root, augmentation=[], min_size=None)
    for (image, target), (before, stored) in zip(
        items(root, augmentation=[v2.RandomPhotometricDistort(p=1.0)], min_size=None), plain
    ):
        assert torch.equal(target["boxes"], stored["boxes"])
        assert (image - before).abs().max() > 0.05


def test_every_second_image_is_flipped_unless_told_otherwise(root):
    def lefts(**settings):
        return [round(target["boxes"][0, 0].item()) for _, target in items(root, min_size=None, **settings)]

    assert set(lefts()) == {12, 120 - 12 - 40}
    assert set(lefts(augmentation=[])) == {12}


def test_shorter_sides_are_drawn_and_longer_ones_are_limited(root):
    sizes = {tuple(image.shape[1:]) for image, _ in items(root, min_size=[50, 100, 200], max_size=180, epochs=10)}
    assert sizes == {(50, 60), (100, 120), (150, 180)}
    assert {tuple(image.shape[1:]) for image, _ in items(root, min_size=50)} == {(50, 60)}


def test_the_same_epoch_draws_the_same_whatever_came_before(root):
    data = CocoDataModule(str(root), augmentation=[v2.RandomIoUCrop(), v2.RandomPhotometricDistort()])
    data = data.split("train2017", train=True)
    torch.manual_seed(1)
    first = data[3, 2]
    torch.manual_seed(2)
    torch.rand(5)
    state = torch.get_rng_state()
    second = data[3, 2]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1]["boxes"], second[1]["boxes"])


def test_a_transform_that_fails_names_the_image(root):
    data = CocoDataModule(str(root), augmentation=[v2.RandomCrop(500)])
    with pytest.raises(DataError, match=r"train2017/1\.png: the augmentation fails on this image"):
        data.split("train2017", train=True)[0, 0]


def test_scoring_sees_the_image_as_stored(root):
    data = CocoDataModule(str(root), augmentation=[v2.RandomHorizontalFlip(1.0)]).split("val2017")
    image, target = data[0]
    assert tuple(image.shape) == (3, 100, 120)
    assert target["boxes"][0].tolist() == [12, 20, 52, 50]
    assert isinstance(data, CocoDetection)
