"""Attributes of a module that hold for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def overridden(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Within, a module has these attributes of its own; afterwards those that it had, or its class's."""
    before = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del module.__dict__[name]
        module.__dict__.update(before)
