"""Recall of an RPN's proposals, before the box head."""

from collections.abc import Sequence

from pycocotools import mask
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.ops import box_convert

from detector.data.annotations import Annotations
from detector.data.results import Result
from detector.evaluation.metric import match

COUNTS = (100, 300, 1000)  # proposals per image at which recall is measured
MIN_IOU = 0.5  # the lowest of COCO's thresholds


def covering_proposals(truth: Annotations, image_id: int, boxes: Tensor) -> list[Result]:
    """Return the proposals of an image that cover an object. Others do not affect recall.

    Args:
        truth: the ground truth.
        image_id: the image.
        boxes: [P, 4] (x1, y1, x2, y2) in pixels of the image, in the order of their objectness.

    Returns:
        Results without a category, whose scores are 0, -1, ... in the order of objectness.
    """
    rows = truth.of(int(truth.find([image_id])[0]))
    objects = truth.boxes[rows][~truth.crowds[rows]]
    if not len(objects) or not len(boxes):
        return []
    proposals = box_convert(boxes[: max(COUNTS)].double().cpu(), "xyxy", "xywh").numpy()
    covers = mask.iou(proposals, objects, [0] * len(objects)).max(axis=1) >= MIN_IOU
    found = covers.nonzero()[0].tolist()
    return [{"image_id": image_id, "bbox": proposals[place].tolist(), "score": -float(place)} for place in found]


def recall(truth: COCO, proposals: Sequence[Result], image_ids: Sequence[int]) -> list[dict[str, float]]:
    """Return the average recall over IoU 0.50 to 0.95 of all classes together, by pycocotools.

    Returns:
        For each of :data:`COUNTS` a dict: ``at``, ``AR``, and by the objects' size ``ARs``, ``ARm`` and ``ARl``; -1
        where there is no object of that size.
    """
    any_class = next(iter(truth.cats), None)
    if any_class is None:
        return []
    rows = []
    for count in COUNTS:
        results = [one | {"category_id": any_class} for one in proposals if -one["score"] < count]
        scorer = match(truth, results, image_ids, by_class=False, maxDets=[count])
        recalls = scorer.eval["recall"][:, 0, :, 0].mean(axis=0).tolist()  # by size
        rows.append({"at": count, **dict(zip(("AR", "ARs", "ARm", "ARl"), recalls, strict=True))})
    return rows
