import os
import signal
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # each process gets its share of the cores; torch reads this when imported
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

import torch


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal; a shell has background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def real_data(name):
    if "DETECTOR_DATA" not in os.environ:
        pytest.skip("real photographs are looked for in the folder that DETECTOR_DATA names, which is not set")
    folder = Path(os.environ["DETECTOR_DATA"]) / name
    if not folder.is_dir():
        pytest.skip(f"real photographs: {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def coco_cc():
    """A genuine subset of COCO 2017, in COCO's own layout."""
    return real_data("coco-cc")


@pytest.fixture(scope="session")
def bccd():
    """Micrographs of blood cells."""
    return real_data("bccd")
