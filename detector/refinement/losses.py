"""Training of the refinement: its boxes, and the losses of its unrolled iterations."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from detector.rcnn.box_gradient import bounded_copies, scale_gradient
from detector.rcnn.forward import Boxes, Features, Losses, Sizes
from detector.refinement.boxes import decode, encode, move, paired_iou
from detector.refinement.head import Refinement

BETA = 1 / 9  # of the smooth L1 loss, as in torchvision
MIN_TRAINING_IOU = 0.5  # of a box and its object, for it to be a training box and to have a box loss
BOXES_PER_OBJECT = 8  # jittered copies of each ground-truth box
JITTER = 0.25  # maximum standard deviation, in units of the box's sides
BOXES_PER_IMAGE = 64
REFUSED_DTYPES = (torch.bool, torch.bfloat16, torch.float16)  # 16-bit floats cannot hold pixel coordinates


def unrolled_losses(refinement: Refinement, features: Features, boxes: Boxes, truth: Boxes, sizes: Sizes) -> Losses:
    """Return the losses of all iterations, summed. Each is a mean over the boxes of the batch.

    Args:
        refinement: the refinement.
        features: maps [N, C, H, W] by level.
        boxes: [L, 4] per image, in pixels of the resized image.
        truth: the object of each box, likewise. The box loss of a box whose IoU with it is below 0.5 is 0.
        sizes: (height, width) of each resized image.
    """
    settings = refinement.config.box_gradient
    target = torch.cat(truth)
    count = max(len(target), 1)
    current = boxes
    box_losses, iou_losses = [], []
    for remaining in reversed(range(refinement.config.train_iterations)):
        deltas, predicted_iou = refinement(features, [scale_gradient(b, settings.crop) for b in current], sizes)
        all_boxes = torch.cat(current)
        iou = paired_iou(all_boxes.detach(), target)
        bounded = bounded_copies(deltas, settings.bound) if settings.enabled else (deltas, deltas.detach())
        target_deltas = encode(target, scale_gradient(all_boxes, settings.coder_scale))
        errors = F.smooth_l1_loss(bounded[0], target_deltas, beta=BETA, reduction="none").sum(1)
        box_losses.append((errors * (iou >= MIN_TRAINING_IOU)).sum() / (4 * count))
        iou_losses.append(F.binary_cross_entropy_with_logits(predicted_iou, iou, reduction="sum") / count)
        if remaining:
            current = decode(bounded[1], current if settings.enabled else [b.detach() for b in current], sizes)
    return {"loss_refinement_box": torch.stack(box_losses).sum(), "loss_refinement_iou": torch.stack(iou_losses).sum()}


def sample_training_boxes(candidates: Boxes, truth: Boxes, image_sizes: Sizes) -> tuple[Boxes, Boxes]:
    """Sample jittered ground truth and candidates that overlap an object. Return boxes and the ground truth of each."""
    boxes, matched = [], []
    for own, true, size in zip(candidates, truth, image_sizes, strict=True):
        true = true.to(own.dtype)
        copies = true.repeat(BOXES_PER_OBJECT, 1)
        # Each copy has its own standard deviation, between 0 and the maximum.
        offsets = torch.randn_like(copies) * torch.rand_like(copies[:, :1]) * JITTER
        all_boxes, targets = clip_boxes_to_image(move(copies, offsets), size), copies
        overlap = paired_iou(all_boxes, copies)
        if len(true) and len(own):
            own_overlap, match = box_iou(own, true).max(dim=1)
            all_boxes, targets = torch.cat([all_boxes, own]), torch.cat([copies, true[match]])
            overlap = torch.cat([overlap, own_overlap])
        near = torch.where(overlap >= MIN_TRAINING_IOU)[0]  # the only synchronization with the device
        sampled = near[torch.randperm(len(near), device=near.device)[:BOXES_PER_IMAGE]]
        boxes.append(all_boxes[sampled])
        matched.append(targets[sampled])
    return boxes, matched


def check_truth(images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Check the ground-truth boxes [L, 4] of images [3, H, W]. Errors name the image, the field and the value."""
    if len(images) == 0 or len(targets) != len(images):
        raise ValueError(f"images and targets must have one length, at least 1, got {len(images)} and {len(targets)}")
    valid = []
    for number, (image, target) in enumerate(zip(images, targets)):
        if image.dim() != 3:
            raise ValueError(f"images[{number}] must be [3, H, W], got {list(image.shape)}")
        field, boxes = f"targets[{number}]['boxes']", target.get("boxes")
        if not isinstance(boxes, Tensor) or boxes.is_complex() or boxes.dtype in REFUSED_DTYPES:
            got = getattr(boxes, "dtype", type(boxes).__name__)
            raise TypeError(f"{field} must be a tensor of float32, float64 or integers, got {got}")
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{field} must be [L, 4], torch.zeros(0, 4) without objects, got {list(boxes.shape)}")
        x1, y1, x2, y2 = boxes.unbind(1)
        inside = (x1 < image.shape[-1]) & (y1 < image.shape[-2]) & (x2 > 0) & (y2 > 0)
        valid.append(boxes.isfinite().all(dim=1) & (x1 < x2) & (y1 < y2) & inside)
    if not torch.cat(valid).all():  # the only synchronization with the device
        number = next(n for n, of_image in enumerate(valid) if not of_image.all())
        row, (height, width) = int((~valid[number]).nonzero()[0]), images[number].shape[-2:]
        rule = f"finite (x1, y1, x2, y2) with x1 < x2 and y1 < y2 that overlap the image of {width} x {height} pixels"
        box = targets[number]["boxes"][row].tolist()
        raise ValueError(f"targets[{number}]['boxes'][{row}] must be {rule}, got {box}")
