import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crops import both_samplers, general_boxes, randn
from torch import nn
from torchvision.ops import MultiScaleRoIAlign, RoIAlign, roi_align

import detector.crop.grid_sampler
from detector import AffineCrop, MultiScaleAffineCrop, affine_crop

SCALES = [1.0, 0.5, 0.0625, 0.3, 2.0]


def with_index(index, boxes):
    return torch.cat([torch.tensor(index, dtype=boxes.dtype)[:, None], boxes], 1)


# --- Values: equal to roi_align, for any box -------------------------------------------------------------------------


@st.composite
def sides(draw, size, kind, huge):
    """Start and end of a box along one axis, in pixels of a map that is ``size`` long."""
    inside = st.floats(0, size)
    around = st.floats(-size, 2 * size)
    if kind == "inside":
        return tuple(sorted((draw(inside), draw(inside))))
    if kind == "across":
        return draw(st.floats(-size, size)), draw(st.floats(size, 2 * size))
    if kind == "outside":
        start = draw(st.one_of(st.floats(-3 * size, -size - 2), st.floats(size + 2, 3 * size)))
        return start, start + draw(st.floats(0, size))
    if kind == "border":
        borders = st.sampled_from([-1.0, -0.5, 0.0, 0.5, size - 1.0, size - 0.5, float(size), size + 0.5])
        return tuple(sorted((draw(borders), draw(borders))))
    if kind == "integer":
        integers = st.integers(-size, 2 * size)
        return tuple(sorted((float(draw(integers)), float(draw(integers)))))
    if kind == "subpixel":
        start = draw(around)
        return start, start + draw(st.floats(1e-3, 0.9))
    if kind == "huge":
        return -draw(st.floats(size, huge)), draw(st.floats(2 * size, huge))
    if kind == "zero":
        start = draw(st.one_of(around, st.integers(-2, size + 2).map(float)))
        return start, start
    assert kind == "inverted"
    start = draw(around)
    return start, start - draw(st.floats(0, size))


KINDS = ["inside", "across", "outside", "border", "integer", "subpixel", "huge", "zero", "inverted"]


@st.composite
def crops(draw, huge=1e4, adaptive_huge=200.0):
    """One call: a map, boxes in it (by list and image) and the other arguments."""
    ratio = draw(st.sampled_from([-1, 0, 1, 2, 3]))
    aligned = draw(st.booleans())
    scale = draw(st.sampled_from(SCALES))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    images = draw(st.integers(1, 3))
    boxes = []
    for _ in range(images):
        rows = []
        for _ in range(draw(st.integers(0, 3))):
            kinds = [draw(st.sampled_from(KINDS)) for _ in range(2)]
            # torchvision crashes on adaptive sampling of a box that is inverted along exactly one axis: its number
            # of samples, a product, is negative. It has tests of its own below.
            if ratio <= 0 and aligned and "inverted" in kinds:
                kinds = ["inverted"] * 2
            limit = adaptive_huge if ratio <= 0 else huge  # at 1e4 roi_align would compute a weight for 1e8 samples
            (x1, x2), (y1, y2) = draw(sides(width, kinds[0], limit)), draw(sides(height, kinds[1], limit))
            rows.append([x1, y1, x2, y2])
        boxes.append(torch.tensor(rows, dtype=torch.float64).reshape(-1, 4) / scale)
    output_size = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    features = randn(images, 2, height, width, seed=draw(st.integers(0, 100)))
    return features, boxes, output_size, scale, ratio, aligned


@both_samplers
@settings(deadline=None, derandomize=True, max_examples=250)
@given(crops())
def test_values_and_feature_gradients_equal_roi_align(sampler, call):
    features, boxes, *rest = call
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    result, expected = affine_crop(ours, boxes, *rest, sampler=sampler), roi_align(theirs, boxes, *rest)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    upstream = randn(*expected.shape, seed=1)
    (gradient,) = torch.autograd.grad(result, ours, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, theirs, upstream)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


@both_samplers
@settings(deadline=None, derandomize=True, max_examples=150)
@given(crops(huge=300.0))
def test_float32_values_equal_roi_align(sampler, call):
    # A normalised coordinate of a box of some hundred pixels is rounded to 1e-5 .. 1e-4 pixels, and the values of
    # neighbouring N(0, 1) pixels lie up to 6 apart.
    features, boxes, *rest = call
    features, boxes = features.float(), [b.float() for b in boxes]
    result, expected = affine_crop(features, boxes, *rest, sampler=sampler), roi_align(features, boxes, *rest)
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-4)


@both_samplers
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 1, 2, 3])
def test_every_integer_box_of_a_small_map(sampler, ratio, aligned):
    # Samples of integer boxes lie exactly on the border where they begin to count as zero. The decision must be
    # roi_align's to the last bit: one that is wrong is off by a whole pixel value.
    features = 1 + randn(1, 1, 5, 4).abs()
    corners = torch.cartesian_prod(*[torch.arange(-3.0, 8)] * 2).double()
    pairs = torch.cartesian_prod(torch.arange(len(corners)), torch.arange(len(corners)))
    boxes = torch.cat([corners[pairs[:, 0]], corners[pairs[:, 1]]], 1)
    boxes = boxes[(boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1])]
    for output_size in [(2, 3), (7, 7)]:
        result = affine_crop(features, [boxes], output_size, 1.0, ratio, aligned, sampler=sampler)
        expected = roi_align(features, [boxes], output_size, 1.0, ratio, aligned)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@both_samplers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_large_map(sampler, dtype):
    # The size of a real feature map: many rows and columns, images of unequal numbers of boxes.
    features = randn(3, 4, 84, 168, dtype=dtype)
    boxes = [general_boxes(n, (84, 168), seed=n, dtype=dtype) * 8 for n in (40, 0, 3)]
    for ratio in (-1, 2):
        result = affine_crop(features, boxes, 7, 0.125, ratio, sampler=sampler)
        atol = 1e-10 if dtype == torch.float64 else 5e-4
        torch.testing.assert_close(result, roi_align(features, boxes, 7, 0.125, ratio), rtol=0, atol=atol)


@both_samplers
@pytest.mark.parametrize(("box", "name"), [([7.0, 1, 2, 5], "x"), ([1.0, 6, 5, 2], "y")])
def test_a_side_inverted_alone_has_no_adaptive_samples(sampler, box, name):
    boxes = torch.tensor([box, [1.3, 1.4, 5.2, 4.9]], dtype=torch.float64, requires_grad=True)
    features = randn(1, 2, 8, 9).requires_grad_()
    result = affine_crop(features, [boxes], 3, 1.0, -1, aligned=True, sampler=sampler)
    assert torch.equal(result[0], torch.zeros(2, 3, 3, dtype=torch.float64))
    expected = roi_align(features, [boxes[1:].detach()], 3, 1.0, -1, aligned=True)
    torch.testing.assert_close(result[1:], expected, rtol=0, atol=1e-10)
    result.sum().backward()
    assert torch.equal(boxes.grad[0], torch.zeros(4, dtype=torch.float64))
    assert features.grad.isfinite().all()


@both_samplers
@pytest.mark.parametrize("aligned", [False, True])
def test_a_box_far_larger_than_the_map_adaptively(sampler, aligned):
    # Not comparable with roi_align, which would weigh each of its 1e10 samples; with the same samples as a ratio.
    features = randn(1, 2, 6, 5)
    box = torch.tensor([[-40.3, -70.2, 109.7, 79.8]], dtype=torch.float64)  # 150 x 150 in 3 x 3 bins: 50 samples a bin
    result = affine_crop(features, [box], 3, 1.0, -1, aligned, sampler=sampler)
    torch.testing.assert_close(result, roi_align(features, [box], 3, 1.0, 50, aligned), rtol=0, atol=1e-10)
    huge = torch.tensor([[-5e4, -5e4, 5e4, 5e4]], dtype=torch.float64, requires_grad=True)
    result = affine_crop(features, [huge], 3, 1.0, -1, aligned, sampler=sampler)
    (gradient,) = torch.autograd.grad(result.sum(), huge)
    assert gradient.isfinite().all()
    # The middle bin, 33,333 pixels wide, holds the whole map: its sum, and the ring that repeats its edge, over all.
    ring = F.pad(features, (1, 1, 1, 1), mode="replicate")
    assert result[0, :, 1, 1].abs().max() < ring.abs().sum() / 3e4**2
    assert torch.equal(result[0, :, 0, 0], torch.zeros(2, dtype=torch.float64))


# --- Gradients -------------------------------------------------------------------------------------------------------

MODES = [(ratio, aligned) for ratio in (-1, 1, 2) for aligned in (False, True)]


@both_samplers
@pytest.mark.parametrize(
    ("ratio", "aligned", "form"), [(*mode, "list") for mode in MODES] + [(-1, False, "tensor"), (2, True, "tensor")]
)
def test_gradcheck(sampler, ratio, aligned, form):
    features = randn(2, 1, 5, 6).requires_grad_()
    corners = general_boxes(3, (10, 12), seed=2).requires_grad_()

    def crop(features, corners):
        boxes = [corners[:2], corners[2:]] if form == "list" else with_index([1, 0, 1], corners)
        return affine_crop(features, boxes, (2, 3), 0.5, ratio, aligned, sampler=sampler)

    assert torch.autograd.gradcheck(crop, (features, corners))


@both_samplers
@pytest.mark.parametrize(("ratio", "aligned"), [(-1, True), (2, False)])
def test_gradgradcheck(sampler, ratio, aligned):
    features = randn(1, 1, 4, 5).requires_grad_()
    corners = general_boxes(2, (8, 10), seed=3).requires_grad_()

    def crop(features, corners):
        return affine_crop(features, [corners], 2, 0.5, ratio, aligned, sampler=sampler)

    assert torch.autograd.gradgradcheck(crop, (features, corners))


@both_samplers
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize(("ratio", "aligned"), MODES)
def test_box_gradient_equals_finite_differences_of_roi_align(sampler, ratio, aligned, scale):
    """The reference is torchvision's own operator: its values, moved by a hair."""
    features = randn(2, 3, 11, 14)
    boxes = general_boxes(24, (11, 14), seed=4) / scale
    # Boxes below one pixel, which not aligned are widened to one: their far side has no gradient.
    boxes = torch.cat([boxes, boxes[:4, :2].repeat(1, 2) + torch.tensor([0, 0, 0.4, 0.7]) / scale])
    rois = with_index([0, 1] * 14, boxes)
    upstream = randn(28, 3, 3, 4, seed=5)

    attached = rois.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        affine_crop(features, attached, (3, 4), scale, ratio, aligned, sampler=sampler), attached, upstream
    )

    step = 1e-6
    expected = torch.zeros(28, 5, dtype=torch.float64)
    for side in range(1, 5):
        moved = torch.zeros(5, dtype=torch.float64)
        moved[side] = step
        ahead, behind = (roi_align(features, rois + d, (3, 4), scale, ratio, aligned) for d in (moved, -moved))
        expected[:, side] = ((ahead - behind) * upstream).sum((1, 2, 3)) / (2 * step)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    assert expected[:, 1:].abs().mean() > 0.1  # the comparison means something


@both_samplers
def test_the_image_index_has_no_gradient(sampler):
    rois = with_index([1, 0], general_boxes(2, (8, 8))).requires_grad_()
    (gradient,) = torch.autograd.grad(affine_crop(randn(2, 1, 8, 8), rois, 2, sampler=sampler).sum(), rois)
    assert torch.equal(gradient[:, 0], torch.zeros(2, dtype=torch.float64))


@both_samplers
@pytest.mark.parametrize("size", [(1, 1), (1, 6)])
def test_a_map_of_one_pixel_is_flat(sampler, size):
    # Along an axis of one pixel every sample reads that pixel: no slope.
    boxes = torch.tensor([[0.2, 0.1, 0.9, 0.8]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        affine_crop(randn(1, 1, *size), [boxes], 2, 1.0, 2, True, sampler=sampler).sum(), boxes
    )
    assert torch.equal(gradient[0, 1::2], torch.zeros(2, dtype=torch.float64))


# --- Forms of the boxes ----------------------------------------------------------------------------------------------


@both_samplers
@pytest.mark.parametrize("ratio", [-1, 2])
def test_unsorted_image_indices(sampler, ratio):
    features = randn(3, 2, 8, 9).requires_grad_()
    boxes = general_boxes(7, (8, 9), seed=6).requires_grad_()
    index = [2, 0, 2, 1, 0, 2, 2]
    result = affine_crop(features, with_index(index, boxes), (2, 3), 1.0, ratio, sampler=sampler)
    expected = roi_align(features, with_index(index, boxes.detach()), (2, 3), 1.0, ratio)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    # Each RoI alone, by the list: the same gradients, in the same places.
    upstream = randn(*result.shape, seed=7)
    gradients = torch.autograd.grad(result, [features, boxes], upstream)
    alone = torch.cat(
        [
            affine_crop(features, [boxes[:0]] * i + [boxes[k : k + 1]], (2, 3), 1.0, ratio, sampler=sampler)
            for k, i in enumerate(index)
        ]
    )
    for gradient, wanted in zip(gradients, torch.autograd.grad(alone, [features, boxes], upstream), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)


@both_samplers
@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("counts", [[3, 2, 4], [0, 5, 0], [40, 1, 1], [1, 0, 40, 0, 2], [3, 2], [0, 0, 0], []])
def test_list_form_equals_tensor_form(sampler, counts, ratio):
    """Also images without boxes, numbers of boxes far apart, and a list that is shorter than the batch."""
    features = randn(max(len(counts), 3), 2, 8, 9).requires_grad_()
    boxes = [general_boxes(n, (8, 9), seed=i).requires_grad_() for i, n in enumerate(counts)]
    index = [i for i, n in enumerate(counts) for _ in range(n)]
    tensor = with_index(index, torch.cat([*boxes, torch.zeros(0, 4, dtype=torch.float64)]))
    by_list = affine_crop(features, boxes, (2, 3), 1.0, ratio, sampler=sampler)
    by_tensor = affine_crop(features, tensor, (2, 3), 1.0, ratio, sampler=sampler)
    assert by_list.shape == (sum(counts), 2, 2, 3)
    torch.testing.assert_close(by_list, by_tensor, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_list, roi_align(features, tensor.detach(), (2, 3), 1.0, ratio), rtol=0, atol=1e-10)
    upstream = randn(*by_list.shape)
    inputs = [features, *boxes]
    gradients = torch.autograd.grad(by_list, inputs, upstream)
    expected = torch.autograd.grad(by_tensor, inputs, upstream, allow_unused=True)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)


@both_samplers
@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("form", ["tensor", "empty list", "list of empty"])
def test_no_boxes(sampler, form, images, ratio):
    boxes = {
        "tensor": torch.zeros(0, 5, requires_grad=True),
        "empty list": [],
        "list of empty": [torch.zeros(0, 4, requires_grad=True) for _ in range(images)],
    }[form]
    features = torch.randn(images, 2, 5, 6, requires_grad=True)
    result = affine_crop(features, boxes, (2, 3), 0.5, ratio, sampler=sampler)
    assert result.shape == (0, 2, 2, 3)
    assert result.dtype == torch.float32
    # The result stays in the graph, so that a step in which no image has a box does not raise.
    result.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


@both_samplers
def test_a_tuple_of_boxes_and_an_int_output_size(sampler):
    features, boxes = randn(2, 2, 8, 9), [general_boxes(2, (8, 9)), general_boxes(1, (8, 9), seed=1)]
    expected = affine_crop(features, boxes, (3, 3), sampler=sampler)
    assert torch.equal(affine_crop(features, tuple(boxes), 3, sampler=sampler), expected)
    assert torch.equal(affine_crop(features, boxes, [3, 3], sampler=sampler), expected)


# --- Dtypes, memory formats, autocast --------------------------------------------------------------------------------


@both_samplers
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_feature_dtypes(sampler, ratio, dtype, autocast):
    """The output is in the input's dtype; the geometry, that of the same features in float32, inside autocast too."""
    features = torch.randn(2, 3, 60, 80).to(dtype).requires_grad_()
    # 500 pixels of the image away from the origin bfloat16 has steps of 2 pixels: a box in it would be another box.
    boxes = [(general_boxes(4, (60, 80), seed=i) * 8).float().requires_grad_() for i in range(2)]
    wide = features.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected = affine_crop(wide, boxes, 4, 0.125, ratio, sampler=sampler)
    upstream = torch.randn(expected.shape)
    expected_gradients = torch.autograd.grad(expected, [wide, *boxes], upstream.to(expected.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = affine_crop(features, boxes, 4, 0.125, ratio, sampler=sampler)
        gradients = torch.autograd.grad(result, [features, *boxes], upstream.to(dtype))
    assert result.dtype == dtype
    assert gradients[0].dtype == dtype
    assert gradients[1].dtype == torch.float32
    # Values and feature gradients are rounded once, at the end; a box gradient sums upstream values that are rounded.
    eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(result.to(expected.dtype), expected, rtol=eps, atol=1e-5)
    torch.testing.assert_close(gradients[0].to(expected.dtype), expected_gradients[0], rtol=2 * eps, atol=4 * eps)
    for gradient, wanted in zip(gradients[1:], expected_gradients[1:], strict=True):
        assert (gradient - wanted).norm() < (4 * eps) * wanted.norm()


@both_samplers
def test_float64_boxes_on_float32_features(sampler):
    features, boxes = randn(1, 2, 30, 40), [general_boxes(5, (30, 40))]
    result = affine_crop(features.float(), boxes, 3, 1.0, 2, sampler=sampler)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), roi_align(features, boxes, 3, 1.0, 2), rtol=0, atol=5e-5)


@both_samplers
def test_bfloat16_boxes_are_taken_as_they_are(sampler):
    features, boxes = torch.randn(1, 2, 30, 40), general_boxes(5, (30, 40)).bfloat16()
    result = affine_crop(features, [boxes], 3, 1.0, 2, sampler=sampler)
    torch.testing.assert_close(
        result, affine_crop(features, [boxes.float()], 3, 1.0, 2, sampler=sampler), rtol=0, atol=0
    )


@both_samplers
@pytest.mark.parametrize("ratio", [-1, 2])
def test_channels_last(sampler, ratio):
    features = randn(2, 4, 9, 10)
    boxes = [general_boxes(3, (9, 10), seed=i).requires_grad_() for i in range(2)]
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        source = features.clone(memory_format=memory_format).requires_grad_()
        crop = affine_crop(source, boxes, (2, 3), 1.0, ratio, sampler=sampler)
        results.append([crop, *torch.autograd.grad(crop.square().sum(), [source, *boxes])])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@both_samplers
def test_a_map_that_is_a_view(sampler):
    base, boxes = randn(2, 8, 20, 22), [general_boxes(3, (10, 11)), general_boxes(2, (10, 11))]
    view = base[:, 1::2, ::2, 1::2]
    torch.testing.assert_close(
        affine_crop(view, boxes, 3, sampler=sampler),
        affine_crop(view.contiguous(), boxes, 3, sampler=sampler),
        rtol=0,
        atol=1e-12,
    )


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_crop(backend):
    return torch.compile(affine_crop, fullgraph=True, backend=backend)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["list", "tensor"])
def test_compiles_into_one_graph(form):
    features = torch.randn(2, 3, 8, 9, requires_grad=True)
    corners = general_boxes(5, (16, 18), dtype=torch.float32).requires_grad_()
    boxes = [corners[:2], corners[2:]] if form == "list" else with_index([1, 0, 1, 1, 0], corners)
    expected = affine_crop(features, boxes, (2, 3), 0.5, 2)
    result = compiled_crop("aot_eager")(features, boxes, (2, 3), 0.5, 2)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    upstream = torch.randn(result.shape)
    gradients = torch.autograd.grad(result, [features, corners], upstream)
    wanted = torch.autograd.grad(expected, [features, corners], upstream)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_inductor():
    features = torch.randn(2, 3, 8, 9, requires_grad=True)
    boxes = [general_boxes(n, (16, 18), seed=n, dtype=torch.float32).requires_grad_() for n in (2, 3)]
    expected = affine_crop(features, boxes, (2, 3), 0.5, 2)
    result = compiled_crop("inductor")(features, boxes, (2, 3), 0.5, 2)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(result.square().sum(), [features, *boxes])
    wanted = torch.autograd.grad(expected.square().sum(), [features, *boxes])
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


NAN, INF = math.nan, math.inf


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["list", "tensor"])
def test_under_compile_a_bad_roi_is_nan_and_harms_no_other(form):
    """Where a look at the values would cost a synchronisation they cannot be checked."""
    features = torch.randn(2, 3, 8, 9, requires_grad=True)
    corners = general_boxes(8, (8, 9), dtype=torch.float32)
    bad = [1, 3, 4]
    corners[1, 0], corners[3, 2], corners[4, 3] = NAN, INF, -INF
    index = [0.0, 0, 0, 0, 1, 1, 1, 1]
    if form == "tensor":
        bad, index[6], index[7], index[5] = [*bad, 5, 6, 7], 2.0, NAN, 0.5
        index[0] = -1.0
        bad = [0, *bad]
    corners.requires_grad_()
    boxes = [corners[:4], corners[4:]] if form == "list" else with_index(index, corners)
    result = compiled_crop("aot_eager")(features, boxes, 2, 1.0, 2)
    good = [k for k in range(8) if k not in bad]
    assert result[bad].isnan().all()
    expected = roi_align(features, with_index(index, corners.detach())[good], 2, 1.0, 2)
    torch.testing.assert_close(result[good], expected, rtol=0, atol=1e-5)
    result[good].sum().backward()
    assert corners.grad.isfinite().all()
    assert torch.equal(corners.grad[bad], torch.zeros(len(bad), 4))
    (wanted,) = torch.autograd.grad(expected.sum(), features)
    torch.testing.assert_close(features.grad, wanted, rtol=0, atol=1e-5)
    # Even a NaN in the loss says so at the RoI and leaves the features alone that no good RoI reads.
    features.grad = None
    compiled_crop("aot_eager")(features, boxes, 2, 1.0, 2).sum().backward()
    assert features.grad.isfinite().all()


# --- Errors ----------------------------------------------------------------------------------------------------------

MAP = torch.zeros(2, 3, 8, 9)
ONE = torch.tensor([[1.0, 2, 5, 6]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((MAP[0], [ONE], 2), ValueError, r"input must have shape \[N, C, H, W\], got \[3, 8, 9\]"),
        ((MAP[..., :0], [ONE], 2), ValueError, r"input must be at least one pixel .* \[2, 3, 8, 0\]"),
        ((MAP.long(), [ONE], 2), TypeError, "input must be a floating point tensor, got torch.int64"),
        (("map", [ONE], 2), TypeError, "input must be a floating point tensor, got str"),
        ((MAP, ONE, 2), ValueError, r"boxes must have shape \[K, 5\].*, got \[1, 4\]"),
        ((MAP, torch.zeros(5), 2), ValueError, r"boxes must have shape \[K, 5\].*, got \[5\]"),
        ((MAP, [ONE, torch.zeros(1, 5)], 2), ValueError, r"boxes\[1\] must have shape \[L, 4\].*, got \[1, 5\]"),
        ((MAP, [ONE[0]], 2), ValueError, r"boxes\[0\] must have shape \[L, 4\].*, got \[4\]"),
        ((MAP, [ONE, ONE.long()], 2), TypeError, r"boxes\[1\] must be a floating point tensor, got torch.int64"),
        ((MAP, torch.zeros(1, 5).int(), 2), TypeError, "boxes must be a floating point tensor, got torch.int32"),
        ((MAP, [[1.0, 2, 5, 6]], 2), TypeError, r"boxes\[0\] must be a floating point tensor, got list"),
        ((MAP, None, 2), TypeError, "boxes must be a .*, got NoneType"),
        ((MAP, "boxes", 2), TypeError, "boxes must be a .*, got str"),
        ((MAP, {"a": ONE}, 2), TypeError, "boxes must be a .*, got dict"),
        ((MAP, [ONE] * 3, 2), ValueError, "boxes has 3 images, but input has a batch of 2"),
        ((MAP, [ONE.to("meta")], 2), TypeError, r"boxes\[0\] and input must be on one device, got meta and cpu"),
        ((MAP, with_index([2], ONE), 2), ValueError, r"boxes\[0\] has image index 2.0, .* batch of 2"),
        ((MAP, with_index([0, -1], ONE.repeat(2, 1)), 2), ValueError, r"boxes\[1\] has image index -1.0, .* of 2"),
        ((MAP, with_index([0.5], ONE), 2), ValueError, r"boxes\[0\] has image index 0.5"),
        ((MAP, with_index([NAN], ONE), 2), ValueError, r"boxes\[0\] has image index nan"),
        ((MAP[:0], with_index([0], ONE), 2), ValueError, r"boxes\[0\] has image index 0.0, .* batch of 0"),
        ((MAP, [ONE, torch.tensor([[0, 1.0, NAN, 2]])], 2), ValueError, r"boxes must be finite, got \[.*nan.*RoI 1"),
        ((MAP, [torch.tensor([[-INF, 1.0, 2, 3]])], 2), ValueError, r"boxes must be finite, got \[-inf, 1.0, 2.0, 3.0"),
        ((MAP, [ONE * 1e37], 2, 1e3), ValueError, r"boxes must be finite in map pixels, got .* spatial_scale 1000.0"),
        ((MAP, [ONE], 0), ValueError, "output_size must be at least 1, got 0"),
        ((MAP, [ONE], (3, 0)), ValueError, r"output_size must be at least 1, got \(3, 0\)"),
        ((MAP, [ONE], (-2, 3)), ValueError, r"output_size must be at least 1, got \(-2, 3\)"),
        ((MAP, [ONE], (1, 2, 3)), TypeError, r"output_size must be .*, got \(1, 2, 3\)"),
        ((MAP, [ONE], 2.0), TypeError, "output_size must be .*, got 2.0"),
        ((MAP, [ONE], 2, 0.0), ValueError, "spatial_scale must be positive and finite, got 0.0"),
        ((MAP, [ONE], 2, -1.0), ValueError, "spatial_scale must be positive and finite, got -1.0"),
        ((MAP, [ONE], 2, NAN), ValueError, "spatial_scale must be positive and finite, got nan"),
        ((MAP, [ONE], 2, INF), ValueError, "spatial_scale must be positive and finite, got inf"),
    ],
)
def test_an_error_names_the_argument_and_the_value(arguments, error, message):
    with pytest.raises(error, match=message):
        affine_crop(*arguments)


@pytest.mark.parametrize("size", [0, (2, -1)])
def test_the_module_checks_its_output_size_when_it_is_made(size):
    with pytest.raises(ValueError, match="output_size must be at least 1"):
        AffineCrop(size)


# --- What is computed ------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch):
    """The shapes of the map, the grid and the result, and the grid's dtype, of every call of grid_sample."""
    calls = []
    original = F.grid_sample

    def grid_sample(input, grid, **kwargs):
        result = original(input, grid, **kwargs)
        calls.append({"map": input.shape, "grid": grid.shape, "result": result.numel(), "dtype": grid.dtype})
        return result

    monkeypatch.setattr(F, "grid_sample", grid_sample)
    return calls


@pytest.mark.parametrize("ratio", [-1, 1, 2])
@pytest.mark.parametrize("counts", [[6], [5, 4, 0], [30, 1, 1]])
def test_no_map_is_copied_per_roi(sampled, counts, ratio):
    features = randn(len(counts), 2, 20, 20)
    boxes = [general_boxes(n, (20, 20), seed=i) for i, n in enumerate(counts)]
    affine_crop(features, boxes, 3, 1.0, ratio, sampler="grid_sample")
    assert sampled
    for call in sampled:
        assert call["map"][0] in (1, len(counts))  # images, never RoIs
        assert call["map"][1:] == features.shape[1:]


@pytest.mark.parametrize("form", ["list", "tensor"])
def test_images_of_a_batch_are_sampled_by_one_call(sampled, form):
    # grid_sample runs one thread per image of the batch axis on a CPU.
    features, boxes = randn(4, 2, 20, 20), general_boxes(13, (20, 20))
    index = [0, 3, 1, 2, 0, 3, 1, 2, 0, 3, 1, 2, 2]
    rois = with_index(index, boxes)
    given = rois if form == "tensor" else [boxes[rois[:, 0] == i] for i in range(4)]
    affine_crop(features, given, 3, 1.0, 2, sampler="grid_sample")
    assert [call["map"][0] for call in sampled] == [4]


def test_boxes_in_one_image_of_many_do_not_pay_for_the_others(sampled):
    affine_crop(
        randn(8, 2, 20, 20), with_index([5] * 20, general_boxes(20, (20, 20))), 3, 1.0, 2, sampler="grid_sample"
    )
    assert sum(call["grid"].numel() for call in sampled) == 20 * (3 * 2) ** 2 * 2


@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("counts", [[9], [4, 5, 3], [12, 0, 1]])
@pytest.mark.parametrize("limit", [1, 100])
def test_chunks_change_nothing(monkeypatch, sampled, limit, counts, ratio):
    features = randn(len(counts), 2, 12, 13).requires_grad_()
    boxes = [general_boxes(n, (12, 13), seed=i).requires_grad_() for i, n in enumerate(counts)]

    def run():
        result = affine_crop(features, boxes, (3, 2), 1.0, ratio, sampler="grid_sample")
        return [result, *torch.autograd.grad(result.square().sum(), [features, *boxes])]

    expected = run()
    calls = len(sampled)
    monkeypatch.setattr(detector.crop.grid_sampler, "MAX_SAMPLED_ELEMENTS", limit)
    for result, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-11)
    assert len(sampled) - calls > calls  # it did take chunks


@pytest.mark.parametrize("aligned", [False, True])
def test_a_huge_adaptive_box_is_taken_in_slices(monkeypatch, sampled, aligned):
    limit = 2**18
    monkeypatch.setattr(detector.crop.grid_sampler, "MAX_SAMPLED_ELEMENTS", limit)
    features = randn(1, 4, 100, 120, dtype=torch.float32).requires_grad_()
    box = torch.tensor([[-3e4, -2e4, 4e4, 5e4], [-300.3, -200.1, 400.2, 500.4]], requires_grad=True)
    result = affine_crop(features, [box], 7, 1.0, -1, aligned, sampler="grid_sample")
    # The first alone has 70,000 x 70,000 samples; the second, 100 x 100 a bin, roi_align takes as well.
    assert max(call["result"] for call in sampled) <= limit
    expected = roi_align(features, [box[1:].detach()], 7, 1.0, -1, aligned)
    torch.testing.assert_close(result[1:], expected, rtol=0, atol=5e-4)
    for gradient in torch.autograd.grad(result.sum(), [features, box]):
        assert gradient.isfinite().all()


def test_many_rois_stay_within_the_limit(monkeypatch, sampled):
    monkeypatch.setattr(detector.crop.grid_sampler, "MAX_SAMPLED_ELEMENTS", 2**14)
    features = randn(2, 4, 30, 30, dtype=torch.float32)
    boxes = [general_boxes(60, (30, 30), seed=i, dtype=torch.float32) for i in range(2)]
    for ratio in (-1, 2):
        affine_crop(features, boxes, 7, 1.0, ratio, sampler="grid_sample")
    assert max(call["result"] for call in sampled) <= 2**14


@both_samplers
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_what_lies_outside_every_box_is_not_read(sampler, ratio, bad):
    features = torch.full((3, 2, 30, 30), bad, dtype=torch.float64)
    features[0, :, 8:17, 5:20] = randn(2, 9, 15)
    features[2, :, :12, 18:] = randn(2, 12, 12)
    # Image 1 has no boxes, and image 2 fewer than image 0: their padding must read nothing either.
    boxes = [
        torch.tensor([[7.2, 10.1, 17.3, 14.2], [8.1, 9.9, 12.2, 15.3]], dtype=torch.float64),
        torch.zeros(0, 4, dtype=torch.float64),
        torch.tensor([[20.3, -6.2, 41.9, 9.4]], dtype=torch.float64),
    ]
    result = affine_crop(features, boxes, 3, 1.0, ratio, True, sampler=sampler)
    assert result.isfinite().all()
    # roi_align gives a sample outside the map a weight of 0 at the first pixel: NaN, if that is.
    clean = features.nan_to_num(0, 0, 0)
    torch.testing.assert_close(result, roi_align(clean, boxes, 3, 1.0, ratio, True), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("fresh_compiler")
def test_under_compile_no_image_reads_the_features_of_another():
    features = torch.full((2, 2, 10, 10), NAN)
    features[1] = torch.randn(2, 10, 10)
    rois = with_index([1, 1], general_boxes(2, (10, 10), dtype=torch.float32))
    result = compiled_crop("aot_eager")(features, rois, 3, 1.0, 2)
    torch.testing.assert_close(result, roi_align(features, rois, 3, 1.0, 2), rtol=0, atol=1e-5)


def test_autocast_leaves_the_grid_in_float32(sampled):
    boxes = (general_boxes(4, (60, 80)) * 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for features in (torch.randn(1, 2, 60, 80), torch.randn(1, 2, 60, 80).bfloat16()):
            for ratio in (-1, 2):
                affine_crop(features, [boxes], 3, 0.125, ratio, sampler="grid_sample")
    assert {call["dtype"] for call in sampled} == {torch.float32}


# --- The module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [-1, 2])
def test_module_equals_function(ratio):
    features, boxes = randn(1, 2, 8, 9), [general_boxes(3, (16, 18))]
    module = AffineCrop((2, 3), 0.5, ratio, aligned=True)
    assert torch.equal(module(features, boxes), affine_crop(features, boxes, (2, 3), 0.5, ratio, True))
    assert not module.state_dict()


def test_module_repr_and_arguments_are_those_of_roi_align():
    assert repr(AffineCrop((2, 3), 0.5, 2, True)) == (
        "AffineCrop(output_size=(2, 3), spatial_scale=0.5, sampling_ratio=2, aligned=True)"
    )
    assert repr(AffineCrop((2, 3), 0.5, 2, True)) == repr(RoIAlign((2, 3), 0.5, 2, True)).replace(
        "RoIAlign", "AffineCrop"
    )
    assert repr(AffineCrop(2, sampler="gather")).endswith(", aligned=False, sampler=gather)")
    assert repr(AffineCrop(7)) == "AffineCrop(output_size=(7, 7), spatial_scale=1.0, sampling_ratio=-1, aligned=False)"


# --- GPU -------------------------------------------------------------------------------------------------------------


@both_samplers
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 5e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)]
)
def test_gpu(sampler, dtype, atol, ratio, aligned):
    features = randn(2, 3, 20, 30).to("cuda", dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    boxes = [(general_boxes(6, (20, 30), seed=i, dtype=wide) * 4).cuda().requires_grad_() for i in range(2)]
    result = affine_crop(features, boxes, (3, 4), 0.25, ratio, aligned, sampler=sampler)
    # torchvision's operator rounds the boxes to the features' dtype; compare with its float32.
    reference = features.detach().to(wide).requires_grad_()
    expected = roi_align(reference, [b.detach() for b in boxes], (3, 4), 0.25, ratio, aligned)
    assert result.dtype == dtype
    torch.testing.assert_close(result.to(wide), expected, rtol=0, atol=atol)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(result, [features, *boxes], upstream.to(dtype))
    (wanted,) = torch.autograd.grad(expected, reference, upstream)
    torch.testing.assert_close(gradients[0].to(wide), wanted, rtol=0, atol=4 * atol)
    on_cpu = [t.detach().cpu().requires_grad_() for t in (reference, *boxes)]
    wanted = torch.autograd.grad(
        affine_crop(on_cpu[0], on_cpu[1:], (3, 4), 0.25, ratio, aligned, sampler=sampler), on_cpu[1:], upstream.cpu()
    )
    for gradient, box_gradient in zip(gradients[1:], wanted, strict=True):
        assert (gradient.cpu() - box_gradient).norm() < max(atol, 1e-3) * box_gradient.norm()


@both_samplers
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("form", ["list", "tensor"])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_gpu_a_bad_roi_is_nan_and_harms_no_other(sampler, ratio, form):
    features = torch.randn(2, 3, 8, 9, device="cuda", requires_grad=True)
    corners = general_boxes(6, (8, 9), dtype=torch.float32)
    corners[1, 0], corners[4, 3] = NAN, INF
    index = [0.0, 0, 0, 1, 1, 1]
    bad = [1, 4]
    if form == "tensor":
        index[3], bad = 7.0, [1, 3, 4]
    boxes = with_index(index, corners).cuda() if form == "tensor" else [corners[:3].cuda(), corners[3:].cuda()]
    result = affine_crop(features, boxes, 2, 1.0, ratio, sampler=sampler)
    good = [k for k in range(6) if k not in bad]
    assert result[bad].isnan().all()
    expected = roi_align(features, with_index(index, corners)[good].cuda(), 2, 1.0, ratio)
    torch.testing.assert_close(result[good], expected, rtol=0, atol=1e-4)
    result[good].sum().backward()
    assert features.grad.isfinite().all()


@both_samplers
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_the_list_form_does_not_synchronise(sampler):
    features = torch.randn(2, 3, 8, 9, device="cuda", requires_grad=True)
    boxes = [general_boxes(3, (8, 9), dtype=torch.float32).cuda().requires_grad_() for _ in range(2)]
    affine_crop(features, boxes, 2, 1.0, 2, sampler=sampler).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        affine_crop(features, boxes, 2, 1.0, 2, sampler=sampler).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_huge_boxes_in_many_images_stay_within_the_limit(monkeypatch):
    """Their slices are sampled in one call, so the images share the limit."""
    limit = 50_000
    monkeypatch.setattr(detector.crop.grid_sampler, "MAX_SAMPLED_ELEMENTS", limit)
    sampled = []
    grid_sample = F.grid_sample

    def record(*args, **kwargs):
        sampled.append(grid_sample(*args, **kwargs))
        return sampled[-1]

    monkeypatch.setattr(detector.crop.grid_sampler.F, "grid_sample", record)
    maps = torch.randn(8, 2, 40, 40, dtype=torch.float64)
    box = torch.tensor([[1.0, 2.0, 39.0, 38.0]], dtype=torch.float64)
    crops = affine_crop(maps, [box] * 8, 2, sampler="grid_sample")
    assert max(s.numel() for s in sampled) <= limit
    torch.testing.assert_close(crops, roi_align(maps, [box] * 8, 2))


@both_samplers
@pytest.mark.parametrize("ratio", [-1, 2])
def test_no_channels(sampler, ratio):
    maps = torch.zeros(2, 0, 5, 5, requires_grad=True)
    boxes = [torch.tensor([[0.0, 0.0, 3.0, 3.0]], requires_grad=True)] * 2
    crops = affine_crop(maps, boxes, 2, 1.0, ratio, sampler=sampler)
    assert crops.shape == (2, 0, 2, 2)
    gradients = torch.autograd.grad(crops.sum(), [maps, boxes[0]])  # of an output in the graph, as roi_align's is
    assert [gradient.shape for gradient in gradients] == [(2, 0, 5, 5), (1, 4)]
    assert not gradients[1].any()


@both_samplers
@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("form", ["list", "tensor"])
def test_shapes_on_the_meta_device(sampler, ratio, form):
    maps = torch.empty(2, 40, 9, 10, device="meta", requires_grad=True)
    boxes = torch.empty(3, 5, device="meta", requires_grad=True)
    given = boxes if form == "tensor" else [boxes[:2, 1:], boxes[2:, 1:]]
    crops = affine_crop(maps, given, (3, 2), 0.5, ratio, sampler=sampler)
    assert crops.is_meta
    assert crops.shape == roi_align(maps, given, (3, 2), 0.5, ratio).shape
    assert [g.shape for g in torch.autograd.grad(crops.sum(), [maps, boxes])] == [maps.shape, boxes.shape]


@pytest.mark.parametrize("size", [np.int64(3), (np.int32(3), 3), torch.Size([3, 3]), [3, np.uint8(3)]])
def test_sizes_are_integers_of_any_kind(size):
    module = AffineCrop(size)
    assert repr(module) == repr(AffineCrop(3))
    assert module(MAP, [ONE]).shape == MultiScaleAffineCrop(["0"], size, 2)({"0": MAP}, [ONE], [(8, 8)]).shape


# --- Graphs of other makers ------------------------------------------------------------------------------------------


traced = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:FutureWarning")


class Pool(nn.Module):
    """A pooler of four levels whose call a trace can take: tensors alone."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, *tensors):
        maps, boxes = tensors[:4], list(tensors[4:])
        return self.pool(dict(zip("0123", maps)), boxes, [(64, 96)] * len(boxes))


@both_samplers
@traced
@pytest.mark.parametrize("images", [1, 2])
def test_jit_trace_answers_other_boxes_and_sizes(sampler, images):
    def inputs(count, size, seed):
        boxes = general_boxes(count, (30, 40), seed, torch.float32)
        return randn(images, 3, *size, dtype=torch.float32), with_index([k % images for k in range(count)], boxes)

    module = AffineCrop((3, 2), 0.5, 2, sampler=sampler)
    graph = torch.jit.trace(module, inputs(5, (15, 20), 0))
    for count, size in ((5, (15, 20)), (9, (12, 31)), (1, (4, 4)), (0, (15, 20))):
        arguments = inputs(count, size, count)
        torch.testing.assert_close(graph(*arguments), roi_align(*arguments, (3, 2), 0.5, 2), rtol=0, atol=1e-4)


@both_samplers
@traced
def test_jit_trace_of_a_pyramid_answers_boxes_on_other_levels(sampler):
    def inputs(counts, scale, seed):
        maps = [randn(2, 3, 64 // stride, 96 // stride, dtype=torch.float32, seed=seed) for stride in (4, 8, 16, 32)]
        return (*maps, *(general_boxes(count, (64, 96), seed, torch.float32) * scale for count in counts))

    settings = {"canonical_scale": 40, "canonical_level": 4}
    pool = Pool(MultiScaleAffineCrop(list("0123"), 3, 2, sampler=sampler, **settings))
    stock = Pool(MultiScaleRoIAlign(list("0123"), 3, 2, **settings))
    graph = torch.jit.trace(pool, inputs((6, 3), 1.0, 0))
    for counts, scale in (((6, 3), 1.0), ((2, 9), 0.3), ((0, 7), 0.1), ((4, 0), 3.0), ((0, 0), 1.0)):
        arguments = inputs(counts, scale, 1)
        torch.testing.assert_close(graph(*arguments), stock(*arguments), rtol=0, atol=1e-4)


@both_samplers
@traced
@pytest.mark.parametrize("ratio", [-1, 0])
def test_jit_trace_of_an_adaptive_crop_is_refused(sampler, ratio):
    """It would keep the numbers of samples of the boxes that it was traced with."""
    with pytest.raises(ValueError, match=f"sampling_ratio is {ratio}: .* cannot be traced"):
        torch.jit.trace(AffineCrop(2, 1.0, ratio, sampler=sampler), (MAP, torch.tensor([[0, 1.0, 1, 3, 3]])))


def test_a_symbolic_trace_has_it_as_a_leaf():
    traced = torch.fx.symbolic_trace(AffineCrop(3, 0.5, 2))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [affine_crop]
    maps, boxes = randn(1, 2, 9, 9), with_index([0, 0], general_boxes(2, (18, 18)))
    torch.testing.assert_close(traced(maps, boxes), roi_align(maps, boxes, 3, 0.5, 2))


@both_samplers
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_hessians_by_reverse_mode_and_directions_by_double_backward(sampler):
    """As the docstring says; PyTorch's grid_sample has no forward mode."""
    maps, box = randn(1, 2, 9, 9), general_boxes(1, (9, 9))

    def loss(box):
        return affine_crop(maps, [box], 3, 1.0, 2, sampler=sampler).square().sum()

    def difference(function, step=1e-6):
        """Central differences of a function of the box, along each of its coordinates."""
        moved = [(box + sign * step * row[None]) for row in torch.eye(4).double() for sign in (1, -1)]
        values = [function(one) for one in moved]
        return torch.stack([(a - b) / (2 * step) for a, b in zip(values[::2], values[1::2])], -1)

    gradient = torch.func.grad(loss)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(box)[0, :, 0]
    torch.testing.assert_close(hessian, difference(lambda one: gradient(one)[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, box)[0, :, 0], hessian)
    slope = torch.autograd.functional.jvp(loss, box, torch.ones_like(box))[1]
    torch.testing.assert_close(slope, difference(loss).sum(), rtol=1e-6, atol=1e-6)


@both_samplers
def test_list_of_many_images_in_bfloat16(sampler):
    """The image index is none of the boxes' numbers: bfloat16 counts to 256."""
    maps = torch.arange(300.0).view(300, 1, 1, 1).expand(300, 1, 4, 4)
    boxes = [torch.tensor([[1.0, 1.0, 3.0, 3.0]], dtype=torch.bfloat16)] * 300
    assert torch.equal(affine_crop(maps, boxes, 1, sampling_ratio=1, sampler=sampler).flatten(), torch.arange(300.0))
