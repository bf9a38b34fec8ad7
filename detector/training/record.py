"""The record of a run: command, versions, settings and git state."""

import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from detector.files import read_json, write_atomically, write_json
from detector.versions import circumstances

FILE = "environment.json"
PACKAGE = Path(__file__).resolve().parents[1]


class RunRecord(Callback):
    """Adds each start of a run to ``environment.json`` in its folder, and saves uncommitted changes as a patch.

    Args:
        folder: the run folder.
        checkpoint: the checkpoint to resume from.
    """

    def __init__(self, folder: Path, checkpoint: Path | None) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE
        starts = read_json(path) if path.exists() else []
        git, patch = git_state()
        if patch:
            git["patch"] = f"uncommitted-{len(starts) + 1}.patch"
            write_atomically(self.folder / git["patch"], patch)
        start = {
            **circumstances(trainer.strategy.root_device),
            "folder": os.getcwd(),
            "devices": trainer.world_size,
            "threads": torch.get_num_threads(),
            "machine": platform.platform(),
            "python": platform.python_version(),
            "executable": sys.executable,
            "git": git,
            "ckpt_path": self.checkpoint and str(self.checkpoint),
            "settings": settings(trainer),
        }
        write_json(path, [*starts, start], indent=2)


def settings(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a run, whether it was started from a file or from Python."""
    task: Any = trainer.lightning_module
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    of_task = ("detector", "box_gradient", "optimizer", "refinement")
    of_data = ("train_split", "val_split", "annotations", "images", "batch_size", "val_batch_size", "group_by_shape")
    of_trainer = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
    return {
        "seed": data.seed,
        "data": {"root": str(data.root.resolve()), **{name: getattr(data, name) for name in of_data}},
        "transform": str(data.train_transform),
        "crop": task.crop,
        **{name: getattr(task, name) and asdict(getattr(task, name)) for name in of_task},
        "trainer": {name: getattr(trainer, name) for name in of_trainer},
    }


def git_state() -> tuple[dict[str, Any], bytes]:
    """Return the commit and changed files of this package's checkout, and the changes; empty outside a checkout."""
    try:
        if Path(os.fsdecode(_git("rev-parse", "--show-toplevel").strip())).resolve() != PACKAGE.parent:
            return {}, b""  # installed in another project's checkout
        state: dict[str, Any] = {"commit": _git("rev-parse", "HEAD").decode().strip()}
        if changed := _git("status", "--porcelain").decode().splitlines():
            state["changed"] = changed
        return state, _git("diff", "HEAD", "--binary")
    except (OSError, subprocess.SubprocessError):
        return {}, b""


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, check=True, timeout=30).stdout
