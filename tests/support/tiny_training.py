"""Training runs of a second or two on a handful of digits."""

import json
import shutil
from pathlib import Path

import torch

from detector.tools.training_cli import main as train

REPOSITORY = Path(__file__).parents[2]
TINY = [
    "--config=configs/quickstart.yaml",
    "--data.generate=null",
    "--model.box_gradient={crop: 1, coder: 1, bound: 0.1}",
    "--model.refinement=null",
    "--data.workers=0",
    "--data.min_size=96",
    "--model.detector.min_size=96",
    "--model.detector.name=timm/test_efficientnet",
    "--model.detector.weights_backbone=null",
    "--model.detector.fpn_channels=16",
    "--model.detector.box_head_size=32",
    "--model.detector.rpn_pre_nms_top_n=[100, 50]",
    "--model.detector.rpn_post_nms_top_n=[50, 20]",
    "--model.detector.rois_per_image=16",
    "--model.detector.score_threshold=0.0",
    "--model.detector.detections_per_image=10",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]


def tiny_run(root, folder, *flags):
    """Train on the data in ``root``; returns the run folder."""
    train([*TINY, f"--data.root={root}", f"--run_dir={folder}", *flags])
    return folder


def last_checkpoint(folder):
    """Return the content of a run's last checkpoint."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def changed_copy(root, copy, split, change):
    """Return a copy of a data set; ``change`` edits the annotations of a split in place."""
    shutil.copytree(root, copy)
    path = copy / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return copy
