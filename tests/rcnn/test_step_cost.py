"""What a training step and an inference cost a GPU beyond the stock model's, besides the crops themselves."""

from functools import partial

import pytest
import torch
from support.operator_counts import OperatorCounts, uncounted
from support.tiny_models import batch, copies, tiny_rcnn
from torchvision.ops import MultiScaleRoIAlign

from detector import BoxGradient, swap_crop_head
from detector.rcnn import roi_heads

EVERY_LOSS = ("box", "classification", "mask", "keypoint")


class FreeCrop(torch.autograd.Function):
    """A crop that costs nothing, forward and backward."""

    @staticmethod
    def forward(ctx, shape, *maps_and_boxes):
        ctx.save_for_backward(*maps_and_boxes)
        with uncounted():
            return maps_and_boxes[0].new_zeros(shape)

    @staticmethod
    def backward(ctx, gradient):
        with uncounted():
            needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:])
            return None, *(torch.zeros_like(given) if need else None for given, need in needed)


def free_crop(pool, features, boxes, image_shapes):
    maps = [features[name] for name in pool.featmap_names]
    return FreeCrop.apply((sum(map(len, boxes)), maps[0].shape[1], *pool.output_size), *maps, *boxes)


def free_box_gradient(pool, features, boxes, image_shapes, upstream):
    with uncounted():
        return [torch.zeros_like(b) for b in boxes]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(roi_heads, "reads_are_free", lambda tensor: False, raising=False)


def counted(model, images, targets=None):
    """Return the counts of an inference, or with targets of the forward and the backward pass of a training step."""
    for pool in model.modules():
        if isinstance(pool, MultiScaleRoIAlign):
            pool.forward, pool.box_gradient = partial(free_crop, pool), partial(free_box_gradient, pool)
    torch.manual_seed(0)
    counts = [OperatorCounts()]
    if targets is None:
        with torch.no_grad(), counts[0]:
            model.eval()(images)
        return counts
    model.train()
    with counts[0]:
        loss = sum(model(images, copies(targets)).values())
    counts.append(OperatorCounts())
    with counts[1]:
        loss.backward()
    return counts

if __name__ == "__main__":
    mp = pytest.MonkeyPatch()
    as_on_a_gpu.__wrapped__(mp) if hasattr(as_on_a_gpu, "__wrapped__") else as_on_a_gpu._get_wrapped_function()(mp)
    for kind, settings in (("box", BoxGradient()), ("box", BoxGradient(crop=0)),("box", BoxGradient(losses=("box", "classification"))), ("mask", BoxGradient()), ("mask", BoxGradient(losses=EVERY_LOSS)), ("keypoint", BoxGradient(losses=EVERY_LOSS))):
        for n in (1, 2):
            images, targets = (part[:n] for part in batch())
            names = ["inference"], ["forward", "backward"]
            for t, phases in zip((None, targets), names):
                stock = counted(tiny_rcnn(kind), images, t)
                ours = counted(swap_crop_head(tiny_rcnn(kind), settings), images, t)
                for phase, a, b in zip(phases, stock, ours):
                    print(f"{kind:9}{n} {phase:10} crop={settings.crop} {','.join(settings.losses)}: kernels {a.kernels.total()} -> {b.kernels.total()} (+{b.kernels.total()-a.kernels.total()})  syncs {a.syncs.total()} -> {b.syncs.total()}",
                      )
                    import sys
                    if len(sys.argv) > 1: print("     ", dict(b.kernels - a.kernels), "-", dict(a.kernels-b.kernels), dict(b.syncs - a.syncs), dict(a.syncs - b.syncs))
