"""What is trained where a detector is there already: the refinement of its boxes, and nothing else."""

from typing import Any

from torch import Tensor

from detector.data.annotation_types import AnnotationType
from detector.data.keypoints import KeypointLayout
from detector.errors import ModelError
from detector.models.published import batch_norm_eps
from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector, digest_of
from detector.pretrained.initial_weights import REFINEMENT
from detector.refinement.attach import add_refinement, refinement_losses
from detector.refinement.config import RefinementConfig
from detector.refinement.feature_cache import FeatureCache
from detector.training.failures import REFINE, TrainingError
from detector.training.optimization import OptimizerConfig
from detector.training.task import DetectionTask

# The rate is not for a number of images: there are at most some hundred boxes a step, however many images.
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_rule="constant", weight_decay=1e-4)


class RefinementTask(DetectionTask):
    """Train the refinement of a detector, whose own weights stay as they are to the last bit.

    The classes of the data need not be the detector's, for the refinement is the same for all. What is drawn at random
    is a function of the seed and the step.

    What the checkpoint calls ``box_gradient`` is the refinement's, between its iterations; that which the detector was
    trained with stays in the detector's own checkpoint.

    Args:
        detector: is changed in place: it gets the refinement, and nothing else of it is trained.
        refinement: the settings.
        optimizer: how the refinement's weights are changed.
        cache_bytes: memory of the :class:`~detector.refinement.feature_cache.FeatureCache`.

    Raises:
        ModelError: the detector cannot be refined, or could not be saved.
    """

    advice = REFINE

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
        self.category_ids, self.category_names = detector.category_ids, detector.category_names
        self.keypoints = detector.keypoints
        try:
            self.model = add_refinement(detector.model, refinement)
        except TypeError as error:
            raise ModelError(f"the detector cannot be refined: {error}") from None
        self.model.requires_grad_(False)
        self.model.roi_heads.refinement.requires_grad_()
        self.cache = FeatureCache(cache_bytes)
        self.base = digest_of(
            {name: value for name, value in self.model.state_dict().items() if not name.startswith(REFINEMENT)}
        )

    def on_fit_start(self) -> None:
        pass  # no weights to begin from, no anchors to advise on

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return refinement_losses(self.model, images, targets, cache=self.cache)

    def description(self) -> DetectorDescription:
        eps = batch_norm_eps(self.model)
        return DetectorDescription(
            self.detector, self.crop, self.category_ids, self.category_names, eps, self.refinement, self.keypoints
        )

    @property
    def annotation_types(self) -> tuple[AnnotationType, ...]:
        """Nothing: boxes are learned, masks and keypoints are looked for in them."""
        return ()

    def _category_names(self) -> list[str]:
        return self.category_names

    def _keypoints(self) -> KeypointLayout | None:
        return self.keypoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["refined_weights"] = self.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get("refined_weights") != self.base:
            raise TrainingError(
                f"the checkpoint refines another detector: give the one that it began with{REFINE.anew}"
            )
