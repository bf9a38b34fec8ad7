"""Masks and keypoints that have nothing to do with their boxes, and areas that are placeholders."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detector.data import mask_keypoint_checks
from detector.data.annotation_types import FIELD
from detector.data.annotations import read_annotations
from detector.data.check_dataset import check_dataset
from detector.data.entries import CocoFile
from detector.data.mask_keypoint_checks import check_annotation_type
from detector.data.masks import as_rle, mask_area, mask_box
from detector.data.segmentations import measure_mask
from detector.errors import DataError

WIDTH, HEIGHT = 640, 480


def objects(count=40, seed=0, low=30, high=150):
    """Boxes in random places, an ellipse's outline in each, and five points."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for _ in range(count):
        size = rng.uniform(low, high, 2)
        corner = rng.uniform(0, (WIDTH, HEIGHT) - size)
        yield (
            np.concatenate([corner, size]),
            corner + (circle + 1) / 2 * size,
            corner + rng.uniform(0, 1, (5, 2)) * size,
        )


def polygons(points):
    return [points.reshape(-1).tolist()]


def visible(points):
    return np.hstack([points, np.full((len(points), 1), 2)]).reshape(-1).tolist()


def unchanged(points, box):
    return points


def file(root, annotation_type, change=unchanged, *, some=lambda number: True, area=None, **size):
    """A file of masks or keypoints, of which some are changed."""
    annotations = []
    for number, (box, outline, points) in enumerate(objects(**size), start=1):
        given = outline if annotation_type == "masks" else points
        value = change(given, box) if some(number) else given
        if isinstance(value, np.ndarray):
            value = polygons(value) if annotation_type == "masks" else visible(value)
        annotations.append(
            {
                "id": number,
                "image_id": number % 4,
                "category_id": 1,
                "bbox": box.tolist(),
                "area": float(np.pi / 4 * box[2] * box[3]) if area is None else area(box),
                FIELD[annotation_type]: value,
            }
        )
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(4)]
    path = root / "a.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]})
    )
    return path


def found(path):
    """Return the errors and warnings of check.py, by level and kind."""
    findings = check_dataset(path).findings
    return {(finding.level, finding.kind) for finding in findings if finding.level != "note"}


SIZE = np.array([WIDTH, HEIGHT])
LOOKS = {
    "normalised": lambda points, box: points / SIZE,
    "y before x": lambda points, box: points[:, ::-1],
    "box's corner": lambda points, box: points - box[:2],
    "times as large": lambda points, box: points / 2,
    "as large: divide": lambda points, box: points * 1.5,
    "to their box": lambda points, box: (points - box[:2]) / box[2:],
    "other objects": lambda points, box: points + np.where(box[:2] < SIZE / 2, SIZE / 2, -SIZE / 2),
}


@pytest.mark.parametrize("annotation_type", ["masks", "keypoints"])
@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("share", [0.75])
def test_most_are_outside_their_boxes(tmp_path, annotation_type, looks, share):
    path = file(tmp_path, annotation_type, LOOKS[looks], some=lambda number: number <= 40 * share)
    (finding,) = [one for one in check_annotation_type(CocoFile(path), annotation_type) if one.level == "error"]
    assert looks in finding.message
    assert finding in check_dataset(path).findings  # an error there, too
    with pytest.raises(DataError, match=looks):
        read_annotations(path, annotation_types=[annotation_type])
    read_annotations(path)  # boxes can be trained


@pytest.mark.parametrize("annotation_type", ["masks", "keypoints"])
@pytest.mark.parametrize("looks", ["normalised", "to their box"])
@pytest.mark.parametrize("count", [1, 40])
def test_normalised_ones_in_large_boxes(tmp_path, annotation_type, looks, count):
    """Many objects lie in the corner of the image, where coordinates are small."""
    path = file(tmp_path, annotation_type, LOOKS[looks], count=count, low=300, high=450)
    with pytest.raises(DataError, match=looks if count > 1 else "bbox"):
        read_annotations(path, annotation_types=[annotation_type])
    assert found(file(tmp_path, annotation_type, count=count, low=300, high=450)) == set()


def test_masks_of_a_small_part_are_in_their_boxes(tmp_path):
    """Such as a car's number plate: a twentieth of its box's width."""
    path = file(tmp_path, "masks", lambda points, box: box[:2] + 0.4 * box[2:] + (points - box[:2]) / 20)
    assert not any("outside" in kind for _, kind in found(path))
    read_annotations(path, annotation_types=["masks"])


@pytest.mark.parametrize("below", [0.3, 0.9])
def test_a_point_on_the_ground_below_its_box_is_no_error(tmp_path, below):
    def ground(points, box):
        return np.array([[box[0] + box[2] / 2, box[1] + box[3] * (1 + below)]])

    path = file(tmp_path, "keypoints", ground)
    assert not any(level == "error" for level, _ in found(path))
    read_annotations(path, annotation_types=["keypoints"])


@pytest.mark.parametrize("placeholder", [0, -1])
def test_labelled_placeholders_are_warnings(tmp_path, placeholder):
    def some_at_the_corner(points, box):
        return np.vstack([points[:2], np.full((3, 2), placeholder)])

    path = file(tmp_path, "keypoints", some_at_the_corner)
    assert ("warning", "labelled keypoints at (0, 0) or (-1, -1)") in found(path)
    assert not any(level == "error" for level, _ in found(path))
    nothing_else = file(tmp_path, "keypoints", lambda points, box: np.full((5, 2), placeholder))
    assert ("error", "annotation file whose keypoints lie outside boxes") in found(nothing_else)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda points, box: points, set()),
        (lambda points, box: EMPTY["a point three times"](points, box), {("warning", "masks without a pixel")}),
        (lambda points, box: points / SIZE, {("warning", "masks without a pixel")}),
        (LOOKS["other objects"], {("warning", "masks outside their boxes")}),
    ],
)
def test_many_masks_are_judged_by_a_few_points_first(tmp_path, monkeypatch, change, expected):
    monkeypatch.setattr(mask_keypoint_checks, "MAX_MEASURED", 0)
    path = file(tmp_path, "masks", change, some=lambda number: number == 7)
    assert expected <= found(path)
    assert not any(level == "error" for level, _ in found(path))
    whole = file(tmp_path, "masks", lambda points, box: points / SIZE)
    with pytest.raises(DataError, match="normalised"):
        read_annotations(whole, annotation_types=["masks"])
    kind = "areas that are far from their masks'"
    assert found(file(tmp_path, "masks", area=lambda box: 0.2 * box[2] * box[3])) == {("warning", kind)}


@pytest.mark.parametrize("annotation_type", ["masks", "keypoints"])
def test_valid_ones_have_no_findings(tmp_path, annotation_type):
    assert found(file(tmp_path, annotation_type)) == set()
    loose = file(tmp_path, annotation_type, lambda points, box: (points + 0.2 * box[2:]).clip(0, SIZE))
    assert found(loose) == set()


@pytest.mark.parametrize("annotation_type", ["masks", "keypoints"])
def test_a_few_outside_their_boxes_are_warnings(tmp_path, annotation_type):
    path = file(tmp_path, annotation_type, LOOKS["y before x"], some=lambda number: number % 4 == 0)
    kind = f"{'masks' if annotation_type == 'masks' else 'keypoints'} outside their boxes"
    assert ("warning", kind) in found(path)
    assert not any(level == "error" for level, _ in found(path))
    warnings = read_annotations(path, annotation_types=[annotation_type]).warnings
    assert 0 < warnings[kind] <= 10


def rle(pixel):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[:1, :1] = pixel
    coded = coco_mask.encode(mask)
    return {"size": coded["size"], "counts": coded["counts"].decode()}


EMPTY = {
    "a point three times": lambda points, box: polygons(np.repeat(points[:1], 3, axis=0)),
    "a line": lambda points, box: [[*box[:2], *(box[:2] + box[2:]), *box[:2]]],
    "a line with many points": lambda points, box: polygons(box[:2] + np.arange(8)[[0, 2, 4, 6, 7, 5, 3, 1], None]),
    "an RLE": lambda points, box: rle(0),
    "counts": lambda points, box: {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT]},
}


@pytest.mark.parametrize("empty", EMPTY)
def test_a_mask_without_a_pixel_counts_as_missing(tmp_path, empty):
    path = file(tmp_path, "masks", EMPTY[empty], some=lambda number: number == 7)
    segmentation = json.loads(path.read_text())["annotations"][6]["segmentation"]
    assert mask_area(as_rle(segmentation, HEIGHT, WIDTH)) == 0  # by pycocotools
    assert found(path) == {("warning", "masks without a pixel")}
    assert read_annotations(path, annotation_types=["masks"]).warnings == {"masks without a pixel": 1}
    with pytest.raises(DataError, match="pixel"):  # nobody has a mask
        read_annotations(file(tmp_path, "masks", EMPTY[empty]), annotation_types=["masks"])


def test_masks_outside_their_image_are_outside_their_boxes(tmp_path):
    path = file(tmp_path, "masks", lambda points, box: -points.clip(1, 470))
    assert ("error", "annotation file whose masks lie outside boxes") in found(path)
    one = file(tmp_path, "masks", lambda points, box: -points.clip(1, 470), some=lambda number: number == 7)
    assert found(one) == {("warning", "masks without a pixel")}


def test_masks_that_reach_outside_their_image_are_warnings(tmp_path):
    path = file(tmp_path, "masks", lambda points, box: np.vstack([points, [[-5, box[1]]]]), some=lambda n: n < 4)
    assert ("warning", "masks that reach outside their image") in found(path)
    rounded = file(tmp_path, "masks", lambda points, box: np.vstack([points, [[-0.4, box[1]]]]), some=lambda n: n < 4)
    assert "masks that reach outside their image" not in {kind for _, kind in found(rounded)}


def test_points_up_and_left_of_their_image_are_no_placeholders(tmp_path):
    path = file(tmp_path, "keypoints", lambda points, box: np.vstack([points[:4], [[-30.0, -40.0]]]))
    assert found(path) == {("warning", "keypoints outside their image")}


def test_labelled_points_outside_their_image_are_warnings(tmp_path):
    def moved(points, box):
        return np.vstack([points[:4], [[WIDTH + 30.0, 10.0]]])

    path = file(tmp_path, "keypoints", moved, some=lambda number: number < 4)
    assert found(path) == {("warning", "keypoints outside their image")}
    assert read_annotations(path, annotation_types=["keypoints"]).warnings == {"keypoints outside their image": 3}
    unlabelled = file(tmp_path, "keypoints", lambda points, box: [*visible(points[:4]), WIDTH + 30.0, 10.0, 0])
    assert found(unlabelled) == set()


@pytest.mark.parametrize("annotation_type", ["masks", "keypoints"])
@pytest.mark.parametrize(
    "area",
    [lambda box: 0, lambda box: 1, lambda box: box[2] * box[3] / WIDTH / HEIGHT, lambda box: 9 * box[2] * box[3]],
)
def test_areas_far_from_the_boxes_are_warnings(tmp_path, annotation_type, area):
    path = file(tmp_path, annotation_type, area=area)
    kind = "areas that are far from their boxes'"
    assert found(path) == {("warning", kind)}
    assert (
        read_annotations(path, annotation_types=[annotation_type]).warnings
        == read_annotations(path).warnings
        == {kind: 40}
    )


@pytest.mark.parametrize("share", [0.002, 0.02, 0.1, 0.5, 1.0, 2.0])
def test_areas_of_thin_objects_and_of_their_boxes_are_valid(tmp_path, share):
    path = file(tmp_path, "keypoints", area=lambda box: share * box[2] * box[3])
    assert found(path) == set()


def test_areas_far_from_the_masks_are_warnings(tmp_path):
    kind = "areas that are far from their masks'"
    scaled = file(tmp_path, "masks", area=lambda box: 0.2 * box[2] * box[3])  # of an image of half the size
    assert found(scaled) == {("warning", kind)}
    assert found(file(tmp_path, "masks", area=lambda box: box[2] * box[3])) == set()  # the box's, as many tools write


def test_masks_are_measured_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for number, (_, outline, _) in enumerate(objects(60)):
        shifted = outline + rng.uniform(-400, 400, 2) * (number % 3 == 0)  # some reach out of the image
        value = [shifted.reshape(-1).tolist()]
        if number % 4 == 1:
            value.append((outline[:5] + 100).reshape(-1).tolist())
        coded = as_rle(value, HEIGHT, WIDTH)
        exact = mask_area(coded)
        *box, area = measure_mask(value, WIDTH, HEIGHT)
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in value])
        assert box == [*points.min(axis=0), *points.max(axis=0)]
        assert area >= exact * 0.95 if len(value) > 1 else area == pytest.approx(exact, rel=0.05, abs=1)
        *box, area = measure_mask(coded, WIDTH, HEIGHT)
        assert area == exact
        x, y, w, h = mask_box(coded)
        assert box == [x, y, x + w, y + h] if exact else np.isnan(box).all()
    assert np.isnan(measure_mask(None, WIDTH, HEIGHT)).all()
    assert measure_mask([[5, 5, 5, 5, 5, 5]], WIDTH, HEIGHT)[4] == 0
