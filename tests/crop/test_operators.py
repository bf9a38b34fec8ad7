"""The same checks for every crop: affine_crop with both samplers and both kinds of sample counts, and exact_crop."""

import doctest
import math
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.crops import (
    OPERATORS,
    TOLERANCES,
    both_samplers,
    for_sampler,
    general_boxes,
    python_roi_align,
    randn,
    slopes,
    with_index,
)
from torchvision.ops import RoIAlign, roi_align

import detector
from detector import AffineCrop, MultiScaleAffineCrop, affine_crop, exact_crop

both_alignments = pytest.mark.parametrize("aligned", [False, True])
both_forms = pytest.mark.parametrize("form", ["list", "tensor"])
both_ratios = pytest.mark.parametrize("ratio", [-1, 2])
sampled = pytest.mark.parametrize("name", [name for name in OPERATORS if "exact" not in name])
NAN, INF = math.nan, math.inf


def in_form(form, boxes, counts):
    """Boxes [K, 4] as a list by image, or with the image's index."""
    index = [float(image) for image, count in enumerate(counts) for _ in range(count)]
    return list(boxes.split(counts)) if form == "list" else with_index(index, boxes)


# --- Smoke: shapes, dtypes, layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_smoke(operator, device, low, autocast):
    """The output has the input's dtype; geometry is that of float32 features, in autocast too."""
    features = torch.randn(2, 3, 60, 80, device=device).to(low).requires_grad_()
    # 500 pixels from the origin bfloat16 has steps of 2 pixels.
    boxes = [for_sampler(operator.sampler, general_boxes(4, (60, 80), seed=i) * 8, every=4) for i in range(2)]
    boxes = [b.float().to(device).requires_grad_() for b in boxes]
    wide = features.detach().to(torch.promote_types(low, torch.float32)).requires_grad_()
    expected = operator(wide, boxes, (4, 3), 0.125)
    upstream = torch.randn(expected.shape, device=device)
    wanted = torch.autograd.grad(expected, [wide, *boxes], upstream.to(expected.dtype))
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        crops = operator(features, boxes, (4, 3), 0.125)
        gradients = torch.autograd.grad(crops, [features, *boxes], upstream.to(low))
    assert crops.shape == (2 * len(boxes[0]), 3, 4, 3)
    assert crops.is_contiguous()
    assert crops.dtype == gradients[0].dtype == low
    assert gradients[1].dtype == torch.float32
    # Values are rounded once, at the end. Box gradients sum rounded upstream values.
    eps = torch.finfo(low).eps if low.itemsize == 2 else 1e-6
    torch.testing.assert_close(crops.to(expected.dtype), expected, rtol=eps, atol=1e-5)
    for gradient, full in zip(gradients, wanted, strict=True):
        assert (gradient - full).norm() < max(4 * eps, 1e-5) * full.norm()


@pytest.mark.parametrize("layout", ["channels_last", "view"])
def test_layouts(operator, layout):
    base, boxes = randn(2, 8, 20, 22), [general_boxes(3, (10, 11), seed=i).requires_grad_() for i in range(2)]
    source = base[:, 1::2, ::2, 1::2]
    if layout == "channels_last":
        source = source.contiguous(memory_format=torch.channels_last)
    results = []
    for features in (source.detach(), source.contiguous().detach()):
        features.requires_grad_()
        crops = operator(features, boxes)
        results.append([crops, *torch.autograd.grad(crops.square().sum(), [features, *boxes])])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    assert results[0][0].is_contiguous()
    if layout == "channels_last" and operator.sampler != "grid_sample":  # the gather's gradient has the map's layout
        assert results[0][1].is_contiguous(memory_format=torch.channels_last)


@both_forms
def test_meta_device(operator, form):
    maps, boxes = (torch.empty(*shape, device="meta", requires_grad=True) for shape in [(2, 40, 9, 10), (3, 5)])
    given = boxes if form == "tensor" else [boxes[:2, 1:], boxes[2:, 1:]]
    crops = operator(maps, given)
    assert crops.is_meta
    assert crops.shape == (3, 40, 2, 3)
    assert [g.shape for g in torch.autograd.grad(crops.sum(), [maps, boxes])] == [maps.shape, boxes.shape]


def test_boxes_of_another_dtype(operator):
    features, boxes = randn(1, 2, 30, 40), [general_boxes(5, (30, 40))]
    result = operator(features.float(), boxes)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), operator(features, boxes), rtol=0, atol=5e-5)
    half = [boxes[0].bfloat16()]
    assert torch.equal(operator(features.float(), half), operator(features.float(), [half[0].float()]))
    # bfloat16 counts to 256 only.
    maps = torch.arange(300.0).view(300, 1, 1, 1).expand(300, 1, 4, 4)
    many = [torch.tensor([[1.0, 1.0, 3.0, 3.0]], dtype=torch.bfloat16)] * 300
    torch.testing.assert_close(operator(maps, many, 1).flatten(), torch.arange(300.0), rtol=1e-6, atol=0)


# --- Values ----------------------------------------------------------------------------------------------------------


def boxes_of_every_kind(size, ratio, aligned, generator):
    """Every pair of the kinds of sides below, [K, 4] in pixels of a map."""
    huge = 1e4 if ratio > 0 else 200.0  # adaptively roi_align would weigh 1e8 samples

    def sides(pixels):
        def uniform(low, high):
            return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

        border = [-1.0, -0.5, 0.0, 0.5, pixels - 1.0, pixels - 0.5, float(pixels), pixels + 0.5]
        start, whole = uniform(-pixels, 2 * pixels), math.floor(uniform(-pixels, pixels))
        return {
            "inside": sorted([uniform(0, pixels), uniform(0, pixels)]),
            "across": [uniform(-pixels, 0), uniform(pixels, 2 * pixels)],
            "outside": [pixels + 2.3, 2.7 * pixels + 3],
            "border": sorted(border[int(uniform(0, 8))] for _ in range(2)),
            "integer": [whole, whole + math.floor(uniform(0, pixels))],
            "subpixel": [start, start + uniform(1e-3, 0.9)],
            "huge": [-uniform(pixels, huge), uniform(2 * pixels, huge)],
            "zero": [start, start],
            "inverted": [start, start - uniform(0, pixels)],
        }

    y, x = sides(size[0]), sides(size[1])
    # Adaptively torchvision crashes on a box that is inverted along one axis: its number of samples is negative.
    pairs = [(a, b) for a in y for b in x if ratio > 0 or not aligned or (a == "inverted") == (b == "inverted")]
    return torch.tensor([[x[b][0], y[a][0], x[b][1], y[a][1]] for a, b in pairs], dtype=torch.float64)


@sampled
@both_alignments
@pytest.mark.parametrize("size", [(7, 9), (1, 6), (1, 1), (40, 33)], ids=str)
def test_values_equal_roi_align(name, size, aligned, device, dtype):
    operator, generator = OPERATORS[name], torch.Generator().manual_seed(0)
    for scale in (1.0, 0.5, 0.3, 2.0):
        boxes = boxes_of_every_kind(size, operator.ratio, aligned, generator) / scale
        boxes = for_sampler(operator.sampler, boxes, every=23)
        if dtype == torch.float32:  # which cannot tell a border on which samples of huge boxes lie
            boxes = boxes[boxes.abs().amax(1) * scale < 300]
        counts = [len(boxes) // 2, 0, len(boxes) - len(boxes) // 2]
        boxes = [b.to(device, dtype) for b in boxes.split(counts)]
        ours, theirs = (randn(3, 2, *size).to(device, dtype).requires_grad_() for _ in range(2))
        result = operator(ours, boxes, (2, 3), scale, aligned)
        expected = operator.reference(theirs, boxes, (2, 3), scale, aligned)
        atol = TOLERANCES[dtype]
        torch.testing.assert_close(result, expected, rtol=0, atol=atol)
        upstream = randn(*expected.shape, seed=1).to(device, dtype)
        (gradient,) = torch.autograd.grad(result, ours, upstream)
        (wanted,) = torch.autograd.grad(expected, theirs, upstream)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=10 * atol)


@both_alignments
def test_exact_values_are_the_limit_of_roi_align(aligned, device, dtype):
    maps, boxes = torch.rand(2, 5, 20, 24, dtype=dtype), general_boxes(24, (20, 24), dtype=dtype) * 1.25
    maps, boxes = maps.to(device), [boxes[:10].to(device), boxes[10:].to(device)]
    found = exact_crop(maps, boxes, 3, 0.8, aligned)
    crops = [roi_align(maps, boxes, 3, 0.8, ratio, aligned) for ratio in (2, 8, 32, 128)]
    errors = [(points - found).abs().mean().item() for points in crops]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 27 * errors[3]
    assert errors[3] < 5e-4


@both_forms
@pytest.mark.parametrize("counts", [[3, 2, 4], [0, 5, 0], [40, 1, 1], [3, 2], []], ids=str)
def test_forms_of_boxes(operator, counts, form):
    """Images without boxes, unequal counts, and a list that is shorter than the batch."""
    features = torch.rand(3, 2, 8, 9, dtype=torch.float64).requires_grad_()
    boxes = general_boxes(sum(counts), (8, 9)).requires_grad_()
    result = operator(features, in_form(form, boxes, counts))
    expected = operator.reference(features, in_form("tensor", boxes.detach(), counts))
    torch.testing.assert_close(result, expected, rtol=0, atol=max(operator.error, 1e-10))
    if not counts:
        return
    # Each RoI alone, in another order: the same gradients in the same places.
    index = [image for image, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(index)).tolist()
    unsorted = operator(features, with_index([index[k] for k in order], boxes[order]))
    upstream = randn(*result.shape)
    gradients = torch.autograd.grad(result, [features, boxes], upstream)
    wanted = torch.autograd.grad(unsorted, [features, boxes], upstream[order])
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-10)


def test_pixels_outside_every_box_are_not_read(operator):
    features = torch.full((3, 2, 30, 30), NAN, dtype=torch.float64)
    features[0, :, 8:17, 5:20] = torch.rand(2, 9, 15).double()
    features[2, :, :12, 18:] = torch.rand(2, 12, 12).double()
    # Image 1 has no boxes, and image 2 has fewer than image 0: their padding must not read either.
    boxes = torch.tensor([[7.2, 10.1, 17.3, 14.2], [8.1, 9.9, 12.2, 15.3], [20.3, -6.2, 41.9, 9.4]]).double()
    boxes = list(boxes.split([2, 0, 1]))
    result = operator(features, boxes, 3, aligned=True)
    expected = operator.reference(features.nan_to_num(), boxes, 3, aligned=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=max(operator.error, 1e-10))


# --- Gradients -------------------------------------------------------------------------------------------------------


@both_alignments
def test_gradcheck(operator, aligned, device):
    features = randn(2, 1, 3, 4).to(device).requires_grad_()
    corners = general_boxes(2, (6, 8), seed=2)
    if operator.ratio == 100:  # the exact crop has no kinks on integer boxes
        corners[0] = torch.tensor([2.0, 2, 6, 4])
    corners = for_sampler(operator.sampler, corners, every=2).to(device).requires_grad_()

    def crop(features, corners):
        return operator(features, with_index([1, 0][: len(corners)], corners), (2, 1), 0.5, aligned)

    assert torch.autograd.gradcheck(crop, (features, corners))


def test_gradgradcheck(operator):
    features, corners = randn(1, 1, 3, 4).requires_grad_(), general_boxes(1, (3, 4), seed=3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda f, c: operator(f, [c], (1, 2)), (features, corners))


@sampled
@both_alignments
def test_box_gradients_equal_those_of_torchvisions_python_roi_align(name, aligned, device):
    """Boxes inside the map: there torchvision's Python version has the values of its operator."""
    operator = OPERATORS[name]
    features = randn(2, 3, 11, 14).to(device).requires_grad_()
    corners = torch.rand(24, 4, dtype=torch.float64) * torch.tensor([12.0, 9, 12, 9]) + 1
    corners = torch.cat([corners.view(24, 2, 2).amin(1), corners.view(24, 2, 2).amax(1)], 1)
    corners[:4, 2:] = corners[:4, :2] + torch.tensor([0.4, 0.7])  # not aligned, they are widened to a pixel
    rois = with_index([0, 1] * 12, corners / 0.3).to(device).requires_grad_()
    expected = python_roi_align(features, rois, (3, 4), 0.3, operator.ratio, aligned)
    result = operator(features, rois, (3, 4), 0.3, aligned)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    upstream = randn(*result.shape, seed=5).to(device)
    gradients = torch.autograd.grad(result, [features, rois], upstream)
    wanted = torch.autograd.grad(expected, [features, rois], upstream)
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-9)
    assert wanted[1][:, 1:].abs().mean() > 0.1
    assert not gradients[1][:, 0].any()  # the image index


@both_alignments
def test_box_gradients_equal_finite_differences_across_the_border(operator, aligned, device):
    features, boxes = torch.rand(1, 3, 11, 14).double().to(device), general_boxes(24, (11, 14), seed=4) / 0.3
    boxes = boxes.to(device).requires_grad_()
    crops = operator(features, [boxes], (3, 4), 0.3, aligned)
    upstream = randn(*crops.shape, seed=5).to(device)
    (gradient,) = torch.autograd.grad(crops, boxes, upstream)
    reference = OPERATORS["exact"] if operator.ratio == 100 else operator.reference
    expected = slopes(lambda moved: reference(features, [moved], (3, 4), 0.3, aligned), boxes.detach(), upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    assert expected.abs().mean() > 0.05


def test_a_map_of_one_pixel_is_flat(operator):
    boxes = torch.tensor([[0.2, 0.1, 0.9, 0.8]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(operator(randn(1, 1, 1, 1), [boxes], 2, aligned=True).sum(), boxes)
    assert gradient.abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_hessians_by_reverse_mode(operator):
    maps, box = randn(2, 2, 9, 9), general_boxes(1, (9, 9))

    def loss(box):
        return operator(maps, [box[:0], box], 3).square().sum()

    def difference(function, step=1e-6):
        moved = [(box + sign * step * row[None]) for row in torch.eye(4).double() for sign in (1, -1)]
        values = [function(one) for one in moved]
        return torch.stack([(a - b) / (2 * step) for a, b in zip(values[::2], values[1::2])], -1)

    hessian = torch.func.jacrev(torch.func.jacrev(loss))(box)[0, :, 0]
    torch.testing.assert_close(hessian, difference(lambda b: torch.func.grad(loss)(b)[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, box)[0, :, 0], hessian)


# --- Border ----------------------------------------------------------------------------------------------------------


@both_samplers
@both_alignments
@pytest.mark.parametrize("ratio", [-1, 1, 2, 3])
def test_every_integer_box_of_a_small_map(sampler, ratio, aligned, device):
    """Their samples lie exactly on the border of what counts as zero. A wrong decision is off by a pixel's value."""
    features = (1 + randn(1, 1, 5, 4).abs()).to(device)
    sides = torch.combinations(torch.arange(-3.0, 8).double(), with_replacement=True)
    pairs = torch.cartesian_prod(torch.arange(len(sides)), torch.arange(len(sides)))
    (x1, x2), (y1, y2) = sides[pairs[:, 0]].unbind(1), sides[pairs[:, 1]].unbind(1)
    boxes = for_sampler(sampler, torch.stack([x1, y1, x2, y2], 1), every=131).to(device)
    for output_size in [(2, 3), (7, 7)]:
        result = affine_crop(features, [boxes], output_size, 1.0, ratio, aligned, sampler=sampler)
        expected = roi_align(features, [boxes], output_size, 1.0, ratio, aligned)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@both_samplers
@pytest.mark.parametrize("box", [[7.0, 1, 2, 5], [1.0, 6, 5, 2]])
def test_a_box_inverted_along_one_axis_has_no_adaptive_samples(sampler, box):
    boxes = torch.tensor([box, [1.3, 1.4, 5.2, 4.9]], dtype=torch.float64, requires_grad=True)
    features = randn(1, 2, 8, 9).requires_grad_()
    result = affine_crop(features, [boxes], 3, 1.0, -1, aligned=True, sampler=sampler)
    assert not result[0].any()
    expected = roi_align(features, [boxes[1:].detach()], 3, 1.0, -1, aligned=True)
    torch.testing.assert_close(result[1:], expected, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(result.sum(), [boxes, features])
    assert not gradients[0][0].any()
    assert gradients[1].isfinite().all()


@both_samplers
@both_alignments
def test_boxes_far_larger_than_the_map_adaptively(sampler, aligned):
    features = randn(1, 2, 6, 5)
    box = torch.tensor([[-40.3, -70.2, 109.7, 79.8]], dtype=torch.float64)  # 150 x 150 in 3 x 3 bins: 50 samples a bin
    result = affine_crop(features, [box], 3, 1.0, -1, aligned, sampler=sampler)
    torch.testing.assert_close(result, roi_align(features, [box], 3, 1.0, 50, aligned), rtol=0, atol=1e-10)
    huge = torch.tensor([[-5e4, -5e4, 5e4, 5e4]], dtype=torch.float64, requires_grad=True)
    result = affine_crop(features, [huge], 3, 1.0, -1, aligned, sampler=sampler)
    assert torch.autograd.grad(result.sum(), huge)[0].isfinite().all()
    # The middle bin, 33,333 pixels wide, holds the map and the ring that repeats its edge.
    ring = F.pad(features, (1, 1, 1, 1), mode="replicate")
    assert 0 < result[0, :, 1, 1].abs().max() < ring.abs().sum() / 3e4**2
    assert not result[0, :, 0, 0].any()


# --- Empty -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("form", ["tensor", "empty list", "list of empty"])
def test_no_boxes(operator, form, images, device):
    boxes = {
        "tensor": torch.zeros(0, 5, device=device, requires_grad=True),
        "empty list": [],
        "list of empty": [torch.zeros(0, 4, device=device, requires_grad=True) for _ in range(images)],
    }[form]
    features = torch.randn(images, 2, 5, 6, device=device, requires_grad=True)
    result = operator(features, boxes)
    assert result.shape == (0, 2, 2, 3)
    assert result.dtype == torch.float32
    result.sum().backward()  # a step whose images are all empty does not raise
    assert not features.grad.any()


def test_no_channels(operator):
    maps = torch.zeros(2, 0, 5, 5, requires_grad=True)
    boxes = [torch.tensor([[0.0, 0.0, 3.0, 3.0]], requires_grad=True)] * 2
    crops = operator(maps, boxes)
    assert crops.shape == (2, 0, 2, 3)
    gradients = torch.autograd.grad(crops.sum(), [maps, boxes[0]])
    assert [gradient.shape for gradient in gradients] == [(2, 0, 5, 5), (1, 4)]
    assert not gradients[1].any()


# --- Compile, export and trace ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("form", "backend", "channels"), [("list", "aot_eager", 64), ("tensor", "aot_eager", 3), ("list", "inductor", 3)]
)
def test_compiles_into_one_graph(form, backend, channels):
    features = torch.randn(2, channels, 8, 9, requires_grad=True)
    corners = general_boxes(5, (16, 18), dtype=torch.float32).requires_grad_()
    boxes = in_form(form, corners, [2, 3])
    expected = affine_crop(features, boxes, (2, 3), 0.5, 2, sampler="gather")
    compiled = torch.compile(affine_crop, fullgraph=True, backend=backend)
    result = compiled(features, boxes, (2, 3), 0.5, 2)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    upstream = torch.randn(result.shape)
    gradients = torch.autograd.grad(result, [features, corners], upstream)
    wanted = torch.autograd.grad(expected, [features, corners], upstream)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


@both_forms
def test_torch_export(form):
    """As grid_sample, also where "auto" would take the gather."""
    features, corners = randn(2, 64, 8, 9), general_boxes(5, (16, 18))
    boxes = in_form(form, corners, [2, 3])
    program = torch.export.export(AffineCrop((2, 3), 0.5, 2), (features, boxes))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("grid_sampler" in name for name in operators)
    assert all(name.startswith("aten.") or "getitem" in name for name in operators), operators
    expected = roi_align(features, boxes, (2, 3), 0.5, 2)
    torch.testing.assert_close(program.module()(features, boxes), expected, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:FutureWarning")
@both_samplers
@pytest.mark.parametrize("images", [1, 2])
def test_jit_trace_takes_other_boxes_and_sizes(sampler, images):
    def inputs(count, size, seed):
        boxes = general_boxes(count, (30, 40), seed, torch.float32)
        return randn(images, 3, *size, dtype=torch.float32), with_index([k % images for k in range(count)], boxes)

    graph = torch.jit.trace(AffineCrop((3, 2), 0.5, 2, sampler=sampler), inputs(5, (15, 20), 0))
    for count, size in ((5, (15, 20)), (9, (12, 31)), (1, (4, 4)), (0, (15, 20))):
        arguments = inputs(count, size, count)
        torch.testing.assert_close(graph(*arguments), roi_align(*arguments, (3, 2), 0.5, 2), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("name", [name for name in OPERATORS if not name.endswith("2")])
def test_work_that_depends_on_the_box_is_not_traced(name):
    with pytest.raises(ValueError, match="traced"):
        torch.jit.trace(lambda maps, boxes: OPERATORS[name](maps, boxes), (MAP, with_index([0], ONE)))


def test_symbolic_traces_have_it_as_a_leaf():
    traced = torch.fx.symbolic_trace(AffineCrop(3, 0.5, 2))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [affine_crop]


# --- Invalid arguments -----------------------------------------------------------------------------------------------

MAP = torch.zeros(2, 3, 8, 9)
ONE = torch.tensor([[1.0, 2, 5, 6]])


@pytest.mark.parametrize("crop", [affine_crop, exact_crop])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((MAP[0], [ONE], 2), ValueError, "input"),
        ((MAP[..., :0], [ONE], 2), ValueError, "input"),
        ((MAP.long(), [ONE], 2), TypeError, "input .*int64"),
        ((MAP, ONE, 2), ValueError, r"boxes .*\[1, 4\]"),
        ((MAP, [ONE, torch.zeros(1, 5)], 2), ValueError, r"boxes\[1\] .*\[1, 5\]"),
        ((MAP, [ONE, ONE.long()], 2), TypeError, r"boxes\[1\]"),
        ((MAP, [[1.0, 2, 5, 6]], 2), TypeError, r"boxes\[0\] .*list"),
        ((MAP, None, 2), TypeError, "boxes .*NoneType"),
        ((MAP, [ONE] * 3, 2), ValueError, "boxes .*3 .*2"),
        ((MAP, [ONE.to("meta")], 2), TypeError, r"boxes\[0\] .*meta and cpu"),
        ((MAP, with_index([2], ONE), 2), ValueError, r"boxes\[0\] .*2.0"),
        ((MAP, with_index([0, -1], ONE.repeat(2, 1)), 2), ValueError, r"boxes\[1\] .*-1.0"),
        ((MAP, with_index([0.5], ONE), 2), ValueError, r"boxes\[0\] .*0.5"),
        ((MAP, with_index([NAN], ONE), 2), ValueError, r"boxes\[0\] .*nan"),
        ((MAP, [ONE, torch.tensor([[0, 1.0, NAN, 2]])], 2), ValueError, "boxes .*finite.*RoI 1"),
        ((MAP, [ONE * 1e37], 2, 1e3), ValueError, "boxes .*finite.* spatial_scale 1000.0"),
        ((MAP, [ONE], (3, 0)), ValueError, "output_size"),
        ((MAP, [ONE], (1, 2, 3)), TypeError, "output_size"),
        ((MAP, [ONE], 2.0), TypeError, "output_size"),
        ((MAP, [ONE], 2, 0.0), ValueError, "spatial_scale"),
        ((MAP, [ONE], 2, INF), ValueError, "spatial_scale"),
    ],
)
def test_errors_name_the_argument(crop, arguments, error, message):
    with pytest.raises(error, match=message):
        crop(*arguments)


def invalid_rois(form):
    corners, index, bad = general_boxes(8, (8, 9), dtype=torch.float32), [0.0, 0, 0, 0, 1, 1, 1, 1], [1, 3, 4]
    corners[1, 0], corners[3, 2], corners[4, 3] = NAN, INF, -INF
    if form == "tensor":
        index[0], index[5], index[6], index[7], bad = -1.0, 0.5, 2.0, NAN, [0, 1, 3, 4, 5, 6, 7]
    return corners.requires_grad_(), index, bad


def assert_invalid_rois_are_nan(crop, reference, form, device):
    """They are NaN, and harm no other RoI and no gradient."""
    features = torch.randn(2, 3, 8, 9, device=device, requires_grad=True)
    corners, index, bad = invalid_rois(form)
    on_device = corners.to(device)
    boxes = [on_device[:4], on_device[4:]] if form == "list" else with_index(index, on_device)
    result = crop(features, boxes)
    good = [k for k in range(8) if k not in bad]
    assert result[bad].isnan().all()
    expected = reference(features, with_index(index, on_device.detach())[good])
    torch.testing.assert_close(result[good], expected, rtol=0, atol=1e-4)
    (wanted,) = torch.autograd.grad(expected.sum(), features)
    # A loss that is NaN says so at these RoIs only.
    for loss in (result[good].sum(), result.sum()):
        gradients = torch.autograd.grad(loss, [features, corners], retain_graph=True)
        torch.testing.assert_close(gradients[0], wanted, rtol=0, atol=1e-4)
        assert not gradients[1][bad].any()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@both_forms
@both_samplers
def test_compiled_invalid_rois_are_nan(sampler, form):
    """grid_sample compiles into one graph, the gather runs outside of it."""
    crop = torch.compile(affine_crop, backend="aot_eager", fullgraph=sampler == "grid_sample")
    reference = OPERATORS[f"{sampler}2"].reference
    assert_invalid_rois_are_nan(lambda m, b: crop(m, b, (2, 3), 1.0, 2, sampler=sampler), reference, form, "cpu")
    if sampler == "gather":
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(affine_crop, backend="aot_eager", fullgraph=True)(MAP, [ONE], 2, 1.0, 2, sampler=sampler)


@pytest.mark.gpu
@both_forms
def test_invalid_rois_are_nan_on_a_gpu(operator, form):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    if operator.ratio == 100:
        assert operator(*(t.cuda() for t in (MAP, with_index([7], ONE)))).isnan().all()
    else:
        assert_invalid_rois_are_nan(operator, operator.reference, form, "cuda")


# --- Modules and documentation ---------------------------------------------------------------------------------------


@both_ratios
def test_the_module_equals_the_function(ratio):
    features, boxes = randn(1, 2, 8, 9), [general_boxes(3, (16, 18))]
    module = AffineCrop((2, 3), 0.5, ratio, aligned=True)
    assert torch.equal(module(features, boxes), affine_crop(features, boxes, (2, 3), 0.5, ratio, True))
    assert not module.state_dict()
    assert repr(module).startswith(repr(RoIAlign((2, 3), 0.5, ratio, True)).replace("RoIAlign", "AffineCrop")[:-1])
    with pytest.raises(ValueError, match="output_size"):
        AffineCrop(0)


@pytest.mark.parametrize("size", [np.int64(3), (np.int32(3), 3), torch.Size([3, 3]), [3, np.uint8(3)]])
def test_sizes_are_integers_of_any_kind(size):
    module = AffineCrop(size)
    assert module.output_size == (3, 3)
    assert module(MAP, [ONE]).shape == MultiScaleAffineCrop(["0"], size, 2)({"0": MAP}, [ONE], [(8, 8)]).shape


@pytest.mark.parametrize("name", ["crop", "geometry", "pyramid"])
def test_docstring_examples(name):
    module = import_module(f"detector.crop.{name}")
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
    for public in set(detector.crop.__all__) & vars(module).keys():
        assert ">>> " in getattr(detector, public).__doc__
