"""What the box gradient does in training steps: how strong it is, and whether it leads to the truth."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou


class BoxGradientWatch:
    """What was seen in the forward and backward passes of a step.

    Strength is compared at the RPN's deltas, before the bound. Directions are compared where the gradient arrives at
    the positive RoIs, their coordinates in units of the box's sides: of the gradient's descent, and of the way to the
    matched truth. Ground-truth boxes among the RoIs, which have no way to go, are left out.
    """

    def __init__(self) -> None:
        self._own: list[Tensor] = []  # norms
        self._others: list[Tensor] = []
        self._cosines: list[Tensor] = []
        self._ious: list[Tensor] = []

    def see_deltas(self, own: Tensor, others: Tensor) -> None:
        """The deltas for the RPN's own box loss, and those that the proposals are decoded from."""
        for tensor, norms in ((own, self._own), (others, self._others)):
            if tensor.requires_grad:  # not where the RPN is frozen
                tensor.register_hook(lambda gradient, norms=norms: norms.append(gradient.norm()))

    def see_positives(self, drawn: list[Tensor], positive: list[Tensor], truth: list[Tensor]) -> None:
        """By image: the RoIs [R, 4], which of them are positive [R], and the truth [P, 4] matched to those."""
        for boxes, mask, goals in zip(drawn, positive, truth):
            rows = mask.nonzero()[:, 0]
            away = (boxes.detach()[rows] != goals).any(1)
            rows, goals = rows[away], goals[away]
            start = boxes.detach()[rows]
            self._ious.append(box_iou(start, goals).diagonal())
            if boxes.requires_grad:
                sides = (start[:, 2:] - start[:, :2]).repeat(1, 2)
                boxes.register_hook(_Compass(self._cosines, rows, sides, (goals - start) / sides))

    def reading(self) -> dict[str, float]:
        """What was seen, as far as there was anything to see.

        ``ratio``: the norm of the box gradient over that of the RPN's own box loss; ``away``: the share of positives
        that it leads away from the truth; ``cosine``: the mean cosine with the way there; ``iou``: their mean IoU
        with the truth as they are.
        """
        seen = {}
        if self._own and self._others:
            seen["ratio"] = float(torch.stack(self._others).norm() / torch.stack(self._own).norm().clamp(min=1e-30))
        cosines, ious = (torch.cat(values) if values else torch.empty(0) for values in (self._cosines, self._ious))
        if len(cosines):
            seen |= {"away": float((cosines < 0).double().mean()), "cosine": float(cosines.mean())}
        if len(ious):
            seen["iou"] = float(ious.mean())
        return seen


class _Compass:
    """A hook that notes the cosines of a gradient's descent with the way to the truth, of rows that have any."""

    def __init__(self, cosines: list[Tensor], rows: Tensor, sides: Tensor, way: Tensor) -> None:
        self.cosines, self.rows, self.sides, self.way = cosines, rows, sides, way

    def __call__(self, gradient: Tensor) -> None:
        descent = -gradient[self.rows] * self.sides
        some = descent.any(1)
        self.cosines.append(torch.cosine_similarity(descent[some], self.way[some], dim=1, eps=0))


@contextmanager
def watch_box_gradient(model: Any) -> Iterator[BoxGradientWatch]:
    """Within, the training steps of a model that :func:`~detector.swap_crop_head` made are watched, in any loop.

    ::

        with watch_box_gradient(model) as watch:
            sum(model(images, targets).values()).backward()
        print(watch.reading())
    """
    watch = BoxGradientWatch()
    model.rpn.watch = model.roi_heads.watch = watch
    try:
        yield watch
    finally:
        model.rpn.watch = model.roi_heads.watch = None
