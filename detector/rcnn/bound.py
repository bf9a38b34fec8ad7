"""Hold the gradient that comes back through one use of a tensor to a share of the one that comes through another."""

from typing import Any

import torch
from torch import Tensor


def bounded_copies(tensor: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
    """Two copies of ``tensor``: one for what it is trained for, one whose gradient may not take over.

    In a backward pass with ``own`` the gradient at the first copy and ``other`` the one at the second (0 where a copy
    is not used), each row of ``tensor`` gets ``own + s * other`` with ``s = min(1, bound * |own| / |other|)``, norms
    over the row. Below 1 that never points uphill for the first copy's loss, ``(own + s * other) . own >=
    (1 - bound) * |own|^2``, and is zero where ``own`` is. Both are the gradients that arrive in the same pass: the
    bound holds under a loss scaler, accumulation and several devices, and a weight on the first copy's loss weights
    it alike.

    Args:
        tensor: [N, D], of a floating dtype.
        bound: the largest share, or ``None`` for the plain sum.
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
            room, size = (gradient.norm(dim=1, keepdim=True) for gradient in (own, other))
            share = ctx.bound * room / size.clamp(min=torch.finfo(size.dtype).tiny)
            other = share.clamp(max=1) * other
        return own + other, None
