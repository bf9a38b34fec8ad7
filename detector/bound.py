"""Hold the gradient that comes back through one use of a tensor to a share of the one that comes through another."""

from typing import Any

import torch
from torch import Tensor


def fork(tensor: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
    """Two copies of ``tensor``: one for what it is trained for, one whose gradient may not take over.

    In a backward pass with ``own`` the gradient at the first copy and ``other`` the one at the second, each row of
    ``tensor`` gets ``own + s * other`` with ``s = min(1, bound * |own| / |other|)``, norms over the row. With a bound
    below 1 that never leads uphill for the first copy's loss, ``(own + s * other) . own >= (1 - bound) * |own|^2``,
    and is zero where ``own`` is. Both are the gradients that arrive in the same pass, so that a loss scaler, weights
    of the losses, accumulated batches and several devices change nothing.

    Args:
        tensor: [N, D], of a floating dtype.
        bound: the largest share, or ``None`` for the plain sum.
    """
    first, second = _Fork.apply(tensor, bound)
    return first, second


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.bound = bound
        return tensor.view_as(tensor), tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, own: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, None]:
        if ctx.bound is None:
            return (own if other is None else other if own is None else own + other), None
        if own is None or other is None:
            return own, None
        room, size = (gradient.norm(dim=1, keepdim=True) for gradient in (own, other))
        share = ctx.bound * room / size.clamp(min=torch.finfo(size.dtype).tiny)
        return own + share.clamp(max=1) * other, None
