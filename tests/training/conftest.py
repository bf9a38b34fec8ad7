"""A handful of digits, and one finished run on them."""

import sys

import pytest


@pytest.fixture(autouse=True, scope="module")
def command_line():
    """In the repository's folder, and without pytest's own arguments, of which LightningCLI would warn."""
    from support.tiny_training import REPOSITORY

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", ["train.py"])
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    from detector.data.digits import write_digits

    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root, splits={"train": 8, "val": 4})
    return root


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The folder of a finished run of two epochs."""
    from support.tiny_training import tiny_run

    return tiny_run(digits, tmp_path_factory.mktemp("runs") / "run", "--trainer.max_epochs=2")
