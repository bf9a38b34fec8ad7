"""Which settings refine a detector's boxes best, told on images that its refinement did not learn from."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from detector.data.batches import ScoringBatches
from detector.data.categories import match_categories
from detector.data.dataset import CocoDetection, as_float
from detector.data.loading import make_loader
from detector.data.results import Result, to_results
from detector.errors import ModelError
from detector.evaluation.metric import evaluate
from detector.evaluation.truth import coco_of
from detector.overriding import overridden
from detector.pretrained.detector import Detector
from detector.refinement.config import RefinementConfig
from detector.refinement.refining import refine
from detector.refinement.seen import finding_boxes_alone

CHANCE = 0.005  # of AP: on some dozens of images settings that are alike lie so far apart


@torch.no_grad()
def score_refinements(
    detector: Detector,
    data: CocoDetection,
    candidates: Sequence[RefinementConfig],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    workers: int = 2,
) -> list[dict[str, float]]:
    """Score a refined detector with several settings on a data set; backbone, RPN and head run once an image.

    Args:
        detector: with a refinement, on ``device``; its settings stay.
        data: without a transform.
        candidates: the settings, of as many stages as the refinement has.
        device: where the detector is.
        batch_size: images at a time.
        workers: processes that read images.

    Returns:
        The scores of each candidate, see :func:`~detector.evaluation.evaluate`.

    Raises:
        ModelError: the detector has no refinement, or no class of the data.
        DataError: an image cannot be read.
    """
    model: Any = detector.model
    refinement = detector.refinement
    if refinement is None:
        raise ModelError("the detector has no refinement whose settings could be told")
    category_ids = match_categories(detector, data)
    loader = make_loader(data.as_bytes(), ScoringBatches(len(data), batch_size), workers=workers)
    results: list[list[Result]] = [[] for _ in candidates]
    known = refinement.config
    detector.eval()
    with tqdm(total=len(data), desc="telling the settings", unit="image", leave=False, disable=None) as bar:
        for images, targets in loader:
            sizes = [(image.shape[-2], image.shape[-1]) for image in images]
            image_ids = [int(target["image_id"]) for target in targets]
            batch, _ = model.transform([as_float(image.to(device)) for image in images])
            features: dict[str, Tensor] | Tensor = model.backbone(batch.tensors)
            if isinstance(features, Tensor):
                features = OrderedDict([("0", features)])
            proposals, _ = model.rpn(batch, features)
            with overridden(refinement, enabled=False), finding_boxes_alone(model.roi_heads):
                found, _ = model.roi_heads(features, proposals, batch.image_sizes)
            boxes, kept, labels = ([one[name] for one in found] for name in ("boxes", "scores", "labels"))
            for candidate, into in zip(candidates, results, strict=True):
                refinement.configure(candidate)
                try:
                    refined = refine(
                        refinement,
                        features,
                        boxes,
                        kept,
                        labels,
                        batch.image_sizes,
                        nms_threshold=model.roi_heads.nms_thresh,
                    )
                finally:
                    refinement.configure(known)
                detections = [{"boxes": b, "scores": s, "labels": la} for b, s, la in zip(*refined, strict=True)]
                detections = model.transform.postprocess(detections, batch.image_sizes, sizes)
                into += to_results(detections, image_ids, category_ids)
            bar.update(len(images))
    truth = coco_of(data.annotations, data.image_ids)
    return [evaluate(truth, one)[0] for one in results]


def best_refinement(
    candidates: Sequence[RefinementConfig], scores: Sequence[dict[str, float]], default: RefinementConfig
) -> RefinementConfig:
    """The candidate of the highest AP, unless the default, which is one of them, is as good but for chance."""
    ap = {candidate: score["AP"] for candidate, score in zip(candidates, scores, strict=True)}
    best = max(candidates, key=lambda candidate: ap[candidate])
    return best if ap[best] > ap[default] + CHANCE else default
