"""Evaluation: COCO's metric, and a report with plots and pictures."""

from detector.data.results import Result, to_results
from detector.evaluation.losses import detect_with_losses
from detector.evaluation.metric import SUMMARY, evaluate
from detector.evaluation.report import Report
from detector.evaluation.running import EvaluationOptions, Predictions

__all__ = [
    "SUMMARY",
    "EvaluationOptions",
    "Predictions",
    "Report",
    "Result",
    "detect_with_losses",
    "evaluate",
    "to_results",
]
