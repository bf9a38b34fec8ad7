"""The network of the refinement."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from detector.rcnn.forward import Boxes, Features, Sizes
from detector.rcnn.pooler import MultiScaleAffineCrop
from detector.refinement.config import RefinementConfig


class RefinementHead(nn.Module):
    """A copy of the detector's box head with two outputs: class-agnostic deltas and the IoU with the object."""

    def __init__(self, heads: RoIHeads) -> None:
        super().__init__()
        size = heads.box_predictor.cls_score.in_features
        self.trunk = copy.deepcopy(heads.box_head).requires_grad_()
        self.deltas = nn.Linear(size, 4)
        self.iou = nn.Linear(size, 1)
        for layer in (self.deltas, self.iou):  # an untrained refinement moves no box
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Return deltas [K, 4] and the logits of the predicted IoU [K] in float32 or better."""
        features = self.trunk(crops)
        dtype = torch.promote_types(features.dtype, torch.float32)
        return self.deltas(features).to(dtype), self.iou(features).squeeze(1).to(dtype)


class Refinement(nn.Module):
    """The pool and the head of a refinement."""

    def __init__(self, heads: RoIHeads, config: RefinementConfig, size_divisible: int | None) -> None:
        super().__init__()
        self.config, self.enabled = config, True
        pool = heads.box_roi_pool
        same = ("canonical_scale", "canonical_level", "aligned", "sampler")
        options: Any = {name: getattr(pool, name) for name in same if hasattr(pool, name)}
        self.pool = MultiScaleAffineCrop(pool.featmap_names, pool.output_size, pool.sampling_ratio, **options)
        self.pool.size_divisible = size_divisible
        self.head = RefinementHead(heads)

    @property
    def description(self) -> str:
        """The iterations and the ascent steps of a box, or "off"."""
        steps = f"{self.config.iterations} iterations, {self.config.ascent_steps} ascent steps"
        return steps if self.enabled else "off"

    def forward(self, features: Features, boxes: Boxes, image_sizes: Sizes) -> tuple[Tensor, Tensor]:
        return self.head(self.pool(features, boxes, image_sizes))
