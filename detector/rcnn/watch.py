"""Diagnostics of the box gradient in training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from detector.overriding import overridden


class BoxGradientWatch:
    def __init__(self) -> None:
        self._norms: list[Tensor] = []  # of the RPN's own gradient, the box gradient, and the bounded box gradient
        self._cosines: list[Tensor] = []

    def watch_deltas(self, deltas: Tensor, own: Tensor, others: Tensor) -> None:
        gradients = dict.fromkeys(("own", "others"), torch.zeros_like(deltas))

        def record(total: Tensor) -> None:
            self._norms.append(torch.stack([g.norm() for g in (*gradients.values(), total - gradients["own"])]))

        if deltas.requires_grad:
            own.register_hook(lambda g: gradients.update(own=g))
            others.register_hook(lambda g: gradients.update(others=g))
            deltas.register_hook(record)

    def watch_positives(self, boxes: Tensor, positive: Tensor, truth: Tensor) -> None:
        corners = boxes.detach()[positive]
        sides = (corners[:, 2:] - corners[:, :2]).repeat(1, 2)
        direction = (truth - corners) / sides  # 0 for ground truth among the RoIs

        def record(gradient: Tensor) -> None:
            gradient = gradient[positive]
            rows = direction.any(1) & gradient.any(1)
            self._cosines.append(torch.cosine_similarity((-gradient * sides)[rows], direction[rows], dim=1, eps=0))

        if boxes.requires_grad:
            boxes.register_hook(record)

    def reading(self) -> dict[str, float]:
        norms = torch.stack(self._norms or [torch.zeros(3)]).norm(dim=0).tolist()
        cosines = torch.cat(self._cosines or [torch.zeros(0)]).double()
        values = {"ratio": norms[1] / norms[0], "passed": norms[2] / norms[0]} if norms[0] else {}
        directions = {"cosine": cosines.mean().item(), "away": (cosines < 0).double().mean().item()}
        return values | (directions if len(cosines) else {})


@contextmanager
def watch_box_gradient(model: Any) -> Iterator[BoxGradientWatch]:
    """Record the box gradient of a swapped model in the backward passes of the block. Other models raise TypeError.

    ``reading()`` of the yielded object is a dict, empty if nothing was recorded. ``ratio`` and ``passed`` are the norms
    of the box gradient at the RPN's deltas before and after the bound, relative to the RPN's own. ``cosine`` is the
    mean cosine of the descent direction with the direction to the ground truth, ``away`` the fraction of negative
    cosines.
    """
    if not hasattr(getattr(model, "rpn", None), "box_gradient_watch"):
        raise TypeError(f"{type(model).__name__} is not a swapped model: call swap_crop_head first, and unwrap it")
    watch = BoxGradientWatch()
    with overridden(model.rpn, box_gradient_watch=watch), overridden(model.roi_heads, box_gradient_watch=watch):
        yield watch
