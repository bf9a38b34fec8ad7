"""Reading files of weights that anybody may have written.

Nothing in a file is executed; only tensors and plain values are read. Checksums detect damage, but are not signatures.
A file takes no more memory than its size: archives must not be compressed, and a network is first built on the meta
device. Numbers must be finite.
"""

import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detector.errors import ModelError, one_line
from detector.text import short

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def as_model_error(prefix: str) -> Iterator[None]:
    """Raise any error about a file's content as a :class:`ModelError` that starts with ``prefix``."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{prefix}: it has no {error}") from None
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{prefix}: {one_line(error)}") from None


def read_weights(path: str | Path, *, legacy: bool = False) -> dict[str, Any]:
    """Read a dict of tensors and plain values that ``torch.save`` wrote; ``legacy`` is the format before torch 1.6.

    Raises:
        ModelError: the file is missing, broken, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                _check_archive(path)
            elif not legacy:
                raise ValueError("not a ZIP archive, as torch.save writes it")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises errors of any type for a broken file
        # After the first sentence, PyTorch advises to read untrusted pickles.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise ModelError(f"{path}: cannot be read as weights (cut off, or not a weights file?): {reason}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a dict, not a {type(content).__name__}")
    return content


def _check_archive(path: str | Path) -> None:
    """Check what ``torch.load`` does not: checksums, and members that would fill the memory."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.lower(): member for member in archive.infolist()}
        if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
            raise ValueError("it is compressed, as torch.save never writes it")
        if len(members) < len(archive.infolist()):
            raise ValueError("it holds two members with the same name")  # testzip would check only one of them
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
        # weights_only=True allows this call, which allocates any amount of memory.
        if any(b"\nbytearray\n" in archive.read(members[name]) for name in members if name.endswith(".pkl")):
            raise ValueError("it holds a bytearray, which no weights file needs")


def load_weights(build: Callable[[], Model], state: Any) -> Model:
    """Build a model and load an untrusted state_dict into it.

    Raises:
        ModelError: the model cannot be built; names, shapes or kinds of dtypes differ from the model's; or a number is
            not finite.
    """
    with as_model_error("cannot be built"), torch.device("meta"):
        expected = build().state_dict()
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError("its weights are not tensors by name")
    if wrong := differences(state, expected):
        raise ModelError(wrong[0])
    check_tensors(state, expected)
    model = build()
    model.load_state_dict(state, strict=False)
    return model


def differences(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Return a message for each name or shape that differs between a file's tensors and a model's."""
    found = []
    for name in dict.fromkeys([*expected, *state]):
        shapes = [list(weights[name].shape) if name in weights else "missing" for weights in (state, expected)]
        # torchvision's older files lack this counter, which is never used.
        if shapes[0] != shapes[1] and not str(name).endswith("num_batches_tracked"):
            found.append(f"{short(str(name))} is {shapes[0]} in the file, {shapes[1]} in the model")
    return found


def check_tensors(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise a :class:`ModelError` for tensors that are not plain and finite, or of another kind than a model's.

    Names in only one of the two are ignored.
    """
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise ModelError(f"{name} is not a plain tensor")
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if sum(value.numel() * value.element_size() for value in state.values()) > sum(stored.values()):
        raise ModelError("its weights are larger than the numbers it stores")  # expanded views
    for name in state.keys() & expected.keys():
        value, wanted = state[name], expected[name]
        if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
            raise ModelError(f"{name} is {value.dtype} in the file, {wanted.dtype} in the model")
        if not math.isfinite(value.sum(dtype=torch.float64).item()) and not value.isfinite().all():
            raise ModelError(f"{name} holds NaN or infinity (did the training diverge?)")
