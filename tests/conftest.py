import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root():
    """The folder of real data sets that the environment variable DETECTOR_DATA names."""
    if "DETECTOR_DATA" not in os.environ:
        pytest.skip("real photographs are looked for in the folder that DETECTOR_DATA names, which is not set")
    return Path(os.environ["DETECTOR_DATA"])
