"""Climbing: boxes follow the gradient of a score of their fit, each as long as its own score rises."""

from collections.abc import Callable

import torch
from torch import Tensor

FURTHEST = 0.05  # of a side, in one step
SHORTER = 0.5  # a step, after one that did not rise
SHORTEST = 0.1  # of the first step: a box whose steps are shorter has arrived


def climb(
    score_of: Callable[[Tensor], Tensor], boxes: Tensor, *, steps: int, step_size: float
) -> tuple[Tensor, Tensor]:
    """Move boxes uphill by gradient ascent with backtracking.

    A step moves the centre and the logarithm of the size, in units in which a box is 1 wide and 1 high: the gradient
    there times ``step_size``, no more than 5 % for any of the four. A box goes where its score rises; where it does
    not, it stays and tries a shorter step. All boxes move at once, at one evaluation of the score a step.

    Args:
        score_of: from boxes [K, 4] to scores [K], the score of a box depending on that box alone; differentiable.
        boxes: [K, 4] (x1, y1, x2, y2), float32 or better.
        steps: the most steps.
        step_size: see above.

    Returns:
        Boxes [K, 4], none with a lower score than it had, and their scores [K]; detached.
    """
    best = boxes.detach()
    score, slope = _score_and_slope(score_of, best)
    length = torch.full_like(score, step_size)
    for _ in range(steps):
        if not bool((length >= SHORTEST * step_size).any()):
            break
        tried = _moved(best, (length[:, None] * slope).nan_to_num().clamp(-FURTHEST, FURTHEST))
        new_score, new_slope = _score_and_slope(score_of, tried)
        rises = new_score > score  # false for NaN
        best = torch.where(rises[:, None], tried, best)
        slope = torch.where(rises[:, None], new_slope, slope)
        score = torch.where(rises, new_score, score)
        length = torch.where(rises, length, length * SHORTER)
    return best, score


def _moved(boxes: Tensor, by: Tensor) -> Tensor:
    """Boxes moved by (x, y, log width, log height) [K, 4], in units of their sides."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + by[:, :2] * size
    half = size * by[:, 2:].exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


def _score_and_slope(score_of: Callable[[Tensor], Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [K], and their gradient at the identity of :func:`_moved`, [K, 4]."""
    with torch.enable_grad():
        by = torch.zeros_like(boxes, requires_grad=True)
        score = score_of(_moved(boxes, by))
        (slope,) = torch.autograd.grad(score.sum(), by)  # of the boxes alone: no weight gets a buffer
    return score.detach(), slope
