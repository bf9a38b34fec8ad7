"""The ground truth as pycocotools' index."""

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from detector.data.annotation_types import FIELD
from detector.data.annotations import Annotations


def coco_of(annotations: Annotations, image_ids: Iterable[int] | None = None) -> COCO:
    """Return pycocotools' index of the annotations of some images, by default of all.

    Its ``dataset`` has an extra key, ``layout``: the keypoint layout of all images.
    """
    chosen = np.arange(len(annotations)) if image_ids is None else np.unique(annotations.find(image_ids))
    chosen = chosen[chosen >= 0]
    rows = np.flatnonzero(np.isin(annotations.image_of, chosen))
    ids = annotations.ids
    if (ids == 0).any():  # pycocotools treats 0 as no match
        ids = np.arange(1, len(ids) + 1)
    columns = {
        "id": ids,
        "image_id": annotations.image_ids[annotations.image_of],
        "category_id": annotations.category_ids,
        "bbox": annotations.boxes,
        "area": annotations.areas,
        "iscrowd": annotations.crowds.astype(int),
    }
    entries = [dict(zip(columns, row)) for row in zip(*(column[rows].tolist() for column in columns.values()))]
    for name in annotations.annotation_types:
        for entry, row in zip(entries, rows.tolist()):
            entry[FIELD[name]] = annotations.value(name, row)
    images = [annotations.image(index) for index in chosen.tolist()]
    content = {"images": images, "annotations": entries, "categories": annotations.categories}
    return index_coco(content | {"layout": annotations.keypoint_layout()})


def index_coco(content: dict[str, Any]) -> COCO:
    """Return pycocotools' index of a dict in COCO's format, without what its constructor prints."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
