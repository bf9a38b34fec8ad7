"""Small torchvision detectors, hand-built, that a test can run forward and backward in a fraction of a second."""

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
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
    parts = {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.7, 1.0),) * len(sizes)),
        "box_roi_pool": pool(names),
        "box_head": nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 9, 16), nn.Tanh()),
        "box_predictor": FastRCNNPredictor(16, CLASSES),
        "min_size": SIZE,
        "max_size": SIZE,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 20,
        "box_batch_size_per_image": 64,
        "rpn_pre_nms_top_n_train": 600,
        "rpn_post_nms_top_n_train": 600,
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
        }
    builder = {"box": FasterRCNN, "mask": MaskRCNN, "keypoint": KeypointRCNN}[kind]
    model = builder(backbone, **parts)
    # At torchvision's initialisation the deltas are next to nothing: the anchors, whose integer coordinates put
    # samples on the kinks of bilinear interpolation, would be the proposals, and the crop path a trickle.
    nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.1)
    nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.5)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if name.endswith("weight"):
                parameter *= 3
    return model


def batch(dtype=torch.float32, seed=0):
    """Two images and their targets: boxes near to an anchor, so that the RPN has positives that are not the truth."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, height, SIZE, dtype=dtype, generator=generator) for height in (SIZE, SIZE - 8)]
    boxes = [
        torch.tensor([[18.3, 20.1, 47.2, 50.4], [33.2, 14.7, 47.9, 31.6], [1.2, 2.1, 60.7, 59.4]], dtype=dtype),
        torch.tensor([[15.1, 16.2, 50.3, 46.7]], dtype=dtype),
    ]
    labels = [torch.tensor([1, 2, 1]), torch.tensor([2])]
    targets = []
    for image, image_boxes, image_labels in zip(images, boxes, labels):
        x1, y1, x2, y2 = (side[:, None, None] for side in image_boxes.unbind(1))
        rows, columns = torch.meshgrid(torch.arange(image.shape[1]), torch.arange(image.shape[2]), indexing="ij")
        # An ellipse in each box, and two keypoints.
        masks = ((columns - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((rows - (y1 + y2) / 2) / (y2 - y1)) ** 2 < 0.25
        middle = (image_boxes[:, :2] + image_boxes[:, 2:]) / 2
        points = torch.stack([middle, middle + (image_boxes[:, 2:] - middle) / 2], 1)
        targets.append(
            {
                "boxes": image_boxes,
                "labels": image_labels,
                "masks": masks.to(torch.uint8),
                "keypoints": torch.cat([points, torch.ones(len(points), 2, 1)], 2).float(),
            }
        )
    return images, targets


def copies(targets):
    """Fresh targets: torchvision's transform changes the dicts that it is given."""
    return [dict(target) for target in targets]


def losses_of(model, dtype=torch.float32):
    """The losses of a model in training mode, with the same sampling in every call."""
    torch.manual_seed(1)
    images, targets = batch(dtype)
    return model(images, copies(targets))


def at_the_deltas(model, *groups):
    """Return the gradients of sums of losses at the deltas of the RPN's head, [anchors, 4], or zeros, in float64."""
    deltas = []
    handle = model.rpn.head.register_forward_hook(lambda _, given, result: deltas.extend(result[1]))
    losses = losses_of(model, torch.float64)
    handle.remove()
    found = []
    for names in groups:
        gradients = torch.autograd.grad(sum(losses[n] for n in names), deltas, retain_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(d) if g is None else g for g, d in zip(gradients, deltas)]
        found.append(torch.cat([g.unflatten(1, (-1, 4)).movedim(2, -1).flatten(0, -2) for g in gradients]))
    return found


def assert_bounded(found, own, others, bound):
    """Compare gradients [anchors, 4] with the definition of the bound."""
    scale = bound * own.norm(dim=1, keepdim=True) / others.norm(dim=1, keepdim=True).clamp(min=1e-30)
    assert ((scale < 1) & own.any(1, keepdim=True) & others.any(1, keepdim=True)).sum() >= 3
    wanted = own + scale.clamp(max=1) * others
    assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max()
