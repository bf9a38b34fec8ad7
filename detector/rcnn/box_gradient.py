"""The settings that say how the losses of the RoI heads move the proposals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

BOUND = 0.1  # of the RPN's own gradient; measured in .github/MEASUREMENTS.md
LossName = Literal["box", "classification", "mask", "keypoint"]


@dataclass(frozen=True)
class BoxGradient:
    """How gradients flow from the RoI heads into the proposals, and so into the RPN's deltas.

    Two paths lead from the box loss to a proposal. The **crop path** runs through the features cropped at the
    proposal; the **coder path** through the regression targets ``encode(matched truth, proposal)``. Both at 1 is
    the exact derivative of the refinement loss. One path without the other is for study only: it is not the
    derivative of anything. Moving a proposal by d changes the head's prediction by about -d and the target by -d
    as well, so the crop path alone lowers the loss by making the crop *look* as far off as the head already says,
    and drives proposals away from the ground truth.

    At the RPN's deltas that derivative is tens of times as strong as the gradient of the RPN's own box loss, and stays
    so while the RPN gets better, for it shrinks with the head's error rather than the proposal's. It is therefore
    held to ``bound``, which it exceeds by so much that a common scale of both paths hardly acts below it.

    With gradients on in eval mode, where there is no loss, proposals stay attached to what is computed from them
    unless both scales are 0.

    Args:
        crop: scale of the crop path's gradient, from 0 (off) to 1 (as it is).
        coder: scale of the coder path's gradient, from 0 to 1. Only the box loss takes this path.
        losses: which losses may move a proposal: any of "box", "classification", "mask", "keypoint". One that is
            not named trains the features and its head as ever.
        positives_only: leave the boxes of background RoIs detached. They have no box loss, and a classification
            loss pays for moving them onto easier background.
        bound: the largest norm that the gradient of the RoI heads' losses may have at an anchor's four deltas, as a
            share of that of the RPN's own box loss there, in the same backward pass; ``None``: no bound. Below 1 the
            sum never points uphill for the RPN's own loss, and is zero at an anchor that this loss does not train.
        warmup_steps: proposals stay detached in the first so many training steps: those of the optimizer in
            ``detector.training``, forward passes with gradients in a loop of one's own. A run that goes on there, or
            accumulates batches, sets ``model.rpn.warmup_step``, the number of steps that are over.

    Raises:
        ValueError: a scale outside [0, 1], an unknown loss, a bound that is not above 0, or warmup_steps below 0.
    """

    crop: float = 1.0
    coder: float = 1.0
    losses: tuple[LossName, ...] = ("box",)
    positives_only: bool = True
    bound: float | None = BOUND
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("crop", "coder"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a scale from 0 to 1, got {getattr(self, name)}")
        if self.bound is not None and not 0 < self.bound < math.inf:
            raise ValueError(f"bound must be a share above 0, such as 0.1, or None (null in a file), got {self.bound}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        known = get_args(LossName)
        if isinstance(self.losses, str) or not isinstance(self.losses, Sequence):
            raise ValueError(f'losses must be a tuple of names, such as ("box",), got {self.losses!r}')
        for loss in self.losses:
            if loss not in known:
                raise ValueError(f"losses must be of {', '.join(known)}, got {loss!r}")
        object.__setattr__(self, "losses", tuple(self.losses))  # a list, from a config file, would not hash

    @classmethod
    def exact(cls) -> "BoxGradient":
        """The exact derivative of the refinement loss with respect to the proposals, with no bound: for research.

        Joint training with it fails: on photographs of one large object each it brought AP from 0.55 to 0.12 (means
        of three seeds), and the RPN's own box loss from 0.002 to 0.03.
        """
        return cls(bound=None)

    @property
    def enabled(self) -> bool:
        """Whether any gradient reaches a proposal in training."""
        return bool(self.losses) and (self.crop > 0 or self.coder_scale > 0)

    @property
    def coder_scale(self) -> float:
        """The scale of the coder path, 0 where the only loss that takes it may not move a proposal."""
        return self.coder if "box" in self.losses else 0.0


def scale_gradient(tensor: Tensor, scale: float) -> Tensor:
    """``tensor``, its (finite) value unchanged to the last bit, its gradient times ``scale``."""
    if scale == 1:
        return tensor
    constant = tensor.detach()
    return constant if scale == 0 else constant + scale * (tensor - constant)
