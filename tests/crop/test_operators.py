"""The same checks for every crop, by every sampler or method, with fixed and adaptive numbers of samples."""

import doctest
import io
import math
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.crops import (
    OPERATORS,
    TOLERANCES,
    aligned_operators,
    both_samplers,
    for_sampler,
    general_boxes,
    operators,
    python_roi_align,
    randn,
    slopes,
    with_index,
)
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torchvision.ops import RoIAlign, roi_align

import detector
from detector import (
    AffineCrop,
    MultiScaleAffineCrop,
    PrRoIPool2D,
    RoIAlignRotated,
    affine_crop,
    prroi_pool2d,
    roi_align_rotated,
)

both_alignments = pytest.mark.parametrize("aligned", [False, True])
both_forms = pytest.mark.parametrize("form", ["list", "tensor"])
both_ratios = pytest.mark.parametrize("ratio", [-1, 2])
RULES = {name: OPERATORS[name] for name in ("grid_sample2", "precise products", "rotated2")}  # one of each
one_of_each = operators(lambda operator: operator in RULES.values())
in_graphs = operators(lambda operator: operator.ratio != -1 and operator.sampler != "triton")
adaptive = operators(lambda operator: operator.ratio == -1)
NAN, INF = math.nan, math.inf


def is_affine(operator):
    return operator.rule == "affine"


class Module(torch.nn.Module):
    """An operator on its own boxes, for exports, which take a module."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, maps, boxes):
        return self.operator.crop(maps, boxes, (2, 3), 0.5, False)


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
    # A backward under autocast, which PyTorch advises against, would round the factors of the products.
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast and operator.sampler != "products"):
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
    # The gather's gradient has the map's layout.
    if layout == "channels_last" and operator.sampler in ("gather", "triton"):
        assert results[0][1].is_contiguous(memory_format=torch.channels_last)


@both_forms
def test_meta_device(operator, form):
    maps, boxes = (torch.empty(*shape, device="meta", requires_grad=True) for shape in [(2, 40, 9, 10), (3, 5)])
    given = boxes if form == "tensor" else [boxes[:2, 1:], boxes[2:, 1:]]
    crops = operator(maps, given)
    assert crops.is_meta
    assert crops.shape == (3, 40, 2, 3)
    assert [g.shape for g in torch.autograd.grad(crops.sum(), [maps, boxes])] == [maps.shape, boxes.shape]


@pytest.mark.parametrize(
    ("name", "form", "reads"),
    [
        ("precise products", "list", False),
        ("precise products", "tensor", False),
        ("precise gather", "list", True),
        ("rotated2", "list", False),
        ("rotated2", "tensor", True),
        ("rotated-1", "list", True),
    ],
)
def test_values_that_a_forward_reads_on_a_gpu(name, form, reads):
    """None, or some: on tensors without values, as if on a GPU. affine_crop is in test_samplers."""
    with FakeTensorMode():
        maps, boxes = torch.empty(2, 64, 20, 30, device="cuda"), torch.empty(5, 4, device="cuda")
        given = list(boxes.split([2, 3])) if form == "list" else torch.cat([boxes[:, :1], boxes], 1)
        with pytest.raises(DynamicOutputShapeException) if reads else nullcontext():
            assert OPERATORS[name](maps, given).shape == (5, 64, 2, 3)


def test_boxes_of_another_dtype(operator):
    features, boxes = randn(1, 2, 30, 40), [general_boxes(5, (30, 40))]
    result = operator(features.float(), boxes)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), operator(features, boxes), rtol=0, atol=5e-5)
    half, rest = operator.own(boxes)[0].bfloat16(), ((2, 3), 1.0, False)
    wide = operator.crop(features.float(), [half.float()], *rest)
    assert torch.equal(operator.crop(features.float(), [half], *rest), wide)
    single = operator.own(boxes)[0].float()  # computed in float64, as the maps are
    result = operator.crop(features, [single], *rest)
    assert result.dtype == torch.float64
    assert torch.equal(result, operator.crop(features, [single.double()], *rest))
    # bfloat16 counts to 256 only.
    maps = torch.arange(300.0).view(300, 1, 1, 1).expand(300, 1, 4, 4)
    many = [torch.tensor([[1.0, 1.0, 3.0, 3.0]], dtype=torch.bfloat16)] * 300
    torch.testing.assert_close(operator(maps, many, 1).flatten(), torch.arange(300.0), rtol=1e-6, atol=0)


# --- Values ----------------------------------------------------------------------------------------------------------


def boxes_of_every_kind(size, operator, aligned, generator):
    """Every pair of the kinds of sides below, [K, 4] in pixels of a map."""
    huge = 100.0 if operator.ratio == -1 else 1e4  # adaptively the reference would weigh 1e8 samples

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
    pairs = [(a, b) for a in y for b in x]
    if operator.rule == "rotated":  # a negative side is an error
        pairs = [pair for pair in pairs if "inverted" not in pair]
    elif operator.ratio == -1 and aligned:
        # torchvision crashes on a box that is inverted along one axis: its number of samples is negative.
        pairs = [(a, b) for a, b in pairs if (a == "inverted") == (b == "inverted")]
    return torch.tensor([[x[b][0], y[a][0], x[b][1], y[a][1]] for a, b in pairs], dtype=torch.float64)


@aligned_operators()
@pytest.mark.parametrize("size", [(7, 9), (1, 6), (1, 1), (40, 33)], ids=str)
def test_values_equal_the_reference(operator, size, aligned, device, dtype):
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 0.5, 0.3, 2.0):
        boxes = boxes_of_every_kind(size, operator, aligned, generator) / scale
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


@both_forms
@pytest.mark.parametrize("counts", [[3, 2, 4], [0, 5, 0], [40, 1, 1], [3, 2], []], ids=str)
def test_forms_of_boxes(operator, counts, form):
    """Images without boxes, unequal counts, and a list that is shorter than the batch."""
    features = torch.rand(3, 2, 8, 9, dtype=torch.float64).requires_grad_()
    boxes = general_boxes(sum(counts), (8, 9)).requires_grad_()
    result = operator(features, in_form(form, boxes, counts))
    expected = operator.reference(features, in_form("tensor", boxes.detach(), counts))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
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


# The products multiply every pixel, and NaN times 0 is NaN.
@operators(lambda operator: operator.sampler != "products")
def test_pixels_outside_every_box_are_not_read(operator):
    features = torch.rand(3, 2, 30, 30, dtype=torch.float64, requires_grad=True)
    # Image 1 has no boxes, and image 2 has fewer than image 0: their padding must not read either.
    boxes = torch.tensor([[7.2, 10.1, 17.3, 14.2], [8.1, 9.9, 12.2, 15.3], [20.3, -6.2, 41.9, 9.4]]).double()
    boxes = list(boxes.split([2, 0, 1]))
    expected = operator.reference(features, boxes, 3, aligned=True)
    (weights,) = torch.autograd.grad(expected.sum(), features)
    near = F.max_pool2d(weights, 3, 1, 1) > 0  # a sample on an edge pixel's centre reads its neighbour by a rounding
    assert not near[1].any()
    assert near[[0, 2]].double().mean() < 0.3
    result = operator(torch.where(near, features, NAN), boxes, 3, aligned=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


# --- Gradients -------------------------------------------------------------------------------------------------------


@aligned_operators()
def test_gradcheck(operator, aligned, device):
    features = randn(2, 1, 3, 4).to(device).requires_grad_()
    corners = general_boxes(2, (6, 8), seed=2)
    if operator.rule == "precise":  # which has no kinks on integer boxes
        corners[0] = torch.tensor([2.0, 2, 6, 4])
    corners = for_sampler(operator.sampler, corners, every=2).to(device).requires_grad_()

    def crop(features, corners):
        return operator(features, with_index([1, 0][: len(corners)], corners), (2, 1), 0.5, aligned)

    assert torch.autograd.gradcheck(crop, (features, corners))


def test_gradgradcheck(operator):
    features, corners = randn(1, 1, 3, 4).requires_grad_(), general_boxes(1, (3, 4), seed=3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda f, c: operator(f, [c], (1, 2)), (features, corners))


@aligned_operators(is_affine)
def test_box_gradients_equal_those_of_torchvisions_python_roi_align(operator, aligned, device):
    """Boxes inside the map: there torchvision's Python version has the values of its operator."""
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


@aligned_operators()
def test_box_gradients_equal_finite_differences_across_the_border(operator, aligned, device):
    features, boxes = torch.rand(1, 3, 11, 14).double().to(device), general_boxes(24, (11, 14), seed=4) / 0.3
    boxes = boxes.to(device).requires_grad_()
    crops = operator(features, [boxes], (3, 4), 0.3, aligned)
    upstream = randn(*crops.shape, seed=5).to(device)
    (gradient,) = torch.autograd.grad(crops, boxes, upstream)

    def reference(moved):
        return operator.reference(features, [moved], (3, 4), 0.3, aligned)

    expected = slopes(reference, boxes.detach(), upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    assert expected.abs().mean() > 0.05


@operators(lambda operator: operator.rule != "precise")  # whose surface falls to zero at once
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


def test_activation_checkpoints(operator):
    features, boxes = randn(2, 2, 9, 10).requires_grad_(), [general_boxes(2, (9, 10), seed=i) for i in range(2)]
    boxes = [b.requires_grad_() for b in boxes]
    expected = torch.autograd.grad(operator(features, boxes).square().sum(), [features, *boxes])
    crops = checkpoint(lambda *tensors: operator(tensors[0], tensors[1:]), features, *boxes, use_reentrant=False)
    gradients = torch.autograd.grad(crops.square().sum(), [features, *boxes])
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-10)


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


def graph_inputs(operator, form, channels=3, dtype=torch.float32):
    corners = general_boxes(5, (16, 18), dtype=dtype).requires_grad_()
    maps = randn(2, channels, 8, 9, dtype=dtype).requires_grad_()
    return maps, operator.own(in_form(form, corners, [2, 3])), [maps, corners]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@one_of_each
@pytest.mark.parametrize(("form", "backend"), [("list", "aot_eager"), ("tensor", "aot_eager"), ("list", "inductor")])
def test_compiles_into_one_graph(operator, form, backend):
    maps, boxes, inputs = graph_inputs(operator, form)
    expected = Module(operator)(maps, boxes)
    upstream = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
    result = torch.compile(Module(operator), fullgraph=True, backend=backend)(maps, boxes)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(result, inputs, upstream)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_auto_compiles_where_it_would_take_the_gather(monkeypatch):
    monkeypatch.setattr(sys.modules[prroi_pool2d.__module__], "MAX_PRODUCTS", 0)
    maps, boxes = randn(2, 64, 8, 9), [general_boxes(5, (8, 9))] * 2
    for crop, arguments in ((affine_crop, (7, 1.0, 2)), (prroi_pool2d, (7, 7))):
        compiled = torch.compile(crop, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(maps, boxes, *arguments), crop(maps, boxes, *arguments), rtol=0, atol=1e-10)


@both_forms
@pytest.mark.parametrize(
    ("module", "name", "wanted"),
    [
        (AffineCrop((2, 3), 0.5, 2), "grid_sample2", "grid_sampler"),
        (PrRoIPool2D(2, 3, 0.5), "precise products", "matmul"),
        (RoIAlignRotated((2, 3), 0.5, 2, False), "rotated2", "grid_sampler"),
    ],
    ids=list(RULES),
)
def test_torch_export(module, name, wanted, form):
    """With operators of PyTorch alone, also where "auto" would take the gather."""
    maps, boxes, _ = graph_inputs(OPERATORS[name], form, 64, torch.float64)
    program = torch.export.export(module, (maps, boxes))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(wanted in name for name in operators)
    assert all(name.startswith("aten.") or "getitem" in name for name in operators), operators
    expected = OPERATORS[name].own_reference(maps, boxes, (2, 3), 0.5, False)
    torch.testing.assert_close(program.module()(maps, boxes), expected, rtol=0, atol=1e-10)


def inputs_of(operator, images, count, size):
    boxes = general_boxes(count, (30, 40), count, torch.float32)
    rois = operator.own(with_index([k % images for k in range(count)], boxes))
    return randn(images, 3, *size, dtype=torch.float32), rois


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:FutureWarning")
@in_graphs
@pytest.mark.parametrize("images", [1, 2])
def test_jit_trace_takes_other_boxes_and_sizes(operator, images):
    graph = torch.jit.trace(Module(operator), inputs_of(operator, images, 5, (15, 20)))
    for count, size in ((5, (15, 20)), (9, (12, 31)), (1, (4, 4)), (0, (15, 20))):
        arguments = inputs_of(operator, images, count, size)
        expected = operator.own_reference(*arguments, (2, 3), 0.5, False)
        torch.testing.assert_close(graph(*arguments), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:FutureWarning")
@adaptive
def test_work_that_depends_on_the_box_is_not_traced(operator):
    with pytest.raises(ValueError, match="traced"):
        torch.jit.trace(lambda maps, boxes: operator(maps, boxes), (MAP, with_index([0], ONE)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@one_of_each
@pytest.mark.parametrize(("images", "opset"), [(1, 16), (1, 18), (2, 18)])
def test_onnx_export(operator, images, opset):
    """With ONNX's own operators; the graph takes other numbers of boxes, and other sizes of maps."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    file, example = io.BytesIO(), inputs_of(operator, images, 5, (15, 20))
    axes = {"maps": {2: "height", 3: "width"}, "rois": {0: "count"}}
    names = {"input_names": list(axes), "dynamic_axes": axes, "opset_version": opset}
    torch.onnx.export(Module(operator), example, file, dynamo=False, **names)
    assert {node.domain for node in onnx.load_from_string(file.getvalue()).graph.node} <= {"", "ai.onnx"}
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for count, size in ((5, (15, 20)), (9, (12, 31)), (1, (15, 20)), (0, (15, 20))):
        maps, rois = inputs_of(operator, images, count, size)
        (result,) = session.run(None, {"maps": maps.numpy(), "rois": rois.numpy()})
        expected = Module(operator)(maps, rois)
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (AffineCrop(3, 0.5, 2), affine_crop),
        (PrRoIPool2D(3, 3, 0.5), prroi_pool2d),
        (RoIAlignRotated(3, 0.5), roi_align_rotated),
    ],
    ids=list(RULES),
)
def test_symbolic_traces_have_it_as_a_leaf(module, function):
    traced = torch.fx.symbolic_trace(module)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]


# --- Invalid arguments -----------------------------------------------------------------------------------------------

MAP = torch.zeros(2, 3, 8, 9)
ONE = torch.tensor([[1.0, 2, 5, 6]])


@one_of_each
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda one: (MAP[0], [one]), ValueError, "MAPS"),
        (lambda one: (MAP[..., :0], [one]), ValueError, "MAPS"),
        (lambda one: (MAP.long(), [one]), TypeError, "MAPS .*int64"),
        (lambda one: (MAP, one), ValueError, r"ROIS .*\[1, COLUMNS\]"),
        (lambda one: (MAP, [one, one[:, 1:]]), ValueError, r"ROIS\[1\] .*\[L, COLUMNS\]"),
        (lambda one: (MAP, [one, one.long()]), TypeError, r"ROIS\[1\]"),
        (lambda one: (MAP, one.tolist()), TypeError, r"ROIS\[0\] .*list"),
        (lambda one: (MAP, None), TypeError, "ROIS .*NoneType"),
        (lambda one: (MAP, [one] * 3), ValueError, "ROIS .*3 .*MAPS .*2"),
        (lambda one: (MAP, [one.to("meta")]), TypeError, r"ROIS\[0\] .*meta and cpu"),
        (lambda one: (MAP, with_index([2], one)), ValueError, r"ROIS\[0\] .*2.0"),
        (lambda one: (MAP, with_index([0, -1], one.repeat(2, 1))), ValueError, r"ROIS\[1\] .*-1.0"),
        (lambda one: (MAP, with_index([0.5], one)), ValueError, r"ROIS\[0\] .*0.5"),
        (lambda one: (MAP, with_index([NAN], one)), ValueError, r"ROIS\[0\] .*nan"),
        (lambda one: (MAP, [one, torch.where(one == one[0, 1], NAN, one)]), ValueError, "ROIS .*finite.*RoI 1"),
        (lambda one: (MAP, [one * 1e37], 2, 1e3), ValueError, "ROIS .*finite.* spatial_scale 1000"),
        (lambda one: (MAP, [one], (3, 0)), ValueError, "SIZE"),
        (lambda one: (MAP, [one], (3.0, 3)), TypeError, "SIZE"),
        (lambda one: (MAP, [one], 2, 0.0), ValueError, "spatial_scale"),
        (lambda one: (MAP, [one], 2, INF), ValueError, "spatial_scale"),
    ],
)
def test_errors_name_the_argument(operator, arguments, error, message):
    one = operator.own(ONE)
    maps, boxes, output_size, scale = (*arguments(one), *(2, 1.0)[len(arguments(one)) - 2 :])
    size = "pooled_height" if operator.rule == "precise" else "output_size"
    names = {"MAPS": operator.names[0], "ROIS": operator.names[1], "COLUMNS": str(one.shape[1]), "SIZE": size}
    for placeholder, name in names.items():
        message = message.replace(placeholder, name)
    with pytest.raises(error, match=message):
        operator.crop(maps, boxes, output_size, scale, True)


@pytest.mark.parametrize("crop", [affine_crop, roi_align_rotated])
@pytest.mark.parametrize("size", [(1, 2, 3), 2.0])
def test_an_output_size_is_one_or_two_integers(crop, size):
    with pytest.raises(TypeError, match="output_size"):
        crop(MAP, [], size)


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
@operators(lambda operator: operator.ratio != -1 and operator.sampler != "triton")
def test_compiled_invalid_rois_are_nan(operator, form):
    """All compile into one graph, except affine_crop's gather, which runs outside of it."""
    breaks = is_affine(operator) and operator.sampler == "gather"
    crop = torch.compile(operator.crop, backend="aot_eager", fullgraph=not breaks)

    def compiled(maps, boxes):
        return crop(maps, operator.own(boxes), (2, 3), 1.0, False)

    assert_invalid_rois_are_nan(compiled, operator.reference, form, "cpu")
    if breaks:
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(affine_crop, backend="aot_eager", fullgraph=True)(MAP, [ONE], 2, 1.0, 2, sampler="gather")


@pytest.mark.gpu
@both_forms
def test_invalid_rois_are_nan_on_a_gpu(operator, form):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
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
    assert module.output_size == RoIAlignRotated(size, 1.0).output_size == (3, 3)
    assert module(MAP, [ONE]).shape == MultiScaleAffineCrop(["0"], size, 2)({"0": MAP}, [ONE], [(8, 8)]).shape


@pytest.mark.parametrize("name", sorted({getattr(detector, name).__module__ for name in detector.crop.__all__}))
def test_docstring_examples(name):
    module = sys.modules[name]
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
    for public in set(detector.crop.__all__) & vars(module).keys():
        assert ">>> " in getattr(detector, public).__doc__
