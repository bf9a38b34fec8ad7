"""Masks and skeletons in pictures: where they are, what they look like, and on which pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn.functional import max_pool2d

from detector.data.dataset import CocoDetection
from detector.data.drawing import COLORS, LEFT, MIDDLE, RIGHT, Box, draw, draw_boxes, draw_keypoints, draw_mask
from detector.data.keypoints import PERSON, KeypointLayout
from detector.evaluation.confusion import BoxOutcome
from detector.evaluation.page import MARKS
from detector.evaluation.pictures import draw_examples, draw_outcomes
from detector.evaluation.truth import coco_of
from detector.tools.browsing import browse

BLUE = COLORS[0]
TRIO = KeypointLayout(("nose", "left_eye", "right_eye"), ((0, 1), (1, 2)))


def rgb(color):
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def rectangle(height, width, x1, y1, x2, y2):
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def grown(mask, pixels):
    """A mask [H, W], bool, with as many pixels around it; taken from it, if there are less than 0."""
    if pixels < 0:
        return ~grown(~mask, -pixels)
    return max_pool2d(mask[None].float(), 2 * pixels + 1, 1, pixels)[0] > 0


def as_rle(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.numpy()))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def pixels_of(picture):
    return torch.from_numpy(np.array(picture))


def changed(picture, ground="#808080"):
    """Where a picture is not its ground any more, [H, W]."""
    return (pixels_of(picture) != torch.tensor(rgb(ground))).any(dim=2)


def over(color, ground="#808080"):
    """A mask's colour over its ground."""
    return torch.tensor(rgb(ground)) * 0.55 + torch.tensor(rgb(color)) * 0.45


class TestMasks:
    @pytest.mark.parametrize("form", [lambda mask: mask, as_rle], ids=["tensor", "rle"])
    def test_the_object_is_coloured_its_edge_is_drawn_and_nothing_else_changes(self, form):
        mask = rectangle(60, 80, 10, 20, 40, 50)
        mask[25:30, 15:50] = 1
        mask[40:44, 20:30] = 0  # a hole
        picture = Image.new("RGB", (80, 60), "#808080")
        draw_mask(picture, form(mask), BLUE)
        mask = mask > 0
        torch.testing.assert_close(changed(picture), grown(mask, 1))
        pixels = pixels_of(picture)
        inside = grown(mask, -2)
        assert inside.sum() > 300
        assert (pixels[inside] - over(BLUE)).abs().max() <= 1
        assert (pixels[mask & ~inside] == torch.tensor(rgb(BLUE))).all()
        assert (pixels[grown(mask, 1) & ~mask] == 255).all()

    @pytest.mark.parametrize("ground", ["#FFFFFF", "#000000", *COLORS])
    def test_the_edge_is_seen_on_any_ground(self, ground):
        for color in (*COLORS, *(mark.color for mark in MARKS.values())):
            picture = Image.new("RGB", (40, 40), ground)
            draw_mask(picture, rectangle(40, 40, 10, 10, 30, 30), color)
            across = pixels_of(picture)[20, 5:15].float()  # luminance and all
            assert (across - torch.tensor(rgb(ground))).abs().amax() > 100, color

    @pytest.mark.parametrize("size", [(400, 600), (200, 310), (13, 17), (10, 900)])
    def test_it_is_stretched_over_the_picture(self, size):
        """Compared with the nearest pixel of the mask: at most one off, of the mask's or the picture's."""
        mask = rectangle(20, 30, 4, 6, 21, 17)
        mask[8:10, 21:26] = 1
        picture = Image.new("RGB", size[::-1], "#808080")
        draw_mask(picture, mask, BLUE)
        rows, columns = (((torch.arange(n) + 0.5) * m / n).long() for n, m in zip(size, (20, 30)))
        sure, perhaps = (grown(mask > 0, n)[rows][:, columns] for n in (-1, 1))
        drawn = changed(picture)
        assert drawn[sure].all()
        assert not drawn[~grown(perhaps, 1)].any()

    def test_an_object_that_the_picture_cuts_has_no_edge_there(self):
        picture = Image.new("RGB", (30, 20), "#808080")
        draw_mask(picture, torch.ones(20, 30, dtype=torch.uint8), BLUE)
        assert (pixels_of(picture) - over(BLUE)).abs().max() <= 1

    @pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (33, 77)])
    @pytest.mark.parametrize(
        "mask", [rectangle(50, 70, *box) for box in [(0, 0, 0, 0), (69, 49, 70, 50), (3, 0, 4, 50)]]
    )
    def test_any_mask_is_drawn_on_a_picture_of_any_size(self, size, mask):
        picture = Image.new("RGB", size, "#808080")
        draw_mask(picture, mask, BLUE)
        assert picture.size == size
        assert mask.any() or not changed(picture).any()

    def test_objects_of_one_class_that_touch_are_told_apart(self):
        target = {
            "boxes": torch.tensor([[100.0, 100, 300, 300], [200, 100, 400, 300]]),  # their frames are elsewhere
            "labels": torch.tensor([1, 1]),
            "masks": torch.stack([rectangle(440, 440, 100, 100, 250, 300), rectangle(440, 440, 250, 100, 400, 300)]),
        }
        row = pixels_of(draw(torch.full((3, 440, 440), 0.5), target, ["cat"]))[200, 240:260]
        assert (row == 255).all(dim=1).any()

    def test_a_large_mask_does_not_hide_a_small_one_and_boxes_lie_on_top(self):
        small, large = rectangle(100, 100, 40, 40, 60, 60), rectangle(100, 100, 5, 5, 95, 95)
        picture = Image.new("RGB", (100, 100), "#808080")
        boxes = [Box((40, 40, 60, 60), "", BLUE, mask=small), Box((5, 5, 95, 95), "", COLORS[1], mask=large)]
        draw_boxes(picture, boxes)
        pixels = pixels_of(picture)
        assert (pixels[50, 50] - over(BLUE, "#{:02X}{:02X}{:02X}".format(*pixels[30, 30].tolist()))).abs().max() <= 2
        frame = torch.cat([pixels[40, 40:60], pixels[40:60, 40]])
        assert (frame == torch.tensor(rgb(BLUE))).all()

    @pytest.mark.parametrize("field", ["masks", "segmentations"])
    def test_a_detection_below_the_score_has_none(self, field):
        masks = [rectangle(440, 440, 100, 100, 150, 150), rectangle(440, 440, 300, 300, 350, 350)]
        target = {
            "boxes": torch.tensor([[100.0, 100, 150, 150], [300, 300, 350, 350]]),
            "labels": torch.tensor([1, 1]),
            "scores": torch.tensor([0.4, 0.9]),
            field: torch.stack(masks) if field == "masks" else [as_rle(mask) for mask in masks],
        }
        drawn = changed(draw(torch.full((3, 440, 440), 128, dtype=torch.uint8), target, ["cat"]))
        assert not drawn[120:130, 120:130].any()
        assert drawn[320:330, 320:330].all()


def with_points(points, boxes=((0, 0, 1, 1),)):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.ones(len(boxes)).long(),
            "keypoints": torch.tensor(points, dtype=torch.float32)}  # fmt: skip


class TestKeypoints:
    def test_each_is_where_it_is_on_the_enlarged_picture(self):
        points = [[[20, 10, 1], [40, 30, 2], [60, 15, 1]]]
        picture = draw(torch.full((3, 50, 88), 128, dtype=torch.uint8), with_points(points), ["cat"], layout=TRIO)
        assert picture.size == (440, 250)
        for (x, y, _), color in zip(points[0], (MIDDLE, LEFT, RIGHT)):
            assert picture.getpixel((5 * x, 5 * y)) == tuple(rgb(color))
        for x, y in ((30, 20), (50, 22.5)):  # half-way
            assert picture.getpixel((5 * x, int(5 * y))) == tuple(rgb(BLUE))
        drawn = changed(picture)[:, 60:]  # beside the caption
        assert not drawn[:40].any()
        assert not drawn[160:].any()
        assert not drawn[:, 250:].any()
        assert not drawn[50:74, 110:180].any()  # no line that the layout does not have, from the first to the last

    def test_one_that_is_not_visible_is_not_drawn_nor_a_line_to_it(self):
        picture = Image.new("RGB", (100, 100), "#808080")
        draw_keypoints(picture, [[20, 20, 1], [50, 50, 0], [80, 20, 1]], TRIO, BLUE)
        drawn = changed(picture)
        assert drawn[20, 20]
        assert drawn[20, 80]
        assert not drawn[:, 30:70].any()

    @pytest.mark.parametrize("place", [(-1, 50), (50, 101), (1e9, 50), (-1e9, 1e9), (float("nan"), 5)])
    def test_one_outside_the_picture_is_not_drawn_nor_a_line_to_it(self, place):
        picture = Image.new("RGB", (100, 100), "#808080")
        draw_keypoints(picture, [[20, 20, 1], [*place, 1], [80, 20, 1]], TRIO, BLUE)
        assert changed(picture)[20, 20]
        assert not changed(picture)[:, 30:70].any()
        assert not changed(picture)[30:].any()

    @pytest.mark.parametrize("layout", [None, PERSON, KeypointLayout(("a", "bright", "right"))])
    def test_where_names_say_no_side_dots_have_the_colour_of_the_object(self, layout):
        picture = Image.new("RGB", (100, 100), "#808080")
        draw_keypoints(picture, [[20, 20, 1], [50, 50, 1], [80, 20, 1]], layout, COLORS[1])
        assert {picture.getpixel(place) for place in ((20, 20), (50, 50), (80, 20))} == {tuple(rgb(COLORS[1]))}
        assert not changed(picture)[35, 35]

    @pytest.mark.parametrize(("left", "right"), [("left_eye", "right_eye"), ("eye-L", "Eye-R"), ("r knee", "l knee")])
    def test_left_and_right_whatever_their_words(self, left, right):
        picture = Image.new("RGB", (100, 100), "#808080")
        draw_keypoints(picture, [[20, 20, 1], [50, 50, 1]], KeypointLayout((left, right)), BLUE)
        found = [picture.getpixel(place) for place in ((20, 20), (50, 50))]
        assert found == [tuple(rgb(color)) for color in ((RIGHT, LEFT) if left == "r knee" else (LEFT, RIGHT))]

    @pytest.mark.parametrize("ground", ["#FFFFFF", "#000000", *COLORS])
    def test_dots_and_lines_are_seen_on_any_ground(self, ground):
        for color in COLORS:
            for layout in (TRIO, None):
                picture = Image.new("RGB", (100, 100), ground)
                draw_keypoints(picture, [[20, 50, 1], [80, 50, 1], [80, 90, 1]], layout, color)
                columns = (20, 50) if layout else (20,)
                for x in columns:
                    across = pixels_of(picture)[40:60, x].float()
                    assert (across - torch.tensor(rgb(ground))).abs().amax() > 100, color

    def test_dots_do_not_hide_a_small_object(self):
        drawn = []
        for scale in (1, 10):
            picture = Image.new("RGB", (300, 300), "#808080")
            draw_keypoints(picture, [[20, 20, 1], [20 + 20 * scale, 20, 1]], None, BLUE)
            drawn.append(int(changed(picture).sum()))
        assert drawn[0] < drawn[1] / 2

    def test_an_object_without_any(self):
        picture = Image.new("RGB", (100, 100), "#808080")
        draw_keypoints(picture, [[0, 0, 0]] * 3, TRIO, BLUE)
        assert not changed(picture).any()


POINTS = [300, 150, 2, 500, 150, 1, 0, 0, 0]


@pytest.fixture
def split_of(tmp_path):
    """Makes a split of one grey image, 1000 x 500, with a cat, which has a mask and keypoints, a dog and a crowd."""

    def make(*parts, **options):
        (tmp_path / "a.json").write_text(
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "1.png", "width": 1000, "height": 500}],
                    "categories": [
                        {"id": 3, "name": "cat", "keypoints": TRIO.names, "skeleton": [[1, 2], [2, 3]]},
                        {"id": 8, "name": "dog"},
                    ],
                    "annotations": [
                        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [200, 100, 400, 300], "keypoints": POINTS}
                        | {"segmentation": [[200, 200, 600, 200, 600, 400, 200, 400]]},
                        {"id": 2, "image_id": 1, "category_id": 8, "bbox": [20, 20, 30, 30]},
                        {"id": 3, "image_id": 1, "category_id": 3, "bbox": [800, 0, 200, 500], "iscrowd": 1}
                        | {"segmentation": {"size": [500, 1000], "counts": [400000, 100000]}},
                    ],
                }
            )
        )
        Image.new("RGB", (1000, 500), "#808080").save(tmp_path / "1.png")
        return CocoDetection(tmp_path, tmp_path / "a.json", annotation_types=parts, **options)

    return make


def check(picture, scale, corner, color, *, mask=True, points=True):
    """The cat's parts are there, or not; in a picture that is part of another, from its corner on."""
    pixels, (left, top) = pixels_of(picture), corner

    def at(x, y):
        return pixels[top + round(y * scale), left + round(x * scale)]

    ground, inside = at(250, 120), at(250, 300)
    assert (ground == 128).all()
    assert (inside - (over(color) if mask else 128)).abs().max() <= 1
    assert (at(700, 300) == 128).all()
    for (x, y), ink in (((300, 150), MIDDLE), ((500, 150), LEFT), ((400, 150), color)):
        assert at(x, y).tolist() == (rgb(ink) if points else [128] * 3)


class TestBrowsing:
    def test_a_large_image_is_made_small_with_masks_and_points(self, split_of, tmp_path):
        parts = ("masks", "keypoints")
        browse(split_of(*parts), split_of(*parts, transform=lambda *item: item), tmp_path / "a.png", epochs=1)
        with Image.open(tmp_path / "a.png") as drawn:
            for left in (8, 8 + 480 + 8):
                check(drawn.crop((left, 28, left + 480, 268)), 0.48, (0, 0), BLUE)

    def test_boxes_alone(self, split_of, tmp_path):
        browse(split_of(), split_of(transform=lambda *item: item), tmp_path / "a.png", epochs=1)
        with Image.open(tmp_path / "a.png") as drawn:
            check(drawn, 0.48, (8, 28), BLUE, mask=False, points=False)


class TestOutcomes:
    def outcome(self, kind, split, **detected):
        truth = coco_of(split.annotations).anns[1]
        found = {"image_id": 1, "category_id": 3, "bbox": truth["bbox"], "score": 0.9} | detected
        return BoxOutcome(kind, None if kind == "false" else truth, None if kind == "missed" else found)

    def drawn(self, split, *outcomes):
        return draw_outcomes(split[0][0], outcomes, split)

    @pytest.mark.parametrize("kind", ["found", "false", "confused"])
    def test_those_of_a_detection_have_the_colour_of_its_box(self, split_of, kind):
        """Its keypoints are all scored, so that all are drawn, whatever their third number is."""
        found = {
            "segmentation": as_rle(rectangle(500, 1000, 200, 200, 600, 400)),
            "keypoints": [300, 150, 0.0, 500, 150, -3.5, 2000, 2000, 0],
        }
        split = split_of("masks", "keypoints")
        color = BLUE if kind == "found" else MARKS[kind].color
        check(self.drawn(split, self.outcome(kind, split, **found)), 0.96, (0, 0), color)
        check(self.drawn(split, self.outcome(kind, split)), 0.96, (0, 0), color, mask=False, points=False)

    @pytest.mark.parametrize("parts", [(), ("masks",), ("keypoints",), ("masks", "keypoints")])
    def test_those_of_a_missed_object_as_far_as_they_are_read(self, split_of, parts):
        split = split_of(*parts)
        picture = self.drawn(split, self.outcome("missed", split))
        check(picture, 0.96, (0, 0), MARKS["missed"].color, mask="masks" in parts, points="keypoints" in parts)

    def test_a_crowd_has_its_mask_and_an_object_may_have_nothing(self, split_of):
        split = split_of("masks", "keypoints")
        crowd, dog = coco_of(split.annotations).anns[3], coco_of(split.annotations).anns[2]
        picture = self.drawn(split, BoxOutcome("crowd", crowd, None), BoxOutcome("missed", dog, None))
        assert (pixels_of(picture)[240, 860] - over(MARKS["crowd"].color)).abs().max() <= 1
        assert not changed(picture)[100:, :760].any()

    def test_the_ground_truth_beside_the_detections(self, split_of, tmp_path):
        moved = rectangle(500, 1000, 200, 200, 600, 400)
        results = [
            {"image_id": 1, "category_id": 3, "bbox": [200, 100, 400, 300], "score": 0.9}
            | {"segmentation": as_rle(moved), "keypoints": [*POINTS[:6], 100, 450, 0]},
        ]
        draw_examples(split_of("masks", "keypoints"), results, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as drawn:
            for left in (8, 8 + 1000 + 8):
                check(drawn, 1, (left, 28), BLUE)
            assert drawn.getpixel((1016 + 100, 28 + 450)) == tuple(rgb(RIGHT))
            assert drawn.getpixel((8 + 100, 28 + 450)) == (128, 128, 128)

    def test_no_detections_beside_the_ground_truth(self, split_of, tmp_path):
        draw_examples(split_of("masks", "keypoints"), [], tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as drawn:
            assert not changed(drawn.crop((1016, 28, 2016, 528))).any()
