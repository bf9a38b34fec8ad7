"""The head that looks at a box again: from the crop at it, where the object's box is, and how well this one fits."""

import copy

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import RoIHeads

from detector.crop.pyramid import MultiScaleAffineCrop
from detector.refinement.config import RefinementConfig

# Deltas of boxes that are nearly right are small: twice the weights of the detector's own (Cai & Vasconcelos, "Cascade
# R-CNN", 2018, section 4.1, likewise).
CODER = BoxCoder((20.0, 20.0, 10.0, 10.0))


class RefinementHead(nn.Module):
    """One set of weights: the detector's box head, copied, with an output of its own.

    Args:
        box_head: from crops [K, C, P, P] to [K, size].
        size: features that it gives.
    """

    def __init__(self, box_head: nn.Module, size: int) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(box_head).requires_grad_()
        self.deltas = nn.Linear(size, 4)
        self.fit = nn.Linear(size, 1)
        for layer in (self.deltas, self.fit):  # at first all boxes stay where they are
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Deltas [K, 4], for :data:`CODER`, and the logit of the expected IoU [K], in float32 or better."""
        features = self.trunk(crops)
        deltas, fit = self.deltas(features), self.fit(features).squeeze(1)
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        return deltas.to(dtype), fit.to(dtype)


class Refinement(nn.Module):
    """What is added to a detector: the pool, the sets of weights, and the switch.

    Attributes:
        config: the settings.
        score_threshold: that of the settings; a tensor while a graph is made, in which it is an input.
        enabled: ``False``: detections come back as if there were no refinement.
    """

    def __init__(self, heads: RoIHeads, config: RefinementConfig, *, size_divisible: int | None) -> None:
        super().__init__()
        pool = heads.box_roi_pool
        self.config = config
        self.score_threshold: float | Tensor = config.score_threshold
        self.enabled = True
        self.pool = MultiScaleAffineCrop(
            pool.featmap_names,
            pool.output_size,
            pool.sampling_ratio,
            canonical_scale=pool.canonical_scale,
            canonical_level=pool.canonical_level,
            aligned=getattr(pool, "aligned", False),
            sampler=getattr(pool, "sampler", "auto"),
            size_divisible=size_divisible,
        )
        size = heads.box_predictor.cls_score.in_features
        self.pool.sampling = config.sampling
        self.stages = nn.ModuleList(RefinementHead(heads.box_head, size) for _ in range(config.stages))

    def configure(self, config: RefinementConfig) -> None:
        """Change the settings, but for the number of stages."""
        assert config.stages == len(self.stages)
        self.config = config
        self.pool.sampling = config.sampling
        self.score_threshold = config.score_threshold

    def stage(self, look: int) -> nn.Module:
        """The weights of a look, from 0 on."""
        return self.stages[min(look, len(self.stages) - 1)]
