"""Checks whether PyTorch traces or compiles a call, or runs it under ``torch.func`` or ``torch.vmap``."""

from typing import Any

import torch
from torch import Tensor


def makes_graph() -> bool:
    """Return whether a graph is being compiled or traced (for ONNX too), so that values must not be read."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def makes_standard_graph() -> bool:
    """Return whether a graph is traced or exported, which should have PyTorch's own operators only."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_vmapped(tensor: Tensor) -> bool:
    """Return whether ``torch.vmap`` runs over this tensor itself, so that its values must not be read."""
    if torch.compiler.is_compiling():
        return False
    # PyTorch has no public function for this; torch.cond and tensor printing use these.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)  # a wrapper of grad, perhaps around one of vmap
    return False


def is_wrapped(tensor: Any) -> bool:
    """Return whether a tensor is wrapped by ``torch.func`` or ``torch.vmap``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)
