"""Masks and keypoints of a detector with a refinement: in the boxes that come out, not in those of before."""

import pytest
import torch
from support.refined_models import refined
from support.tiny_models import batch, tiny_rcnn

from detector import swap_crop_head
from detector.refinement.seen import look_at


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_none_are_looked_for_while_a_refinement_learns(kind):
    model = refined(swap_crop_head(tiny_rcnn(kind)).eval(), looks=2, climbs=2)
    (image, *_), _ = batch()
    model.roi_heads.refinement.enabled = False
    with torch.no_grad():
        expected = model([image])[0]["boxes"]
    getattr(model.roi_heads, f"{kind}_head").forward = None  # would fail
    seen = look_at(model, image)
    assert len(expected)
    torch.testing.assert_close(seen.boxes, expected)


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_masks_and_key_points_are_looked_for_in_refined_boxes(kind):
    model = refined(swap_crop_head(tiny_rcnn(kind)).eval(), looks=2, climbs=2)
    pooled = []
    pool = getattr(model.roi_heads, f"{kind}_roi_pool")
    pool.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[1]))
    images = [batch()[0][0]]  # of the size that the model resizes to: its pixels are the image's
    with torch.no_grad():
        (found,) = model(images)
        model.roi_heads.refinement.enabled = False
        (before,) = model(images)
    torch.testing.assert_close(pooled[0][0], found["boxes"])
    torch.testing.assert_close(pooled[1][0], before["boxes"])
    assert not torch.allclose(found["boxes"], before["boxes"], atol=0.5)
    field = {"mask": "masks", "keypoint": "keypoints"}[kind]
    assert len(found[field]) == len(found["boxes"])
    assert not torch.allclose(found[field], before[field])
