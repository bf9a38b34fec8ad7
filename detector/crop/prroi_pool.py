"""Precise RoI Pooling, by the name and arguments of its authors' CUDA extension. Nothing is compiled."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
import torch.fx
from torch import Tensor, nn

from detector.crop.arguments import check_choice, finish, pair, split_rois
from detector.crop.crop import runs_triton
from detector.crop.geometry import geometry_dtype
from detector.crop.precise import NAMES, PRECISE, place_bins, pool_by_gather, pool_by_products
from detector.crop.transforms import is_vmapped, makes_graph
from detector.crop.triton_sampler import crop_by_triton

PoolMethod = Literal["auto", "products", "gather", "triton"]
MAX_PRODUCTS = 2**25  # multiplications; beyond them the gather is faster


@torch.fx.wrap  # a leaf in torch.fx traces, like roi_align
def prroi_pool2d(
    features: Tensor,
    rois: Tensor | Sequence[Tensor],
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    *,
    method: PoolMethod = "auto",
) -> Tensor:
    """Average feature maps over the bins of RoIs in closed form, with gradients to the maps and the RoIs.

    RoIs are (x1, y1, x2, y2) in image pixels, x to the right and y down. Pixel ``i`` of a map has its **centre** at
    coordinate ``i``, not at ``i + 0.5`` as in ``affine_crop(aligned=True)``. Beyond the border the bilinear surface
    falls to zero within a pixel. Means are exact, so the box gradient is continuous. Arguments, values and gradients
    are those of ``PreciseRoIPooling`` (Jiang et al., "Acquisition of Localization Confidence for Accurate Object
    Detection", 2018, section 3.3), as in IoU-Net and pytracking. Second derivatives work.

    Args:
        features: [N, C, H, W], any floating dtype.
        rois: [K, 5], the image's index and the box; or one [L, 4] tensor per image. Coordinates are used in float32 or
            float64. An empty or inverted box gives 0. Bins below 0.005 map pixels (float64: 6e-6) are widened to that.
        pooled_height, pooled_width: rows and columns of bins.
        spatial_scale: pixels of ``features`` per image pixel.
        method: how means are computed; values and gradients agree to rounding. ``"products"`` multiplies whole maps
            by matrices, and can be compiled, exported and vmapped; a pixel that is not finite spreads to all RoIs.
            ``"gather"`` reads only a bin's pixels, and synchronises on a GPU. ``"triton"`` is one kernel each way, on a
            GPU with Triton, elsewhere ``"auto"``: the products in graphs and for a few RoIs of one small map, otherwise
            the gather.

    Returns:
        [K, C, pooled_height, pooled_width] in the dtype of ``features``. RoIs with a bad image index or a non-finite
        coordinate are NaN where a check would synchronise or is impossible: on a GPU, in graphs, vmapped over boxes.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or device, or an invalid shape or value.

    Example:
        >>> rois = torch.tensor([[0, 20.0, 30.0, 180.0, 150.0]], requires_grad=True)
        >>> pooled = prroi_pool2d(torch.rand(1, 64, 18, 18), rois, 5, 5, 1 / 16)
        >>> pooled.sum().backward()
        >>> pooled.shape, rois.grad.shape
        (torch.Size([1, 64, 5, 5]), torch.Size([1, 5]))
    """
    bins = pair("pooled_height and pooled_width", (pooled_height, pooled_width))
    check_choice("method", method, PoolMethod)
    index, corners, _ = split_rois([features], rois, [spatial_scale], NAMES)
    if runs_triton(method, [features, corners]):
        return crop_by_triton([features], corners, index, None, bins, [spatial_scale], PRECISE, True)
    samples, valid = place_bins(features, index, corners, bins, spatial_scale)
    if makes_graph() or is_vmapped(features) or is_vmapped(corners):
        method = "products"
    elif features.is_meta:
        method = "gather"  # it needs no values
    elif method in ("auto", "triton"):
        # Products multiply each RoI by all images, and autocast would round their factors in a backward.
        few = len(features) == 1 and bins[0] * corners.shape[0] * prod(features.shape) <= MAX_PRODUCTS
        method = "products" if few and not torch.is_autocast_enabled(features.device.type) else "gather"
    if method == "products":
        pooled = pool_by_products([features.to(geometry_dtype(features))], [samples])
    else:
        pooled = pool_by_gather(features, samples)
    return finish(pooled, valid, features.dtype)


class PrRoIPool2D(nn.Module):
    """Precise RoI Pooling: :func:`prroi_pool2d` as a module. It replaces ``prroi_pool.PrRoIPool2D``.

    Example:
        >>> pool = PrRoIPool2D(5, 5, spatial_scale=1 / 16)
        >>> pool(torch.rand(1, 64, 18, 18), torch.tensor([[0, 20.0, 30.0, 180.0, 150.0]])).shape
        torch.Size([1, 64, 5, 5])
    """

    def __init__(
        self, pooled_height: int, pooled_width: int, spatial_scale: float, *, method: PoolMethod = "auto"
    ) -> None:
        super().__init__()
        self.pooled_height, self.pooled_width = pair("pooled_height and pooled_width", (pooled_height, pooled_width))
        self.spatial_scale, self.method = spatial_scale, check_choice("method", method, PoolMethod)

    def forward(self, features: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        bins = (self.pooled_height, self.pooled_width)
        return prroi_pool2d(features, rois, *bins, self.spatial_scale, method=self.method)

    def extra_repr(self) -> str:
        names = ("pooled_height", "pooled_width", "spatial_scale", "method")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
