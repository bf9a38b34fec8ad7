"""Ascent on scores made by hand, whose maximum is known, and on the fit of a refinement."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from support.refinement_cases import SHAPES, RefinementCase

from detector.refinement.climbing import climb
from detector.refinement.refining import refine

GOAL = torch.tensor([[20.0, 30.0, 60.0, 50.0], [5.0, 5.0, 25.0, 45.0], [40.0, 10.0, 50.0, 20.0]]).double()
START = torch.tensor([[23.1, 27.3, 70.4, 52.2], [1.3, 9.9, 22.7, 47.1], [41.7, 7.7, 49.3, 20.9]]).double()
SIDES = (GOAL[:, 2:] - GOAL[:, :2]).repeat(1, 2)


def closeness(boxes, goal=GOAL, sides=SIDES):
    """A quadratic score with its maximum, 0, at the goals."""
    return -((boxes - goal) / sides).square().sum(1)


def test_boxes_end_at_the_maximum():
    boxes, score = climb(closeness, START, steps=100, step_size=0.25)
    torch.testing.assert_close(boxes, GOAL, rtol=0, atol=0.01)
    torch.testing.assert_close(score, closeness(boxes))


@pytest.mark.parametrize("step_size", [0.03, 0.25, 10])
def test_no_score_falls_with_more_steps(step_size):
    before = closeness(START)
    for steps in range(12):
        _, score = climb(closeness, START, steps=steps, step_size=step_size)
        assert (score >= before).all()
        before = score
    assert (before > closeness(START)).all()


def test_too_long_a_step_is_halved_until_one_rises():
    """A ridge 1 % of a side away: a step of 5 % leads too far, and its half does, too."""

    def ridge(boxes):
        return -((boxes[:, 0] + boxes[:, 2]) / 2 - 50.1).abs() * 1000

    start = torch.tensor([[45.0, 45.0, 55.0, 55.0]]).double()
    boxes, score = climb(ridge, start, steps=10, step_size=5e-6)
    # The gradient is 10 000 of a side: steps of 5, 2.5, 1.25 %, of which the last rises.
    torch.testing.assert_close(boxes, start + torch.tensor([0.125, 0, 0.125, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(score, ridge(boxes))


def test_no_step_is_longer_than_five_percent_of_a_side():
    seen = []

    def steep(boxes):
        seen.append(boxes.detach().clone())
        return 1e6 * closeness(boxes)

    climb(steep, START, steps=3, step_size=10)
    assert len(seen) == 4
    for before, after in pairwise(seen):  # at first all rise
        sides = before[:, 2:] - before[:, :2]
        moved = ((after[:, :2] + after[:, 2:]) - (before[:, :2] + before[:, 2:])).abs() / 2 / sides
        grown = ((after[:, 2:] - after[:, :2]) / sides).log().abs()
        furthest = torch.cat([moved, grown], dim=1).amax(dim=1)
        torch.testing.assert_close(furthest, torch.full((3,), 0.05).double())


def test_boxes_do_not_know_of_each_other():
    """Some arrive early, one has no score: the others go on as if alone."""

    def score_of(boxes, rows=slice(None)):
        scale = torch.tensor([1.0, 30.0, math.nan]).double()[rows]
        return scale * closeness(boxes, GOAL[rows], SIDES[rows])

    together, scores = climb(score_of, START, steps=20, step_size=0.1)
    for row in range(3):
        rows = slice(row, row + 1)
        alone, score = climb(lambda b, rows=rows: score_of(b, rows), START[rows], steps=20, step_size=0.1)
        assert torch.equal(alone, together[rows])
        assert torch.equal(score.nan_to_num(7), scores[rows].nan_to_num(7))
    assert not torch.equal(together[:2], START[:2])


@pytest.mark.parametrize("where", ["score", "slope", "beyond"])
def test_what_is_not_a_number_leaves_the_box(where):
    def score_of(boxes):
        first, one, last = closeness(boxes).split(1)
        if where == "score":
            one = one * math.nan
        elif where == "slope":  # of a square root, at 0
            one = (one - one.detach()).sqrt()
        elif not torch.equal(boxes[1], START[1]):  # once it has moved
            one = one * math.nan
        return torch.cat([first, one, last])

    seen = []
    boxes, _ = climb(lambda b: (seen.append(b.detach()), score_of(b))[1], START, steps=20, step_size=0.1)
    assert torch.cat(seen).isfinite().all()  # the crop refuses others
    assert torch.equal(boxes[1], START[1])
    assert (closeness(boxes)[[0, 2]] > closeness(START)[[0, 2]]).all()
    assert boxes.isfinite().all()


def test_no_more_evaluations_than_steps_and_none_after_arrival():
    calls = []

    def counted(boxes):
        calls.append(len(boxes))
        return closeness(boxes)

    climb(counted, START, steps=7, step_size=0.1)
    assert calls == [3] * 8
    calls.clear()
    climb(counted, GOAL, steps=100, step_size=0.1)  # there already
    assert len(calls) == 5  # a step of 0.1, and of its half, quarter and eighth


def test_no_steps():
    boxes, score = climb(closeness, START, steps=0, step_size=0.1)
    assert torch.equal(boxes, START)
    assert torch.equal(score, closeness(START))


def test_no_boxes():
    boxes, score = climb(lambda b: b.sum(1), torch.zeros(0, 4), steps=5, step_size=0.1)
    assert boxes.shape == (0, 4)
    assert score.shape == (0,)


# --- The fit of a refinement -----------------------------------------------------------------------------------------


def climbed(case, climbs, looks=0, features=None):
    """Boxes and fits of a refinement that climbs, by scores that are all 1 before."""
    config = case.refinement.config
    case.refinement.configure(dataclasses.replace(config, looks=looks, climbs=climbs, fit_power=1.0, step_size=0.3))
    scores = [b.new_ones(len(b)) for b in case.boxes]
    labels = [torch.arange(len(b)) for b in case.boxes]
    boxes, fits, labels = refine(
        case.refinement, features or case.features, case.boxes, scores, labels, SHAPES, nms_threshold=0.5
    )
    order = [la.argsort() for la in labels]
    return torch.cat([b[o] for b, o in zip(boxes, order)]), torch.cat([f[o] for f, o in zip(fits, order)])


def fit_at(case, boxes, look):
    parts = boxes.split([len(b) for b in case.boxes])
    return case.refinement.stage(look)(case.refinement.pool(case.features, list(parts), SHAPES))[1].sigmoid()


@torch.no_grad()
def test_the_fit_rises_and_is_that_at_the_boxes():
    case = RefinementCase(stages=2)
    before, low = climbed(case, 0)
    torch.testing.assert_close(low, fit_at(case, torch.cat(case.boxes), 0))
    assert torch.equal(before, torch.cat(case.boxes))
    after, high = climbed(case, 8)
    assert (high > low + 0.01).sum() >= 5
    assert (high >= low).all()
    torch.testing.assert_close(high, fit_at(case, after, 0))
    # After a look the weights are those of the next one.
    after, high = climbed(case, 8, looks=1)
    torch.testing.assert_close(high, fit_at(case, after, 1))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_climbs_whatever_the_gradient_mode(context, autocast):
    case = RefinementCase(torch.float32)
    wanted, _ = climbed(case, 5, looks=1)
    with context(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = {name: feature * 1 for name, feature in case.features.items()}  # made there
        boxes, _ = climbed(case, 5, looks=1, features=features)
    torch.testing.assert_close(boxes.detach(), wanted.detach(), rtol=0, atol=2.0 if autocast else 1e-4)
    assert not torch.equal(boxes, climbed(case, 0, looks=1)[0])
    assert all(p.grad is None for p in case.refinement.parameters())
    assert all(not f.requires_grad for f in case.features.values())
