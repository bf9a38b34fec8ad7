"""Masks and keypoints of training images: what augmentations do to them, and what is not read without need."""

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
    return write_digits_with_parts(root, splits={"train": 12, "val": 2}, height=(40, 80))


def load(root, *, annotation_types=("masks", "keypoints"), **options):
    return CocoDetection(
        root / "train", root / "annotations" / "instances_train.json", annotation_types=annotation_types, **options
    )


def read(data):
    return [data[index] for index in range(len(data))]


def box_of(mask: Tensor) -> list[int]:
    rows, columns = mask.nonzero().unbind(1)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def whole(target, image_size):
    """The objects that no digit on top of them, and no edge of the image, cuts: whose mask fills their box."""
    height, width = image_size
    for i, (box, mask) in enumerate(zip(target["boxes"], target["masks"])):
        inside = (box[:2] > 1).all() and box[2] < width - 1 and box[3] < height - 1
        others = torch.cat([target["boxes"][:i], target["boxes"][i + 1 :]])
        apart = (others[:, :2] > box[2:]).any(1) | (others[:, 2:] < box[:2]).any(1)
        if inside and apart.all() and mask.any():
            yield i


def test_as_stored(root):
    data = load(root)
    assert data.keypoints.names == tuple(POINTS)
    for index in range(len(data)):
        image, target = data[index]
        count = len(target["labels"])
        assert {type(value) for value in target.values()} == {Tensor}
        assert target["masks"].shape == (count, *image.shape[1:])
        assert target["masks"].dtype == torch.uint8
        assert target["keypoints"].shape == (count, 5, 3)
        assert target["keypoints"].dtype == torch.float32
        assert set(target["masks"].unique().tolist()) <= {0, 1}
        for i in whole(target, image.shape[1:]):
            assert torch.allclose(torch.tensor(box_of(target["masks"][i])).float(), target["boxes"][i], atol=1.01)
        middle = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
        assert torch.allclose(target["keypoints"][:, 4, :2], middle, atol=0.51)
        assert (target["keypoints"][..., 2] == 1).all()  # hidden is labelled


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomHorizontalFlip(1),
        v2.RandomVerticalFlip(1),
        v2.RandomRotation((90, 90), expand=True),
        v2.RandomRotation((180, 180)),
        v2.RandomAffine(0, translate=(0.2, 0.2), scale=(0.5, 0.8)),
        v2.Compose([v2.RandomHorizontalFlip(1), v2.RandomVerticalFlip(1)]),
        v2.RandomIoUCrop(),
        v2.RandomZoomOut(fill={tv_tensors.Image: 123, "others": 0}),
        v2.RandomZoomOut(fill=123, p=1),
        v2.ScaleJitter((128, 128)),
        v2.RandomShortestSize([100], 150, antialias=False),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_masks_and_points_move_with_the_boxes(root, transform):
    plain, data = load(root), load(root, transform=transform)
    looked_at = 0
    for index in range(len(data)):
        image, target = data[index]
        counts = {len(target[name]) for name in ("boxes", "labels", "masks", "keypoints")}
        assert len(counts) == 1
        assert target["masks"].shape[1:] == image.shape[1:]
        assert set(target["masks"].unique().tolist()) <= {0, 1}
        before = plain[index][1]
        if len(before["boxes"]) != len(target["boxes"]):
            continue  # some are cut away
        stored = set(whole(before, plain[index][0].shape[1:]))
        for i in stored & set(whole(target, image.shape[1:])):
            # Masks move by whole pixels.
            box = torch.tensor(box_of(target["masks"][i])).float()
            assert torch.allclose(box, target["boxes"][i], atol=1.6)
            points, labelled = target["keypoints"][i, :, :2], target["keypoints"][i, :, 2]
            assert labelled.all()
            middle = (target["boxes"][i, :2] + target["boxes"][i, 2:]) / 2
            assert torch.allclose(points[4], middle, atol=1.6)
            looked_at += 1
    assert looked_at >= 4


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
        (v2.Resize([50, 60]), False),
    ],
)
def test_a_mirror_exchanges_left_and_right(root, transform, mirrors):
    """By an independent route: the same transform of the points alone."""
    plain, data = load(root), load(root, transform=transform)
    for index in range(4):
        image, before = plain[index]
        _, after = data[index]
        points = tv_tensors.KeyPoints(before["keypoints"][..., :2], canvas_size=tuple(image.shape[1:]))
        _, moved = transform(tv_tensors.Image(image), points)
        expected = moved[:, MIRROR] if mirrors else moved
        assert torch.allclose(after["keypoints"][..., :2], expected.as_subclass(Tensor))


def test_a_point_outside_the_image_is_labelled_no_longer(root):
    data = load(root, transform=v2.RandomAffine(0, translate=(0.5, 0.5)))
    seen = set()
    for index in range(len(data)):
        image, target = data[index]
        height, width = image.shape[1:]
        x, y, labelled = target["keypoints"].unbind(-1)
        inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
        assert torch.equal(labelled > 0, inside)
        seen |= set(inside.flatten().tolist())
    assert seen == {True, False}


@pytest.mark.parametrize("part", ["masks", "keypoints"])
def test_a_transform_that_leaves_objects_out_is_refused(root, part):
    clean = v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: inputs[1]["labels"])
    data = load(root, annotation_types=[part], transform=v2.Compose([v2.RandomCrop((60, 60)), clean]))
    with pytest.raises(DataError, match=r"/00\d+\.png: .*: leave SanitizeBoundingBoxes and the like out"):
        read(data)


@pytest.mark.parametrize(
    ("transform", "words"),
    [(v2.SanitizeKeyPoints(), "augmentation fails"), (v2.ClampKeyPoints(), "ClampKeyPoints out")],
)
def test_a_transform_that_spoils_key_points_is_refused(root, transform, words):
    data = load(root, annotation_types=["keypoints"], transform=v2.Compose([v2.RandomCrop((20, 20)), transform]))
    with pytest.raises(DataError, match=words):
        read(data)


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomHorizontalFlip(1),
        v2.RandomRotation((20, 20)),
        v2.ElasticTransform(),
        v2.Resize([37, 53], antialias=False),
        v2.RandomPerspective(p=1),
        v2.RandomZoomOut(fill=123, p=1),
        v2.RandomZoomOut(fill=1, p=1),  # the number of an object
        v2.RandomApply([v2.Pad(20, fill=[123, 117, 104])], p=1),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_masks_are_those_of_the_transform_of_each_alone(root, transform):
    """Few maps go through the transform, of many masks each; torchvision's references transform the masks."""
    data = load(root, annotation_types=["masks"], transform=transform)
    plain = load(root, annotation_types=["masks"])
    for index in range(len(data)):
        image, target = plain[index]
        _, moved = data[index]
        if len(moved["boxes"]) != len(target["boxes"]):
            continue  # some are outside now
        with seeded(seed_of(data.seed, 0, index)):  # of the masks it fills with 0 since data has it
            _, masks = transform(tv_tensors.Image((image * 255).byte()), tv_tensors.Mask(target["masks"]))
        assert torch.equal(moved["masks"], (masks.as_subclass(Tensor) == 1).to(torch.uint8))


def test_layers_are_the_masks_before_they_are_many(root):
    data = load(root, transform=v2.RandomIoUCrop())
    for index in range(len(data)):
        _, target = data[index]
        _, laid = data.with_layers()[index]
        assert torch.equal(laid["masks"].masks(), target["masks"])
        assert torch.equal(laid["keypoints"], target["keypoints"])


def test_relabelled_and_kept_objects_keep_their_parts(root):
    data, plain = load(root), load(root)
    ids = data.category_ids[::-2]
    data.relabel(ids, [str(number) for number in ids])
    data.keep(data.image_ids[3:])
    for index in range(len(data)):
        _, target = data[index]
        _, whole_target = plain[index + 3]
        kept = [plain.category_ids[label - 1] in ids for label in whole_target["labels"].tolist()]
        assert torch.equal(target["masks"], whole_target["masks"][kept])
        assert torch.equal(target["keypoints"], whole_target["keypoints"][kept])
        assert len(target["labels"]) == sum(kept)
    gone = data.image_ids[0]
    data.leave_out({gone: "broken"})
    assert torch.equal(data[0][1]["keypoints"], load(root)[4][1]["keypoints"]) or len(ids) < 10
    assert data.visible_keypoints() == [int(data[i][1]["keypoints"][..., 2].sum()) for i in range(len(data))]


def test_objects_without_are_read_as_torchvisions_references_read_them(tmp_path):
    data = copy.deepcopy(VALID)
    data["annotations"][0] |= {"segmentation": [[2, 3, 9, 3, 9, 6]], "keypoints": [3, 4, 2, 0, 0, 0]}
    data["annotations"][1] |= {"segmentation": [], "keypoints": [0] * 6}
    path = write(tmp_path, data)
    loaded = CocoDetection(tmp_path / "images", path, annotation_types=["masks", "keypoints"])
    _, target = loaded[0]
    assert target["masks"].flatten(1).any(1).tolist() == [True, False]
    assert target["keypoints"].tolist() == [[[3, 4, 1], [0, 0, 0]], [[0, 0, 0]] * 2]
    _, target = loaded[1]  # a crowd alone
    assert target["masks"].shape == (0, 20, 30)
    assert target["keypoints"].shape == (0, 2, 3)


def test_boxes_alone_read_nothing_more(root, tmp_path, monkeypatch):
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    for annotation in content["annotations"]:
        annotation |= {"segmentation": "broken", "keypoints": "broken"}
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    expected = [load(root)[index][1] for index in range(3)]

    def never(*_):
        raise AssertionError("read")

    monkeypatch.setattr(dataset_module.MaskLayers, "of", never)
    monkeypatch.setattr(dataset_module.CocoDetection, "_keypoints", never)
    data = CocoDetection(root / "train", path)
    for index, target in enumerate(expected):
        _, alone = data[index]
        assert set(alone) == {"boxes", "labels", "image_id"}
        assert all(torch.equal(alone[name], target[name]) for name in alone)
    assert data.annotations.annotation_types == {}


def test_real_masks_under_augmentation(coco_cc):
    folder = coco_cc
    crop = v2.Compose([v2.RandomHorizontalFlip(1), v2.RandomIoUCrop()])
    annotations = folder / "annotations" / "instances_val2017.json"
    data = CocoDetection(folder / "val2017", annotations, annotation_types=["masks"], transform=crop)
    objects = inside = 0
    for index in range(12):
        _, target = data[index]
        for box, mask in zip(target["boxes"], target["masks"]):
            objects += 1
            if mask.any():
                left, top, right, bottom = box_of(mask)
                inside += left >= box[0] - 2 and top >= box[1] - 2 and right <= box[2] + 2 and bottom <= box[3] + 2
    assert objects > 20
    assert inside >= 0.9 * objects
