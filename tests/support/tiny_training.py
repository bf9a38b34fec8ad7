"""The flags of a training run that takes a second an epoch on a handful of digits."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TINY = [
    "--config=configs/quickstart.yaml",
    "--data.generate=null",
    "--data.workers=0",
    "--data.min_size=96",
    "--model.detector.min_size=96",
    "--model.detector.weights_backbone=null",
    "--model.detector.fpn_channels=16",
    "--model.detector.box_head_size=32",
    "--model.detector.rois_per_image=16",
    "--model.detector.score_threshold=0.0",
    "--model.detector.detections_per_image=10",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]
