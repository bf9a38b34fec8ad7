"""RoI pooling over a feature pyramid, with box gradients through every level."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log2
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.boxes import box_area
from torchvision.ops.poolers import LevelMapper

from detector.crop.arguments import check_choice, pair
from detector.crop.crop import Sampler, box_gradient, crop_levels, runs_triton
from detector.crop.geometry import geometry_dtype
from detector.crop.rois import Geometry


class MultiScaleAffineCrop(MultiScaleRoIAlign):
    """Crop boxes out of a feature pyramid, with gradients to the maps and the boxes.

    Boxes are (x1, y1, x2, y2) in pixels of the resized images, x to the right and y down. Constructor, call and values
    are those of ``torchvision.ops.MultiScaleRoIAlign``, which gives boxes no gradient. The level of an RoI follows from
    its size (Lin et al., "Feature Pyramid Networks", 2017, equation 1) and carries no gradient. In graphs, and if
    vmapped over boxes, every RoI samples every level and image.

    Args:
        featmap_names: the feature maps to crop from; others are ignored.
        output_size, sampling_ratio, sampler: see :func:`~detector.affine_crop`.
        canonical_scale: box size, in image pixels, that maps to ``canonical_level``.
        canonical_level: level of a box of that size (k0 in equation 1); 4 is stride 16.
        aligned: see :func:`~detector.affine_crop`. torchvision's pooler, and every weight trained with it, has False.
        size_divisible: images are padded to a multiple of this many pixels before the backbone; 1 means no padding.
            :func:`~detector.swap_crop_head` takes it from the model's transform. ``None`` takes 32 (torchvision's
            value) or 1, whichever fits a map's size better; for images below 48 pixels it may be wrong.

    Example:
        >>> pool = MultiScaleAffineCrop(["0", "1"], output_size=7, sampling_ratio=2)
        >>> maps = {"0": torch.rand(1, 8, 64, 64), "1": torch.rand(1, 8, 32, 32)}  # strides 4 and 8
        >>> boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0], [5.0, 5.0, 250.0, 200.0]], requires_grad=True)
        >>> pool(maps, [boxes], [(256, 256)]).shape
        torch.Size([2, 8, 7, 7])
    """

    # swap_crop_head changes the class of a pool that lacks these.
    aligned: bool = False
    sampler: Sampler = "auto"
    size_divisible: int | None = None

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        sampler: Sampler = "auto",
        size_divisible: int | None = None,
    ) -> None:
        bins = pair("output_size", output_size)
        canonical = {"canonical_scale": canonical_scale, "canonical_level": canonical_level}
        super().__init__(list(featmap_names), bins, sampling_ratio, **canonical)
        if size_divisible is not None and size_divisible < 1:
            raise ValueError(f"size_divisible must be at least 1, got {size_divisible}")
        self.aligned = aligned
        self.sampler = check_choice("sampler", sampler, Sampler)
        self.size_divisible = size_divisible

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Crop RoIs out of a pyramid, [K, C, *output_size]. Raises what :func:`~detector.affine_crop` does.

        Args:
            x: feature maps by name, [N, C, H_level, W_level], from the finest level to the coarsest; at least one of
                them in ``featmap_names``. With several, RoIs of negative area are on no level and are zero.
            boxes: one [L, 4] tensor per image.
            image_shapes: (height, width) of the resized, unpadded images; they give the strides of the levels.
        """
        maps, geometry = self._maps_and_geometry(x, image_shapes)
        return crop_levels(maps, boxes, geometry, self.sampler)

    def box_gradient(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]], upstream: Tensor
    ) -> list[Tensor]:
        """Return the gradient at the boxes, [L, 4] per image, of a loss whose gradient at their crops is ``upstream``.

        Features and boxes get no gradient. The other arguments are those of the call.
        """
        maps, geometry = self._maps_and_geometry(x, image_shapes)
        return box_gradient(maps, boxes, upstream, geometry, self.sampler)

    def needs_no_forward(self, x: dict[str, Tensor]) -> bool:
        """Return whether :meth:`box_gradient` takes no crops, so that RoIs without a gradient cost next to nothing."""
        return runs_triton(self.sampler, list(x.values()))

    def _maps_and_geometry(
        self, x: dict[str, Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], Geometry]:
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if not features:
            raise ValueError(f"x has none of the feature maps {self.featmap_names}, only {list(x)}")
        if not image_shapes:
            raise ValueError("image_shapes must have the size of at least one image, got none")
        largest = [max(sides) for sides in zip(*image_shapes)]
        scales = [_scale(feature.shape[-2:], largest, self.size_divisible) for feature in features]
        levels = None
        if len(scales) > 1:
            ends: Any = (scales[0], scales[-1])
            first, last = (-torch.log2(s).round() if isinstance(s, Tensor) else -int(log2(s)) for s in ends)
            levels = Levels(first, last, self.canonical_scale, self.canonical_level)
        return features, Geometry(
            pair("output_size", self.output_size), scales, self.sampling_ratio, self.aligned, levels
        )

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, aligned={self.aligned}, sampler={self.sampler})"


@dataclass(frozen=True)
class Levels:
    """The levels of a pyramid (Lin et al., "Feature Pyramid Networks", 2017, equation 1). They carry no gradient."""

    first: Any  # the logarithm of the stride of the first level; a tensor while ONNX is traced
    last: Any
    canonical_scale: int  # box size, in image pixels, of canonical_level
    canonical_level: int

    def __call__(self, corners: Tensor) -> Tensor:
        """Return each RoI's level: -1 for a negative area, as in torchvision, and 0 for boxes that are not finite."""
        corners = corners.to(geometry_dtype(corners))
        mapper = LevelMapper(self.first, self.last, self.canonical_scale, self.canonical_level)
        level = torch.where(box_area(corners) < 0, -1, mapper([corners.nan_to_num()]))
        return torch.where(torch.isfinite(corners).all(dim=1), level, 0)

    def least_areas(self) -> list[float]:
        """Return the least area, in image pixels, of boxes on each level but the first. Infinite: there is none."""
        exponents = [level - self.canonical_level - 1e-6 for level in range(self.first + 1, self.last + 1)]
        return [(self.canonical_scale * 2.0**e) ** 2 for e in exponents] or [inf]  # 1e-6 is LevelMapper's eps


def _scale(map_size: Sequence[int], image_size: Sequence[int], size_divisible: int | None) -> Any:
    """Return map pixels per pixel of the padded image, rounded to a power of two; a tensor while ONNX is traced."""
    # torchvision divides by the size before padding, which doubles the scale of a thin image: 20 pixels are padded to
    # 32.
    exponents: list[Any] = []
    for multiple in (32, 1) if size_divisible is None else (size_divisible,):
        # Sums of both sides, so that the longer side counts more where a backbone rounds.
        ratio: Any = sum(map_size) / sum((side + multiple - 1) // multiple * multiple for side in image_size)
        if isinstance(ratio, Tensor):
            return torch.pow(2.0, torch.log2(ratio).round())
        exponents.append(log2(ratio))
    return 2.0 ** round(min(exponents, key=lambda exponent: abs(exponent - round(exponent))))
