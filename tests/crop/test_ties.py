"""Box gradients where a sample, or the edge of a bin, lies exactly on a place where the formula changes.

The reference is the crop in numpy, moved slightly to either side. Where both sides have one slope the gradient is that
slope; at a kink it is one of the two, or between them.
"""

from functools import cache

import numpy as np
import pytest
import torch
from support.crops import both_samplers, for_sampler, randn

from detector import affine_crop, exact_crop

HEIGHT, WIDTH = 6, 8
MAP = randn(1, 1, HEIGHT, WIDTH)
EXACT = "exact"
both_alignments = pytest.mark.parametrize("aligned", [False, True])


def tied_boxes():
    """One axis, or both, on centres and edges of pixels, on the border, and a pixel beyond it. [K, 4], numpy."""
    across = [-1, -0.5, 0, 0.5, 1, 2.5, 3, 7, 7.5, 8, 8.5]
    down = [-1, -0.5, 0, 0.5, 2, 4.5, 5, 5.5, 6, 6.5]
    boxes = [[start, 0.61, end, 4.37] for start in across for end in across if start < end]
    boxes += [[0.73, start, 6.31, end] for start in down for end in down if start < end]
    boxes += [[0, 0, 5.3, 4.2], [0.7, 0.6, 7, 5], [0, 0, 7, 5], [0.5, 0.5, 7.5, 5.5], [0, 0, 8, 6]]
    boxes += [[2.3, 1.2, 3.3, 2.2], [0, 0, 1, 1], [2, 1, 3, 2]]  # one pixel, the least if not aligned
    return np.array([*boxes, [2, 1, 2.01, 3], [2.5, 1.25, 2.5, 3.5]])  # the smallest exact bin, and an empty one


def surface(at, size):
    """The weights of an axis' pixels in the bilinear surface with roi_align's border at places [n], [n, size]."""
    on_map = np.clip(at, 0, size - 1)[:, None]
    return np.maximum(1 - abs(on_map - np.arange(size)), 0) * ((at >= -1) & (at <= size))[:, None]


def mean_over(start, end, size):
    """Their mean over an interval. Between pixel centres the surface is straight, and its middle is the mean."""
    if end - start < 0.01:  # MIN_BIN
        start, end = (start + end) / 2 - 0.005, (start + end) / 2 + 0.005
    cuts = np.array([start, *(n for n in range(-1, size + 1) if start < n < end), end])
    return np.diff(cuts) / (end - start) @ surface((cuts[1:] + cuts[:-1]) / 2, size)


def axis_weights(start, end, bins, ratio, size, aligned):
    """[bins, samples, size]; in the exact crop a bin is one sample."""
    start, end = (start - 0.5, end - 0.5) if aligned else (start, max(end, start + 1))
    step = (end - start) / bins
    if ratio == EXACT:
        return np.stack([mean_over(start + n * step, start + (n + 1) * step, size) for n in range(bins)])[:, None]
    at = start + (np.arange(bins)[:, None] + (np.arange(ratio) + 0.5) / ratio) * step
    return surface(at.flatten(), size).reshape(bins, ratio, size)


def by_samples(box, along, bins, ratios, aligned):
    """The crop in numpy, as a mean over the last axis, the samples of one axis (0: x, 1: y). [bins, bins, samples]"""
    x = axis_weights(box[0], box[2], bins, ratios[0], WIDTH, aligned)
    y = axis_weights(box[1], box[3], bins, ratios[1], HEIGHT, aligned)
    x, y = (x, y.mean(1, keepdims=True)) if along == 0 else (x.mean(1, keepdims=True), y)
    return np.einsum("pmh,hw,qnw->pqmn", y, MAP[0, 0].numpy(), x).reshape(bins, bins, -1)


@cache
def slope_bounds(bins, ratio, aligned, step=1e-6):
    """Least and greatest slope for a step of each coordinate to either side, each [K, bins, bins, 4].

    Each sample on a kink may have its own side. Adaptive counts are those of the box itself. Where a sample crosses the
    border the value jumps, and the bounds are infinite.
    """
    boxes, bounds = tied_boxes(), []
    for box in boxes:
        sides = box[2:] - box[:2] if aligned else np.maximum(box[2:] - box[:2], 1)
        ratios = [max(int(np.ceil(side / bins)), 1) for side in sides] if ratio == -1 else [ratio] * 2
        for side in range(4):
            moved = [box + sign * step * np.eye(4)[side] for sign in (-1, 0, 1)]
            behind, here, ahead = (by_samples(one, side % 2, bins, ratios, aligned) for one in moved)
            either = np.stack([here - behind, ahead - here]) / step
            jumps = (abs(either) > 1e3).any(0)
            least, greatest = np.where(jumps, -np.inf, either.min(0)), np.where(jumps, np.inf, either.max(0))
            bounds.append([least.mean(-1), greatest.mean(-1)])
    bounds = np.stack(bounds).reshape(len(boxes), 4, 2, bins, bins)
    least, greatest = torch.from_numpy(bounds).permute(2, 0, 3, 4, 1)
    return least, greatest


@both_alignments
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("bins", [1, 2])
def test_gradients_on_ties_are_those_of_a_side(operator, bins, create_graph, aligned, device):
    ratio = EXACT if operator.ratio == 100 else operator.ratio
    boxes, (least, greatest) = torch.from_numpy(tied_boxes()), slope_bounds(bins, ratio, aligned)
    if ratio == -1 and aligned:  # an empty box has no samples, and is 0
        boxes, least, greatest = boxes[:-1], least[:-1], greatest[:-1]
    boxes, least, greatest = (for_sampler(operator.sampler, rows, every=6) for rows in (boxes, least, greatest))
    boxes = boxes.to(device).requires_grad_()
    assert_between(operator(MAP.to(device), [boxes], bins, 1.0, aligned), boxes, least, greatest, create_graph)


@both_samplers
@both_alignments
def test_gradients_on_ties_of_a_single_sample(sampler, aligned):
    rows = (torch.from_numpy(tied_boxes()), *slope_bounds(2, 1, aligned))
    boxes, least, greatest = (for_sampler(sampler, one, every=6) for one in rows)
    crops = affine_crop(MAP, [boxes.requires_grad_()], 2, 1.0, 1, aligned, sampler=sampler)
    assert_between(crops, boxes, least, greatest, False)


def assert_between(crops, boxes, least, greatest, create_graph):
    keep = {"create_graph": create_graph, "retain_graph": True}
    gradient = torch.stack([torch.autograd.grad(b, boxes, **keep)[0] for b in crops.flatten(1).sum(0)], 1)
    gradient = gradient.detach().cpu().view_as(least)
    assert (gradient - gradient.clamp(least, greatest)).abs().max() < 1e-5
    smooth = greatest - least < 1e-6
    assert smooth.double().mean() > 0.4  # where the gradient must be one number
    assert gradient[smooth].abs().mean() > 0.05


@both_alignments
def test_second_derivatives_of_exact_crops_on_ties_are_those_to_the_right(aligned):
    """A step of a coordinate moves all edges one way, so the slopes to the right belong together.

    On maps and boxes whose edges float64 represents; others are on either side by rounding.
    """
    source, step = randn(1, 1, 8, 8), 1e-4
    starts = torch.tensor([[0.0, 0], [1, 2], [-0.5, 0.5], [0.5, 1.5], [2.25, 1], [3, -0.5]], dtype=torch.float64)
    sides = torch.tensor([[2.0, 4], [4, 3], [7, 7], [7, 4], [8, 2]], dtype=torch.float64)
    boxes = torch.cat([starts.repeat(5, 1), starts.repeat(5, 1) + sides.repeat_interleave(6, 0)], 1)

    def crop(boxes):
        return exact_crop(source, [boxes], 1, 1.0, aligned).flatten()

    def second_difference(a, b):
        return crop(boxes + a + b) - crop(boxes + a) - crop(boxes + b) + crop(boxes)

    steps = step * torch.eye(4, dtype=torch.float64)
    expected = torch.stack([torch.stack([second_difference(a, b) for b in steps], 1) for a in steps], 1) / step**2
    moved = boxes.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(crop(moved).sum(), moved, create_graph=True)
    rows = [torch.autograd.grad(column.sum(), moved, retain_graph=True)[0] for column in gradient.unbind(1)]
    torch.testing.assert_close(torch.stack(rows, 1), expected, rtol=0, atol=2e-3)
    assert expected.abs().mean() > 0.05


def test_the_exact_gradient_is_continuous_where_a_sampled_one_jumps():
    maps = torch.rand(1, 1, 9, 9, dtype=torch.float64)

    def jump_at(x, crop):
        boxes = torch.tensor([[x + d, 2.0, x + d + 3, 5.0] for d in (-1e-7, 1e-7)]).double().requires_grad_()
        before, after = torch.autograd.grad(crop([boxes]).sum(), boxes)[0][:, 0].tolist()
        return abs(after - before)

    for x in (2.0, 2.5, 3.0):
        assert jump_at(x, lambda boxes: exact_crop(maps, boxes, 1, 1.0, True)) < 1e-6
    assert jump_at(2.0, lambda boxes: affine_crop(maps, boxes, 1, 1.0, 1, True)) > 1e-3
