"""Pictures of an evaluation: outcomes, ground truth and detections."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image
from support.drawn import POINTS, as_rle, assert_cat, changed, over, pixels_of, rectangle, rgb, write_split
from support.shapes import truth_file, write_shapes

from detector.data.dataset import CocoDetection
from detector.data.drawing import COLORS, RIGHT
from detector.evaluation import Report
from detector.evaluation.confusion import BoxOutcome, image_rows, match_boxes
from detector.evaluation.pictures import MARKS, SIDE, draw_examples, draw_outcomes, worst_and_best
from detector.evaluation.truth import coco_of

CAT = {"bbox": [10, 20, 30, 40], "category_id": 3}
DOG = {"bbox": [100, 20, 30, 40], "category_id": 8, "score": 0.876}


def drawn_boxes(split, monkeypatch, *outcomes, unrefined=()):
    boxes = []
    monkeypatch.setattr("detector.evaluation.pictures.draw_boxes", lambda _, marked, **options: boxes.extend(marked))
    draw_outcomes(torch.zeros(3, 240, 480), outcomes, split, unrefined)
    return [(box.caption, box.color, box.stroke, box.corners) for box in boxes]


def test_captions_colours_and_order_of_outcomes(tmp_path, monkeypatch):
    boxes = drawn_boxes(
        write_split(tmp_path),
        monkeypatch,
        BoxOutcome("missed", CAT, None),
        BoxOutcome("false", None, DOG),
        BoxOutcome("confused", CAT, DOG),
        BoxOutcome("found", DOG, DOG),
        BoxOutcome("crowd", CAT, None),
        BoxOutcome("crowd", None, DOG),
        unrefined=[CAT | {"bbox": [5, 5, 9, 9]}],
    )
    cat, dog = (20, 40, 80, 120), (200, 40, 260, 120)  # twice as large
    assert boxes == [
        ("", "#FFFFFF", "dotted", (10, 10, 28, 28)),
        ("crowd: cat", MARKS["crowd"].color, "thin", cat),
        ("dog 0.88, on a crowd", MARKS["crowd"].color, "thin", dog),
        ("dog 0.88", COLORS[1], "thin", dog),
        ("dog 0.88, is: cat", MARKS["confused"].color, "thick", dog),
        ("false: dog 0.88", MARKS["false"].color, "thick", dog),
        ("missed: cat", MARKS["missed"].color, "dashed", cat),
    ]


def test_boxes_are_clipped_to_the_picture(tmp_path, monkeypatch):
    split = write_split(tmp_path)
    for box in ([-1e9, -1e9, 2e9, 2e9], [1e9, 5, 1e-100, 1], [5, 5, -3, -3], [470, 230, 10, 10]):
        outcome = BoxOutcome("missed", {"bbox": box, "category_id": 3}, None)
        ((_, _, _, corners),) = drawn_boxes(split, monkeypatch, outcome)
        assert all(0 <= x < SIDE and 0 <= y < SIDE / 2 for x, y in (corners[:2], corners[2:]))


@pytest.mark.parametrize(("height", "width"), [(3, 3000), (3000, 3), (60, 80)])
def test_pictures_of_any_size(tmp_path, height, width):
    outcome = BoxOutcome("missed", {"bbox": [0, 0, width, height], "category_id": 3}, None)
    picture = draw_outcomes(torch.zeros(3, height, width), [outcome], write_split(tmp_path))
    assert max(picture.size) == SIDE
    assert (pixels_of(picture) == torch.tensor(rgb(MARKS["missed"].color))).all(dim=2).any()


@pytest.mark.parametrize("kind", ["found", "false", "confused"])
def test_mask_and_keypoints_of_a_detection(tmp_path, kind):
    """All of its keypoints are drawn, because all are scored."""
    split = write_split(tmp_path, "masks", "keypoints")
    truth = coco_of(split.annotations).anns[1]
    boxes = {"image_id": 1, "category_id": 3, "bbox": truth["bbox"], "score": 0.9}
    more = {
        "segmentation": as_rle(rectangle(500, 1000, 200, 200, 600, 400)),
        "keypoints": [300, 150, 0.0, 500, 150, -3.5, 2000, 2000, 0],
    }
    color = COLORS[0] if kind == "found" else MARKS[kind].color
    for detection, has in ((boxes | more, True), (boxes, False)):
        outcome = BoxOutcome(kind, None if kind == "false" else truth, detection)
        picture = draw_outcomes(split[0][0], [outcome], split)
        assert_cat(picture, 0.96, (0, 0), color, mask=has, points=has)


@pytest.mark.parametrize("types", [(), ("masks",), ("keypoints",), ("masks", "keypoints")])
def test_mask_and_keypoints_of_a_missed_object(tmp_path, types):
    split = write_split(tmp_path, *types)
    truth = coco_of(split.annotations).anns
    outcomes = [BoxOutcome("missed", truth[1], None), BoxOutcome("missed", truth[2], None)]
    picture = draw_outcomes(split[0][0], [*outcomes, BoxOutcome("crowd", truth[3], None)], split)
    color = MARKS["missed"].color
    assert_cat(picture, 0.96, (0, 0), color, mask="masks" in types, points="keypoints" in types)
    if "masks" in types:
        assert (pixels_of(picture)[240, 860] - over(MARKS["crowd"].color)).abs().max() <= 1


def test_ground_truth_beside_detections(tmp_path):
    split = write_split(tmp_path, "masks", "keypoints")
    mask = as_rle(rectangle(500, 1000, 200, 200, 600, 400))
    found = {"image_id": 1, "category_id": 3, "bbox": [200, 100, 400, 300], "score": 0.9, "segmentation": mask}
    found["keypoints"] = [*POINTS[:6], 100, 450, 0]
    truth = coco_of(split.annotations).anns[1]
    draw_examples(split, {1: [BoxOutcome("found", truth, found)]}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        for left in (8, 8 + 480 + 8):
            assert_cat(drawn, 0.48, (left, 28), COLORS[0])
        assert drawn.getpixel((496 + 48, 28 + 216)) == tuple(rgb(RIGHT))
        assert drawn.getpixel((8 + 48, 28 + 216)) == (128, 128, 128)
    draw_examples(split, {1: [BoxOutcome("missed", truth, None)]}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        assert not changed(drawn.crop((496, 28, 976, 268))).any()


def test_classes_that_the_detector_lacks_are_drawn(tmp_path, monkeypatch):
    split = write_split(tmp_path)
    truth = coco_of(split.annotations).anns[1]
    monkeypatch.setattr(split, "category_ids", [one for one in split.category_ids if one != truth["category_id"]])
    ((_, color, _, _),) = drawn_boxes(split, monkeypatch, BoxOutcome("found", truth, None))
    assert color == MARKS["found"].color
    draw_examples(split, {1: [BoxOutcome("missed", truth, None)]}, tmp_path / "a.png")


def test_pictures_show_what_was_counted(tmp_path, monkeypatch):
    """The boxes that are drawn are those of the counts beside them."""
    root, least = write_shapes(tmp_path / "shapes"), 0.5
    split = CocoDetection(root / "val", truth_file(root))
    truth = json.loads(truth_file(root).read_text())["annotations"]
    found = [
        {"image_id": one["image_id"], "category_id": category, "bbox": one["bbox"], "score": score}
        for one in truth
        for category, score in ((3, 0.9), (5, 0.8), (8, 0.4), (3, 0.6))
    ]
    outcomes = match_boxes(coco_of(split.annotations), found, split.image_ids, min_score=least)
    report = Report({}, confusion={"min_score": least}, images=image_rows(outcomes))
    drawn = []

    def draw(image, boxes, split, unrefined):
        drawn.append((Counter(box.kind for box in boxes), unrefined))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("detector.evaluation.pictures.draw_outcomes", draw)
    pictures, _ = worst_and_best(split, report, outcomes, found, number=5)
    assert len(pictures) >= 5
    for picture, (counts, unrefined) in zip(pictures, drawn, strict=True):
        of_image = [one for one in found if one["image_id"] == picture.entry["id"] and one["score"] >= least]
        assert unrefined == of_image
        for kind in ("found", "missed", "confused", "false"):
            assert picture.entry[kind] == counts[kind]
    assert sum(counts.total() for counts, _ in drawn) > 20
