"""The training task of a refinement, which leaves its detector as it is."""

from typing import Any

from torch import Tensor

from detector.data.annotation_types import AnnotationType
from detector.errors import ModelError
from detector.models.published import batch_norm_eps
from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector, digest_of
from detector.pretrained.initial_weights import REFINEMENT
from detector.refinement.attach import add_refinement, refinement_losses
from detector.refinement.config import RefinementConfig
from detector.refinement.feature_cache import FeatureCache
from detector.training.failures import TrainingError
from detector.training.optimization import OptimizerConfig
from detector.training.task import DetectionTask

# The rate is constant: a step sees at most a few hundred boxes, whatever the number of images.
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_rule="constant", weight_decay=1e-4)


class RefinementTask(DetectionTask):
    """Trains the refinement of a detector, whose own weights stay the same to the last bit.

    The classes of the data may differ from the detector's, since one refinement serves all classes. Every random choice
    is a function of the seed and the step.

    Args:
        detector: gets the refinement, in place.
        refinement: settings of the refinement.
        optimizer: how the refinement's weights are optimized.
        cache_bytes: memory for the feature cache, see :class:`~detector.refinement.feature_cache.FeatureCache`.

    Raises:
        ModelError: the detector cannot be refined, or could not be saved.
    """

    new_run = "start a new run"

    def __init__(
        self,
        detector: Detector,
        refinement: RefinementConfig = RefinementConfig(),
        optimizer: OptimizerConfig = OPTIMIZER,
        *,
        cache_bytes: int = 2 * 10**9,
    ) -> None:
        if detector.settings is None or detector.crop is None:
            raise ModelError("only detectors that tools/train.py can build can be refined: torchvision's R-CNNs")
        super().__init__(detector.settings, refinement.box_gradient, detector.crop, optimizer, refinement)
        try:
            self.model = add_refinement(detector.model, refinement)
        except TypeError as error:
            raise ModelError(f"the detector cannot be refined: {error}") from None
        self.model.requires_grad_(False)
        self.model.roi_heads.refinement.requires_grad_()
        self._description = DetectorDescription(
            detector.settings,
            detector.crop,
            detector.category_ids,
            detector.category_names,
            batch_norm_eps(self.model),
            refinement,
            detector.keypoints,
        )
        self.cache = FeatureCache(cache_bytes)
        own_weights = {n: value for n, value in self.model.state_dict().items() if not n.startswith(REFINEMENT)}
        self.digest = digest_of(own_weights)

    @property
    def annotation_types(self) -> tuple[AnnotationType, ...]:
        """None: only boxes are learned, whatever the detector finds in them."""
        return ()

    def on_fit_start(self) -> None:
        pass  # no initial weights, no advice on anchors

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return refinement_losses(self.model, images, targets, cache=self.cache)

    def description(self) -> DetectorDescription:
        return self._description

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["refined_weights"] = self.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get("refined_weights") != self.digest:
            raise TrainingError("the checkpoint refines another detector", hints=("give that one", self.new_run))
