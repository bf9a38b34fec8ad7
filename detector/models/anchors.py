"""Checking a detector's anchors against the objects of a data set."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detector.models.config import DetectorConfig

FITTING_IOU = 0.5  # anchors an octave apart reach it for every square between them
SIZES = [
    tuple(round(first * step**level) for level in range(5))
    for first in (quarters * 2**octave for octave in range(7) for quarters in (4, 5, 6, 7))
    for step in (2, 2**0.5)
]
MIN_RATIO_STEP = 1.5  # factor between suggested aspect ratios
MIN_RATIO_GAIN = 0.05  # fraction of further objects that new aspect ratios must fit
SAMPLE_SIZE = 5000  # objects that the search uses


def best_ious(shapes: Tensor, settings: DetectorConfig) -> Tensor:
    """Return the highest IoU [L] of an anchor with each object when both have the same centre.

    Args:
        shapes: [L, 2], width and height in pixels of the resized image, above 0.
        settings: their ``anchor_sizes`` and ``aspect_ratios`` are used.
    """
    cells = torch.cat(list(settings.anchor_generator().cell_anchors)).to(shapes)  # [15, 4]
    width, height = (cells[:, 2:] - cells[:, :2]).unbind(1)
    best = []
    for chunk in shapes.split(2**14):  # limits the memory
        common = chunk[:, :1].minimum(width) * chunk[:, 1:].minimum(height)  # [L, 15]
        best.append((common / (chunk.prod(1, keepdim=True) + width * height - common)).amax(1))
    return torch.cat(best)


def anchor_advice(shapes: Tensor, images: Tensor, settings: DetectorConfig) -> str | None:
    """Return a message with better anchors if the anchors fit less than half of the objects.

    Args:
        shapes: width and height of the objects, [L, 2] in pixels of the stored image, above 0.
        images: width and height of the image of each, [L, 2] in pixels.
        settings: the anchors, and how images are resized.
    """
    if len(shapes) == 0:
        return None
    shapes, images = shapes.double(), images.double()
    shapes = shapes * (settings.min_size / images.amin(1)).minimum(settings.max_size / images.amax(1))[:, None]
    before = _fitting_share(shapes, settings)
    if before >= 0.5:
        return None
    small, median, large = _quantiles(shapes.prod(1).sqrt(), (0.05, 0.5, 0.95))
    flat, tall = _quantiles(shapes[:, 1] / shapes[:, 0], (0.05, 0.95))
    message = (
        f"{1 - before:.0%} of {len(shapes):,} objects cannot reach an IoU of {FITTING_IOU} with any anchor: resized to "
        f"{settings.min_size} (at most {settings.max_size}) pixels, they are {small:.3g} to {large:.3g} pixels large, "
        f"median {median:.3g}, and {flat:.2g} to {tall:.2g} times as high as wide; anchors have sizes "
        f"{_bracketed(settings.anchor_sizes)} and ratios {_bracketed(settings.aspect_ratios)}"
    )
    better = _better_anchors(shapes[:: -(-len(shapes) // SAMPLE_SIZE)], settings)
    after = _fitting_share(shapes, better)
    if after <= before:
        return f"{message}; no better ones were found: other image sizes may help (min_size, max_size)"
    changed = [name for name in ("anchor_sizes", "aspect_ratios") if getattr(better, name) != getattr(settings, name)]
    flags = " ".join(f'--model.detector.{name} "{_bracketed(getattr(better, name))}"' for name in changed)
    return f"{message}; with {flags} this would be {1 - after:.0%}"


def _better_anchors(shapes: Tensor, settings: DetectorConfig) -> DetectorConfig:
    """Return settings with the sizes that fit the most objects, and with other ratios if they add enough."""

    def best(ratios: tuple[float, float, float]) -> tuple[float, float, DetectorConfig]:
        candidates = [replace(settings, anchor_sizes=sizes, aspect_ratios=ratios) for sizes in SIZES]
        ious = [(best_ious(shapes, candidate), candidate) for candidate in candidates]
        found = [((iou >= FITTING_IOU).double().mean().item(), iou.mean().item(), candidate) for iou, candidate in ious]
        return max(found, key=lambda one: one[:2])

    # The medians of the three thirds of the objects.
    low, middle, high = _quantiles((shapes[:, 1] / shapes[:, 0]).clamp(0.02, 50), (1 / 6, 1 / 2, 5 / 6))
    low, high = min(low, middle / MIN_RATIO_STEP), max(high, middle * MIN_RATIO_STEP)
    same, other = (
        best(settings.aspect_ratios),
        best((float(f"{low:.2g}"), float(f"{middle:.2g}"), float(f"{high:.2g}"))),
    )
    return (other if other[0] > same[0] + MIN_RATIO_GAIN else same)[-1]


def _fitting_share(shapes: Tensor, settings: DetectorConfig) -> float:
    return (best_ious(shapes, settings) >= FITTING_IOU).double().mean().item()


def _quantiles(values: Tensor, places: Sequence[float]) -> list[float]:
    ordered = values.sort().values  # torch.quantile is limited to 16 million values
    return [ordered[round(place * (len(ordered) - 1))].item() for place in places]


def _bracketed(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"
