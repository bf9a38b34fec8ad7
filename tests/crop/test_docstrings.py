"""The examples in the docstrings of the crop's public functions and modules run, and give what they say."""

import doctest
from importlib import import_module

import pytest

import detector

MODULES = ("crop", "exact", "geometry", "pyramid")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    results = doctest.testmod(import_module(f"detector.crop.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


def test_every_public_name_of_the_crop_has_an_example():
    public = [getattr(detector, name) for name in detector.__all__]
    of_the_crop = [one for one in public if one.__module__.startswith("detector.crop.")]
    assert len(of_the_crop) == 7
    for one in of_the_crop:
        assert ">>> " in one.__doc__, one
