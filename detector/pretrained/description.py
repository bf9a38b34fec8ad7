"""The description of a detector, stored beside its weights in checkpoints and in the config.json of saved folders."""

from dataclasses import asdict, dataclass
from typing import Any

from torchvision.models.detection import FasterRCNN

from detector.choices import Crop
from detector.data.keypoints import KeypointLayout
from detector.errors import ModelError, short_repr
from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.published import batch_norm_eps, set_batch_norm_eps
from detector.models.weights import as_model_error, load_weights
from detector.rcnn.swap import swap_crop_head
from detector.refinement.attach import add_refinement
from detector.refinement.config import RefinementConfig


@dataclass(frozen=True)
class DetectorDescription:
    """Everything needed to rebuild a detector except its weights. Labels count from 1; 0 is the background.

    Args:
        settings: the settings that the network is built with.
        crop: how the network crops its feature maps.
        category_ids: the category id of each label; ``None`` for a label without a category.
        category_names: the category name of each label.
        batch_norm_eps: see :func:`~detector.models.published.batch_norm_eps`.
        refinement: the settings of the refinement, if there is one.
        keypoints: the layout of the keypoints, if the detector finds any.
    """

    settings: DetectorConfig
    crop: Crop
    category_ids: list[int | None]
    category_names: list[str]
    batch_norm_eps: dict[str, float]
    refinement: RefinementConfig | None = None
    keypoints: KeypointLayout | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON and ``weights_only=True`` require."""
        content = {
            "detector": asdict(self.settings),
            "crop": self.crop,
            "categories": [{"id": i, "name": name} for i, name in zip(self.category_ids, self.category_names)],
            "batch_norm_eps": self.batch_norm_eps,
            "refinement": self.refinement and asdict(self.refinement),
            "keypoints": self.keypoints and self.keypoints.to_dict(),
        }
        return {name: value for name, value in content.items() if value is not None}

    @classmethod
    def from_dict(cls, content: Any) -> "DetectorDescription":
        """Read the output of :meth:`to_dict` from an untrusted file. Unknown keys are ignored.

        Raises:
            ModelError: a value is invalid.
            Exception: a value is missing or of the wrong type; see :func:`~detector.models.weights.as_model_error`.
        """
        if not isinstance(content, dict):
            raise ModelError(f"it must hold a dict, not a {type(content).__name__}")
        settings, crop, eps = DetectorConfig.from_dict(content["detector"]), content["crop"], content["batch_norm_eps"]
        ids, names = ([category[key] for category in content["categories"]] for key in ("id", "name"))
        if crop not in ("affine", "roi_align"):
            raise ModelError(f"crop must be affine or roi_align, got {short_repr(crop)}")
        if not all(type(i) in (int, type(None)) and type(name) is str for i, name in zip(ids, names)):
            raise ModelError("categories: each needs an id and a name")
        if not isinstance(eps, dict) or not all(type(e) in (int, float) and 0 <= e <= 1 for e in eps.values()):
            raise ModelError("batch_norm_eps must be numbers from 0 to 1")
        with as_model_error("refinement"):
            fields = content.get("refinement")
            refinement = None if fields is None else RefinementConfig.from_dict(fields)
        with as_model_error("keypoints"):
            has_keypoints = "keypoints" in settings.annotation_types
            keypoints = KeypointLayout.from_dict(content.get("keypoints")) if has_keypoints else None
        return cls(settings, crop, ids, names, eps, refinement, keypoints)

    def build(self, weights: Any) -> FasterRCNN:
        """Build the detector with weights from an untrusted state_dict.

        Raises:
            ModelError: the weights do not fit the description, or the detector cannot be built.
        """
        model = load_weights(self._build_untrained, weights)
        if self.batch_norm_eps.keys() != batch_norm_eps(model).keys():
            raise ModelError("batch_norm_eps does not name the model's batch norms")
        set_batch_norm_eps(model, self.batch_norm_eps)
        return swap_crop_head(model) if self.crop == "affine" else model

    def _build_untrained(self) -> FasterRCNN:
        options = {} if self.keypoints is None else {"num_keypoints": len(self.keypoints)}
        model = build_detector(self.settings, len(self.category_ids), pretrained=False, **options)
        return model if self.refinement is None else add_refinement(model, self.refinement)
