"""The annotation types that a data set may have besides boxes."""

from typing import Literal

AnnotationType = Literal["masks", "keypoints"]  # the names of the fields in torchvision's targets
FIELD: dict[AnnotationType, str] = {"masks": "segmentation", "keypoints": "keypoints"}  # the fields in COCO's files
