"""Training and scoring with Lightning, as ``tools/train.py`` does."""

from detector.pretrained.loading import load_checkpoint
from detector.training.data import CocoDataModule
from detector.training.optimization import OptimizerConfig
from detector.training.run import train
from detector.training.task import DetectionTask

__all__ = ["CocoDataModule", "DetectionTask", "OptimizerConfig", "load_checkpoint", "train"]
