"""Detectors with a refinement that moves boxes, though it has learned nothing."""

import torch
from torch import nn

from detector.refinement import RefinementConfig, add_refinement


def refined(model, *, std=0.5, **settings):
    """The model, in place, with a refinement of random weights; of all detections, far and in order, by default."""
    known = {"score_threshold": 0.0, "looks": 2, "look_scale": 1.0, "least_overlap": 0.0, "fit_power": 0.0}
    add_refinement(model, RefinementConfig(**known | settings))
    generator = torch.Generator().manual_seed(0)
    for stage in model.roi_heads.refinement.stages:
        nn.init.normal_(stage.deltas.weight, std=std, generator=generator)
        nn.init.normal_(stage.fit.weight, std=std, generator=generator)
    return model
