"""COCO's own metric: detections in COCO's results format, scored by pycocotools."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_convert

from detector.coco import DataError, index_coco

# pycocotools' 12 summary numbers, in its order. AP is averaged over IoU 0.50 to 0.95, AR is at that many detections.
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

Result = dict[str, Any]


def to_results(
    detections: Sequence[dict[str, Tensor]], image_ids: Sequence[int], category_ids: Sequence[int | None]
) -> list[Result]:
    """Detections in COCO's results format.

    Args:
        detections: per image ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels of the annotated image, ``labels`` [L]
            and ``scores`` [L], as torchvision's detectors return them.
        image_ids: the images' ids.
        category_ids: the category id of each label, from label 1 on; ``None`` for one to leave out.

    Returns:
        One dict per detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``.
    """
    results = []
    for detection, image_id in zip(detections, image_ids, strict=True):
        boxes = box_convert(detection["boxes"].detach().cpu().double(), "xyxy", "xywh")
        rows = zip(boxes.tolist(), detection["labels"].tolist(), detection["scores"].tolist())
        for box, label, score in rows:
            category_id = category_ids[label - 1]
            if category_id is not None:
                results.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
    return results


def evaluate(
    truth: COCO, results: list[Result], image_ids: Iterable[int] | None = None
) -> tuple[dict[str, float], str]:
    """Score results with pycocotools' COCOeval, boxes.

    Args:
        truth: the annotations, crowds and all.
        results: COCO's results format; none at all is a score of 0.
        image_ids: the images to score; all of ``truth`` by default. Results for others are not counted.

    Returns:
        The 12 numbers of :data:`SUMMARY` and AP90 (at IoU 0.90); -1 where no truth is of that size, as pycocotools
        says it. And pycocotools' own table.

    Raises:
        DataError: a result is for an image or a category that ``truth`` does not have.
    """
    for result in results:
        if result["image_id"] not in truth.imgs:
            raise DataError(f"a result has image_id {result['image_id']}, which the annotations do not have")
        if result["category_id"] not in truth.cats:
            raise DataError(f"a result has category_id {result['category_id']}, which the annotations do not have")
    # COCO.loadRes cannot take an empty list; this is what it does with a list of boxes.
    annotations = [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    found = index_coco({**truth.dataset, "annotations": annotations})
    table = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(truth, found, iouType="bbox")
        scorer.params.imgIds = sorted(truth.imgs if image_ids is None else set(image_ids))
        scorer.evaluate()
        scorer.accumulate()
    with contextlib.redirect_stdout(table):
        scorer.summarize()
    scores = dict(zip(SUMMARY, (float(number) for number in scorer.stats)))
    precision = scorer.eval["precision"][np.isclose(scorer.params.iouThrs, 0.9), ..., 0, -1]
    precision = precision[precision > -1]
    scores["AP90"] = float(precision.mean()) if precision.size else -1.0
    return scores, table.getvalue().rstrip()


@torch.no_grad()
def detect_with_losses(
    model: GeneralizedRCNN, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Detections and the training losses of the same images, by one pass of backbone and RPN.

    The model is in eval mode, but for the two flags by which RPN and RoI heads choose what to return: batch norm
    and dropout do not take part, and no statistic changes. The losses are those of the proposals of testing, which
    are fewer than in training.

    Args:
        model: a torchvision R-CNN; put in eval mode for the call.
        images: [3, H, W] in 0..1.
        targets: as in training.

    Returns:
        What the model returns in eval mode, and the losses by torchvision's names.
    """
    training = model.training
    model.eval()
    try:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, resized = model.transform(images, targets)
        features = model.backbone(batch.tensors)
        if isinstance(features, Tensor):
            features = {"0": features}
        with _losses_of_testing(model.rpn):
            proposals, losses = model.rpn(batch, features, resized)
        model.roi_heads.training = True
        losses = losses | model.roi_heads(features, proposals, batch.image_sizes, resized)[1]
        model.roi_heads.training = False
        detections, _ = model.roi_heads(features, proposals, batch.image_sizes)
        return model.transform.postprocess(detections, batch.image_sizes, sizes), losses
    finally:
        model.train(training)


@contextlib.contextmanager
def _losses_of_testing(rpn: RegionProposalNetwork) -> Iterator[None]:
    """Within, an RPN in eval mode also returns its losses; its proposals are still those of testing."""
    pre_nms, post_nms = rpn.pre_nms_top_n(), rpn.post_nms_top_n()
    rpn.pre_nms_top_n, rpn.post_nms_top_n = (lambda: pre_nms), (lambda: post_nms)
    rpn.training = True
    try:
        yield
    finally:
        rpn.training = False
        del rpn.pre_nms_top_n, rpn.post_nms_top_n


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]],
    category_ids: Sequence[int | None],
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], Any] = lambda images: None,
) -> list[Result]:
    """Run a detector over a split.

    Args:
        model: a torchvision detector; put in eval mode for the run.
        batches: images [3, H, W] in 0..1 at their annotated size, and targets of which ``image_id`` is used.
        category_ids: the category id of each label, from label 1 on.
        device: where the model is.
        on_batch: called with the number of images of each batch done, for a progress bar.

    Returns:
        COCO's results format.
    """
    training = model.training
    model.eval()
    results: list[Result] = []
    try:
        for images, targets in batches:
            detections = model([image.to(device) for image in images])
            results += to_results(detections, [int(target["image_id"]) for target in targets], category_ids)
            on_batch(len(images))
    finally:
        model.train(training)
    return results
