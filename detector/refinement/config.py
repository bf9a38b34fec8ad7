"""Settings of the refinement."""

from dataclasses import dataclass
from typing import Any

from detector.errors import ModelError
from detector.rcnn.box_gradient import BoxGradient


@dataclass(frozen=True)
class RefinementConfig:
    """Settings of test-time refinement and of its training. Plain values, saved in every checkpoint.

    A small head crops the detector's feature maps at a box, and predicts four deltas, whatever the class, and the IoU
    of the box with its object. A **refinement iteration** moves the box by the deltas. **Gradient ascent** then follows
    the gradient of the predicted IoU through the crop (Jiang et al., "Acquisition of Localization Confidence for
    Accurate Object Detection", 2018, section 3.3).

    Args:
        iterations: Number of refinement iterations at test time, 0 to 100.
        train_iterations: Number of refinement iterations in training, 1 to 100. Their losses are summed.
        ascent_steps: Maximum number of gradient ascent steps at test time, 0 to 100.
        iou_power: Power of the predicted IoU in the score, 0 to 10: ``sqrt(score * again) * iou ** iou_power``, where
            ``again`` is the box head's softmax score of the last crop. 0 keeps the detector's scores,
            without ``again``.
        box_gradient: How gradients flow through the boxes between the training iterations. By default the boxes are
            detached, which is simpler: on four sets AP differed by at most 0.010, over three seeds.
            ``BoxGradient.exact()`` is the derivative, and ``bound`` limits the gradient of later iterations relative to
            an iteration's own.

    Raises:
        ModelError: A setting is out of its range.
    """

    iterations: int = 2
    train_iterations: int = 3
    ascent_steps: int = 0
    iou_power: float = 0.5
    box_gradient: BoxGradient = BoxGradient(crop=0, coder=0)

    def __post_init__(self) -> None:
        # Maxima, because settings may come from a file of unknown origin.
        limits = {"iterations": (0, 100), "train_iterations": (1, 100), "ascent_steps": (0, 100), "iou_power": (0, 10)}
        if not isinstance(self.box_gradient, BoxGradient):
            raise ModelError("must be a BoxGradient", setting="refinement.box_gradient", value=self.box_gradient)
        for name, (low, high) in limits.items():
            value, whole = getattr(self, name), name != "iou_power"
            if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise ModelError(f"must be {kind} from {low} to {high}", setting=f"refinement.{name}", value=value)

    @classmethod
    def from_dict(cls, fields: Any) -> "RefinementConfig":
        """Invert ``dataclasses.asdict``. Raises ValueError, TypeError or LookupError for invalid fields."""
        return cls(**{**fields, "box_gradient": BoxGradient(**fields["box_gradient"])})
