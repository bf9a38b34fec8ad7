"""Pictures of detections, whatever their shapes and names."""

import pytest
import torch

from detector.drawing import LEGIBLE_SIDE, draw
from detector.names import clean, short


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


def test_names_are_one_line_and_not_too_long():
    assert clean("a\n\tb\u200b\u202e c\ud800") == "a b c\ufffd"
    assert short("x" * 100, 10) == "x" * 9 + "\u2026"
    assert short("x" * 10, 10) == "x" * 10
