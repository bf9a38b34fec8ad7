"""Box gradients of affine_crop where a sample lies exactly on a place where the formula changes.

The reference is the crop in numpy, moved slightly to either side. Where both sides have one slope the gradient is that
slope; at a kink it is one of the two, or between them.
"""

from functools import cache

import numpy as np
import pytest
import torch
from support.crops import both_samplers, for_sampler, operators, randn

from detector import affine_crop

HEIGHT, WIDTH = 6, 8
MAP = randn(1, 1, HEIGHT, WIDTH)
both_alignments = pytest.mark.parametrize("aligned", [False, True])


def tied_boxes():
    """One axis, or both, on centres and edges of pixels, on the border, and a pixel beyond it. [K, 4], numpy."""
    across = [-1, -0.5, 0, 0.5, 1, 2.5, 3, 7, 7.5, 8, 8.5]
    down = [-1, -0.5, 0, 0.5, 2, 4.5, 5, 5.5, 6, 6.5]
    boxes = [[start, 0.61, end, 4.37] for start in across for end in across if start < end]
    boxes += [[0.73, start, 6.31, end] for start in down for end in down if start < end]
    boxes += [[0, 0, 5.3, 4.2], [0.7, 0.6, 7, 5], [0, 0, 7, 5], [0.5, 0.5, 7.5, 5.5], [0, 0, 8, 6]]
    boxes += [[2.3, 1.2, 3.3, 2.2], [0, 0, 1, 1], [2, 1, 3, 2]]  # one pixel, the least if not aligned
    return np.array([*boxes, [2, 1, 2.01, 3], [2.5, 1.25, 2.5, 3.5]])  # a narrow one, and an empty one


def surface(at, size):
    """The weights of an axis' pixels in the bilinear surface with roi_align's border at places [n], [n, size]."""
    on_map = np.clip(at, 0, size - 1)[:, None]
    return np.maximum(1 - abs(on_map - np.arange(size)), 0) * ((at >= -1) & (at <= size))[:, None]


def axis_weights(start, end, bins, ratio, size, aligned):
    """[bins, samples, size]"""
    start, end = (start - 0.5, end - 0.5) if aligned else (start, max(end, start + 1))
    step = (end - start) / bins
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


@operators(lambda operator: operator.rule == "affine")
@both_alignments
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("bins", [1, 2])
def test_gradients_on_ties_are_those_of_a_side(operator, bins, create_graph, aligned, device):
    boxes, (least, greatest) = torch.from_numpy(tied_boxes()), slope_bounds(bins, operator.ratio, aligned)
    if operator.ratio == -1 and aligned:  # an empty box has no samples, and is 0
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
