"""The settings of a refinement: how often boxes are looked at again, how far they climb, and how that is learned."""

from dataclasses import dataclass
from typing import Any, Literal

from detector.rcnn.box_gradient import BoxGradient

MOST = 100  # of anything that is done over and over: the settings may come from a file that anybody wrote


@dataclass(frozen=True)
class RefinementConfig:
    """How detections are refined, and how that is trained; plain values, kept in every checkpoint.

    A small head crops the detector's own feature maps at a box and says two things about it: where the object's box is
    (four deltas, whatever the class) and how well this one fits (the IoU that it expects). **Looking again** moves the
    box by the deltas, and does so ``looks`` times, each time with a new crop; a box stays whose expected fit would
    fall. **Climbing** then follows the gradient of the fit through the crop (Jiang et al., "Acquisition of Localization
    Confidence for Accurate Object Detection", 2018, section 3.3), ``climbs`` steps at most.

    Args:
        looks: how often a box is looked at again, 0 for not at all.
        look_scale: share of the deltas that a box is moved by, in a look at test time.
        least_overlap: IoU that a box keeps with the detector's own: it stays where a look would take it further. A
            climb may.
        climbs: the most steps that a box climbs the fit, 0 for none.
        step_size: of a climb: the centre and the logarithm of the size move by ``step_size * gradient``, in units of
            the box's sides, by 0.05 at most.
        score_threshold: detections with a lower score are not looked at again: their boxes stay,
        boxes_per_image: and so do all but so many of an image, the best ones.
        fit_power: alpha of ``score * fit ** alpha``, the score of detections that are looked at again; 0: as it is. The
            others keep their full score beside it, and all are ranked together.
        fit_nms: of boxes of a class that overlap too much for the detector the one that fits best is kept, with the
            best score of them. Those that are not looked at again fit worst.
        sampling: how the head crops, see :func:`~detector.affine_crop`.
        stages: sets of weights, one for each look; further looks share the last. With more than one, each learns to
            move boxes from such of an IoU higher by 0.1, to 0.9 at most, as in a cascade. No more than ``train_looks``:
            others would never learn.
        train_looks: how often a box is looked at again in training; the losses of all looks are summed.
        box_gradient: how the losses of later looks flow into the earlier ones' boxes: ``crop`` and ``coder`` scale the
            two paths (both 0: boxes are constants between the looks), ``bound`` holds what comes back at a box's deltas
            to a share of the gradient of that look's own loss there. ``positives_only`` and ``warmup_steps`` have no
            meaning here.
        boxes_per_object: jittered copies of each true box to learn from, beside the detector's own boxes,
        train_boxes: but no more than so many of both an image.
        jitter: how far off they are: centre and logarithm of the size, in units of the sides, by a normal deviate times
            up to so much.
        min_iou: only boxes that begin with this IoU, or more, with the truth are learned from; and to move a box is
            learned in such looks alone in which it still has it.

    Raises:
        ValueError: a setting is out of its range, or there are more stages than ``train_looks``.
    """

    looks: int = 2
    look_scale: float = 0.8
    least_overlap: float = 0.7
    climbs: int = 0
    step_size: float = 0.1
    score_threshold: float = 0.05
    boxes_per_image: int = 100
    fit_power: float = 0.5
    fit_nms: bool = False
    sampling: Literal["points", "exact"] = "points"
    stages: int = 1
    train_looks: int = 3
    box_gradient: BoxGradient = BoxGradient.exact()
    boxes_per_object: int = 8
    train_boxes: int = 64
    jitter: float = 0.25
    min_iou: float = 0.5

    def __post_init__(self) -> None:
        whole = {"looks": 0, "climbs": 0, "stages": 1, "train_looks": 1, "boxes_per_object": 1, "train_boxes": 1}
        for name, least in (whole | {"boxes_per_image": 1}).items():
            value = getattr(self, name)
            most = 10_000 if name.endswith(("boxes", "image")) else MOST
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"refinement.{name} must be a whole number from {least} to {most}, got {value!r}")
        if self.stages > self.train_looks:
            raise ValueError(
                f"refinement.stages must be no more than refinement.train_looks ({self.train_looks}), got "
                f"{self.stages}: the others would never learn"
            )
        shares = ("look_scale", "least_overlap", "score_threshold", "jitter", "min_iou")
        for name, most in (dict.fromkeys(shares, 1) | {"step_size": 10, "fit_power": 10}).items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise ValueError(f"refinement.{name} must be a number from 0 to {most}, got {value!r}")
        if self.sampling not in ("points", "exact"):
            raise ValueError(f"refinement.sampling must be points or exact, got {self.sampling!r}")
        if type(self.fit_nms) is not bool:
            raise ValueError(f"refinement.fit_nms must be True or False, got {self.fit_nms!r}")
        if not isinstance(self.box_gradient, BoxGradient):
            raise ValueError(f"refinement.box_gradient must be a BoxGradient, got {self.box_gradient!r}")

    @classmethod
    def from_dict(cls, fields: Any) -> "RefinementConfig":
        """What ``dataclasses.asdict`` made of one. Raises ValueError, TypeError or LookupError if it is not."""
        gradient = fields["box_gradient"]
        return cls(**{**fields, "box_gradient": BoxGradient(**{**gradient, "losses": tuple(gradient["losses"])})})
