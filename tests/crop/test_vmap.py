"""torch.vmap over boxes, maps and both: the values and gradients of a loop over roi_align, moved by a hair."""

import pytest
import torch
from support.crops import general_boxes, randn
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from torch.func import grad, jacrev
from torchvision.ops import MultiScaleRoIAlign, roi_align

from detector import MultiScaleAffineCrop, affine_crop, exact_crop

SIZE = (9, 11)
SPLIT = [2, 0, 3]  # boxes of three images
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
# Of 64 channels "auto" takes the gather, whose operators have no batching rules.
samplers = pytest.mark.parametrize(
    ("sampler", "channels"), [("auto", 3), ("auto", 64), ("gather", 4), ("grid_sample", 4)]
)


def looped(function, *batches):
    return torch.stack([function(*examples) for examples in zip(*batches, strict=True)])


def energy_slopes(crop, boxes, step=1e-6):
    """The gradient of the sum of a crop's squares at boxes [..., 4] or [..., 5], by central differences."""
    gradient = torch.zeros_like(boxes)
    for number in range(boxes.numel()):
        if boxes.shape[-1] == 5 and number % 5 == 0:
            continue  # the image's index
        moved = torch.zeros(boxes.numel(), dtype=boxes.dtype)
        moved[number] = step
        ahead, behind = (crop(boxes + sign * moved.view_as(boxes)).square().sum() for sign in (1, -1))
        gradient.view(-1)[number] = (ahead - behind) / (2 * step)
    return gradient


def assert_as_looped(crop, reference, boxes, in_dims=0, tolerance=1e-5):
    """Values and a gradient for each example, of a crop and of roi_align, both functions of the boxes."""
    examples = boxes.movedim(in_dims, 0)
    result = torch.vmap(crop, in_dims)(boxes)
    torch.testing.assert_close(result, looped(reference, examples), rtol=0, atol=1e-10)
    gradients = torch.vmap(grad(lambda one: crop(one).square().sum()), in_dims)(boxes)
    expected = looped(lambda one: energy_slopes(reference, one), examples)
    torch.testing.assert_close(gradients, expected, rtol=tolerance, atol=tolerance)
    assert expected.abs().amax(-1).min() > 0.01


@samplers
@layouts
@pytest.mark.parametrize("aligned", [False, True])
def test_over_boxes_one_at_a_time(aligned, layout, sampler, channels):
    features = randn(1, channels, *SIZE).contiguous(memory_format=layout)

    def crop(box):
        return affine_crop(features, [box[None]], 7, 1.0, 2, aligned, sampler=sampler)

    assert_as_looped(
        crop, lambda box: roi_align(features, [box[None]], 7, 1.0, 2, aligned), general_boxes(5, SIZE, seed=1)
    )


@samplers
@layouts
def test_over_rois_with_the_image_index(layout, sampler, channels):
    features = randn(3, channels, *SIZE).contiguous(memory_format=layout)
    index = torch.tensor([0, 2, 2, 1, 0], dtype=torch.float64)[:, None]
    rois = torch.cat([index, general_boxes(5, SIZE, seed=1)], 1)
    rois = torch.stack([rois, rois + torch.tensor([0, 0.3, 0.2, 0.4, 0.1])], 1)  # [5, 2, 5]
    assert_as_looped(
        lambda one: affine_crop(features, one, 3, 1.0, 2, sampler=sampler),
        lambda one: roi_align(features, one, 3, 1.0, 2),
        rois,
    )


@samplers
def test_over_boxes_of_several_images_along_another_axis(sampler, channels):
    features = randn(3, channels, *SIZE)
    boxes = torch.stack([general_boxes(5, SIZE, seed=seed) for seed in range(2)], 1)  # [5, 2, 4]
    assert_as_looped(
        lambda one: affine_crop(features, list(one.split(SPLIT)), 3, 1.0, 2, sampler=sampler),
        lambda one: roi_align(features, list(one.split(SPLIT)), 3, 1.0, 2),
        boxes,
        in_dims=1,
    )


@samplers
def test_over_maps_and_boxes_together(sampler, channels):
    maps = randn(2, 3, channels, *SIZE)
    boxes = torch.stack([general_boxes(5, SIZE, seed=seed) for seed in range(2)])

    def crop(source, one):
        return affine_crop(source, list(one.split(SPLIT)), 3, 1.0, 2, sampler=sampler)

    def reference(source, one):
        return roi_align(source, list(one.split(SPLIT)), 3, 1.0, 2)

    result = torch.vmap(crop, in_dims=(2, 1))(maps.movedim(0, 2), boxes.movedim(0, 1))
    torch.testing.assert_close(result, looped(reference, maps, boxes), rtol=0, atol=1e-10)
    of_maps, of_boxes = torch.vmap(grad(lambda *one: crop(*one).square().sum(), argnums=(0, 1)))(maps, boxes)
    expected = looped(lambda source, one: energy_slopes(lambda b: reference(source, b), one), maps, boxes)
    torch.testing.assert_close(of_boxes, expected, rtol=1e-5, atol=1e-5)
    maps.requires_grad_()
    (expected,) = torch.autograd.grad(looped(reference, maps, boxes).square().sum(), maps)
    torch.testing.assert_close(of_maps, expected, rtol=0, atol=1e-9)


@samplers
@pytest.mark.parametrize("options", [{"sampling_ratio": 2}, {"sampling_ratio": -1}, "exact"])
def test_over_maps_the_boxes_may_be_looked_at(options, sampler, channels):
    maps, boxes = randn(2, 1, channels, *SIZE), general_boxes(3, SIZE)

    def crop(source, boxes):
        if options == "exact":
            return exact_crop(source, [boxes], 3)
        return affine_crop(source, [boxes], 3, sampler=sampler, **options)

    result = torch.vmap(lambda source: crop(source, boxes))(maps)
    torch.testing.assert_close(result, looped(lambda source: crop(source, boxes), maps), rtol=0, atol=1e-10)
    # One gradient for each map, at boxes that grad wraps and vmap does not.
    of_boxes = grad(lambda boxes, source: crop(source, boxes).square().sum())
    gradients = torch.vmap(of_boxes, in_dims=(None, 0))(boxes, maps)
    expected = looped(lambda source: energy_slopes(lambda one: crop(source, one), boxes), maps)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="boxes must be finite"):
        torch.vmap(lambda source: crop(source, boxes / 0))(maps)


@samplers
def test_over_something_else(sampler, channels):
    features, boxes = randn(1, channels, *SIZE), [general_boxes(3, SIZE)]
    result = torch.vmap(lambda factor: factor * affine_crop(features, boxes, 3, sampler=sampler))(torch.arange(2.0))
    torch.testing.assert_close(result[1], roi_align(features, boxes, 3), rtol=0, atol=1e-10)


@samplers
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_inside_of_and_around_other_transforms(sampler, channels):
    features, boxes = randn(1, channels, *SIZE), general_boxes(4, SIZE, seed=1)

    def crop(box):
        return affine_crop(features, [box[None]], 2, 1.0, 2, sampler=sampler)

    def energy(box):
        return crop(box).square().sum()

    expected = looped(lambda box: energy_slopes(lambda b: roi_align(features, [b[None]], 2, 1.0, 2), box), boxes)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(grad(lambda all_boxes: torch.vmap(energy)(all_boxes).sum())(boxes), expected, **close)
    leaf = boxes.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(torch.vmap(energy)(leaf).sum(), leaf)[0], expected, **close)
    pairs = boxes.view(2, 2, 4)
    torch.testing.assert_close(torch.vmap(torch.vmap(grad(energy)))(pairs).view(4, 4), expected, **close)
    rows = torch.vmap(jacrev(crop))(boxes)
    torch.testing.assert_close((2 * torch.vmap(crop)(boxes)[..., None] * rows).sum((1, 2, 3, 4)), expected, **close)
    # grad of grad: the gradient's length.
    lengths = torch.vmap(grad(lambda box: grad(energy)(box).square().sum()))(boxes)
    moved = looped(lambda box: energy_slopes(grad(energy), box), boxes)
    torch.testing.assert_close(lengths, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["auto", "gather", "grid_sample"])
@pytest.mark.parametrize("names", [["0"], list(STRIDES)])
def test_over_the_boxes_of_a_pyramid(names, sampler):
    size = (120, 150)
    maps = {name: source for name, source in pyramid(2, size, 33).items() if name in names}
    settings = (names, 3, 2)
    pool, stock = MultiScaleAffineCrop(*settings, **SMALL, sampler=sampler), MultiScaleRoIAlign(*settings, **SMALL)
    boxes = torch.stack([boxes_of_side(LEVEL_SIDES[:4], seed) for seed in range(2)])
    boxes[1] += 0.3
    assert_as_looped(
        lambda one: pool(maps, [one[:1], one[1:]], [size] * 2),
        lambda one: stock(maps, [one[:1], one[1:]], [size] * 2),
        boxes,
    )


@samplers
def test_a_bad_roi_is_nan_and_harms_no_other(sampler, channels):
    features, boxes = randn(2, channels, *SIZE), general_boxes(6, SIZE)
    rois = torch.cat([torch.tensor([0, 1, 2, 0.5, 0, 1], dtype=torch.float64)[:, None], boxes], 1)
    rois[4, 1], rois[5, 4] = torch.nan, torch.inf

    def crop(roi):
        return affine_crop(features, roi[None], 3, 1.0, 2, sampler=sampler)

    result = torch.vmap(crop)(rois)
    assert result[2:].isnan().all()
    torch.testing.assert_close(result[:2, 0], roi_align(features, rois[:2], 3, 1.0, 2), rtol=0, atol=1e-10)
    gradients = torch.vmap(grad(lambda roi: crop(roi).nan_to_num().sum()))(rois)
    assert gradients[:2].any(1).all()
    assert torch.equal(gradients[2:], torch.zeros(4, 5, dtype=torch.float64))


@samplers
@pytest.mark.parametrize("ratio", [-1, 0])
def test_work_that_goes_with_the_box_is_refused(ratio, sampler, channels):
    features, boxes = randn(1, channels, *SIZE), general_boxes(3, SIZE)

    def crop(box):
        return affine_crop(features, [box[None]], 3, 1.0, ratio, sampler=sampler)

    for function in (crop, grad(lambda box: crop(box).sum())):
        with pytest.raises(ValueError, match=f"sampling_ratio={ratio} cannot be vmapped over boxes"):
            torch.vmap(function)(boxes)
