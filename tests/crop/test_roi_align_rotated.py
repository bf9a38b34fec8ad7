"""Rotated RoIAlign's own rules: expectations of detectron2 and mmcv, right angles, the angle's direction, huge boxes.

What all crops have in common is in test_operators, at one angle.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support.crops import general_boxes, randn, rotated_reference, slopes, with_index
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes

from detector import RoIAlignRotated, affine_crop, roi_align_rotated

SIZE = (11, 14)
MAP = torch.rand(1, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
both_ratios = pytest.mark.parametrize("ratio", [0, 2])
both_alignments = pytest.mark.parametrize("aligned", [False, True])


def rotated(corners, angle=0.0):
    """Boxes [K, 4] of corners as boxes with an angle, or one angle each."""
    centres, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return torch.cat([centres, sides, torch.as_tensor(angle).to(corners).expand(len(corners))[:, None]], 1)


# --- Expectations of earlier implementations -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_expectation_of_detectron2(turns, dtype):
    """Its box is (1, 1, 3, 3); turned by 90 degrees the crop's top is the map's left, upwards."""
    image = torch.arange(25, dtype=dtype).view(1, 1, 5, 5)
    rows = [[4.5, 5, 5.5, 6], [7, 7.5, 8, 8.5], [9.5, 10, 10.5, 11], [12, 12.5, 13, 13.5]]
    expected = torch.tensor(rows, dtype=dtype).rot90(-turns)
    found = roi_align_rotated(image, torch.tensor([[0, 2, 2, 2, 2, 90.0 * turns]], dtype=dtype), 4, 1.0, 0)
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=1e-5)


@both_ratios
def test_an_empty_box(ratio):
    """detectron2 has no adaptive sample in it, and fixed ones at its centre."""
    source = torch.rand(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 3, 2, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    found = roi_align_rotated(source, rois, 7, 1.0, ratio)
    centre = source.detach()[0, 0, 1:3, 2:4].mean() if ratio else torch.tensor(0.0)
    torch.testing.assert_close(found, centre.to(found).expand(1, 1, 7, 7), rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(found.sum(), [source, rois])
    assert gradients[0].any() == gradients[1].any() == (ratio > 0)
    assert gradients[1].isfinite().all()


@both_ratios
def test_an_empty_batch(ratio):
    source, rois = torch.zeros(0, 3, 10, 10, requires_grad=True), torch.zeros(0, 6, requires_grad=True)
    found = roi_align_rotated(source, rois, (7, 7), 1.0, ratio)
    assert found.shape == (0, 3, 7, 7)
    found.sum().backward()
    assert source.grad.shape == source.shape


SQUARE = [[1.0, 2], [3, 4]]
SLOPED = [[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]


@pytest.mark.parametrize("clockwise", [False, True])
@pytest.mark.parametrize(
    ("maps", "roi", "values", "of_map"),
    [
        ([SQUARE], [0.5, 0.5, 1, 1, 0], [[[1, 1.25], [1.5, 1.75]]], [[3.0625, 0.4375], [0.4375, 0.0625]]),
        ([SQUARE], [0.5, 0.5, 1, 1, 90], [[[1.5, 1], [1.75, 1.25]]], [[3.0625, 0.4375], [0.4375, 0.0625]]),
        (
            [SQUARE, [[4.0, 3], [2, 1]]],
            [0.5, 0.5, 1, 1, 0],
            [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]],
            [[3.0625, 0.4375], [0.4375, 0.0625]],
        ),
        (
            [SLOPED],
            [1.5, 1.5, 3, 3, 0],
            [[[1.9375, 4.75], [7.5625, 10.375]]],
            [
                [0.47265625, 0.42968750, 0.42968750, 0.04296875],
                [0.42968750, 0.39062500, 0.39062500, 0.03906250],
                [0.42968750, 0.39062500, 0.39062500, 0.03906250],
                [0.04296875, 0.03906250, 0.03906250, 0.00390625],
            ],
        ),
        (
            [SLOPED],
            [1.5, 1.5, 3, 3, 90],
            [[[7.5625, 1.9375], [10.375, 4.75]]],
            [
                [0.47265625, 0.42968750, 0.42968750, 0.04296875],
                [0.42968750, 0.39062500, 0.39062500, 0.03906250],
                [0.42968750, 0.39062500, 0.39062500, 0.03906250],
                [0.04296875, 0.03906250, 0.03906250, 0.00390625],
            ],
        ),
    ],
    ids=["a map", "90 degrees", "two channels", "4 x 4", "4 x 4 at 90 degrees"],
)
def test_expectations_of_mmcv(maps, roi, values, of_map, clockwise):
    """Its angles are in radians, counter-clockwise by default. Its test takes the gradient of the sum."""
    maps = torch.tensor([maps], dtype=torch.float64, requires_grad=True)
    radians = math.radians(roi[4]) * (-1 if clockwise else 1)
    rois = torch.tensor([[0, *roi[:4], radians]], dtype=torch.float64)
    rois = torch.cat([rois[:, :5], rois[:, 5:].rad2deg()], 1)
    found = roi_align_rotated(maps, rois, (2, 2), 1.0, 2, aligned=True, clockwise=clockwise)
    torch.testing.assert_close(found, found.new_tensor([values]), rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), maps)
    torch.testing.assert_close(gradient, gradient.new_tensor(of_map).expand_as(maps), rtol=0, atol=1e-10)


# --- Angles ----------------------------------------------------------------------------------------------------------


@both_ratios
@both_alignments
def test_angle_0_is_affine_crop(ratio, aligned):
    """On boxes across the border, and on integer boxes inside of the map, whose samples lie on pixel centres."""
    inside = torch.combinations(torch.arange(0, 8.0).double())
    integer = torch.cat(
        [torch.stack([inside[:, 0], b[0].expand(28), inside[:, 1], b[1].expand(28)], 1) for b in inside]
    )
    for corners in (general_boxes(30, SIZE) / 0.3, integer / 0.5):
        scale = 0.5 if len(corners) > 30 else 0.3
        if not aligned:  # affine_crop widens boxes to a pixel from their start, and this from their centre
            corners = corners[(corners[:, 2:] - corners[:, :2]).amin(1) * scale > 1]
        boxes, given = corners.clone().requires_grad_(), rotated(corners).requires_grad_()
        expected = affine_crop(MAP, [boxes], (3, 4), scale, ratio or -1, aligned)
        found = roi_align_rotated(MAP, [given], (3, 4), scale, ratio, aligned)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        if scale == 0.3:  # where no sample is on a kink
            upstream = randn(*found.shape)
            (of_corners,) = torch.autograd.grad(expected, boxes, upstream)
            (of_boxes,) = torch.autograd.grad(found, given, upstream)
            low, high = of_corners.split(2, 1)
            torch.testing.assert_close(of_boxes[:, :2], low + high, rtol=0, atol=1e-9)
            torch.testing.assert_close(of_boxes[:, 2:4], (high - low) / 2, rtol=0, atol=1e-9)


@both_ratios
@pytest.mark.parametrize("turns", [0, 1, 2, 3, -1, 5])
def test_right_angles_turn_the_crop(ratio, turns):
    """A turned box with its sides exchanged reads the same pixels; its crop is that of the upright box, turned."""
    corners = general_boxes(20, SIZE, seed=1)
    upright = roi_align_rotated(MAP, [rotated(corners)], 3, 1.0, ratio)
    boxes = rotated(corners, 90.0 * turns)
    if turns % 2:
        boxes = boxes[:, [0, 1, 3, 2, 4]]
    found = roi_align_rotated(MAP, [boxes], 3, 1.0, ratio)
    torch.testing.assert_close(found, upright.rot90(-turns, (2, 3)), rtol=0, atol=1e-10)


@both_ratios
@both_alignments
@pytest.mark.parametrize("angle", [0.0, 90.0, 180.0, 270.0, -90.0, None])
def test_gradients_to_all_five_numbers(ratio, aligned, angle):
    """Against differences of the reference, across the border, at right angles and at any."""
    angles = torch.linspace(-170, 400, 24) if angle is None else angle
    boxes = (rotated(general_boxes(24, SIZE, seed=4), angles) / torch.tensor([0.3] * 4 + [1])).requires_grad_()
    found = roi_align_rotated(MAP, [boxes], (3, 4), 0.3, ratio, aligned)
    upstream = randn(*found.shape, seed=5)
    (gradient,) = torch.autograd.grad(found, boxes, upstream)
    expected = slopes(
        lambda moved: rotated_reference(MAP, [moved], (3, 4), 0.3, ratio, aligned), boxes.detach(), upstream
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    assert (expected.abs().mean(0) > torch.tensor([0.02] * 4 + [0.01])).all()


@both_ratios
@pytest.mark.parametrize("clockwise", [False, True])
def test_gradcheck_to_all_five_numbers(ratio, clockwise):
    boxes = rotated(general_boxes(2, (6, 8), seed=2), torch.tensor([-71.3, 158.9])).requires_grad_()

    def crop(source, boxes):
        return roi_align_rotated(source, with_index([1, 0], boxes), (2, 1), 0.5, ratio, True, clockwise)

    assert torch.autograd.gradcheck(crop, (randn(2, 1, 3, 4).requires_grad_(), boxes))


def test_clockwise_turns_the_other_way():
    boxes = rotated(general_boxes(6, SIZE), 33.0).requires_grad_()
    opposite = (boxes.detach() * torch.tensor([1, 1, 1, 1, -1])).requires_grad_()
    found = roi_align_rotated(MAP, [boxes], 3, 1.0, 2, True, True)
    expected = roi_align_rotated(MAP, [opposite], 3, 1.0, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(found.square().sum(), boxes)
    (other,) = torch.autograd.grad(expected.square().sum(), opposite)
    torch.testing.assert_close(gradient[:, 4], -other[:, 4], rtol=1e-10, atol=1e-12)
    assert other[:, 4].any()


# --- torchvision's rotated boxes -------------------------------------------------------------------------------------

CORNERS = torch.tensor([[30.0, 55.0], [69.0, 31.0], [85.0, 57.0], [46.0, 81.0]])  # clockwise as seen, from the top left


def test_boxes_of_torchvision_are_the_same_boxes():
    """A rectangle painted by its corners: the crop at the box that torchvision finds for them is inside everywhere."""
    picture = Image.new("L", (120, 100))
    ImageDraw.Draw(picture).polygon([tuple(corner) for corner in CORNERS.tolist()], fill=255)
    source = torch.from_numpy(np.array(picture, dtype=np.float32))[None, None] / 255
    (box,) = box_convert(CORNERS.reshape(1, 8), "xyxyxyxy", "cxcywhr")
    shrunk = torch.cat([box[:2], box[2:4] - 4, box[4:]])  # a margin for painted edges
    assert 30 < box[4] < 33  # its first side rises to the right
    inside = roi_align_rotated(source, [shrunk[None]], (8, 12), 1.0, 4)
    assert inside.min() > 0.999
    grown = torch.cat([box[:2], box[2:4] + 8, box[4:]])
    around = roi_align_rotated(source, [grown[None]], (20, 30), 1.0, 4)[0, 0]
    assert around[[0, -1]].max() == around[:, [0, -1]].max() == 0
    opposite = torch.cat([shrunk[:4], -shrunk[4:]])
    assert roi_align_rotated(source, [opposite[None]], (8, 12), 1.0, 4).min() < 0.1


def test_the_crop_reads_between_the_corners_of_torchvision():
    """On a map whose pixels are their own coordinates, bins are spread evenly from corner to corner."""
    y, x = torch.meshgrid(torch.arange(100) + 0.5, torch.arange(120) + 0.5, indexing="ij")
    boxes = BoundingBoxes(
        torch.tensor([[60.0, 50, 44, 26, 33], [40, 45, 20, 30, -100]]), format="CXCYWHR", canvas_size=(100, 120)
    )
    corners = box_convert(boxes.as_subclass(torch.Tensor), "cxcywhr", "xyxyxyxy").view(2, 4, 2)
    crops = roi_align_rotated(torch.stack([x, y])[None], [boxes], (4, 6), 1.0, 1)
    u, v = (torch.arange(6) + 0.5) / 6, ((torch.arange(4) + 0.5) / 4)[:, None]
    for crop, (top_left, top_right, _, bottom_left) in zip(crops, corners):
        across, down = top_right - top_left, bottom_left - top_left
        expected = top_left[:, None, None] + across[:, None, None] * u + down[:, None, None] * v
        torch.testing.assert_close(crop, expected, rtol=0, atol=1e-3)


def test_tv_tensors_as_elements_of_a_list():
    plain = [rotated(general_boxes(n, SIZE, seed=n, dtype=torch.float32), 33.0) for n in (3, 2)]
    boxes = [BoundingBoxes(b, format="CXCYWHR", canvas_size=SIZE) for b in plain]
    source = MAP.float().expand(2, -1, -1, -1)
    found = roi_align_rotated(source, boxes, 3, 1.0, 2)
    assert type(found) is torch.Tensor
    assert torch.equal(found, roi_align_rotated(source, plain, 3, 1.0, 2))


# --- Sides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [[5.0, 5, -1, 2, 0], [5, 5, 2, -1e-3, 33]])
def test_a_negative_side_is_an_error(box):
    with pytest.raises(ValueError, match=r"rois\[1\] must have a width and a height of at least 0, got \[5.0"):
        roi_align_rotated(MAP, torch.tensor([[0, 5.0, 5, 1, 2, 0], [0, *box]]), 2)


@pytest.mark.parametrize(
    "box", [[5.0, 5, -1, 2, 0], [5, 5, 2, -1e-3, 33], [5, 5, 2, 2, math.nan], [5, 5, 2, 2, math.inf]]
)
def test_a_negative_side_or_no_angle_is_nan_where_a_check_is_impossible(box):
    rois = torch.tensor([[0, 5.0, 5, 3, 2, 33], [0, *box]], dtype=torch.float64)
    found = torch.vmap(lambda roi: roi_align_rotated(MAP, roi[None], 2, 1.0, 2))(rois)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[0], roi_align_rotated(MAP, rois[:1], 2, 1.0, 2), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="rois"):
        roi_align_rotated(MAP, rois, 2, 1.0, 2)


@both_alignments
@pytest.mark.parametrize("angle", [0.0, 33.0, 90.0])
def test_boxes_far_larger_than_the_map_adaptively(angle, aligned):
    source = randn(1, 2, 6, 5)
    box = torch.tensor([[34.7, 4.8, 150, 120, angle]], dtype=torch.float64)
    found = roi_align_rotated(source, [box], 3, 1.0, 0, aligned)
    expected = rotated_reference(source, [box], 3, 1.0, 0, aligned)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    huge = torch.tensor([[3.1, 2.2, 1e4, 1e4, angle]], dtype=torch.float64, requires_grad=True)
    found = roi_align_rotated(source, [huge], 3, 1.0, 0, aligned)  # 10^8 samples, if none were left out
    assert torch.autograd.grad(found.sum(), huge)[0].isfinite().all()
    # The middle bin, 3,333 pixels wide, holds the map and the ring that repeats its edge.
    assert 0 < found[0, :, 1, 1].abs().max() < 100 / 3e3**2
    assert found[0].count_nonzero() == 2


@both_ratios
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.85])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sides_below_a_pixel_are_widened_if_not_aligned(ratio, scale, dtype):
    """To one pixel of the map around the centre, as in mmcv: also adaptively that is one sample a bin."""
    boxes = torch.tensor([[4.2, 3.1, 0.4, 0.2, 33], [6.3, 2.2, 0, 0, 20], [5.1, 4.4, 3.7, 0.5, 60]], dtype=dtype)
    boxes = boxes / torch.tensor([scale] * 4 + [1])
    boxes, source = boxes.to(dtype).requires_grad_(), MAP.to(dtype)
    found = roi_align_rotated(source, [boxes], 1, scale, ratio, aligned=False)
    expected = rotated_reference(source, [boxes], 1, scale, ratio, aligned=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), boxes)
    assert not gradient[:2, 2:4].any()
    assert gradient[2, 2] != 0
    assert gradient[:, :2].all()


@both_ratios
@pytest.mark.parametrize("turns", range(4))
def test_samples_exactly_on_the_border_count(ratio, turns):
    """At -1 and at the map's size, along either axis, on a map of ones. Just beyond they count as 0."""
    source = torch.ones(1, 1, 5, 9, dtype=torch.float64)
    # The sample of a bin of one pixel lies at its centre minus half a pixel.
    ends = [(-0.5, 2.5), (9.5, 2.5), (4.5, -0.5), (4.5, 5.5)]
    boxes = torch.tensor([[x, y, 1, 1, 90 * turns] for x, y in ends], dtype=torch.float64)
    assert (roi_align_rotated(source, [boxes], 1, 1.0, min(ratio, 1)) == 1).all()
    boxes[:, :2] += torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]]) * 1e-9
    assert not roi_align_rotated(source, [boxes], 1, 1.0, min(ratio, 1)).any()


@pytest.mark.parametrize("angle", [45, 90, 130])
@pytest.mark.parametrize("size", [(40, 3), (3, 40)])
def test_no_sample_of_a_large_box_on_a_long_map_is_left_out(size, angle):
    source = torch.rand(1, 1, *size, dtype=torch.float64)
    box = torch.tensor([[size[1] / 2, size[0] / 2, 90, 80, angle]], dtype=torch.float64)
    found = roi_align_rotated(source, [box], 3, 1.0, 0)
    torch.testing.assert_close(found, rotated_reference(source, [box], 3, 1.0, 0), rtol=0, atol=1e-10)


# --- Module ----------------------------------------------------------------------------------------------------------


@both_ratios
def test_the_module_equals_the_function(ratio):
    boxes = rotated(general_boxes(3, (22, 28)), 33.0)
    settings = {"sampling_ratio": ratio, "aligned": False, "clockwise": True}
    module = RoIAlignRotated((2, 3), 0.5, **settings)
    expected = roi_align_rotated(MAP, [boxes], (2, 3), 0.5, ratio, False, True)
    assert torch.equal(module(MAP, [boxes]), expected)
    assert torch.equal(module(MAP, with_index([0] * 3, boxes)), expected)
    text = f"output_size=(2, 3), spatial_scale=0.5, sampling_ratio={ratio}, aligned=False, clockwise=True"
    assert repr(module) == f"RoIAlignRotated({text})"
    assert not module.state_dict()
    with pytest.raises(ValueError, match="output_size"):
        RoIAlignRotated(0, 1.0)
