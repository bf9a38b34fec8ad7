"""The circumstances of a result: time, command, device and versions."""

import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "lightning", "timm", "pycocotools", "numpy", "pillow", "affine-crop-rcnn")


def circumstances(device: torch.device | str | None) -> dict[str, Any]:
    """Return the time, the command, the device and the versions of the packages that results depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": _device_name(device),
        "versions": versions,
    }


def _device_name(device: torch.device | str | None) -> str:
    if device is None:
        return "none"
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
