"""Devices, dtypes and states of PyTorch, for tests of crops and of the pooler."""

import pytest
import torch
from support.crops import INTERPRETED

if INTERPRETED:
    from support import fast_interpreter  # noqa: F401

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def where_the_triton_kernel_runs(request):
    """On a CPU it needs Triton's interpreter; without it another sampler would be tested."""
    values = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    takes_triton = any("triton" in str(getattr(value, "sampler", value)) for value in values)
    if takes_triton and "cuda" not in values and not INTERPRETED and "gpu" not in request.keywords:
        pytest.skip("on a CPU Triton needs its interpreter; see test_triton")


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # also fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(before)
