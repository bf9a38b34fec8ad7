"""Images so narrow that torchvision's detectors would resize them to no pixel."""

import copy
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2


class NarrowTransform(GeneralizedRCNNTransform):
    """torchvision's transform of a detector, which leaves at least one pixel of an image's shorter side.

    It makes 1333 x 0 pixels of an image of 3000 x 2, and fails.
    """

    fixed_size: tuple[int, int] | None

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        height, width = image.shape[-2:]
        if self.fixed_size is not None or max(height, width) < self.max_size * min(height, width):
            return super().resize(image, target)
        fixed = copy.copy(self)  # not this one, which several threads may call at once
        fixed.fixed_size = (self.max_size, 1) if width > height else (1, self.max_size)
        return GeneralizedRCNNTransform.resize(fixed, image, target)


class NarrowShortestSize(v2.RandomShortestSize):
    """torchvision's transform of training images, which leaves at least one pixel of the shorter side."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params | {"size": tuple(max(side, 1) for side in params["size"])}


def take_narrow_images(model: nn.Module) -> None:
    """Let a torchvision detector take images of any shape, in place."""
    transform = getattr(model, "transform", None)
    if type(transform) is GeneralizedRCNNTransform:  # of a user's own class it is the user's business
        transform.__class__ = NarrowTransform
