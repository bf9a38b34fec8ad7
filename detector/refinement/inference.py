"""Test-time refinement: refinement iterations, gradient ascent on the predicted IoU, and rescoring."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from detector.rcnn.forward import Detections, Features, Sizes
from detector.refinement.boxes import decode, move, paired_iou
from detector.refinement.head import Refinement

STEP_SIZE = 0.8  # fraction of the predicted deltas that an iteration applies
MIN_IOU = 0.7  # with the detection; an iteration that would move a box further away has no effect
ASCENT_STEP_SIZE = 0.1  # times the gradient, in units of the box's sides
MAX_ASCENT_STEP = 0.05  # in units of the box's sides
BACKTRACKING = 0.5  # factor of the step size after a step without improvement
MIN_ASCENT_STEP_SIZE = 0.1 * ASCENT_STEP_SIZE  # at which a box has converged


def refine_detections(
    refinement: Refinement, features: Features, detections: Detections, image_sizes: Sizes
) -> Detections:
    """Refine and rescore the detections of all images at once.

    Args:
        refinement: The refinement of the detector.
        features: Maps [N, C, H, W] by the name of the level.
        detections: ``boxes`` [L, 4], ``labels`` [L] and ``scores`` [L] per image, highest score first.
        image_sizes: (height, width) of the resized images.

    Returns:
        As many detections, highest score first. Boxes below the score threshold or beyond ``boxes_per_image`` keep
        their coordinates and scores.
    """
    config = refinement.config
    # Slices of the sorted detections instead of a mask: the remaining ones stay in order.
    selected = [one["scores"] >= refinement.score_threshold for one in detections]
    counts = [mask.sum().clamp(max=config.boxes_per_image) for mask in selected]
    boxes = [one["boxes"][:count] for one, count in zip(detections, counts)]
    boxes, ious = iterate(refinement, features, boxes, image_sizes)
    if config.ascent_steps and not torch.jit.is_tracing() and any(map(len, boxes)):
        boxes, ious = _ascend_in_images(refinement, features, boxes, image_sizes)
    return [_rescored(*one, config.iou_power) for one in zip(detections, boxes, ious)]


def _rescored(detections: dict[str, Tensor], boxes: Tensor, ious: Tensor, power: float) -> dict[str, Tensor]:
    count = boxes.shape[0]  # len() would be baked into a traced graph
    boxes, scores, labels = torch.cat([boxes, detections["boxes"][count:]]), detections["scores"], detections["labels"]
    if power:
        scores = torch.cat([scores[:count] * ious**power, scores[count:]])
        # The ONNX exporter has no stable sort, but onnxruntime's TopK is stable.
        tracing = torch.jit.is_tracing()
        order = scores.sort(descending=True)[1] if tracing else scores.argsort(descending=True, stable=True)
        boxes, scores, labels = boxes[order], scores[order], labels[order]
    return {"boxes": boxes, "labels": labels, "scores": scores}


def iterate(
    refinement: Refinement, features: Features, boxes: list[Tensor], image_sizes: Sizes
) -> tuple[list[Tensor], list[Tensor]]:
    """Move boxes [L, 4] per image by the predicted deltas, as long as their predicted IoU does not fall.

    Returns:
        The boxes [L, 4] per image, clipped to it, and their predicted IoU [L], 0 to 1.
    """
    counts = [b.shape[0] for b in boxes]
    start = best = torch.cat(boxes)
    deltas, logits = refinement(features, boxes, image_sizes)
    ious = logits.sigmoid()
    for _ in range(refinement.config.iterations):
        steps = STEP_SIZE * deltas.nan_to_num()  # the crop raises for boxes that are not finite
        candidates = decode(steps, best.split(counts), image_sizes)
        new_deltas, new_logits = refinement(features, candidates, image_sizes)
        moved, new_ious = torch.cat(candidates), new_logits.sigmoid()
        better = (new_ious >= ious) & (paired_iou(moved, start) >= MIN_IOU)  # false for NaN
        best = torch.where(better[:, None], moved, best)
        deltas = torch.where(better[:, None], new_deltas, deltas)
        ious = torch.where(better, new_ious, ious)
    return list(best.split(counts)), list(ious.split(counts))


def _ascend_in_images(
    refinement: Refinement, features: Features, boxes: list[Tensor], image_sizes: Sizes
) -> tuple[list[Tensor], list[Tensor]]:
    counts = [len(b) for b in boxes]

    def clipped(together: Tensor) -> list[Tensor]:
        return [clip_boxes_to_image(b, size) for b, size in zip(together.split(counts), image_sizes)]

    # Inference tensors cannot be saved for backward, but their copies can.
    with torch.inference_mode(False), torch.no_grad():
        maps = {name: m.clone() if m.is_inference() else m.detach() for name, m in features.items()}
        moved, ious = ascend(
            lambda together: refinement(maps, clipped(together), image_sizes)[1].sigmoid(),
            torch.cat(boxes).clone(),
            refinement.config.ascent_steps,
        )
    return clipped(moved), list(ious.split(counts))


def ascend(score_of: Callable[[Tensor], Tensor], boxes: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Move boxes uphill by gradient ascent with backtracking, all boxes at once.

    A step moves the centre and the logarithm of the size by the gradient times the step size, in units of the box's
    sides. A box whose score does not rise stays, and tries a shorter step next.

    Args:
        score_of: A differentiable function from boxes [K, 4] to scores [K], each of its own box alone.
        boxes: [K, 4], float32 or better.
        steps: Maximum number of steps, one call of ``score_of`` each.

    Returns:
        Detached boxes [K, 4] and their scores [K], none lower than before.
    """
    best = boxes.detach()
    score, gradient = _score_and_gradient(score_of, best)
    step_size = torch.full_like(score, ASCENT_STEP_SIZE)
    for _ in range(steps):
        if not bool((step_size >= MIN_ASCENT_STEP_SIZE).any()):
            break
        step = (step_size[:, None] * gradient).nan_to_num().clamp(-MAX_ASCENT_STEP, MAX_ASCENT_STEP)
        candidates = move(best, step)
        new_score, new_gradient = _score_and_gradient(score_of, candidates)
        better = new_score > score  # false for NaN
        best = torch.where(better[:, None], candidates, best)
        gradient = torch.where(better[:, None], new_gradient, gradient)
        score = torch.where(better, new_score, score)
        step_size = torch.where(better, step_size, step_size * BACKTRACKING)
    return best, score


def _score_and_gradient(score_of: Callable[[Tensor], Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        offsets = torch.zeros_like(boxes, requires_grad=True)
        score = score_of(move(boxes, offsets))
        (gradient,) = torch.autograd.grad(score.sum(), offsets)  # leaves the weights without gradients
    return score.detach(), gradient
