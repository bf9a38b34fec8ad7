"""Values that settings of several folders choose from. Imports nothing heavy, for the command lines."""

from typing import Literal

Crop = Literal["affine", "roi_align"]
Evaluator = Literal["pycocotools", "faster-coco-eval"]
Orientation = Literal["upright", "stored"]
