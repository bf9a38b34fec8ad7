"""torch.vmap over boxes, maps and both: the values and gradients of a loop."""

from functools import partial

import pytest
import torch
from support.crops import general_boxes, operators, randn, with_index
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from torch.func import grad, jacrev
from torchvision.ops import MultiScaleRoIAlign

from detector import MultiScaleAffineCrop, affine_crop

SIZE = (9, 11)
SPLIT = [2, 0, 3]  # boxes of three images
# With 64 channels "auto" would take the gather, whose operators have no batching rules.
samplers = pytest.mark.parametrize(("sampler", "channels"), [("auto", 64), ("gather", 4), ("grid_sample", 4)])
others = operators(lambda operator: operator.rule != "affine" and operator.ratio != -1)


def looped(function, *batches):
    return torch.stack([function(*examples) for examples in zip(*batches, strict=True)])


def energy_gradient(crop, boxes):
    """The gradient of the sum of a crop's squares."""
    boxes = boxes.detach().requires_grad_()
    return torch.autograd.grad(crop(boxes).square().sum(), boxes)[0]


def assert_as_looped(crop, boxes, in_dims=0):
    """Values, and a gradient for each example."""
    examples = boxes.movedim(in_dims, 0)
    torch.testing.assert_close(torch.vmap(crop, in_dims)(boxes), looped(crop, examples), rtol=0, atol=1e-10)
    gradients = torch.vmap(grad(lambda one: crop(one).square().sum()), in_dims)(boxes)
    expected = looped(lambda one: energy_gradient(crop, one), examples)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)
    assert expected.any()


@samplers
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_over_boxes(layout, aligned, sampler, channels):
    """One box at a time, RoIs with the image's index, and boxes of several images along another axis."""
    options = {"sampling_ratio": 2, "aligned": aligned, "sampler": sampler}
    features = randn(3, channels, *SIZE).contiguous(memory_format=layout)
    boxes = general_boxes(5, SIZE, seed=1)
    assert_as_looped(lambda box: affine_crop(features[:1], [box[None]], 7, **options), boxes)
    rois = with_index([0, 2, 2, 1, 0], boxes)
    rois = torch.stack([rois, rois + torch.tensor([0, 0.3, 0.2, 0.4, 0.1])], 1)  # [5, 2, 5]
    assert_as_looped(lambda one: affine_crop(features, one, 3, **options), rois)
    sets = torch.stack([boxes, boxes + 0.3], 1)  # [5, 2, 4]
    assert_as_looped(lambda one: affine_crop(features, list(one.split(SPLIT)), 3, **options), sets, in_dims=1)


@others
def test_other_crops_over_boxes_and_over_both(operator):
    features, boxes = randn(3, 4, *SIZE), general_boxes(5, SIZE, seed=1)
    assert_as_looped(lambda box: operator(features[:1], [box[None]], 3), boxes)
    rois = with_index([0, 2, 2, 1, 0], boxes)
    rois = torch.stack([rois, rois + torch.tensor([0, 0.3, 0.2, 0.4, 0.1])], 1)  # [5, 2, 5]
    assert_as_looped(lambda one: operator(features, one), rois)
    sets = torch.stack([boxes, boxes + 0.3], 1)  # [5, 2, 4]
    assert_as_looped(lambda one: operator(features, list(one.split(SPLIT))), sets, in_dims=1)
    maps, sets = randn(2, 3, 4, *SIZE), sets.movedim(1, 0)

    def energy(source, one):
        return operator(source, list(one.split(SPLIT))).square().sum()

    gradients = torch.vmap(grad(energy, argnums=(0, 1)))(maps, sets)
    leaves = [maps.requires_grad_(), sets.clone().requires_grad_()]
    expected = torch.autograd.grad(looped(energy, *leaves).sum(), leaves)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-9)


@samplers
def test_over_maps_and_boxes_together(sampler, channels):
    maps = randn(2, 3, channels, *SIZE)
    boxes = torch.stack([general_boxes(5, SIZE, seed=seed) for seed in range(2)])

    def crop(source, one):
        return affine_crop(source, list(one.split(SPLIT)), 3, 1.0, 2, sampler=sampler)

    result = torch.vmap(crop, in_dims=(2, 1))(maps.movedim(0, 2), boxes.movedim(0, 1))
    torch.testing.assert_close(result, looped(crop, maps, boxes), rtol=0, atol=1e-10)
    gradients = torch.vmap(grad(lambda *one: crop(*one).square().sum(), argnums=(0, 1)))(maps, boxes)
    leaves = [maps.requires_grad_(), boxes.requires_grad_()]
    expected = torch.autograd.grad(looped(crop, maps, boxes).square().sum(), leaves)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("channels", [3, 64])
def test_over_maps_and_over_other_tensors(operator, channels):
    maps, boxes = randn(2, 1, channels, *SIZE), general_boxes(3, SIZE)
    result = torch.vmap(lambda source: operator(source, [boxes]))(maps)
    torch.testing.assert_close(result, looped(lambda m: operator(m, [boxes]), maps), rtol=0, atol=1e-10)
    # One gradient for each map, at boxes that grad wraps and vmap does not.
    of_boxes = grad(lambda boxes, source: operator(source, [boxes]).square().sum())
    gradients = torch.vmap(of_boxes, in_dims=(None, 0))(boxes, maps)
    expected = looped(lambda m: energy_gradient(lambda one: operator(m, [one]), boxes), maps)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=f"{operator.names[1]} must be finite"):
        torch.vmap(lambda source: operator(source, [boxes / 0]))(maps)
    result = torch.vmap(lambda factor: factor * operator(maps[0], [boxes]))(torch.arange(2.0))
    torch.testing.assert_close(result[1], operator(maps[0], [boxes]), rtol=0, atol=1e-10)


@samplers
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_inside_of_and_around_other_transforms(sampler, channels):
    features, boxes = randn(1, channels, *SIZE), general_boxes(4, SIZE, seed=1)

    def crop(box):
        return affine_crop(features, [box[None]], 2, 1.0, 2, sampler=sampler)

    def energy(box):
        return crop(box).square().sum()

    expected, leaf = looped(lambda box: energy_gradient(crop, box), boxes), boxes.clone().requires_grad_()
    rows = torch.vmap(jacrev(crop))(boxes)
    for gradients in (
        grad(lambda all_boxes: torch.vmap(energy)(all_boxes).sum())(boxes),
        torch.autograd.grad(torch.vmap(energy)(leaf).sum(), leaf)[0],
        torch.vmap(torch.vmap(grad(energy)))(boxes.view(2, 2, 4)).view(4, 4),
        (2 * torch.vmap(crop)(boxes)[..., None] * rows).sum((1, 2, 3, 4)),
    ):
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)
    second = grad(lambda box: grad(energy)(box).square().sum())
    torch.testing.assert_close(torch.vmap(second)(boxes), looped(second, boxes), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["auto", "gather", "grid_sample"])
@pytest.mark.parametrize("names", [["0"], list(STRIDES)])
def test_over_the_boxes_of_a_pyramid(names, sampler):
    size = (120, 150)
    maps = {name: source for name, source in pyramid(2, size, 33).items() if name in names}
    pool, stock = MultiScaleAffineCrop(names, 3, 2, **SMALL, sampler=sampler), MultiScaleRoIAlign(names, 3, 2, **SMALL)
    boxes = torch.stack([boxes_of_side(LEVEL_SIDES[:4], seed) for seed in range(2)])
    boxes[1] += 0.3

    def crop(pool, one):
        return pool(maps, [one[:1], one[1:]], [size] * 2)

    assert_as_looped(partial(crop, pool), boxes)
    torch.testing.assert_close(
        torch.vmap(partial(crop, pool))(boxes), looped(partial(crop, stock), boxes), rtol=0, atol=1e-10
    )


@operators(lambda operator: operator.ratio != -1)
@pytest.mark.parametrize("channels", [4, 64])
def test_invalid_rois_are_nan_and_harm_no_other(operator, channels):
    features = randn(2, channels, *SIZE)
    rois = with_index([0, 1, 2, 0.5, 0, 1], general_boxes(6, SIZE))
    rois[4, 1], rois[5, 4] = torch.nan, torch.inf

    def crop(roi):
        return operator(features, roi[None])

    result = torch.vmap(crop)(rois)
    assert result[2:].isnan().all()
    torch.testing.assert_close(result[:2], looped(crop, rois[:2]), rtol=0, atol=1e-10)
    gradients = torch.vmap(grad(lambda roi: crop(roi).nan_to_num().sum()))(rois)
    assert gradients.any(1).tolist() == [True, True, False, False, False, False]


@operators(lambda operator: operator.ratio == -1)
def test_work_that_depends_on_the_box_is_refused(operator):
    features, boxes = randn(1, 3, *SIZE), general_boxes(3, SIZE)

    def crop(box):
        return operator(features, [box[None]])

    for function in (crop, grad(lambda box: crop(box).sum())):
        with pytest.raises(ValueError, match="vmapped"):
            torch.vmap(function)(boxes)
