"""A whole detector that is built, saved and run in a fraction of a second, with a checkpoint."""

import torch

from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.published import batch_norm_eps, set_batch_norm_eps
from detector.pretrained.description import DetectorDescription
from detector.pretrained.loading import CHECKPOINT_KEY

NAMES = ["red cell", "white cell", "platelet"]
IDS = [7, 2, 31]  # with gaps, and in no order
SETTINGS = DetectorConfig(
    name="timm/test_efficientnet",
    min_size=64,
    max_size=128,
    fpn_channels=8,
    box_head_size=16,
    rpn_pre_nms_top_n=(50, 50),
    rpn_post_nms_top_n=(20, 20),
    detections_per_image=10,
    score_threshold=0.0,
)


def tiny_checkpoint(crop="affine", names=NAMES, ids=IDS, settings=SETTINGS):
    """Return a checkpoint as training saves it, with large classifier weights: scores differ between images."""
    torch.manual_seed(0)
    model = build_detector(settings, len(names), pretrained=False)
    set_batch_norm_eps(model, dict.fromkeys(batch_norm_eps(model), 0.25))
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=20.0)
    return {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        CHECKPOINT_KEY: DetectorDescription(settings, crop, list(ids), list(names), batch_norm_eps(model)).to_dict(),
    }


def scene(height=48, width=64, seed=0):
    """[3, H, W], uint8, with edges to detect."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width))[0]
    return (fine * 255).round().to(torch.uint8)
