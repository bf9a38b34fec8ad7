"""Masks and keypoints of training images, and how augmentation changes them."""

import copy
import json

import pytest
import torch
from support.annotation_files import VALID, write
from support.part_data import POINTS, write_digits_with_parts
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

pytest.importorskip("sklearn")


from detector.data import dataset as dataset_module
from detector.data.dataset import CocoDetection
from detector.errors import DataError
from detector.seeds import seed_of, seeded

MIRROR = [1, 0, 3, 2, 4]  # of POINTS: left and right


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    return write_digits_with_parts(root, splits={"train": 8, "val": 2}, height=(40, 80))


def load(root, *, annotation_types=("masks", "keypoints"), **options):
    annotations = root / "annotations" / "instances_train.json"
    return CocoDetection(root / "train", annotations, annotation_types=annotation_types, **options)


def box_of(mask: Tensor) -> list[int]:
    rows, columns = mask.nonzero().unbind(1)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def whole(target, image_size):
    """Objects whose mask fills their box: neither another digit nor the image's edge cuts them."""
    height, width = image_size
    for i, (box, mask) in enumerate(zip(target["boxes"], target["masks"])):
        inside = (box[:2] > 1).all() and box[2] < width - 1 and box[3] < height - 1
        others = torch.cat([target["boxes"][:i], target["boxes"][i + 1 :]])
        apart = (others[:, :2] > box[2:]).any(1) | (others[:, 2:] < box[:2]).any(1)
        if inside and apart.all() and mask.any():
            yield i


def test_targets_without_augmentation(root):
    data = load(root)
    assert data.keypoints.names == tuple(POINTS)
    for index in range(len(data)):
        image, target = data[index]
        count = len(target["labels"])
        assert {type(value) for value in target.values()} == {Tensor}
        assert (target["masks"].shape, target["masks"].dtype) == ((count, *image.shape[1:]), torch.uint8)
        assert (target["keypoints"].shape, target["keypoints"].dtype) == ((count, 5, 3), torch.float32)
        assert set(target["masks"].unique().tolist()) <= {0, 1}
        for i in whole(target, image.shape[1:]):
            assert torch.allclose(torch.tensor(box_of(target["masks"][i])).float(), target["boxes"][i], atol=1.01)
        middle = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
        assert torch.allclose(target["keypoints"][:, 4, :2], middle, atol=0.51)
        assert (target["keypoints"][:, 0, 0] < target["keypoints"][:, 1, 0]).all()  # top_left and top_right
        assert (target["keypoints"][..., 2] == 1).all()  # hidden ones are labelled


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomHorizontalFlip(1),
        v2.RandomRotation((90, 90), expand=True),
        v2.RandomAffine(0, translate=(0.2, 0.2), scale=(0.5, 0.8)),
        v2.RandomIoUCrop(),
        v2.RandomZoomOut(fill={tv_tensors.Image: 123, "others": 0}),
        v2.RandomZoomOut(fill=123, p=1),
        v2.RandomShortestSize([100], 150, antialias=False),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_masks_and_keypoints_move_with_the_boxes(root, transform):
    plain, data = load(root), load(root, transform=transform)
    compared = 0
    for index in range(len(data)):
        image, target = data[index]
        assert len({len(target[name]) for name in ("boxes", "labels", "masks", "keypoints")}) == 1
        assert target["masks"].shape[1:] == image.shape[1:]
        assert set(target["masks"].unique().tolist()) <= {0, 1}
        before = plain[index][1]
        if len(before["boxes"]) != len(target["boxes"]):
            continue  # some are cut away
        stored = set(whole(before, plain[index][0].shape[1:]))
        for i in stored & set(whole(target, image.shape[1:])):
            # Masks move by whole pixels.
            assert torch.allclose(torch.tensor(box_of(target["masks"][i])).float(), target["boxes"][i], atol=1.6)
            assert target["keypoints"][i, :, 2].all()
            middle = (target["boxes"][i, :2] + target["boxes"][i, 2:]) / 2
            assert torch.allclose(target["keypoints"][i, 4, :2], middle, atol=1.6)
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize(
    ("transform", "mirrors"),
    [
        (v2.RandomHorizontalFlip(1), True),
        (v2.RandomVerticalFlip(1), True),
        (v2.RandomRotation((180, 180)), False),
        (v2.RandomRotation((90, 90), expand=True), False),
        (v2.RandomRotation((20, 20)), False),
        (v2.Compose([v2.RandomHorizontalFlip(1), v2.RandomVerticalFlip(1)]), False),
        (v2.Compose([v2.RandomHorizontalFlip(1), v2.Resize([50, 60])]), True),
    ],
)
def test_mirroring_swaps_left_and_right(root, transform, mirrors):
    plain, data = load(root), load(root, transform=transform)
    for index in range(4):
        image, before = plain[index]
        points = tv_tensors.KeyPoints(before["keypoints"][..., :2], canvas_size=tuple(image.shape[1:]))
        _, moved = transform(tv_tensors.Image(image), points)
        expected = moved[:, MIRROR] if mirrors else moved
        assert torch.allclose(data[index][1]["keypoints"][..., :2], expected.as_subclass(Tensor))


def test_keypoints_outside_the_image_are_not_labelled(root):
    data = load(root, transform=v2.RandomAffine(0, translate=(0.5, 0.5)))
    found = set()
    for index in range(len(data)):
        image, target = data[index]
        height, width = image.shape[1:]
        x, y, labelled = target["keypoints"].unbind(-1)
        inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
        assert torch.equal(labelled > 0, inside)
        found |= set(inside.flatten().tolist())
    assert found == {True, False}


REMOVES_BOXES = v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: inputs[1]["labels"])


@pytest.mark.parametrize(
    ("annotation_type", "transform", "words"),
    [
        ("masks", REMOVES_BOXES, "SanitizeBoundingBoxes"),
        ("keypoints", REMOVES_BOXES, "SanitizeBoundingBoxes"),
        ("keypoints", v2.SanitizeKeyPoints(), "augmentation"),
        ("keypoints", v2.ClampKeyPoints(), "ClampKeyPoints"),
    ],
)
def test_transforms_that_remove_objects_or_keypoints_are_refused(root, annotation_type, transform, words):
    crop = v2.Compose([v2.RandomCrop((20, 20)), transform])
    data = load(root, annotation_types=[annotation_type], transform=crop)
    with pytest.raises(DataError, match=rf"/00\d+\.png: .*{words}"):
        _ = [data[index] for index in range(len(data))]


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomRotation((20, 20)),
        v2.Resize([37, 53], antialias=False),
        v2.RandomPerspective(p=1),
        v2.RandomZoomOut(fill=1, p=1),  # the number of an object
        v2.RandomApply([v2.Pad(20, fill=[123, 117, 104])], p=1),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_masks_equal_those_transformed_one_by_one(root, transform):
    """A few maps with many masks each are transformed; torchvision's references transform the masks."""
    data = load(root, annotation_types=["masks"], transform=transform)
    plain = load(root, annotation_types=["masks"])
    for index in range(len(data)):
        image, target = plain[index]
        _, moved = data[index]
        if len(moved["boxes"]) != len(target["boxes"]):
            continue  # some are outside now
        with seeded(seed_of(data.seed, 0, index)):
            _, masks = transform(tv_tensors.Image((image * 255).byte()), tv_tensors.Mask(target["masks"]))
        assert torch.equal(moved["masks"], (masks.as_subclass(Tensor) == 1).to(torch.uint8))
        _, layered = data.with_layers()[index]
        assert torch.equal(layered["masks"].masks(), moved["masks"])


def test_relabelled_and_kept_objects_keep_their_masks_and_keypoints(root):
    data, plain = load(root), load(root)
    ids = data.category_ids[::-2]
    data.relabel(ids, [str(number) for number in ids])
    data.keep(data.image_ids[3:])
    for index in range(len(data)):
        _, target = data[index]
        _, before = plain[index + 3]
        kept = [plain.category_ids[label - 1] in ids for label in before["labels"].tolist()]
        assert torch.equal(target["masks"], before["masks"][kept])
        assert torch.equal(target["keypoints"], before["keypoints"][kept])
        assert len(target["labels"]) == sum(kept)
    assert data.visible_keypoints() == [int(data[i][1]["keypoints"][..., 2].sum()) for i in range(len(data))]


def test_objects_without_masks_or_keypoints(tmp_path):
    data = copy.deepcopy(VALID)
    data["annotations"][0] |= {"segmentation": [[2, 3, 9, 3, 9, 6]], "keypoints": [3, 4, 2, 0, 0, 0]}
    data["annotations"][1] |= {"segmentation": [], "keypoints": [0] * 6}
    path = write(tmp_path, data)
    loaded = CocoDetection(tmp_path / "images", path, annotation_types=["masks", "keypoints"])
    _, target = loaded[0]
    assert target["masks"].flatten(1).any(1).tolist() == [True, False]
    assert target["keypoints"].tolist() == [[[3, 4, 1], [0, 0, 0]], [[0, 0, 0]] * 2]
    _, target = loaded[1]  # only a crowd
    assert target["masks"].shape == (0, 20, 30)
    assert target["keypoints"].shape == (0, 2, 3)


def test_boxes_are_read_without_masks_and_keypoints(root, tmp_path, monkeypatch):
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    for annotation in content["annotations"]:
        annotation |= {"segmentation": "broken", "keypoints": "broken"}
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    both = load(root)
    expected = [both[index][1] for index in range(3)]

    def never(*_):
        raise AssertionError("read")

    monkeypatch.setattr(dataset_module.MaskLayers, "of", never)
    monkeypatch.setattr(dataset_module.CocoDetection, "_keypoints", never)
    for data in (CocoDetection(root / "train", path), both.boxes_alone()):
        for index, target in enumerate(expected):
            _, boxes = data[index]
            assert set(boxes) == {"boxes", "labels", "image_id"}
            assert all(torch.equal(boxes[name], target[name]) for name in boxes)


def test_real_masks_under_augmentation(coco_cc):
    crop = v2.Compose([v2.RandomHorizontalFlip(1), v2.RandomIoUCrop()])
    annotations = coco_cc / "annotations" / "instances_val2017.json"
    data = CocoDetection(coco_cc / "val2017", annotations, annotation_types=["masks"], transform=crop)
    objects = inside = 0
    for index in range(6):
        _, target = data[index]
        for box, mask in zip(target["boxes"], target["masks"]):
            objects += 1
            if mask.any():
                left, top, right, bottom = box_of(mask)
                inside += left >= box[0] - 2 and top >= box[1] - 2 and right <= box[2] + 2 and bottom <= box[3] + 2
    assert objects > 10
    assert inside >= 0.9 * objects
