"""RoI pooling over a feature pyramid, with box gradients through every level."""

from collections.abc import Callable, Sequence
from math import log2
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.boxes import box_area
from torchvision.ops.poolers import LevelMapper

from detector.crop.crop import Sampler, Sampling, check_sampler, check_sampling, crop_levels, describe, pair
from detector.crop.geometry import geometry_dtype


class MultiScaleAffineCrop(MultiScaleRoIAlign):
    """``torchvision.ops.MultiScaleRoIAlign`` with gradients to the boxes: its constructor, its call, its values.

    An RoI is cropped from the level that its size maps to (Lin et al., "Feature Pyramid Networks", 2017,
    equation 1). The level is piecewise constant in the box, so no gradient passes through its choice. Under
    ``torch.compile`` and ``torch.export``, and under ``torch.vmap`` over boxes, each RoI is sampled in every level and
    image, and all but one of these read nothing; in ONNX (:func:`~detector.pretrained.onnx_export.export_onnx`) only
    where it is.

    Args:
        featmap_names: the feature maps to crop from; others are ignored.
        output_size: height and width of the crop in bins, or one number for both.
        sampling_ratio: samples per bin and axis; 0 or less: see :func:`~detector.affine_crop`.
        canonical_scale: the box size, in image pixels, that maps to ``canonical_level``.
        canonical_level: the level of a box of that size (equation 1's k0), 4 for stride 16.
        aligned: as in :func:`~detector.affine_crop`. torchvision's pooler, and every weight trained with it, has False.
        sampler: as in :func:`~detector.affine_crop`.
        sampling: as in :func:`~detector.affine_crop`.
        size_divisible: the images were padded, on the right and below, to a multiple of this many pixels before the
            backbone saw them; 1: not at all. It is the attribute of this name of torchvision's
            ``GeneralizedRCNNTransform``, from which :func:`~detector.swap_crop_head` takes it. ``None``: 32, which is
            torchvision's, or not at all, whichever fits the size of a map better; it may be the wrong one where images
            are not padded and no side has 48 pixels.

    Example:
        >>> pool = MultiScaleAffineCrop(["0", "1"], output_size=7, sampling_ratio=2)
        >>> maps = {"0": torch.rand(1, 8, 64, 64), "1": torch.rand(1, 8, 32, 32)}  # strides 4 and 8
        >>> boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0], [5.0, 5.0, 250.0, 200.0]], requires_grad=True)
        >>> crops = pool(maps, [boxes], [(256, 256)])
        >>> crops.shape, crops.requires_grad
        (torch.Size([2, 8, 7, 7]), True)
    """

    # Of a module whose class was changed, which has no attributes of ours yet.
    aligned: bool = False
    sampler: Sampler = "auto"
    sampling: Sampling = "points"
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
        sampling: Sampling = "points",
        size_divisible: int | None = None,
    ) -> None:
        super().__init__(
            list(featmap_names),
            pair("output_size", output_size),
            sampling_ratio,
            canonical_scale=canonical_scale,
            canonical_level=canonical_level,
        )
        if size_divisible is not None and size_divisible < 1:
            raise ValueError(f"size_divisible must be at least 1, got {size_divisible}")
        self.aligned = aligned
        self.sampler = check_sampler(sampler)
        self.sampling = check_sampling(sampling)
        self.size_divisible = size_divisible

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Crop RoIs out of a pyramid.

        Args:
            x: feature maps by name, [N, C, H_level, W_level] each, from the finest level to the coarsest.
            boxes: (x1, y1, x2, y2) in pixels of the (resized, unpadded) images, one [L, 4] tensor per image.
            image_shapes: (height, width) of those images, from which, with ``size_divisible``, the levels' strides are
                told.

        Returns:
            [K, C, *output_size] in the features' dtype, the RoIs of all images one after the other. An RoI of
            negative area belongs to no level and is zero where there are several, as in torchvision.

        Raises:
            ValueError: no map of ``x`` is in ``featmap_names``, or ``image_shapes`` is empty; and what
                :func:`~detector.affine_crop` raises.
        """
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if not features:
            raise ValueError(f"x has none of the feature maps {self.featmap_names}, only {list(x)}")
        if not image_shapes:
            raise ValueError("image_shapes must have the size of at least one image, got none")
        largest = [max(sides) for sides in zip(*image_shapes)]
        scales = [_scale(feature.shape[-2:], largest, self.size_divisible) for feature in features]
        several = len(features) > 1
        return crop_levels(
            features,
            boxes,
            self._level_mapper(scales) if several else None,
            self.output_size,
            scales,
            self.sampling_ratio,
            self.aligned,
            self.sampler,
            self.sampling,
        )

    def _level_mapper(self, scales: list[float]) -> Callable[[Tensor], Tensor]:
        first, last = (
            -torch.log2(scale).round() if isinstance(scale, Tensor) else -int(log2(scale))
            for scale in (scales[0], scales[-1])
        )
        mapper = LevelMapper(first, last, self.canonical_scale, self.canonical_level)

        def level_of(corners: Tensor) -> Tensor:
            """-1 for a negative area, as in torchvision; 0 for what is not finite, for the crop to answer."""
            corners = corners.to(geometry_dtype(corners))
            area = box_area(corners)
            level = torch.where(area < 0, -1, mapper([corners.nan_to_num()]))
            return torch.where(torch.isfinite(corners).all(dim=1), level, 0)

        return level_of

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, aligned={self.aligned}{describe(self.sampler, self.sampling)})"


def _scale(map_size: Sequence[int], image_size: Sequence[int], size_divisible: int | None) -> Any:
    """The power of two that is nearest to a map's pixels per pixel of the padded image, a number.

    torchvision divides by the image as it was before it was padded, of which a thin image is a small part: 20 pixels
    are padded to 32, and a map of stride 4 would be taken for one of stride 2.

    When a graph for ONNX is traced, sizes and scale are tensors: other images have others.
    """
    exponents: list[Any] = []
    for multiple in (32, 1) if size_divisible is None else (size_divisible,):
        # The sum of both sides: where a backbone rounds, the longer side, which tells more, counts more.
        ratio: Any = sum(map_size) / sum((side + multiple - 1) // multiple * multiple for side in image_size)
        if isinstance(ratio, Tensor):
            return torch.pow(2.0, torch.log2(ratio).round())
        exponents.append(log2(ratio))
    return 2.0 ** round(min(exponents, key=lambda exponent: abs(exponent - round(exponent))))
