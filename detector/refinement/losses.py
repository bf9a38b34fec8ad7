"""What the refinement learns from: true boxes, jittered, and the detector's own, looked at again and again."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from detector.rcnn.bound import bounded_copies
from detector.rcnn.box_gradient import scale_gradient
from detector.refinement.head import CODER, Refinement
from detector.refinement.looking import decoded, paired_iou

BETA = 1 / 9  # below, the box loss is quadratic, as in torchvision's own
STAGE_IOU = 0.1  # by so much more must boxes overlap the truth for each further set of weights


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
