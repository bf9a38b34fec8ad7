"""Where RoIAlign looks: the sample positions of a set of RoIs along one axis.

RoIAlign's samples form a product of two axes, so each axis is worked out alone, on [K, bins, samples]
values, and no tensor here has a channel dimension. The rules are those of ``torchvision.ops.roi_align``
(He et al., "Mask R-CNN", 2017, section 3, and the C++ kernel for the borders):

* bin ``p`` of an RoI of extent ``e`` is cut into ``count`` parts, one sample in the middle of each;
* a sample more than one pixel outside the map (position < -1 or > size) counts as zero;
* any other sample is moved onto the map: to [0, size - 1], the centres of the first and last pixel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Samples that count as zero go here: a normalised coordinate whose neighbours all lie outside any map,
# so that grid_sample's zero padding gives exactly 0, no gradient, and reads nothing.
OUTSIDE = 3.0


@dataclass(frozen=True)
class Axis:
    """One axis (x or y) of K RoIs.

    ``start`` and ``extent`` [K] are in map pixels, computed in roi_align's order of operations and without
    gradient: they decide on which side of the border a sample lies, which must be decided exactly as
    roi_align does. ``scale`` and ``shift`` [K] are theta's entries for this axis (normalised); they say
    where the sample is, and carry the gradient.
    """

    start: Tensor
    extent: Tensor
    scale: Tensor
    shift: Tensor
    size: int  # of the map, in pixels
    bins: int  # of the output

    def select(self, index: Tensor | slice) -> "Axis":
        return Axis(self.start[index], self.extent[index], self.scale[index], self.shift[index], self.size, self.bins)

    def adaptive_counts(self) -> Tensor:
        """Samples per bin at ``sampling_ratio <= 0``: ceil(extent / bins), none for an empty side. [K]"""
        return (self.extent / self.bins).ceil().clamp(min=0)

    def windows(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of each bin that can lie on the map, so that a huge RoI costs no more than the map.

        Args:
            counts: [K], samples per bin.

        Returns:
            The index of the first such sample of each bin, [K, bins], and the number of them in the fullest
            bin of each RoI, [K], both int64. Two samples of slack on each side: what is really on the map is
            decided by :meth:`positions`.
        """
        extent, counts = self.extent.double()[:, None], counts.double()[:, None]
        bin_size = extent / self.bins
        bin_start = self.start.double()[:, None] + torch.arange(self.bins, device=extent.device) * bin_size
        step = bin_size / counts.clamp(min=1)  # [K, 1], pixels from sample to sample
        first = ((-1 - bin_start) / step - 0.5).floor() - 2
        last = ((self.size - bin_start) / step - 0.5).ceil() + 3
        zero = torch.zeros_like(counts)
        first = first.nan_to_num().clamp(zero, counts)
        last = last.nan_to_num().clamp(zero, counts)
        return first.long(), (last - first).amax(dim=1).long()

    def positions(self, index: Tensor, counts: Tensor | int) -> Tensor:
        """Normalised positions of samples, :data:`OUTSIDE` for those that count as zero. Differentiable.

        Args:
            index: which samples of each bin, [n] or [K, bins, n].
            counts: samples per bin, a number or [K]. An ``index`` beyond it counts as zero.

        Returns:
            [K, bins * n]
        """
        dtype = self.start.dtype
        bins = torch.arange(self.bins, dtype=dtype, device=self.start.device)[:, None]  # [bins, 1]
        limit = counts[:, None, None] if isinstance(counts, Tensor) else counts
        count = limit.clamp(min=1) if isinstance(limit, Tensor) else limit
        middle = index.to(dtype) + 0.5
        bin_size = (self.extent / self.bins)[:, None, None]
        # In roi_align's order of operations: on an integer box a sample lies exactly on the border.
        pixel = self.start[:, None, None] + bins * bin_size + middle * bin_size / count  # [K, bins, n]
        on_map = (pixel >= -1) & (pixel <= self.size) & (index < limit)

        unit = (bins + middle / count) * (2 / self.bins) - 1  # the sample in the crop frame, -1..1
        # One row of affine_grid, written out: as a matrix product autocast would make it bfloat16.
        position = self.scale[:, None, None] * unit + self.shift[:, None, None]
        # The centre of the edge pixel, less a rounding error: on the centre itself, or beyond it by rounding,
        # zero padding would give the slope from the pixel down to 0 for a gradient, where it is flat.
        edge = (1 - 1 / self.size) * (1 - 4 * torch.finfo(dtype).eps)
        position = torch.where(position.abs() < edge, position, position.detach().clamp(-edge, edge))
        return torch.where(on_map, position, OUTSIDE).flatten(1)
