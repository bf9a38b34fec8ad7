"""Pictures with boxes, captions, masks and keypoints."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawn import GREY, TRIO, as_rle, assert_cat, changed, over, pixels_of, rectangle, rgb, write_split
from torch.nn.functional import max_pool2d

from detector.data.drawing import (
    COLORS,
    LEFT,
    LEGIBLE_SIDE,
    MIDDLE,
    RIGHT,
    Box,
    draw,
    draw_boxes,
    draw_keypoints,
    draw_mask,
)
from detector.data.keypoints import PERSON, KeypointLayout
from detector.tools.browse import browse

BLUE = COLORS[0]
GROUNDS = ["#FFFFFF", "#000000", "#E0002A", "#FFE600", *COLORS]


def boxes_target(*boxes):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.ones(len(boxes)).long()}


@pytest.mark.parametrize("name", ["a\nb", "", "x" * 500, "\u202edrawkcab", "\ud800", "日本語", "<b>"])
def test_any_name_can_be_drawn(name):
    assert max(draw(torch.zeros(3, 50, 60), boxes_target([5, 20, 30, 40]), [name]).size) >= 400


@pytest.mark.parametrize(("height", "width"), [(1000, 1), (10, 10), (500, 900)])
def test_small_pictures_are_enlarged(height, width):
    factor = max(round(LEGIBLE_SIDE / max(height, width)), 1)
    assert draw(torch.zeros(3, height, width), boxes_target(), []).size == (width * factor, height * factor)
    assert max(draw(torch.zeros(3, height, width), boxes_target(), [], max_side=100).size) == 100


def test_captions_stay_inside_the_picture():
    for top, rows in ((2, slice(0, 40)), (200, slice(180, 198))):  # in the box at the upper edge, otherwise above it
        picture = draw(torch.zeros(3, 440, 440), boxes_target([430, top, 439, top + 28]), ["a long name of a class"])
        plate = changed(picture, "#000000")[rows]
        assert plate[:, :350].any()
        assert plate[:, 436:].any(dim=1).sum() > 5  # its right end


def colors_of(picture, box):
    """The colours within a box, as hexadecimal words."""
    pixels = np.asarray(picture)[box[1] : box[3], box[0] : box[2]].reshape(-1, 3)
    return {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in pixels}


@pytest.mark.parametrize("ground", ["#FFFFFF", "#000000", "#E0002A", "#FFE600"])
def test_strokes_are_visible_on_any_ground(ground):
    changes = {}
    for stroke in ("thick", "dashed", "dotted"):
        picture = Image.new("RGB", (100, 100), ground)
        draw_boxes(picture, [Box((20, 40, 80, 90), "a cat", "#FFE600", stroke)])
        for edge in ((30, 86, 70, 94), (30, 40, 70, 42), (18, 50, 22, 80), (78, 50, 82, 80)):
            assert {"#FFE600", "#000000"} <= colors_of(picture, edge) | {"#000000"}
        assert colors_of(picture, (30, 50, 70, 80)) == {ground}  # the object stays visible
        changes[stroke] = int((np.abs(np.diff(np.asarray(picture)[90, 22:78].astype(int), axis=0)).sum(1) > 0).sum())
    assert colors_of(picture, (0, 0, 100, 39)) == {ground}  # a dotted box has no caption
    assert changes["thick"] == 0
    assert changes["dashed"] == 6 < changes["dotted"]


def test_boxes_without_an_area_or_outside_the_picture():
    picture = Image.new("RGB", (50, 50))
    for stroke in ("thin", "thick", "dashed", "dotted"):
        draw_boxes(picture, [Box((x, x, x - 5, x), "a", "#FFE600", stroke) for x in (-70.0, 0.0, 49.5, 300.0)])
    assert len(colors_of(picture, (0, 0, 50, 50))) > 2


def grown(mask, pixels):
    """A mask [H, W], bool, dilated by pixels, or eroded by a negative number of them."""
    if pixels < 0:
        return ~grown(~mask, -pixels)
    return max_pool2d(mask[None].float(), 2 * pixels + 1, 1, pixels)[0] > 0


@pytest.mark.parametrize("form", [lambda mask: mask, as_rle], ids=["tensor", "rle"])
def test_a_mask_has_a_tint_a_contour_and_a_halo(form):
    mask = rectangle(60, 80, 10, 20, 40, 50)
    mask[25:30, 15:50] = 1
    mask[40:44, 20:30] = 0  # a hole
    picture = Image.new("RGB", (80, 60), GREY)
    draw_mask(picture, form(mask), BLUE)
    mask = mask > 0
    torch.testing.assert_close(changed(picture), grown(mask, 1))
    pixels, inside = pixels_of(picture), grown(mask, -2)
    assert (pixels[inside] - over(BLUE)).abs().max() <= 1
    assert (pixels[mask & ~inside] == torch.tensor(rgb(BLUE))).all()
    assert (pixels[grown(mask, 1) & ~mask] == 255).all()


@pytest.mark.parametrize("ground", GROUNDS)
def test_masks_and_keypoints_are_visible_on_any_ground(ground):
    for color in COLORS:
        picture = Image.new("RGB", (40, 40), ground)
        draw_mask(picture, rectangle(40, 40, 10, 10, 30, 30), color)
        assert (pixels_of(picture)[20, 5:15].float() - torch.tensor(rgb(ground))).abs().amax() > 100
        for layout, columns in ((TRIO, (20, 50)), (None, (20,))):  # dots and lines
            picture = Image.new("RGB", (100, 100), ground)
            draw_keypoints(picture, [[20, 50, 1], [80, 50, 1], [80, 90, 1]], layout, color)
            for x in columns:
                assert (pixels_of(picture)[40:60, x].float() - torch.tensor(rgb(ground))).abs().amax() > 100


@pytest.mark.parametrize("size", [(400, 600), (200, 310), (13, 17), (10, 900)])
def test_masks_are_stretched_over_the_picture(size):
    """Compared with nearest-neighbour scaling: at most one pixel off, of the mask or of the picture."""
    mask = rectangle(20, 30, 4, 6, 21, 17)
    mask[8:10, 21:26] = 1
    picture = Image.new("RGB", size[::-1], GREY)
    draw_mask(picture, mask, BLUE)
    rows, columns = (((torch.arange(n) + 0.5) * m / n).long() for n, m in zip(size, (20, 30)))
    smallest, largest = (grown(mask > 0, n)[rows][:, columns] for n in (-1, 1))
    drawn = changed(picture)
    assert drawn[smallest].all()
    assert not drawn[~grown(largest, 1)].any()


def test_a_mask_has_no_contour_along_the_edge_of_the_picture():
    picture = Image.new("RGB", (30, 20), GREY)
    draw_mask(picture, torch.ones(20, 30, dtype=torch.uint8), BLUE)
    assert (pixels_of(picture) - over(BLUE)).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (33, 77)])
@pytest.mark.parametrize("box", [(0, 0, 0, 0), (69, 49, 70, 50), (3, 0, 4, 50)])
def test_any_mask_on_a_picture_of_any_size(size, box):
    picture = Image.new("RGB", size, GREY)
    mask = rectangle(50, 70, *box)
    draw_mask(picture, mask, BLUE)
    assert mask.any() or not changed(picture).any()


def test_masks_that_touch_have_a_halo_between_them():
    target = boxes_target([100, 100, 300, 300], [200, 100, 400, 300])  # not where the masks end
    target["masks"] = torch.stack([rectangle(440, 440, 100, 100, 250, 300), rectangle(440, 440, 250, 100, 400, 300)])
    row = pixels_of(draw(torch.full((3, 440, 440), 0.5), target, ["cat"]))[200, 240:260]
    assert (row == 255).all(dim=1).any()


def test_small_masks_lie_on_large_ones_and_boxes_on_both():
    small, large = rectangle(100, 100, 40, 40, 60, 60), rectangle(100, 100, 5, 5, 95, 95)
    picture = Image.new("RGB", (100, 100), GREY)
    boxes = [Box((40, 40, 60, 60), "", BLUE, mask=small), Box((5, 5, 95, 95), "", COLORS[1], mask=large)]
    draw_boxes(picture, boxes)
    pixels = pixels_of(picture)
    below = "#{:02X}{:02X}{:02X}".format(*pixels[30, 30].tolist())
    assert (pixels[50, 50] - over(BLUE, below)).abs().max() <= 2
    assert (torch.cat([pixels[40, 40:60], pixels[40:60, 40]]) == torch.tensor(rgb(BLUE))).all()


@pytest.mark.parametrize("field", ["masks", "segmentations"])
def test_detections_below_the_score_are_not_drawn(field):
    masks = [rectangle(440, 440, 100, 100, 150, 150), rectangle(440, 440, 300, 300, 350, 350)]
    target = boxes_target([100, 100, 150, 150], [300, 300, 350, 350]) | {
        "scores": torch.tensor([0.4, 0.9]),
        field: torch.stack(masks) if field == "masks" else [as_rle(mask) for mask in masks],
    }
    drawn = changed(draw(torch.full((3, 440, 440), 128, dtype=torch.uint8), target, ["cat"]))
    assert not drawn[:200].any()
    assert drawn[320:330, 320:330].all()


def test_keypoints_on_an_enlarged_picture():
    points = [[20, 10, 1], [40, 30, 2], [60, 15, 1]]
    target = boxes_target([0, 0, 1, 1]) | {"keypoints": torch.tensor([points], dtype=torch.float32)}
    picture = draw(torch.full((3, 50, 88), 128, dtype=torch.uint8), target, ["cat"], layout=TRIO)
    assert picture.size == (440, 250)
    for (x, y, _), color in zip(points, (MIDDLE, LEFT, RIGHT)):
        assert picture.getpixel((5 * x, 5 * y)) == tuple(rgb(color))
    for x, y in ((30, 20), (50, 22.5)):  # on the lines
        assert picture.getpixel((5 * x, int(5 * y))) == tuple(rgb(BLUE))
    assert not changed(picture)[50:74, 170:240].any()  # no line joins the first and the last


def dots(points, layout=TRIO, color=BLUE):
    picture = Image.new("RGB", (100, 100), GREY)
    draw_keypoints(picture, points, layout, color)
    return picture


@pytest.mark.parametrize("place", [(50, 50, 0), (-1, 50, 1), (50, 101, 1), (1e9, 50, 1), (float("nan"), 5, 1)])
def test_invisible_keypoints_and_their_lines_are_not_drawn(place):
    drawn = changed(dots([[20, 20, 1], place, [80, 20, 1]]))
    assert drawn[20, 20]
    assert drawn[20, 80]
    assert not drawn[:, 30:70].any()
    assert not changed(dots([[0, 0, 0]] * 3)).any()


@pytest.mark.parametrize("layout", [None, PERSON, KeypointLayout(("a", "bright", "right"))])
def test_dots_have_the_colour_of_the_object_if_names_have_no_sides(layout):
    picture = dots([[20, 20, 1], [50, 50, 1], [80, 20, 1]], layout, COLORS[1])
    assert {picture.getpixel(place) for place in ((20, 20), (50, 50), (80, 20))} == {tuple(rgb(COLORS[1]))}
    assert not changed(picture)[35, 35]


@pytest.mark.parametrize("names", [("left_eye", "right_eye"), ("eye-L", "Eye-R"), ("l knee", "r knee")])
def test_dots_on_the_left_and_on_the_right(names):
    for order, colors in ((names, (LEFT, RIGHT)), (names[::-1], (RIGHT, LEFT))):
        picture = dots([[20, 20, 1], [50, 50, 1]], KeypointLayout(order))
        assert [picture.getpixel(place) for place in ((20, 20), (50, 50))] == [tuple(rgb(color)) for color in colors]


def test_dots_of_a_small_object_are_small():
    small, large = (Image.new("RGB", (300, 300), GREY) for _ in range(2))
    draw_keypoints(small, [[20, 20, 1], [40, 20, 1]], None, BLUE)
    draw_keypoints(large, [[20, 20, 1], [220, 20, 1]], None, BLUE)
    assert changed(small).sum() < changed(large).sum() / 2


@pytest.mark.parametrize("types", [(), ("masks", "keypoints")])
def test_a_sheet_of_training_images(tmp_path, types):
    stored, augmented = write_split(tmp_path, *types), write_split(tmp_path, *types, transform=lambda *item: item)
    browse(stored, augmented, tmp_path / "a.png", epochs=1)
    with Image.open(tmp_path / "a.png") as drawn:
        for left in (8, 8 + 480 + 8):
            part = drawn.crop((left, 28, left + 480, 268))
            assert_cat(part, 0.48, (0, 0), BLUE, mask=bool(types), points=bool(types))
