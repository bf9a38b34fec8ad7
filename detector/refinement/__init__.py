"""A trained R-CNN looks again at its detections, and their boxes climb the fit of their crops."""

from detector.refinement.attach import add_refinement, refinement_losses, remove_refinement
from detector.refinement.config import RefinementConfig

__all__ = ["RefinementConfig", "add_refinement", "refinement_losses", "remove_refinement"]
