"""Detectors with a refinement of random weights, which moves boxes."""

import torch
from torch import nn

from detector.refinement import RefinementConfig, add_refinement


def refined(model, *, std=0.2, **settings):
    """Add a refinement of random weights, which by default keeps the scores of the detections."""
    add_refinement(model, RefinementConfig(**{"iou_power": 0.0} | settings))
    refinement = model.roi_heads.refinement
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(refinement.head.deltas.weight, std=std, generator=generator)
    nn.init.normal_(refinement.head.iou.weight, std=std, generator=generator)
    return model
