"""The record of a run: command, versions, seed and git commit."""

import os
import subprocess
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from detector.files import read_json, write_json
from detector.versions import circumstances

PACKAGE = Path(__file__).resolve().parents[1]


class RunRecord(Callback):
    """Adds each start of a run to ``environment.json`` in its folder.

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
        path, data = self.folder / "environment.json", trainer.datamodule  # type: ignore[attr-defined]
        start = {
            **circumstances(trainer.strategy.root_device),
            "devices": trainer.world_size,
            "seed": data.seed,
            "git": git_state(),
            "ckpt_path": self.checkpoint and str(self.checkpoint),
        }
        write_json(path, [*(read_json(path) if path.exists() else []), start], indent=2)


def git_state() -> dict[str, Any]:
    """Return the commit of this package's checkout and whether files differ from it; empty outside a checkout."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != PACKAGE.parent:
            return {}  # installed in another project's checkout
        return {"commit": _git("rev-parse", "HEAD"), "changed": _git("status", "--porcelain") != ""}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE), *arguments]
    return os.fsdecode(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout).strip()
