"""Refinement of an R-CNN's boxes: refinement iterations, and gradient ascent on the predicted IoU."""

from detector.refinement.attach import add_refinement, refinement_losses, remove_refinement
from detector.refinement.config import RefinementConfig

__all__ = ["RefinementConfig", "add_refinement", "refinement_losses", "remove_refinement"]
