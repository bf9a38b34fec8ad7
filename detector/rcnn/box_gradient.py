"""Settings, scale and bound of the gradient from the RoI heads' losses to the proposals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

BOUND = 0.1
LossName = Literal["box", "classification", "mask", "keypoint"]


@dataclass(frozen=True)
class BoxGradient:
    """Gradients from the RoI heads' losses to the proposals, and through them to the RPN's deltas.

    Proposals are (x1, y1, x2, y2) in pixels of the resized images. The box loss reaches them by two paths. The **crop
    path** runs through the features cropped at the proposal. The **coder path** runs through the regression targets,
    ``encode(ground truth, proposal)``. With both scales at 1 the gradient is the exact derivative. The crop path alone
    drives proposals away from the ground truth, towards crops that match the head's predictions.

    Only positive RoIs move: a classification loss would move the others onto easier background. In eval mode with
    gradients enabled, proposals stay attached unless both scales are 0.

    Args:
        crop: Scale of the crop path's gradient, 0 to 1.
        coder: Scale of the coder path's gradient, 0 to 1. Only the box loss takes this path.
        losses: The losses that move proposals: "box", "classification", "mask", "keypoint". A refinement has only
            its box loss.
        bound: Maximum norm of this gradient at a box's four deltas, relative to the norm of the gradient of their own
            box loss: that of the RPN, or of a refinement iteration. ``None`` (null in a file) sets no limit.

    Raises:
        ValueError: A scale is outside [0, 1], a loss is unknown, or the bound is not positive.
    """

    crop: float = 1.0
    coder: float = 1.0
    losses: tuple[LossName, ...] = ("box",)
    bound: float | None = BOUND

    def __post_init__(self) -> None:
        for name, scale in (("crop", self.crop), ("coder", self.coder)):
            if not 0 <= scale <= 1:
                raise ValueError(f"box_gradient.{name} must be a scale from 0 to 1, got {scale}")
        if self.bound is not None and not 0 < self.bound < math.inf:
            raise ValueError(
                f"box_gradient.bound must be positive, such as 0.1, or None (null in a file), got {self.bound}"
            )
        if not set(self.losses) <= set(get_args(LossName)):
            raise ValueError(
                f"box_gradient.losses must be a list of {', '.join(get_args(LossName))}, got {self.losses!r}"
            )
        object.__setattr__(self, "losses", tuple(self.losses))  # hashable also from a configuration file's list

    @classmethod
    def exact(cls) -> "BoxGradient":
        """Return the unbounded, exact derivative of the box loss. For research: joint training with it diverges."""
        return cls(bound=None)

    @property
    def enabled(self) -> bool:
        """True if any gradient reaches a proposal in training."""
        return bool(self.losses) and (self.crop > 0 or self.coder_scale > 0)

    @property
    def coder_scale(self) -> float:
        """The scale of the coder path; 0 where the box loss moves no proposal."""
        return self.coder if "box" in self.losses else 0.0


def scale_gradient(tensor: Tensor, scale: float) -> Tensor:
    """Return ``tensor`` with its gradient multiplied by ``scale``."""
    if scale == 0:
        return tensor.detach()
    if scale == 1 or not tensor.requires_grad:
        return tensor
    scaled = tensor.view_as(tensor)
    scaled.register_hook(lambda gradient: scale * gradient)
    return scaled


def add_gradient(loss: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return ``loss`` with ``gradients`` at ``tensors`` added to its own; its value stays, even for an infinite one."""
    return _AddedGradient.apply(loss, *gradients, *tensors)


class _AddedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *gradients_and_tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_tensors[: len(gradients_and_tensors) // 2])
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return upstream, *[None] * len(gradients), *(upstream * gradient for gradient in gradients)


def bounded_copies(tensor: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
    """Return two copies of ``tensor`` [N, D], the gradient through the second bounded by that through the first.

    With ``own`` and ``other`` the gradients at the copies in the same backward pass, each row of ``tensor`` gets
    ``own + s * other`` with ``s = min(1, bound * |own| / |other|)``. For a bound below 1 the sum is never an ascent
    direction of the first copy's loss: ``(own + s * other) . own >= (1 - bound) * |own|^2``. Loss scalers, accumulation
    and several devices do not change ``s``. ``None`` gives the plain sum.
    """
    return _BoundedCopies.apply(tensor, bound)


class _BoundedCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
        ctx.bound = bound
        return tensor.view_as(tensor), tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, own: Tensor, other: Tensor) -> tuple[Tensor, None]:
        if ctx.bound is not None:
            own_norm, other_norm = (gradient.norm(dim=1, keepdim=True) for gradient in (own, other))
            scale = ctx.bound * own_norm / other_norm.clamp(min=torch.finfo(other_norm.dtype).tiny)
            other = scale.clamp(max=1) * other
        return own + other, None
