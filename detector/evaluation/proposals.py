"""How much of the ground truth an RPN's proposals cover, before the head sees them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pycocotools import mask
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_convert

from detector.data.annotations import Annotations
from detector.evaluation.metric import match
from detector.overriding import overridden

COUNTS = (100, 300, 1000)  # proposals an image at which recall is measured
LEAST_IOU = 0.5  # of COCO's thresholds


@dataclass(frozen=True)
class Hit:
    """A proposal that may cover an object; all others cannot, whatever else is proposed."""

    image_id: int
    place: int  # in the order of the RPN's objectness, from 0
    box: list[float]  # x, y, width, height in pixels of the annotated image


@dataclass
class ProposalRecorder:
    """Keeps an R-CNN's proposals of the last batch, up to the largest of :data:`COUNTS` an image.

    Use :meth:`recording` around the model's calls, and :meth:`hits` after each.
    """

    _boxes: list[Tensor] = field(default_factory=list)  # [P, 4] (x1, y1, x2, y2) in pixels of the resized images
    _sizes: list[tuple[int, int]] = field(default_factory=list)

    @contextmanager
    def recording(self, model: GeneralizedRCNN) -> Iterator[int]:
        """Record within; the detections stay what they are. Gives the number of proposals that the head sees."""
        rpn = model.rpn
        to_head = rpn._post_nms_top_n["testing"]

        def record(
            module: object, inputs: tuple[ImageList, object], output: tuple[list[Tensor], dict[str, Tensor]]
        ) -> tuple[list[Tensor], dict[str, Tensor]]:
            self._boxes, self._sizes = output[0], inputs[0].image_sizes
            return [boxes[:to_head] for boxes in output[0]], output[1]

        handle = rpn.register_forward_hook(record)
        try:
            # Suppression comes before the cut, so more of them change nothing for the first.
            with overridden(rpn, post_nms_top_n=lambda: max(to_head, *COUNTS)):
                yield to_head
        finally:
            handle.remove()

    def hits(self, truth: Annotations, image_ids: list[int], sizes: list[tuple[int, int]]) -> list[Hit]:
        """The recorded proposals that may cover an object.

        Args:
            truth: the ground truth.
            image_ids: the ids of the images of the last batch.
            sizes: their heights and widths in pixels.
        """
        hits = []
        indices = truth.find(image_ids).tolist()
        for image_id, index, size, boxes, resized in zip(
            image_ids, indices, sizes, self._boxes, self._sizes, strict=True
        ):
            objects = truth.boxes[truth.of(index)][~truth.crowds[truth.of(index)]]
            if not len(objects) or not len(boxes):
                continue
            boxes = resize_boxes(boxes[: max(COUNTS)], resized, size)
            proposals = box_convert(boxes.double().cpu(), "xyxy", "xywh").numpy()
            covers = mask.iou(proposals, objects, [0] * len(objects)).max(axis=1) >= LEAST_IOU
            hits += [Hit(image_id, int(place), proposals[place].tolist()) for place in covers.nonzero()[0]]
        return hits


def recall(truth: COCO, hits: Iterable[Hit], image_ids: Iterable[int]) -> list[dict[str, float]]:
    """Average recall over IoU 0.50 to 0.95, whatever the class, by pycocotools.

    Args:
        truth: the ground truth.
        hits: the proposals of all images that may cover an object.
        image_ids: the images that were looked at.

    Returns:
        For each of :data:`COUNTS` a dict: ``at``, ``AR``, and by the objects' size ``ARs``, ``ARm`` and ``ARl``; -1
        where there is no object of that size.
    """
    any_class = next(iter(truth.cats), None)
    if any_class is None:
        return []
    hits, image_ids = list(hits), list(image_ids)
    rows = []
    for count in COUNTS:
        results = [
            {"image_id": hit.image_id, "category_id": any_class, "bbox": hit.box, "score": -float(hit.place)}
            for hit in hits
            if hit.place < count
        ]
        scorer = match(truth, results, image_ids, by_class=False, max_detections=(count,))
        recalls = scorer.eval["recall"][:, 0, :, 0]  # [thresholds, sizes]
        names = ("AR", "ARs", "ARm", "ARl")
        rows.append({"at": count} | {name: float(recalls[:, size].mean()) for size, name in enumerate(names)})
    return rows
