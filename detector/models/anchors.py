"""Whether a detector's anchors fit the objects of a data set, and which would."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detector.models.config import DetectorConfig

# The IoU from which an anchor fits an object: sizes an octave apart reach it for any object between them.
FITS = 0.5
SIZES = [
    tuple(round(first * step**level) for level in range(5))
    for first in (quarters * 2**octave for octave in range(7) for quarters in (4, 5, 6, 7))
    for step in (2, 2**0.5)
]
WIDER = 1.5  # the least factor from a suggested ratio to the next
WORTH = 0.05  # the share of the objects that must come to fit by other ratios, or one flag more is not worth it
SAMPLE = 5000  # objects that anchors are looked for with; those found are judged by all


def overlaps(shapes: Tensor, settings: DetectorConfig) -> Tensor:
    """The best IoU that any anchor can have with each object: both centred on one point.

    Args:
        shapes: [L, 2], width and height in pixels of the image as resized, above 0.
        settings: has ``anchor_sizes`` and ``aspect_ratios``.

    Returns:
        [L], 0 to 1.
    """
    cells = torch.cat(list(settings.anchor_generator().cell_anchors)).to(shapes)  # [15, 4]
    width, height = (cells[:, 2:] - cells[:, :2]).unbind(1)
    best = []
    for some in shapes.split(2**14):  # COCO's 860,000 at once would take 100 MB a tensor
        common = some[:, :1].minimum(width) * some[:, 1:].minimum(height)  # [L, 15]
        best.append((common / (some.prod(1, keepdim=True) + width * height - common)).amax(1))
    return torch.cat(best)


def anchor_advice(shapes: Tensor, images: Tensor, settings: DetectorConfig) -> str | None:
    """A sentence about anchors that most objects lie outside of, with the flags of anchors that fit more.

    An object lies outside the anchors where the IoU with none of them can be half, wherever they are put.

    Args:
        shapes: width and height of the objects, [L, 2] in pixels of the image as stored, above 0.
        images: width and height of each one's image, [L, 2] in pixels.
        settings: how images are resized, and the anchors.

    Returns:
        ``None`` where at least half of the objects fit, or there are none.
    """
    if len(shapes) == 0:
        return None
    shapes, images = shapes.double(), images.double()
    scale = (settings.min_size / images.amin(1)).minimum(settings.max_size / images.amax(1))
    shapes = shapes * scale[:, None]
    before = _share(shapes, settings)
    if before >= 0.5:
        return None
    small, median, large = _quantiles(shapes.prod(1).sqrt(), (0.05, 0.5, 0.95))
    flat, tall = _quantiles(shapes[:, 1] / shapes[:, 0], (0.05, 0.95))
    said = (
        f"{1 - before:.0%} of {len(shapes):,} objects lie outside the anchors, with none of which their IoU can be "
        f"{FITS}: resized to {settings.min_size} (at most {settings.max_size}) pixels, they are {small:.3g} to "
        f"{large:.3g} pixels large, median {median:.3g}, and {flat:.2g} to {tall:.2g} times as high as wide; anchors "
        f"have sizes {_plain(settings.anchor_sizes)} and ratios {_plain(settings.aspect_ratios)}"
    )
    fitting = _fitting(shapes[:: -(-len(shapes) // SAMPLE)], settings)
    after = _share(shapes, fitting)
    if after <= before:
        return f"{said}; none that fit more were found: other sizes of the images may help (min_size, max_size)"
    flags = f'--model.detector.anchor_sizes "{_plain(fitting.anchor_sizes)}"'
    if fitting.aspect_ratios != settings.aspect_ratios:
        flags += f' --model.detector.aspect_ratios "{_plain(fitting.aspect_ratios)}"'
    return f"{said}; {flags} would leave {1 - after:.0%} outside"


def _fitting(shapes: Tensor, settings: DetectorConfig) -> DetectorConfig:
    """The settings with other sizes, and other ratios if they are worth it: the most objects fit, and fit best."""

    def best(ratios: tuple[float, float, float]) -> tuple[float, float, DetectorConfig]:
        found = []
        for sizes in SIZES:
            candidate = replace(settings, anchor_sizes=sizes, aspect_ratios=ratios)
            reached = overlaps(shapes, candidate)
            found.append(((reached >= FITS).double().mean().item(), reached.mean().item(), candidate))
        return max(found, key=lambda one: one[:2])

    same, other = best(settings.aspect_ratios), best(_ratios(shapes))
    return (other if other[0] > same[0] + WORTH else same)[-1]


def _ratios(shapes: Tensor) -> tuple[float, float, float]:
    """Three ratios for as many thirds of the objects: each third's median."""
    low, middle, high = _quantiles((shapes[:, 1] / shapes[:, 0]).clamp(0.02, 50), (1 / 6, 1 / 2, 5 / 6))
    low, high = min(low, middle / WIDER), max(high, middle * WIDER)
    return float(f"{low:.2g}"), float(f"{middle:.2g}"), float(f"{high:.2g}")


def _share(shapes: Tensor, settings: DetectorConfig) -> float:
    return (overlaps(shapes, settings) >= FITS).double().mean().item()


def _quantiles(values: Tensor, places: Sequence[float]) -> list[float]:
    # Not torch.quantile, which takes no more than 16 million values.
    ordered = values.sort().values
    return [ordered[round(place * (len(ordered) - 1))].item() for place in places]


def _plain(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"
