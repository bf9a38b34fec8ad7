"""Small torchvision detectors, hand-built, that a test can run forward and backward in a fraction of a second."""

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

CHANNELS = 8
CLASSES = 3
SIZE = 64


def conv(channels, stride):
    return nn.Sequential(nn.Conv2d(channels, CHANNELS, stride + 1, stride, padding=stride // 2), nn.Tanh())


def pool(names, side=3):
    # Levels change at 32 and 64 pixels, so that the boxes of a 64-pixel image use several of them.
    return MultiScaleRoIAlign(names, side, 2, canonical_scale=32, canonical_level=3)


def tiny_rcnn(kind="box", fpn=True, seed=0, **settings):
    """A Faster, Mask or Keypoint R-CNN for 64-pixel images. Its layers are tanh: smooth, for finite differences."""
    torch.manual_seed(seed)
    if fpn:
        body = nn.Sequential(OrderedDict(a=conv(3, 4), b=conv(CHANNELS, 2), c=conv(CHANNELS, 2)))
        backbone = BackboneWithFPN(body, {"a": "0", "b": "1", "c": "2"}, [CHANNELS] * 3, CHANNELS)
        names, sizes = ["0", "1", "2"], ((8,), (16,), (32,), (64,))
    else:
        backbone = nn.Sequential(conv(3, 4), conv(CHANNELS, 2))
        backbone.out_channels = CHANNELS
        names, sizes = ["0"], ((16, 32, 64),)
    head = TwoMLPHead(CHANNELS * 9, 16)
    head.forward = None  # set below
    del head.forward
    parts = {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.7, 1.0),) * len(sizes)),
        "box_roi_pool": pool(names),
        "box_head": head,
        "box_predictor": FastRCNNPredictor(16, CLASSES),
        "min_size": SIZE,
        "max_size": SIZE,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 20,
        "rpn_pre_nms_top_n_train": 100,
        "rpn_post_nms_top_n_train": 100,
        "rpn_post_nms_top_n_test": 50,
    } | settings
    if kind == "mask":
        parts |= {
            "mask_roi_pool": pool(names, 4),
            "mask_head": conv(CHANNELS, 1),
            "mask_predictor": MaskRCNNPredictor(CHANNELS, CHANNELS, CLASSES),
        }
    if kind == "keypoint":
        parts |= {
            "keypoint_roi_pool": pool(names, 4),
            "keypoint_head": conv(CHANNELS, 1),
            "keypoint_predictor": KeypointRCNNPredictor(CHANNELS, 2),
            "num_keypoints": None,
        }
    builder = {"box": FasterRCNN, "mask": MaskRCNN, "keypoint": KeypointRCNN}[kind]
    model = builder(backbone, **parts)
    # At torchvision's initialisation the deltas are next to nothing: the anchors, whose integer coordinates put
    # samples on the kinks of bilinear interpolation, would be the proposals, and the crop path a trickle.
    for name, parameter in model.named_parameters():
        if "bbox_pred" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
