"""Pictures of detections, whatever their shapes and names."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from detector.data.dataset import CocoDetection
from detector.data.drawing import LEGIBLE_SIDE, Box, draw, draw_boxes
from detector.evaluation.confusion import BoxOutcome
from detector.evaluation.page import MARKS, SIDE
from detector.evaluation.pictures import draw_outcomes
from detector.text import clean, short


def target(*boxes):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.ones(len(boxes)).long()}


@pytest.mark.parametrize("name", ["a\nb", "", "x" * 500, "\u202edrawkcab", "\ud800", "日本語", "<b>"])
def test_any_name_can_be_drawn(name):
    picture = draw(torch.zeros(3, 50, 60), target([5, 20, 30, 40]), [name])
    assert max(picture.size) >= 400


@pytest.mark.parametrize(("height", "width"), [(1000, 1), (1, 1000), (10, 10), (500, 900)])
def test_a_picture_is_enlarged_by_its_longer_side(height, width):
    picture = draw(torch.zeros(3, height, width), target(), [])
    factor = max(round(LEGIBLE_SIDE / max(height, width)), 1)
    assert picture.size == (width * factor, height * factor)


def test_a_caption_stays_inside():
    """At the right edge it is moved to the left, at the upper one it is put into the box."""
    pixels = torch.zeros(3, 440, 440)
    picture = draw(pixels, target([430, 2, 439, 30]), ["a long name of a class"])
    colored = torch.tensor(list(picture.convert("L").tobytes())).reshape(440, 440) > 0
    rows, columns = colored.nonzero().T
    assert columns.min() < 350
    moved = draw(pixels, target([430, 200, 439, 230]), ["a long name of a class"])
    last = torch.tensor(list(moved.convert("L").tobytes())).reshape(440, 440)[180:198, 436:] > 0
    assert last.any(dim=1).sum() > 5  # the plate's own right end
    assert rows.min() <= 2


def colors_of(picture, box):
    """The colours within a box, as hexadecimal words."""
    pixels = np.asarray(picture)[box[1] : box[3], box[0] : box[2]].reshape(-1, 3)
    return {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in pixels}


class TestStrokes:
    @pytest.mark.parametrize("ground", ["#FFFFFF", "#000000", "#E0002A", "#FFE600"])
    def test_a_thick_one_is_seen_on_any_ground_and_a_dashed_one_is_in_pieces(self, ground):
        across = {}
        for stroke in ("thick", "dashed"):
            picture = Image.new("RGB", (100, 100), ground)
            draw_boxes(picture, [Box((20, 40, 80, 90), "", "#FFE600", stroke)])
            for edge in ((30, 86, 70, 94), (30, 40, 70, 42), (18, 50, 22, 80), (78, 50, 82, 80)):
                assert {"#FFE600", "#000000"} <= colors_of(picture, edge) | {"#000000"}
            assert colors_of(picture, (30, 50, 70, 80)) == {ground}  # nothing of the object is hidden
            row = np.asarray(picture)[90, 22:78]
            across[stroke] = int((np.abs(np.diff(row.astype(int), axis=0)).sum(axis=1) > 0).sum())
        assert across == {"thick": 0, "dashed": 6}

    def test_a_dotted_one_has_two_colours_and_no_caption(self):
        picture = Image.new("RGB", (100, 100), "#808080")
        draw_boxes(picture, [Box((20, 40, 80, 90), "a cat", "#FFFFFF", "dotted")])
        assert colors_of(picture, (0, 0, 100, 39)) == colors_of(picture, (23, 43, 78, 88)) == {"#808080"}
        for edge in ((20, 40, 80, 42), (20, 89, 80, 91), (20, 40, 22, 90), (79, 40, 81, 90)):
            assert colors_of(picture, edge) == {"#000000", "#FFFFFF"}

    def test_boxes_of_no_size_and_outside(self):
        picture = Image.new("RGB", (50, 50))
        for stroke in ("thin", "thick", "dashed", "dotted"):
            draw_boxes(picture, [Box((x, x, x - 5, x), "a", "#FFE600", stroke) for x in (-70.0, 0.0, 49.5, 300.0)])
        assert len(colors_of(picture, (0, 0, 50, 50))) > 2


class TestOutcomes:
    @pytest.fixture
    def split(self, tmp_path):
        categories = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
        images = [{"id": 1, "file_name": "1.png", "width": 480, "height": 240}]
        (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
        Image.new("RGB", (480, 240)).save(tmp_path / "1.png")
        return CocoDetection(tmp_path, tmp_path / "a.json")

    def drawn(self, split, monkeypatch, *outcomes, unrefined=()):
        boxes = []
        monkeypatch.setattr(
            "detector.evaluation.pictures.draw_boxes", lambda picture, marked, **options: boxes.extend(marked)
        )
        draw_outcomes(torch.zeros(3, 240, 480), outcomes, split, unrefined)
        return [(box.caption, box.color, box.stroke, box.corners) for box in boxes]

    def test_each_says_what_it_is_and_mistakes_lie_on_top(self, split, monkeypatch):
        cat = {"bbox": [10, 20, 30, 40], "category_id": 3}
        dog = {"bbox": [100, 20, 30, 40], "category_id": 8, "score": 0.876}
        boxes = self.drawn(
            split,
            monkeypatch,
            BoxOutcome("missed", cat, None),
            BoxOutcome("false", None, dog),
            BoxOutcome("confused", cat, dog),
            BoxOutcome("found", dog, dog),
            BoxOutcome("crowd", cat, None),
            BoxOutcome("crowd", None, dog),
        )
        there, here = (20, 40, 80, 120), (200, 40, 260, 120)  # twice as large
        assert boxes == [
            ("crowd: cat", MARKS["crowd"].color, "thin", there),
            ("dog 0.88, on a crowd", MARKS["crowd"].color, "thin", here),
            ("dog 0.88", "#D55E00", "thin", here),  # the second class's
            ("dog 0.88, is: cat", MARKS["confused"].color, "thick", here),
            ("false: dog 0.88", MARKS["false"].color, "thick", here),
            ("missed: cat", MARKS["missed"].color, "dashed", there),
        ]

    def test_boxes_before_a_refinement_lie_beneath(self, split, monkeypatch):
        cat = {"bbox": [10, 20, 30, 40], "category_id": 3, "score": 0.8}
        boxes = self.drawn(split, monkeypatch, BoxOutcome("false", None, cat), unrefined=[cat | {"bbox": [5, 5, 9, 9]}])
        assert boxes == [
            ("", "#FFFFFF", "dotted", (10, 10, 28, 28)),
            ("false: cat 0.80", MARKS["false"].color, "thick", (20, 40, 80, 120)),
        ]

    @pytest.mark.parametrize("box", [[-1e9, -1e9, 2e9, 2e9], [1e9, 5, 1e-100, 1], [5, 5, -3, -3], [470, 230, 10, 10]])
    def test_any_box_is_drawn_inside(self, split, monkeypatch, box):
        ((_, _, _, corners),) = self.drawn(
            split, monkeypatch, BoxOutcome("missed", {"bbox": box, "category_id": 3}, None)
        )
        assert all(0 <= x < SIDE and 0 <= y < SIDE / 2 for x, y in (corners[:2], corners[2:]))

    @pytest.mark.parametrize(("height", "width"), [(3, 3000), (3000, 3), (2000, 1500), (60, 80)])
    def test_labels_are_written_on_the_picture_as_it_is_shown(self, split, height, width):
        outcome = BoxOutcome("missed", {"bbox": [0, 0, width, height], "category_id": 3}, None)
        picture = draw_outcomes(torch.zeros(3, height, width), [outcome], split)
        assert max(picture.size) == SIDE
        assert MARKS["missed"].color in colors_of(picture, (0, 0, *picture.size))


def test_names_are_one_line_and_not_too_long():
    assert clean("a\n\tb\u200b\u202e c\ud800") == "a b c\ufffd"
    assert short("x" * 100, 10) == "x" * 9 + "\u2026"
    assert short("x" * 10, 10) == "x" * 10
