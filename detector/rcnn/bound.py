"""A bound on the gradient through one use of a tensor, relative to the gradient through another use."""

from typing import Any

import torch
from torch import Tensor


def bounded_copies(tensor: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
    """Return two copies of ``tensor`` [N, D], the gradient through the second bounded by that through the first.

    With ``own`` and ``other`` the gradients at the copies in the same backward pass, each row of ``tensor`` gets
    ``own + s * other`` with ``s = min(1, bound * |own| / |other|)``. For a bound below 1 the sum is never an ascent
    direction of the first copy's loss: ``(own + s * other) . own >= (1 - bound) * |own|^2``. Loss scalers, accumulation
    and several devices do not change ``s``. ``None`` gives the plain sum.
    """
    first, second = _BoundedCopies.apply(tensor, bound)
    return first, second


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
