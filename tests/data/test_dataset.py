"""Data sets in COCO's layout: labels, boxes, augmentation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.annotation_files import dataset, load
from torchvision.transforms import v2

from detector.data.annotations import read_annotations
from detector.data.dataset import CocoDetection, as_float
from detector.data.folder import DataFolder
from detector.errors import DataError
from detector.training.data import CocoDataModule


def test_categories_with_gaps_are_mapped_to_labels(tmp_path):
    dataset(tmp_path)
    data = load(tmp_path)
    assert data.category_ids == [3, 7]
    assert data.category_names == ["dog", "cat"]
    assert data.image_ids == [4, 9]
    _, target = data[0]
    assert [data.category_ids[label - 1] for label in target["labels"]] == [7, 3]
    data.relabel([7, None], ["cat", "cow"])
    assert data[0][1]["labels"].tolist() == [1]
    assert data.label_counts() == {1: 1}


def test_targets_contain_neither_crowds_nor_empty_boxes(tmp_path):
    dataset(tmp_path)
    data = load(tmp_path)
    _, target = data[0]
    # The second box is clipped to the image.
    assert target["boxes"].tolist() == [[1, 2, 11, 7], [5, 5, 30, 15]]
    assert len(data.annotations.ids) == 5
    assert data.counts().tolist() == [2, 0]
    shapes, sizes = data.shapes()
    assert shapes.tolist() == [[10, 5], [25, 10]]
    assert sizes.tolist() == [[30, 20]] * 2


def test_an_image_without_objects(tmp_path):
    dataset(tmp_path)
    image, target = load(tmp_path)[1]
    assert type(image) is type(target["boxes"]) is torch.Tensor
    assert (image.shape, image.dtype) == ((3, 20, 30), torch.float32)
    assert 0 <= image.min() <= image.max() <= 1
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["image_id"] == 9
    dataset(tmp_path, annotations=[])
    assert load(tmp_path).shapes()[0].shape == (0, 2)


def test_images_that_are_kept_and_left_out(tmp_path):
    dataset(tmp_path)
    data = load(tmp_path)
    message = data.leave_out({4: "a.png is broken"})
    assert all(words in message for words in ("1 of 2", "(4)", "a.png is broken"))
    assert data.image_ids == [9]
    assert data.files() == [tmp_path / "images" / "b.png"]
    data.keep([])
    assert len(data) == 0


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path):
    dataset(tmp_path)
    flip = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.ColorJitter(0.5)])
    data = load(tmp_path, transform=flip, seed=1)
    state = torch.get_rng_state()
    first = {(epoch, index): data[epoch, index] for epoch in range(8) for index in range(2)}
    assert torch.equal(state, torch.get_rng_state())  # the global generator does not move
    torch.manual_seed(5)
    for key in reversed(list(first)):
        image, target = data[key]
        assert torch.equal(first[key][0], image)
        assert torch.equal(first[key][1]["boxes"], target["boxes"])
    boxes = {tuple(first[epoch, 0][1]["boxes"][0].tolist()) for epoch in range(8)}
    assert boxes == {(1.0, 2.0, 11.0, 7.0), (19.0, 2.0, 29.0, 7.0)}  # stored, and flipped with its box
    other = load(tmp_path, transform=flip, seed=2)
    assert any(not torch.equal(first[epoch, 0][0], other[epoch, 0][0]) for epoch in range(8))


def test_files_that_are_no_annotations(tmp_path):
    path = tmp_path / "b.json"
    content = json.dumps(dataset(tmp_path)).encode()
    for text in (None, b"", b"[1, 2]", b"3", content[: len(content) // 2], b'{"images": []}', b"\xff\xfe\x00"):
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(DataError, match=r"b\.json"):
            read_annotations(path)
    with pytest.raises(DataError, match="nowhere"):
        CocoDetection(tmp_path / "nowhere", tmp_path / "a.json")
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png"):
        load(tmp_path)


def test_a_speck_that_loses_its_area_in_the_transform_is_removed(tmp_path):
    boxes = [[29.999998, 2, 1e-6, 4], [1, 2, 3, 4]]
    annotations = [{"id": i, "image_id": 4, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)]
    dataset(tmp_path, annotations=annotations)
    _, target = load(tmp_path, transform=v2.Resize([4, 5]))[0]
    assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    assert len(target["boxes"]) == len(target["labels"])


def test_images_in_bytes_are_those_in_floats(tmp_path):
    dataset(tmp_path)
    data = load(tmp_path, transform=v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(8)]))
    for index in range(2):
        (floats, target), (sent, same) = data[3, index], data.as_bytes()[3, index]
        assert sent.dtype == torch.uint8
        assert torch.equal(as_float(sent), floats)
        assert all(torch.equal(target[name], same[name]) for name in target)
        assert sent.untyped_storage().nbytes() == sent.nbytes  # without the rest of the image


def test_real_coco(coco_cc):
    """A subset of COCO: ids with gaps, crowds, images without objects."""
    data = CocoDetection(coco_cc / "val2017", coco_cc / "annotations" / "instances_val2017.json")
    assert len(data.category_ids) == 80
    assert data.category_ids[-1] == 90
    assert data.counts().sum() + data.annotations.crowds.sum() == len(data.annotations.ids) == 560
    image, target = data[len(data) - 1]
    info = data.annotations.image(*data.annotations.find([int(target["image_id"])]))
    assert image.shape == (3, info["height"], info["width"])


def test_files_of_a_split():
    folder = DataFolder(Path("coco"))
    assert folder.annotation_file("val2017") == Path("coco/annotations/instances_val2017.json")
    assert folder.image_folder("val2017") == Path("coco/val2017")
    folder = DataFolder(Path("a{b}"), "{fold}/{split}{}/{split:>9}.json", "{split}/{split}{")
    assert folder.annotation_file("val") == Path("a{b}/{fold}/val{}/{split:>9}.json")
    assert folder.image_folder("{split}") == Path("a{b}/{split}/{split}{")


def test_a_split_as_a_data_set(tmp_path):
    dataset(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    data = DataFolder(tmp_path, "{split}.json", "images").dataset("a", seed=3, skip_missing=True)
    assert (len(data), data.seed) == (2, 3)


# --- Augmentation by the data module --------------------------------------------------------------------------------

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
BOXES = [(12, 20, 40, 30), (70, 5, 25, 60), (60, 70, 50, 22)]  # x, y, width, height


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four equal images of rectangles in the colours of their classes."""
    root = tmp_path_factory.mktemp("rectangles")
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
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for i in range(1, 5):
            Image.fromarray(pixels).save(root / split / f"{i}.png")
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def items(root, *, epochs=5, **settings):
    data = CocoDataModule(str(root), **settings).split("train2017", train=True)
    return [data[epoch, index] for epoch in range(epochs) for index in range(len(data))]


def extent(image, label):
    """The box around the pixels of nearly a class's colour, if there are any."""
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
        boxes = target["boxes"]
        assert len(boxes) == len(target["labels"])
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        found.add((height, width, *boxes.flatten().round().int().tolist()))
        for box, label in zip(boxes, target["labels"].tolist()):
            visible = extent(image, label)
            if visible is None:  # specks, whose colour is mixed with the background
                assert (box[2:] - box[:2]).min() < 4
            else:
                assert (visible - box).abs().max() <= 2.5
    assert len(found) > 1


def test_half_of_the_images_are_flipped_by_default(root):
    def lefts(**settings):
        return {round(target["boxes"][0, 0].item()) for _, target in items(root, min_size=None, **settings)}

    assert lefts() == {12, 120 - 12 - 40}
    assert lefts(augmentation=[]) == {12}


def test_min_size_and_max_size_of_training_images(root):
    sizes = {tuple(image.shape[1:]) for image, _ in items(root, min_size=[50, 100, 200], max_size=180, epochs=10)}
    assert sizes == {(50, 60), (100, 120), (150, 180)}
    assert {tuple(image.shape[1:]) for image, _ in items(root, min_size=50)} == {(50, 60)}


def test_a_transform_that_fails_names_the_image(root):
    data = CocoDataModule(str(root), augmentation=[v2.RandomCrop(500)]).split("train2017", train=True)
    with pytest.raises(DataError, match=r"train2017/1\.png: the augmentation"):
        data[0, 0]


def test_images_are_scored_as_stored(root):
    image, target = CocoDataModule(str(root), augmentation=[v2.RandomHorizontalFlip(1.0)]).split("val2017")[0]
    assert tuple(image.shape) == (3, 100, 120)
    assert target["boxes"][0].tolist() == [12, 20, 52, 50]
