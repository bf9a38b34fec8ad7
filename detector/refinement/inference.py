"""Test-time refinement: refinement iterations, gradient ascent on the predicted IoU, and rescoring."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from detector.rcnn.forward import Boxes, Features, Found, Sizes
from detector.refinement.boxes import decode, move
from detector.refinement.head import Refinement

ASCENT_STEP_SIZE = 0.1  # times the gradient, in units of the box's sides
MAX_ASCENT_STEP = 0.05  # in units of the box's sides
BACKTRACKING = 0.5  # factor of the step size after a step without improvement
MIN_ASCENT_STEP_SIZE = 0.1 * ASCENT_STEP_SIZE  # at which a box has converged


def refine_detections(refinement: Refinement, features: Features, found: Found, image_sizes: Sizes) -> Found:
    """Refine and rescore the detections of all images at once.

    Boxes below the score threshold or beyond ``boxes_per_image`` keep their coordinates and scores.
    """
    config = refinement.config
    # Slices of the sorted detections instead of a mask: the remaining ones stay in order.
    counts: Any = [(s >= refinement.score_threshold).sum().clamp(max=config.boxes_per_image) for s in found[1]]
    if not torch.jit.is_tracing():
        counts = torch.stack(counts).tolist()  # one synchronization with the device for all images
    boxes, ious = iterate(refinement, features, [b[:count] for b, count in zip(found[0], counts)], image_sizes)
    if config.ascent_steps and not torch.jit.is_tracing() and any(map(len, boxes)):
        lengths = [len(b) for b in boxes]

        def clipped(moved: Tensor) -> Boxes:
            return [clip_boxes_to_image(b, size) for b, size in zip(moved.split(lengths), image_sizes)]

        # Inference tensors cannot be saved for backward, but their copies can.
        with torch.inference_mode(False), torch.no_grad():
            maps = {name: m.clone() if m.is_inference() else m.detach() for name, m in features.items()}
            moved, predicted = ascend(
                lambda moved: refinement(maps, clipped(moved), image_sizes)[1].sigmoid(),
                torch.cat(boxes).clone(),
                config.ascent_steps,
            )
        boxes, ious = clipped(moved), list(predicted.split(lengths))
    refined = []
    for refined_boxes, iou, old_boxes, scores, labels in zip(boxes, ious, *found):
        count = refined_boxes.shape[0]  # len() would be baked into a traced graph
        one = [torch.cat([refined_boxes, old_boxes[count:]]), scores, labels]
        if config.iou_power:
            one[1] = torch.cat([scores[:count] * iou**config.iou_power, scores[count:]])
            # The ONNX exporter has no stable sort, but onnxruntime's TopK is stable.
            order = one[1].sort(descending=True, **({} if torch.jit.is_tracing() else {"stable": True}))[1]
            one = [values[order] for values in one]
        refined.append(one)
    all_boxes, all_scores, all_labels = map(list, zip(*refined))
    return all_boxes, all_scores, all_labels


def iterate(refinement: Refinement, features: Features, boxes: Boxes, image_sizes: Sizes) -> tuple[Boxes, list[Tensor]]:
    """Move boxes [L, 4] per image by the predicted deltas, iteration by iteration, as in training.

    Returns:
        The boxes [L, 4] per image, clipped to it, and the IoU [L], 0 to 1, that the last crop predicts: the crop at the
        box before the last move. One more crop, at the moved box, would not rank better.
    """
    iterations = refinement.config.iterations
    for _ in range(max(iterations, 1)):
        deltas, logits = refinement(features, boxes, image_sizes)
        if iterations:
            boxes = decode(deltas, boxes, image_sizes)
    return boxes, list(logits.sigmoid().split([b.shape[0] for b in boxes]))


def ascend(score_of: Callable[[Tensor], Tensor], boxes: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Move boxes uphill by gradient ascent with backtracking, all boxes at once.

    A step moves the centre and the logarithm of the size by the gradient times the step size, in units of the box's
    sides. A box whose score does not rise stays, and tries a shorter step next.

    Returns:
        Detached boxes [K, 4] and their scores [K]. No score is lower than before.
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
