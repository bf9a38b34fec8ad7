"""What happens to a detector's boxes at test time: those that matter are looked at again, climb, and are ranked."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from detector.refinement.climbing import climb
from detector.refinement.head import Refinement
from detector.refinement.looking import look_again


def refine(
    refinement: Refinement,
    features: dict[str, Tensor],
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    labels: Sequence[Tensor],
    image_shapes: list[tuple[int, int]],
    *,
    nms_threshold: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Refine detections, those of all images at once.

    Args:
        features: the detector's maps.
        boxes: [L, 4] of each image, (x1, y1, x2, y2) in pixels of the resized images, the best first.
        scores: [L] of each image.
        labels: [L] of each image.
        image_shapes: (height, width) of the resized images.
        nms_threshold: the detector's own, for ``fit_nms``.

    Returns:
        Boxes, scores and labels of each image, the best first. Without ``fit_power`` and ``fit_nms`` order and number
        are as they were; with ``fit_power`` the scores of those that were looked at again are weighted, and the others
        keep their full score beside them; with ``fit_nms`` there may be fewer.
    """
    config = refinement.config
    # Slices of what is sorted, not a mask: so the rest follows without being put in order again.
    counts = [(s >= refinement.score_threshold).sum().clamp(max=config.boxes_per_image) for s in scores]
    few = [b[:count] for b, count in zip(boxes, counts)]
    moved, fit = look_again(refinement, features, few, image_shapes, looks=config.looks)
    if config.climbs and not torch.jit.is_tracing() and sum(len(b) for b in moved):
        moved, fit = _climbed(refinement, features, moved, image_shapes)
    # Of a graph, len() would be a constant.
    refined = [torch.cat([m, b[m.shape[0] :]]) for m, b in zip(moved, boxes)]
    if not (config.fit_power or config.fit_nms):
        return refined, list(scores), list(labels)
    scores = [torch.cat([s[: f.shape[0]] * f**config.fit_power, s[f.shape[0] :]]) for s, f in zip(scores, fit)]
    fit = [torch.cat([f, torch.zeros_like(s[f.shape[0] :])]) for s, f in zip(scores, fit)]
    ranked = []
    for b, s, la, f in zip(refined, scores, labels, fit):
        if config.fit_nms and len(b):
            kept = batched_nms(b, f, la, nms_threshold)
            # The best fitting box of a group stands for it, with the group's best score (Jiang et al., section 3.2).
            groups = (box_iou(b[kept], b) > nms_threshold) & (la[kept][:, None] == la)
            groups[torch.arange(len(kept)), kept] = True
            b, s, la = b[kept], torch.where(groups, s, 0).amax(dim=1), la[kept]
        # The exporter to ONNX has no stable sort; onnxruntime's TopK is one.
        order = s.sort(descending=True)[1] if torch.jit.is_tracing() else s.argsort(descending=True, stable=True)
        ranked.append((b[order], s[order], la[order]))
    return [r[0] for r in ranked], [r[1] for r in ranked], [r[2] for r in ranked]


def _climbed(
    refinement: Refinement, features: dict[str, Tensor], boxes: Sequence[Tensor], image_shapes: list[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The boxes of each image after their climb, and the fit of each."""
    config = refinement.config
    counts = [len(b) for b in boxes]
    # Tensors of inference mode cannot be differentiated through; a copy of them can.
    with torch.inference_mode(False), torch.no_grad():
        maps = {name: m.clone() if m.is_inference() else m.detach() for name, m in features.items()}
        start = torch.cat(list(boxes)).clone()

        def clipped(together: Tensor) -> list[Tensor]:
            return [clip_boxes_to_image(b, shape) for b, shape in zip(together.split(counts), image_shapes)]

        def fit_of(together: Tensor) -> Tensor:
            crops = refinement.pool(maps, clipped(together), image_shapes)
            return refinement.stage(config.looks)(crops)[1].sigmoid()

        moved, fit = climb(fit_of, start, steps=config.climbs, step_size=config.step_size)
    return clipped(moved), list(fit.split(counts))
