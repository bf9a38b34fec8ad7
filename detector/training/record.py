"""What a run was made with, beside its checkpoints: command, versions, seed, data, git state."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from detector.training.files import write_json, write_whole

FILE = "environment.json"
PACKAGES = ("torch", "torchvision", "lightning", "timm", "pycocotools", "numpy", "pillow", "affine-crop-rcnn")


class RunRecord(Callback):
    """Adds each start of a run to ``environment.json`` in its folder; a change that is not committed as a patch.

    Args:
        folder: the run's.
        checkpoint: what it goes on from.
    """

    def __init__(self, folder: Path, checkpoint: Path | None) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE
        starts = json.loads(path.read_text()) if path.exists() else []
        git, patch = git_state()
        if patch:
            name = f"uncommitted-{len(starts) + 1}.patch"
            write_whole(self.folder / name, patch)
            git["patch"] = name
        start = describe(trainer) | {"git": git, "ckpt_path": self.checkpoint and str(self.checkpoint)}
        write_json(path, [*starts, start], indent=2)


def describe(trainer: lightning.Trainer) -> dict[str, Any]:
    """The command, the machine and the versions."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    device = trainer.strategy.root_device
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "folder": os.getcwd(),
        "seed": data.seed,
        "data": str(data.root.resolve()),
        "devices": trainer.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": trainer.precision,
        "machine": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def git_state() -> tuple[dict[str, Any], bytes]:
    """The commit that this package lies at, and what is changed since; nothing outside a git checkout."""
    folder = Path(__file__).parent
    try:
        if _git("rev-parse", "--show-toplevel").strip() != str(folder.parent.parent).encode():
            return {}, b""  # installed into some other project's checkout
        return {"commit": _git("rev-parse", "HEAD").decode().strip()}, _git("diff", "HEAD", "--binary")
    except (OSError, subprocess.SubprocessError):
        return {}, b""


def _git(*arguments: str) -> bytes:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, check=True, timeout=30
    )
    return done.stdout


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
