"""The circumstances of a result: time, command, device and versions."""

import shlex
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "lightning", "timm", "pycocotools", "numpy", "pillow", "affine-crop-rcnn")


def circumstances(device: torch.device | str | None) -> dict[str, Any]:
    """Return the time, the command, the device and the versions of the packages that results depend on."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    kind = "none" if device is None else torch.device(device).type
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "versions": versions,
    }
