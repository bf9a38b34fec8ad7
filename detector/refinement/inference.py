"""Test-time refinement: refinement iterations, gradient ascent on the predicted IoU, rescoring, and NMS."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from detector.rcnn.forward import Boxes, Features, Found, Sizes
from detector.refinement.boxes import decode, move
from detector.refinement.head import Refinement

ASCENT_STEP_SIZE = 0.1  # times the gradient, in units of the box's sides
MAX_ASCENT_STEP = 0.05  # in units of the box's sides
BACKTRACKING = 0.5  # factor of the step size after a step without improvement
MIN_ASCENT_STEP_SIZE = 0.1 * ASCENT_STEP_SIZE  # at which a box has converged


def refine_detections(
    refinement: Refinement,
    features: Features,
    found: Found,
    image_sizes: Sizes,
    *,
    classify: Callable[[Tensor], Tensor] | None = None,
    nms_thresh: float | None = None,
) -> Found:
    """Refine and rescore the detections of all images at once.

    The new score is ``sqrt(score * again) * iou ** iou_power``, where ``again`` is the score that ``classify`` gives
    the last crop of the iterations. That crop fits the object better than the proposal that gave ``score``. With
    ``iou_power`` 0 the scores stay. New scores may be below the detector's score threshold, which selects before.

    Args:
        refinement: The refinement.
        features: Maps [N, C, H, W] by level.
        found: Detections per image, highest score first.
        image_sizes: (height, width) of each resized image.
        classify: The detector's box head, from crops [K, C, h, w] to the logits of a softmax [K, classes], the
            background first, in float32 or better. Default: scores are weighted by the predicted IoU alone.
        nms_thresh: IoU above which NMS removes the lower-scoring of two detections of a class. Default: no NMS.
    """
    config, (boxes, scores, labels) = refinement.config, found
    boxes, ious, crops = iterate(refinement, features, boxes, image_sizes)
    if config.ascent_steps and not torch.jit.is_tracing() and any(map(len, boxes)):
        boxes, ious = _ascended(refinement, features, boxes, image_sizes)
    if config.iou_power:
        if classify is not None:
            again = classify(crops).softmax(1).gather(1, torch.cat(labels)[:, None])[:, 0]
            by_image = again.split([b.shape[0] for b in boxes])  # len() would be baked into a traced graph
            scores = [(old * new).sqrt() for old, new in zip(scores, by_image)]
        scores = [score * iou**config.iou_power for score, iou in zip(scores, ious)]
    orders = []
    for one, score, label in zip(boxes, scores, labels):
        if nms_thresh is not None:  # boxes may have moved onto the same object
            dtype = torch.promote_types(one.dtype, score.dtype)  # they differ under autocast
            orders.append(batched_nms(one.to(dtype), score.to(dtype), label, nms_thresh))  # by descending score
        else:
            orders.append(score.sort(descending=True, stable=True)[1])

    def ordered(values: list[Tensor]) -> list[Tensor]:
        return [of_image[order] for of_image, order in zip(values, orders)]

    return ordered(boxes), ordered(scores), ordered(labels)


def _ascended(
    refinement: Refinement, features: Features, boxes: Boxes, image_sizes: Sizes
) -> tuple[Boxes, list[Tensor]]:
    """Move boxes [L, 4] per image by gradient ascent on their predicted IoU. Returns them and their predicted IoU."""
    lengths = [len(b) for b in boxes]

    def clipped(moved: Tensor) -> Boxes:
        return [clip_boxes_to_image(b, size) for b, size in zip(moved.split(lengths), image_sizes)]

    # Inference tensors cannot be saved for backward, but their copies can.
    with torch.inference_mode(False), torch.no_grad():
        maps = {name: m.clone() if m.is_inference() else m.detach() for name, m in features.items()}
        moved, predicted = ascend(
            lambda moved: refinement(maps, clipped(moved), image_sizes)[1].sigmoid(),
            torch.cat(boxes).clone(),
            refinement.config.ascent_steps,
        )
    return clipped(moved), list(predicted.split(lengths))


def iterate(
    refinement: Refinement, features: Features, boxes: Boxes, image_sizes: Sizes
) -> tuple[Boxes, list[Tensor], Tensor]:
    """Move boxes [L, 4] per image by the predicted deltas, iteration by iteration, as in training.

    Returns:
        The boxes [L, 4] per image, clipped to it; the IoU [L], 0 to 1, that the last crop predicts; and the last crops
        [K, C, h, w] of all images, which are those before the last move.
    """
    iterations = refinement.config.iterations
    for _ in range(max(iterations, 1)):
        crops = refinement.pool(features, boxes, image_sizes)
        deltas, logits = refinement.head(crops)
        if iterations:
            boxes = decode(deltas, boxes, image_sizes)
    return boxes, list(logits.sigmoid().split([b.shape[0] for b in boxes])), crops


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
