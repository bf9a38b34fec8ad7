"""What the refinement learns from: true boxes, jittered, and the detector's own, looked at again and again."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from detector.rcnn.bound import bounded_copies
from detector.rcnn.box_gradient import scale_gradient
from detector.refinement.head import CODER, Refinement
from detector.refinement.looking import decoded, paired_iou

BETA = 1 / 9  # below, the box loss is quadratic, as in torchvision's own
NO_COORDINATES = (torch.bool, torch.bfloat16, torch.float16)  # the latter two have steps of whole pixels
STAGE_IOU = 0.1  # by so much more must boxes overlap the truth for each further set of weights


def check_truth(images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse true boxes that nothing can be learned from: what torchvision refuses in training, and what it overlooks.

    Args:
        images: [3, H, W] each.
        targets: of each image ``boxes``, [L, 4] (x1, y1, x2, y2) in pixels.

    Raises:
        TypeError, ValueError: names the image, the field and the value.
    """
    if len(images) == 0 or len(targets) != len(images):
        raise ValueError(
            f"images has {len(images)} entries, targets {len(targets)}: give an image or more, and a target for each"
        )
    usable = []
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        if image.dim() != 3:
            raise ValueError(f"images[{number}] must be [3, H, W], got {list(image.shape)}")
        field = f"targets[{number}]['boxes']"
        if "boxes" not in target:
            raise ValueError(f"{field} is missing: where there is no object it is torch.zeros(0, 4)")
        boxes = target["boxes"]
        if not isinstance(boxes, Tensor):
            raise TypeError(f"{field} must be a tensor, got {type(boxes).__name__}")
        if boxes.is_complex() or boxes.dtype in NO_COORDINATES:
            raise TypeError(f"{field} must be float32, float64 or integers, got {boxes.dtype}: call .float()")
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{field} must be [L, 4], got {list(boxes.shape)}")
        usable.append(_is_usable(boxes, *image.shape[-2:]))
    if not torch.cat(usable).all():  # the one wait for the device
        number = next(n for n, of_image in enumerate(usable) if not of_image.all())
        row = int((~usable[number]).nonzero()[0])
        box, (height, width) = targets[number]["boxes"][row].tolist(), images[number].shape[-2:]
        raise ValueError(f"targets[{number}]['boxes'][{row}] is {box}: {_fault(box, height, width)}")


def _is_usable(boxes: Tensor, height: int, width: int) -> Tensor:
    """[L]: whether boxes [L, 4] are finite, have a width and a height, and overlap the image."""
    x1, y1, x2, y2 = boxes.unbind(1)
    within = (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)
    return boxes.isfinite().all(dim=1) & (x1 < x2) & (y1 < y2) & within


def _fault(box: list[float], height: int, width: int) -> str:
    """What is wrong with a box that is not usable."""
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)):
        return "it must be finite"
    if x1 >= x2 or y1 >= y2:
        return "it has no width or no height; boxes are (x1, y1, x2, y2), not (x, y, width, height)"
    return f"it lies outside its image, which is {width} pixels wide and {height} high"


def unrolled_losses(
    refinement: Refinement,
    features: dict[str, Tensor],
    boxes: Sequence[Tensor],
    truth: Sequence[Tensor],
    image_shapes: list[tuple[int, int]],
) -> dict[str, Tensor]:
    """The losses of all looks, from boxes that belong to known objects.

    Args:
        boxes: [L, 4] (x1, y1, x2, y2) in pixels of the resized images; a gradient goes into those that have one.
        truth: [L, 4], the true box of each.

    Returns:
        ``loss_refinement_box`` and ``loss_refinement_fit``, each the mean over boxes and coordinates, summed over the
        looks; zeros that stay in the graph where there are no boxes.
    """
    config = refinement.config
    settings = config.box_gradient
    target = torch.cat(list(truth))
    current = list(boxes)
    box_losses, fit_losses = [], []
    for look in range(config.train_looks):
        at_crop = [scale_gradient(b, settings.crop) for b in current]
        deltas, fit = refinement.stage(look)(refinement.pool(features, at_crop, image_shapes))
        constant = torch.cat(current).detach()
        iou = paired_iou(constant, target)
        counts = iou >= min(config.min_iou + STAGE_IOU * min(look, config.stages - 1), 0.9)
        if settings.enabled:
            deltas, onward = bounded_copies(deltas, settings.bound)
        else:
            onward = deltas.detach()
        wanted = CODER.encode_single(target, scale_gradient(torch.cat(current), settings.coder_scale))
        apart = F.smooth_l1_loss(deltas, wanted, beta=BETA, reduction="none").sum(1)
        box_losses.append((apart * counts).sum() / max(4 * len(apart), 1))
        fit_losses.append(F.binary_cross_entropy_with_logits(fit, iou, reduction="sum") / max(len(fit), 1))
        current = decoded(onward, current if settings.enabled else [b.detach() for b in current], image_shapes)
        current = [torch.where(_has_size(b), b, old.detach()) for b, old in zip(current, at_crop)]
    return {"loss_refinement_box": torch.stack(box_losses).sum(), "loss_refinement_fit": torch.stack(fit_losses).sum()}


def boxes_to_learn_from(
    candidates: Sequence[Tensor], truth: Sequence[Tensor], image_shapes: list[tuple[int, int]], refinement: Refinement
) -> tuple[list[Tensor], list[Tensor]]:
    """Draw boxes that belong to objects: jittered copies of the truth, and those of some candidates that overlap it.

    Args:
        candidates: [L, 4] of each image: the detector's own boxes.
        truth: [G, 4] of each image.

    Returns:
        Boxes [M, 4] of each image, and the true box of each, [M, 4].
    """
    config = refinement.config
    boxes, of_boxes = [], []
    for own, true, shape in zip(candidates, truth, image_shapes, strict=True):
        true = true.to(own.dtype)
        copies = true.repeat(config.boxes_per_object, 1)
        drawn = clip_boxes_to_image(jittered(copies, config.jitter), shape)
        found, matched = drawn.new_zeros(0, 4), drawn.new_zeros(0, 4)
        if len(true) and len(own):
            iou, match = box_iou(own.detach(), true).max(dim=1)
            near = (iou >= config.min_iou) & (iou > 0)  # without overlap there may be no size, and no way to the truth
            found, matched = own[near], true[match[near]]
        iou = paired_iou(drawn, copies)
        right = (iou >= config.min_iou) & (iou > 0)
        drawn, copies = torch.cat([drawn[right], found]), torch.cat([copies[right], matched])
        kept = torch.randperm(len(drawn), device=drawn.device)[: config.train_boxes]
        boxes.append(drawn[kept])
        of_boxes.append(copies[kept])
    return boxes, of_boxes


def jittered(boxes: Tensor, jitter: float) -> Tensor:
    """Boxes [L, 4] off by a random share of their size, each by another: from hardly to ``jitter`` and more."""
    size = boxes[:, 2:] - boxes[:, :2]
    by = torch.randn_like(boxes) * torch.rand_like(boxes[:, :1]) * jitter
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + by[:, :2] * size
    half = size * by[:, 2:].exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


def _has_size(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1, keepdim=True)
