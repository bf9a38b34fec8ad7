"""The description of a detector that lies beside its weights: in a checkpoint, and in a saved folder's config.json."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d

from detector.choices import Crop
from detector.data.keypoints import KeypointLayout
from detector.errors import ModelError, one_line, short_repr
from detector.models.build import build_detector
from detector.models.config import DetectorConfig, saved_settings
from detector.models.published import batch_norm_eps, set_batch_norm_eps
from detector.models.weights import load_weights
from detector.rcnn.swap import swap_crop_head
from detector.refinement.attach import add_refinement
from detector.refinement.config import RefinementConfig


@dataclass(frozen=True)
class DetectorDescription:
    """All that it takes, with the weights, to have a detector again.

    Args:
        settings: what it is built by.
        crop: how it crops: "affine" or "roi_align".
        category_ids: of each label, from 1 on; ``None`` where no category belongs to one.
        category_names: likewise.
        batch_norm_eps: see :func:`~detector.models.published.batch_norm_eps`.
        refinement: that of its boxes, if it has one.
        keypoints: the layout of the keypoints that it finds, if it finds any.
    """

    settings: DetectorConfig
    crop: Crop
    category_ids: list[int | None]
    category_names: list[str]
    batch_norm_eps: dict[str, float]
    refinement: RefinementConfig | None = None
    keypoints: KeypointLayout | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which JSON and ``weights_only=True`` take."""
        parts = {
            "refinement": None if self.refinement is None else asdict(self.refinement),
            "keypoints": None if self.keypoints is None else self.keypoints.to_dict(),
        }
        return {
            "detector": asdict(self.settings),
            "crop": self.crop,
            "categories": [{"id": i, "name": name} for i, name in zip(self.category_ids, self.category_names)],
            "batch_norm_eps": self.batch_norm_eps,
        } | {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def from_dict(cls, content: Any) -> "DetectorDescription":
        """Read what :meth:`to_dict` made, of which nothing is trusted; other keys beside it are passed over.

        Raises:
            ModelError: a value cannot be right.
            LookupError, TypeError, AttributeError, ValueError: something is missing, or of another type; see
                :func:`~detector.models.weights.refusing`.
        """
        if not isinstance(content, dict):
            raise ModelError(f"it must hold a dict, not a {type(content).__name__}")
        settings, crop, eps = saved_settings(content["detector"]), content["crop"], content["batch_norm_eps"]
        if "category_names" in content:  # a checkpoint of before this class
            categories = list(zip(content["category_ids"], content["category_names"], strict=True))
        else:
            categories = [(category["id"], category["name"]) for category in content["categories"]]
        if crop not in ("affine", "roi_align"):
            raise ModelError(f"crop must be affine or roi_align, got {short_repr(crop)}")
        for i, name in categories:
            if (type(i) is not int and i is not None) or type(name) is not str:
                raise ModelError(f"a category must have an id and a name, got {short_repr(i)} and {short_repr(name)}")
        if not isinstance(eps, dict) or not all(type(e) in (int, float) and 0 <= e <= 1 for e in eps.values()):
            raise ModelError("batch_norm_eps must be numbers from 0 to 1")
        return cls(
            settings,
            crop,
            [i for i, _ in categories],
            [name for _, name in categories],
            eps,
            _saved_refinement(content.get("refinement")),
            _saved_keypoints(content.get("keypoints"), settings),
        )

    def build(self, weights: Any) -> FasterRCNN:
        """The detector with its weights, a state_dict of which nothing is trusted.

        Raises:
            ModelError: they are not of the detector that is described, or that cannot be built.
        """
        model = load_weights(self._untrained, weights)
        known = batch_norm_eps(model)
        # Earlier versions left out timm's frozen ones, whose eps is that of the builder.
        named = {name for name in known if isinstance(model.get_submodule(name), (nn.BatchNorm2d, FrozenBatchNorm2d))}
        if not named <= self.batch_norm_eps.keys() <= known.keys():
            raise ModelError("batch_norm_eps does not name the model's batch norms")
        set_batch_norm_eps(model, self.batch_norm_eps)
        return swap_crop_head(model) if self.crop == "affine" else model

    def _untrained(self) -> FasterRCNN:
        points = {} if self.keypoints is None else {"num_keypoints": len(self.keypoints)}
        model = build_detector(self.settings, len(self.category_ids), pretrained=False, **points)
        return model if self.refinement is None else add_refinement(model, self.refinement)


def _saved_keypoints(content: Any, settings: DetectorConfig) -> KeypointLayout | None:
    """The layout of keypoints that a file holds; of a detector that finds any it must."""
    if "keypoints" not in settings.annotation_types:
        return None
    try:
        return KeypointLayout.from_dict(content)
    except (LookupError, TypeError, ValueError) as error:
        raise ModelError(f"keypoints: {one_line(error)}") from None


def _saved_refinement(fields: Any) -> RefinementConfig | None:
    """The settings of a refinement that a file holds, if any; those that there were not yet have their defaults."""
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise ModelError(f"refinement must be a dict of settings, got {short_repr(fields)}")
    try:
        return RefinementConfig.from_dict(fields)
    except LookupError as error:
        raise ModelError(f"refinement: it has no {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        message = one_line(error)
        raise ModelError(message if message.startswith("refinement.") else f"refinement: {message}") from None
