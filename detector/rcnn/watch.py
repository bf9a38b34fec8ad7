"""What the box gradient does in training steps: how strong it is, and whether it leads to the ground truth."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from detector.overriding import overridden


class BoxGradientWatch:
    """What was seen in the forward and backward passes of a step.

    Strengths are compared at the RPN's deltas. Directions are compared where the gradient arrives at the positive
    RoIs, before the bound, their coordinates in units of the box's sides: that of the gradient's descent with that of
    the way to the matched truth. Ground-truth boxes among the RoIs, which have no way to go, are left out.
    """

    def __init__(self) -> None:
        self._norms: dict[str, list[Tensor]] = {"own": [], "others": [], "passed": []}
        self._cosines: list[Tensor] = []
        self._ious: list[Tensor] = []

    def see_deltas(self, deltas: Tensor, own: Tensor, others: Tensor) -> None:
        """The RPN's deltas [N, 4], and their copies for its own box loss and for the proposals."""
        if not deltas.requires_grad:  # the RPN is frozen
            return
        gradients: list[Tensor] = []

        def see_own(gradient: Tensor) -> None:
            gradients.append(gradient)
            self._norms["own"].append(gradient.norm())

        own.register_hook(see_own)
        others.register_hook(lambda gradient: self._norms["others"].append(gradient.norm()))
        deltas.register_hook(lambda total: self._norms["passed"].append((total - sum(gradients)).norm()))

    def see_positives(self, drawn: list[Tensor], positive: list[Tensor], truth: list[Tensor]) -> None:
        """By image: the RoIs [R, 4], which of them are positive [R], and the ground truth [P, 4] matched to those."""
        for boxes, mask, goals in zip(drawn, positive, truth):
            rows = mask.nonzero()[:, 0]
            apart = (boxes.detach()[rows] != goals).any(1)
            rows, goals = rows[apart], goals[apart]
            start = boxes.detach()[rows]
            self._ious.append(box_iou(start, goals).diagonal())
            sides = (start[:, 2:] - start[:, :2]).repeat(1, 2)
            way = (goals - start) / sides

            def see(gradient: Tensor, rows: Tensor = rows, sides: Tensor = sides, way: Tensor = way) -> None:
                descent = -gradient[rows] * sides
                some = descent.any(1)
                self._cosines.append(torch.cosine_similarity(descent[some], way[some], dim=1, eps=0))

            if boxes.requires_grad:
                boxes.register_hook(see)

    def reading(self) -> dict[str, float]:
        """What was seen, as far as there was anything to see.

        ``ratio``: the norm of the box gradient at the RPN's deltas, before the bound, over that of the RPN's own box
        loss; ``passed``: the same after it; ``away``: the share of positives that the box gradient leads away from
        the ground truth, of those that it reaches; ``cosine``: its mean cosine with the way there; ``iou``: the mean
        IoU of the positives with the ground truth.
        """
        norms = {name: float(torch.stack(values).norm()) if values else 0.0 for name, values in self._norms.items()}
        seen: dict[str, float] = {}
        if norms["own"] > 0:
            seen |= {"ratio": norms["others"] / norms["own"], "passed": norms["passed"] / norms["own"]}
        cosines, ious = (torch.cat(values) if values else torch.empty(0) for values in (self._cosines, self._ious))
        if len(cosines):
            seen |= {"away": float((cosines < 0).double().mean()), "cosine": float(cosines.mean())}
        if len(ious):
            seen["iou"] = float(ious.mean())
        return seen


@contextmanager
def watch_box_gradient(model: nn.Module) -> Iterator[BoxGradientWatch]:
    """Within, the training steps of a model that :func:`~detector.swap_crop_head` made are watched, in any loop.

    ::

        with watch_box_gradient(model) as watch:
            sum(model(images, targets).values()).backward()
        print(watch.reading())

    Raises:
        TypeError: the model is no swapped R-CNN, or is wrapped in another module.
    """
    rpn: Any = getattr(model, "rpn", None)
    heads: Any = getattr(model, "roi_heads", None)
    if not (hasattr(rpn, "box_gradient_watch") and hasattr(heads, "box_gradient_watch")):
        raise TypeError(f"{type(model).__name__} is not swapped: call swap_crop_head first, and unwrap the model")
    watch = BoxGradientWatch()
    with overridden(rpn, box_gradient_watch=watch), overridden(heads, box_gradient_watch=watch):
        yield watch
