"""Scoring a detector: COCO's metric, and what else tells how it does."""

from detector.data.results import Result, to_results
from detector.evaluation.losses import detect_with_losses
from detector.evaluation.metric import SUMMARY, evaluate
from detector.evaluation.running import Predictions, predict

__all__ = ["SUMMARY", "Predictions", "Result", "detect_with_losses", "evaluate", "predict", "to_results"]
