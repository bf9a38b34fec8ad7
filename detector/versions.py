"""How results came about: when, by which command, on what device, with which versions."""

import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "lightning", "timm", "pycocotools", "numpy", "pillow", "affine-crop-rcnn")


def versions() -> dict[str, str | None]:
    """The versions of the packages that results depend on; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def circumstances(device: torch.device | str | None) -> dict[str, Any]:
    """When, by which command, on what device and by which versions something is made."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": _device_name(device),
        "versions": {name: version for name, version in versions().items() if version is not None},
    }


def _device_name(device: torch.device | str | None) -> str:
    if device is None:
        return "none"
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
