"""The exact crop: a bin is the mean of the bilinear surface over the bin, in closed form.

It is the function of Precise RoI Pooling (Jiang et al., "Acquisition of Localization Confidence for Accurate Object
Detection", 2018, equations 4 to 6) with RoIAlign's rules at the border: what ``roi_align`` tends to as its samples
become more. The surface is separable, and so is its mean: along an axis pixel ``i`` weighs the integral of its hat
function over the bin, over the bin's length. The integral is a polynomial of the second degree between pixel centres,
continuously differentiable across them, so that unlike that of samples the box gradient has no kinks there.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detector.crop.positions import Axis, Samples

# A bin that is smaller (an empty side, with aligned=True) is widened to so many pixels around its middle: the mean is
# then the value there but for a rounding error, and so is the gradient.
SMALLEST_BIN = 0.01


def exact_samples(y: Axis, x: Axis, level: Tensor, image: Tensor) -> list[Samples]:
    """The edges of all bins, [M, bins, 2], in place of positions of samples; RoIs that read like numbers of pixels.

    Reads values, and so synchronises on a GPU.
    """
    everyone = Samples(None, level, image, _edges(y), _edges(x), y.size, x.size, 1, (2, 2))
    if level.is_meta or not len(level):
        return [everyone]
    runs = [_first_and_run(everyone.y, y.size)[1].amax(1), _first_and_run(everyone.x, x.size)[1].amax(1)]
    # Rounded up to powers of two there are few groups; pixels beyond a bin have no weight.
    numbers = (2.0 ** torch.stack(runs, 1).log2().ceil()).long()
    groups, group_of = numbers.unique(dim=0, return_inverse=True)
    samples = []
    for group, taps in enumerate(groups.tolist()):
        rois = torch.where(group_of == group)[0]
        samples.append(replace(everyone.select(rois), rois=rois, taps=(taps[0], taps[1])))
    return samples


def _edges(axis: Axis) -> Tensor:
    """Start and end of each bin, normalised, by theta: [K, bins, 2]."""
    unit = torch.arange(axis.bins + 1, dtype=axis.start.dtype, device=axis.start.device) * (2 / axis.bins) - 1
    edges = axis.scale[:, None] * unit + axis.shift[:, None]
    start, end = edges[:, :-1], edges[:, 1:]
    middle, half = (start + end) / 2, (end - start) / 2
    least = (SMALLEST_BIN / axis.size)[:, None]  # half a bin, in a frame that is 2 wide
    half = torch.where(half.abs() < least, least.copysign(half.detach()), half)
    return torch.stack([middle - half, middle + half], dim=2)


def _pixels(edges: Tensor, size: Tensor) -> Tensor:
    """Edges in pixels, of which number 0 has its centre at 0."""
    return ((edges + 1) * size[:, None, None] - 1) / 2


def _first_and_run(edges: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The first pixel that each bin reads, and how many, [K, bins] both."""
    on_map = torch.minimum(_pixels(edges.detach(), size).clamp(min=0), (size - 1)[:, None, None])
    first, last = on_map.amin(2).floor(), on_map.amax(2).ceil()
    return first, last - first + 1


def hat_weights(edges: Tensor, size: Tensor, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """How much each pixel weighs in the mean over a bin, along one axis.

    Args:
        edges: [M, bins, 2], normalised; not differentiated here.
        size: [M], pixels of each RoI's map.
        taps: pixels that a bin reads, at most.

    Returns:
        The pixels' numbers [M, bins, taps], on the map; their weights; and what those grow by for a step of each
        edge, normalised, [M, bins, taps, 2].
    """
    first, _ = _first_and_run(edges, size)
    numbers = first[..., None] + torch.arange(taps, dtype=edges.dtype, device=edges.device)
    last = (size - 1)[:, None, None]
    pixels = _pixels(edges, size)
    length = pixels[..., 1:] - pixels[..., :1]
    integrals = [_integral(pixels[..., side : side + 1], numbers, last) for side in (0, 1)]
    weight = (integrals[1] - integrals[0]) / length
    values = [_surface(pixels[..., side : side + 1], numbers, last) for side in (0, 1)]
    per_step = size[:, None, None, None] / 2  # pixels in a step of the normalised edge
    slopes = torch.stack([weight - values[0], values[1] - weight], dim=3) / length[..., None] * per_step
    beyond = numbers > last
    index = torch.minimum(numbers, last)
    return index, weight.masked_fill(beyond, 0), slopes.masked_fill(beyond[..., None], 0)


def _surface(at: Tensor, number: Tensor, last: Tensor) -> Tensor:
    """What a pixel weighs in the surface at a place: its hat, replicated one pixel beyond the border, then 0."""
    on_map = torch.minimum(at.clamp(min=0), last)
    # Half-open: on the border the value to the right counts, as in _within.
    return (1 - (on_map - number).abs()).clamp(min=0) * ((at >= -1) & (at < last + 1))


def _integral(to: Tensor, number: Tensor, last: Tensor) -> Tensor:
    """The integral of :func:`_surface` from -1 to a place."""
    before = torch.where(number == 0, _within(to, -1, 0) + 1, 0)
    after = torch.where(number == last, _within(to, last, last + 1) - last, 0)
    return before + _hat_integral(_within(to, 0, last) - number) - _hat_integral(-number) + after


def _hat_integral(to: Tensor) -> Tensor:
    """The integral of the hat ``max(1 - |t|, 0)`` from its beginning."""
    to = _within(to, -1, 1)
    return torch.where(to < 0, (1 + to) ** 2 / 2, 1 - (1 - to) ** 2 / 2)


def _within(at: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``at.clamp(low, high)``, whose slope is 1 from ``low`` on and 0 from ``high`` on.

    Both ends have the slope to the right. Nested clamps would add both slopes on a tie, and ``minimum`` would halve
    them.
    """
    return torch.where(at < low, low, torch.where(at < high, at, high))


def crop_by_matrices(maps: Sequence[Tensor], samples: Sequence[Samples]) -> Tensor:
    """The same as a product of three matrices, rows by map by columns: plain operations, that have all derivatives.

    Every RoI is multiplied with its whole map: slow, and for second derivatives and for comparison.
    """
    crops, order = [], []
    for group in samples:
        everyone = torch.arange(group.level.shape[0], device=group.level.device)
        order.append(everyone if group.rois is None else group.rois)
        out = maps[0].new_zeros(len(everyone), maps[0].shape[1], group.y.shape[1], group.x.shape[1])
        for level, source in enumerate(maps):
            for image in range(source.shape[0]):
                own = torch.where((group.level == level) & (group.image == image))[0]
                if len(own):
                    rows = _matrix(group.y[own], group.height[own], source.shape[2])
                    columns = _matrix(group.x[own], group.width[own], source.shape[3])
                    bins = torch.einsum("kyh,chw,kxw->kcyx", rows, source[image], columns)
                    out = out.index_copy(0, own, bins)
        crops.append(out)
    return torch.cat(crops)[torch.cat(order).argsort()]


def _matrix(edges: Tensor, size: Tensor, pixels: int) -> Tensor:
    """The weights of all pixels of an axis, [M, bins, pixels], differentiable in the edges."""
    numbers = torch.arange(pixels, dtype=edges.dtype, device=edges.device)
    last = (size - 1)[:, None, None]
    start, end = _pixels(edges, size).split(1, dim=2)
    return (_integral(end, numbers, last) - _integral(start, numbers, last)) / (end - start)
