"""Reading files of weights, of which nothing is trusted: the threat model of this project's files.

Checkpoints, saved folders and files of weights are passed around and may come from anybody. Loading one gives its
detector, or a :class:`~detector.errors.ModelError` of one sentence that names the file; and:

- It runs no code. Tensors and plain values are read (``weights_only=True``, safetensors, JSON); nothing is unpickled.
  The network is built by a name that timm or torchvision lists; a file makes nobody fetch anything.
- Damage is seen: by the checksum of each member of an archive, and in a saved folder by a hash of all weights. They are
  no signatures. torchvision's files of before torch 1.6 have none, and are read only where such are expected.
- It takes no more memory than its size. An archive must not say that it holds more, and the network that a file asks
  for is compared by names and shapes on the meta device, before it takes any.
- The numbers are finite and of the model's kind, so that a detector that finds nothing is not one of NaN.

What a network was trained to detect, or not to detect, no check can tell.
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
def refusing(what: str) -> Iterator[None]:
    """What goes wrong with a file's content, of whatever type, as a :class:`ModelError` that begins with ``what``."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{what}: it has no {error}") from None
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{what}: {one_line(error)}") from None


def read_weights(path: str | Path, *, legacy: bool = False) -> dict[str, Any]:
    """Read a file of tensors and plain values; nothing in it is executed.

    Args:
        path: what ``torch.save`` wrote.
        legacy: also take the format before torch 1.6, in which damage to a number cannot be seen.

    Raises:
        ModelError: the file is missing, broken, or holds anything else.
    """
    try:
        with open(path, "rb"):
            pass
        if zipfile.is_zipfile(path):
            _check_archive(path)
        elif not legacy:
            raise ValueError("not a ZIP archive, as torch.save writes it")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises what it likes on a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: cannot be read as weights (cut off, or not a weights file?): {reason}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a dict, not a {type(content).__name__}")
    return content


def _check_archive(path: str | Path) -> None:
    """What torch.load would take without a word: a damaged number, and a small file that fills the memory."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise ValueError("it holds more than its size, packed, as torch.save never writes it")
        if len({member.filename.lower() for member in members}) < len(members):
            raise ValueError("it holds two members of one name")  # of which only one would be looked at
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        for member in members:
            # The one function that weights_only=True calls and that makes any amount of memory out of a number.
            if member.filename.lower().endswith(".pkl") and b"\nbytearray\n" in archive.read(member):
                raise ValueError("it holds a bytearray, which no weights are")


def load_weights(build: Callable[[], Model], state: Any) -> Model:
    """Build a model and load a state_dict into it, of which neither names nor shapes are trusted.

    Args:
        build: makes the model, with random weights.
        state: a state_dict, or what a file holds in its place.

    Raises:
        ModelError: names, shapes or kinds of numbers differ from the model's, or a number is not finite.
    """
    # A ModelError; torchvision's; sizes whose product no integer holds.
    with refusing("cannot be built"), torch.device("meta"):
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
    """What differs of the names and shapes of a file's tensors and a model's, a sentence each."""
    found = []
    for name in dict.fromkeys([*expected, *state]):
        shapes = [list(weights[name].shape) if name in weights else "missing" for weights in (state, expected)]
        # torchvision's older files lack this count, which nothing reads.
        if shapes[0] != shapes[1] and not str(name).endswith("num_batches_tracked"):
            found.append(f"{short(str(name))} is {shapes[0]} in the file, {shapes[1]} in the model")
    return found


def check_tensors(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse tensors that are not stored as they are, and numbers that a model cannot compute with.

    Args:
        state: tensors of a file.
        expected: those of the model, of any device; names that one of both lacks are passed over.

    Raises:
        ModelError: says which tensor, and what is wrong with it.
    """
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise ModelError(f"{name} is no plain tensor")
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if sum(value.numel() * value.element_size() for value in state.values()) > sum(stored.values()):
        raise ModelError("its weights are larger than what it holds of them")
    for name in state.keys() & expected.keys():
        value, wanted = state[name], expected[name]
        if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
            raise ModelError(f"{name} is {value.dtype} in the file, {wanted.dtype} in the model")
        if not math.isfinite(value.sum(dtype=torch.float64).item()) and not value.isfinite().all():
            raise ModelError(f"{name} holds NaN or infinity (did the training diverge?)")
