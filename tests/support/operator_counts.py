"""Counts of the operators that a GPU would run for code that runs on a CPU."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# They allocate or describe memory. So do views, which the schema of an operator tells.
NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"),
    *("lift_fresh", "promote_types"),
}
# On a GPU the host waits for them, for the size or the value of their result. "lift_fresh" is torch.tensor() and
# torch.as_tensor() of Python's numbers, a copy from pageable memory.
SYNCHRONISES = {
    *("nonzero", "nonzero_numpy", "_local_scalar_dense", "masked_select", "equal", "allclose", "bincount", "histc"),
    *("unique_dim", "_unique", "_unique2", "unique_consecutive", "nms", "lift_fresh"),
}
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.__array__}


class OperatorCounts(TorchDispatchMode):
    """Counts operators by name: in ``kernels`` those that start one, in ``syncs`` those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.kernels, self.syncs = Counter(), Counter()
        self._reads = _Reads(self.syncs)

    def __enter__(self):
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in SYNCHRONISES or _selects_by_mask(name, args) or _repeats(name, kwargs) or _moves(name, args, kwargs):
            self.syncs[name] += 1
        if not func.is_view and name not in NO_KERNEL and func.namespace != "prim":
            self.kernels[name] += 1
        return func(*args, **kwargs)


class _Reads(TorchFunctionMode):
    """Counts the methods that copy to the host, which a tensor on the CPU does without any operator."""

    def __init__(self, syncs):
        self.syncs = syncs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.syncs[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _selects_by_mask(name, args):
    indexed = name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
    return indexed and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _repeats(name, kwargs):
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _moves(name, args, kwargs):
    return name == "_to_copy" and kwargs.get("device") not in (None, args[0].device)


@contextmanager
def uncounted():
    with _disable_current_modes():
        yield
