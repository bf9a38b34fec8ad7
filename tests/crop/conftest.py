import pytest
from support.crop_fixtures import deterministic, device, dtype, fresh_compiler, where_the_triton_kernel_runs  # noqa: F401
from support.crops import OPERATORS


@pytest.fixture(params=OPERATORS.values(), ids=list(OPERATORS))
def operator(request):
    return request.param
