"""torchvision's image resizing, fixed for narrow images: torchvision fails, as it scales 3000 x 2 to 1333 x 0."""

import copy
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2


class DetectorTransform(GeneralizedRCNNTransform):
    """torchvision's detection transform, with a shorter side of at least one pixel."""

    fixed_size: tuple[int, int] | None

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        height, width = image.shape[-2:]
        if self.fixed_size is not None or max(height, width) < self.max_size * min(height, width):
            return super().resize(image, target)
        fixed = copy.copy(self)  # several threads may share this one
        fixed.fixed_size = (self.max_size, 1) if width > height else (1, self.max_size)
        return GeneralizedRCNNTransform.resize(fixed, image, target)


class RandomShortestSize(v2.RandomShortestSize):
    """torchvision's training transform, with a shorter side of at least one pixel."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params | {"size": tuple(max(side, 1) for side in params["size"])}


def accept_narrow_images(model: nn.Module) -> None:
    """Replace torchvision's transform of a detector, in place. A user's own transform stays."""
    transform = getattr(model, "transform", None)
    if type(transform) is GeneralizedRCNNTransform:
        transform.__class__ = DetectorTransform
