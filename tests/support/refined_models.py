"""Detectors with a refinement that moves boxes, though it has learned nothing."""

import torch
from torch import nn

from detector.refinement import RefinementConfig, add_refinement

# Every box, as far as its deltas say, and in order.
PLAIN = {"score_threshold": 0.0, "looks": 2, "look_scale": 1.0, "least_overlap": 0.0, "fit_power": 0.0}


def refined(model, *, std=0.5, **settings):
    """The model, in place, with a refinement of random weights; as :data:`PLAIN` says, by default."""
    add_refinement(model, RefinementConfig(**PLAIN | settings))
    generator = torch.Generator().manual_seed(0)
    for stage in model.roi_heads.refinement.stages:
        nn.init.normal_(stage.deltas.weight, std=std, generator=generator)
        nn.init.normal_(stage.fit.weight, std=std, generator=generator)
    return model
