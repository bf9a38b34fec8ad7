"""PrRoIPool's own rules: expectations of earlier implementations, ties, tiny and huge boxes, and its methods.

What all crops have in common is in test_operators, which also checks values against a sum over pieces.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from support.crops import METHODS, for_sampler, general_boxes, precise_reference, randn, slopes, with_index
from torchvision.ops import roi_align

from detector import PrRoIPool2D, affine_crop, prroi_pool2d

both_methods = pytest.mark.parametrize("method", METHODS)
SIZE = (6, 8)
MAP = randn(1, 1, *SIZE)


def first_gradient(boxes, method, bins=1, maps=MAP, **options):
    """The gradient of the sum of all means at boxes [K, 4] on one map."""
    boxes = boxes.detach().requires_grad_()
    pooled = prroi_pool2d(maps, [boxes], bins, bins, method=method)
    return torch.autograd.grad(pooled.sum(), boxes, **options)[0]


def differences(boxes, bins=1, maps=MAP):
    """The same gradient by differences of the reference."""
    boxes = boxes.detach()
    return slopes(lambda b: precise_reference(maps, [b], bins), boxes, torch.ones(len(boxes), 1, bins, bins).to(boxes))


# --- Values ----------------------------------------------------------------------------------------------------------


@both_methods
def test_expectation_of_precise_roi_pooling(method):
    """Bins of a pixel between pixel centres are the means of four pixels, avg_pool2d's."""
    maps = torch.rand(4, 16, 24, 32, requires_grad=True)
    rois = torch.tensor([[0, 0, 0, 14, 14.0], [1, 14, 14, 28, 28]], requires_grad=True)
    pooled = prroi_pool2d(maps, for_sampler(method, rois, every=2), 7, 7, 0.5, method=method)
    pooled_over = F.avg_pool2d(maps.detach(), 2, stride=1)
    expected = torch.stack([pooled_over[0, :, :7, :7], pooled_over[1, :, 7:14, 7:14]])[: len(pooled)]
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)
    gradients = torch.autograd.grad(pooled.sum(), [maps, rois])
    assert gradients[0].sum() == pytest.approx(pooled.numel(), rel=1e-5)
    assert gradients[1][0, 1:].abs().min() > 0


SQUARE = [[1.0, 2], [3, 4]]
FOUR = [[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]


@both_methods
@pytest.mark.parametrize(
    ("maps", "roi", "values", "of_map", "of_roi"),
    [
        ([SQUARE], [0, 0, 0, 1, 1], [[[1.75, 2.25], [2.75, 3.25]]], [[1, 1], [1, 1]], [0, 2, 4, 2, 4]),
        (
            [SQUARE, [[4.0, 3], [2, 1]]],
            [0, 0, 0, 1, 1],
            [[[1.75, 2.25], [2.75, 3.25]], [[3.25, 2.75], [2.25, 1.75]]],
            [[1, 1], [1, 1]],
            [0, 0, 0, 0, 0],
        ),
        (
            [FOUR],
            [0, 0, 0, 3, 3],
            [[[3.75, 6.91666667], [10.08333333, 13.25]]],
            torch.outer(*[torch.tensor([1, 2, 2, 1.0], dtype=torch.float64)] * 2) / 9,
            [0, 10 / 3, 20 / 3, 10 / 3, 20 / 3],
        ),
    ],
    ids=["a map", "two channels", "4 x 4"],
)
def test_expectations_of_mmcv(method, maps, roi, values, of_map, of_roi):
    """Its test takes the gradient of the sum of the means."""
    maps = torch.tensor([maps], dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([roi], dtype=torch.float64, requires_grad=True)
    pooled = prroi_pool2d(maps, rois, 2, 2, 1.0, method=method)
    gradients = torch.autograd.grad(pooled.sum(), [maps, rois])
    expected = [pooled.new_tensor([values]), torch.as_tensor(of_map).expand_as(maps), rois.new_tensor([of_roi])]
    for found, wanted in zip([pooled, *gradients], expected):
        torch.testing.assert_close(found, wanted.to(found), rtol=0, atol=1e-8)
    torch.testing.assert_close(pooled, precise_reference(maps, rois, 2), rtol=0, atol=1e-12)


def test_values_are_the_limit_of_many_samples_of_the_padded_map():
    """Padded, RoIAlign's surface falls to zero within a pixel as well."""
    boxes = general_boxes(12, SIZE, seed=3)
    pooled, padded = prroi_pool2d(MAP, [boxes], 3, 3), F.pad(MAP, (20, 20, 20, 20))
    errors = [(roi_align(padded, [boxes + 20.5], 3, 1.0, n, aligned=True) - pooled).abs().max() for n in (4, 64)]
    assert errors[0] > 1e-3
    assert errors[1] < errors[0] / 100


@both_methods
@pytest.mark.parametrize("box", [[8.1, 1, 12, 4], [-9, -9, -1, -1], [1, 7.5, 5, 9], [-30, 2, -1.5, 4], [20, 1, 30, 9]])
def test_a_box_outside_is_zero(method, box):
    maps, boxes = MAP.clone().requires_grad_(), torch.tensor([box], dtype=torch.float64, requires_grad=True)
    pooled = prroi_pool2d(maps, [boxes], 2, 3, method=method)
    gradients = torch.autograd.grad(pooled.sum(), [maps, boxes], create_graph=True)
    assert not any(tensor.any() for tensor in (pooled, *gradients))


@both_methods
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("box", [[3, 1, 3, 4], [3, 4, 5, 4], [3, 2, 3, 2], [5, 1, 2, 4], [2, 4, 5, 1], [5, 4, 2, 1]])
def test_an_empty_or_inverted_box_is_zero(method, box, create_graph):
    """With a gradient of zero, also next to one that is not."""
    boxes = torch.tensor([[1.3, 1.4, 5.2, 4.9], box], dtype=torch.float64, requires_grad=True)
    maps = MAP.clone().requires_grad_()
    pooled = prroi_pool2d(maps, [boxes], 2, 2, method=method)
    assert not pooled[1].any()
    of_map, of_boxes = torch.autograd.grad(pooled.sum(), [maps, boxes], create_graph=create_graph)
    assert of_boxes.any(1).tolist() == [True, False]
    (alone,) = torch.autograd.grad(prroi_pool2d(maps, [boxes[:1]], 2, 2).sum(), maps)
    torch.testing.assert_close(of_map, alone, rtol=0, atol=1e-12)


# --- Ties ------------------------------------------------------------------------------------------------------------


def tied_boxes():
    """Clipped at 0, with edges on the centres of the first and last pixels, a pixel beyond them, and between pixels."""
    across, down = [-2, -1, 0, 0.5, 3, 7, 8, 9], [-2, -1, 0, 2.5, 4, 5, 6, 7.5]
    boxes = [[start, 0.61, end, 4.37] for start in across for end in across if start < end]
    boxes += [[0.73, start, 6.31, end] for start in down for end in down if start < end]
    boxes += [[0, 0, 5.3, 4.2], [0, 0, 7, 5], [-1, -1, 8, 6], [2, 1, 3, 2], [0, 0, 2, 2]]
    return torch.tensor(boxes, dtype=torch.float64)


@both_methods
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("bins", [1, 2])
def test_gradients_on_ties(method, bins, create_graph):
    """A mean has one slope everywhere."""
    boxes = for_sampler(method, tied_boxes(), every=6)
    found = first_gradient(boxes, method, bins, create_graph=create_graph)
    torch.testing.assert_close(found.detach(), differences(boxes, bins), rtol=0, atol=1e-5)
    assert found.abs().mean() > 0.05


@both_methods
def test_second_derivatives_on_ties_are_those_to_the_right(method):
    """A step of a coordinate moves all edges one way, so the slopes to the right belong together.

    On maps and boxes whose edges float64 represents; others are on either side by rounding.
    """
    source, step = randn(1, 1, 8, 8), 1e-4
    starts = torch.tensor([[0.0, 0], [1, 2], [-1, 0.5], [0.5, 1], [2.25, 1], [3, -1]], dtype=torch.float64)
    sides = torch.tensor([[2.0, 4], [4, 3], [7, 7], [7, 4], [8, 2]], dtype=torch.float64)
    boxes = torch.cat([starts.repeat(5, 1), starts.repeat(5, 1) + sides.repeat_interleave(6, 0)], 1)
    boxes = for_sampler(method, boxes, every=6)

    def reference(boxes):
        return precise_reference(source, [boxes], 1).flatten()

    def second_difference(a, b):
        return reference(boxes + a + b) - reference(boxes + a) - reference(boxes + b) + reference(boxes)

    steps = step * torch.eye(4, dtype=torch.float64)
    expected = torch.stack([torch.stack([second_difference(a, b) for b in steps], 1) for a in steps], 1) / step**2
    moved = boxes.clone().requires_grad_()
    pooled = prroi_pool2d(source, [moved], 1, 1, method=method)
    (gradient,) = torch.autograd.grad(pooled.sum(), moved, create_graph=True)
    rows = [torch.autograd.grad(column.sum(), moved, retain_graph=True)[0] for column in gradient.unbind(1)]
    torch.testing.assert_close(torch.stack(rows, 1), expected, rtol=0, atol=2e-3)
    assert expected.abs().mean() > 0.05


@both_methods
def test_the_gradient_is_continuous_where_a_sampled_one_jumps(method):
    def jump_at(x, crop):
        boxes = torch.tensor([[x + d, 2.0, x + d + 3, 5.0] for d in (-1e-7, 1e-7)]).double().requires_grad_()
        before, after = torch.autograd.grad(crop([boxes]).sum(), boxes)[0][:, 0].tolist()
        return abs(after - before)

    for x in (-1.0, 0.0, 2.0, 2.5, 7.0):  # the border, where the slope of the surface changes, too
        assert jump_at(x, lambda boxes: prroi_pool2d(MAP, boxes, 1, 1, method=method)) < 1e-6
    assert jump_at(2.0, lambda boxes: affine_crop(MAP, boxes, 1, 1.0, 1, True)) > 1e-3


# --- Sizes of boxes --------------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", [1e-3, 1e-5, 1e-9, 1e-30])
def test_tiny_boxes(method, side, dtype):
    """They have the surface's value, and its slope, though a gradient divides by the length of a bin."""
    places = torch.tensor([[2.3, 1.6], [0.6, 4.4], [-0.4, 2.2], [3.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    boxes = torch.cat([places, places + side], 1).to(dtype)
    present = (boxes[:, 2:] > boxes[:, :2]).all(1)  # others are rounded to an empty box
    assert present[4]
    pooled = prroi_pool2d(MAP.to(dtype), [boxes], 1, 1, method=method).double().flatten()
    padded, last = F.pad(MAP, (1, 1, 1, 1)), torch.tensor([SIZE[1] + 1.0, SIZE[0] + 1])
    surface = F.grid_sample(padded, ((places + 1) / last * 2 - 1)[None, None], align_corners=True).flatten()
    torch.testing.assert_close(pooled, torch.where(present, surface, 0), rtol=0, atol=1e-2)
    gradient = first_gradient(boxes, method, maps=MAP.to(dtype)).double()
    assert gradient.abs().max() < 4 * MAP.abs().max()
    wide = torch.cat([places - 1e-3, places + 1e-3], 1)
    on_slope = present & torch.tensor([True, True, True, False, False])  # the last two places are on kinks
    torch.testing.assert_close(gradient[on_slope], differences(wide)[on_slope], rtol=0, atol=1e-2)


@both_methods
@pytest.mark.parametrize(("dtype", "side", "atol"), [(torch.float64, 1e-4, 1e-9), (torch.float32, 6e-3, 1e-4)])
def test_bins_are_widened_only_where_gradients_would_be_rounded(method, dtype, side, atol):
    """Across a pixel's centre, where the mean over a wider bin differs."""
    boxes = torch.tensor([[3.0, 2.0, 3 + side, 2 + side], [3 - side / 2, 2, 3 + side / 2, 2 + side]], dtype=dtype)
    pooled = prroi_pool2d(MAP.to(dtype), [boxes], 1, 1, method=method).double()
    torch.testing.assert_close(pooled, precise_reference(MAP, [boxes.double()], 1), rtol=0, atol=atol)


@both_methods
def test_huge_boxes(method):
    """A million pixels wide: the map's sum over the area, and gradients that fit."""
    boxes = torch.tensor([[-5e5, -5e5, 5e5, 5e5], [-5e5, 1.3, 5e5, 4.2], [2.2, 1.3, 1e6, 1e6]]).double()
    maps = MAP.clone().requires_grad_()
    pooled = prroi_pool2d(maps, [boxes], 1, 1, method=method)
    torch.testing.assert_close(pooled, precise_reference(MAP, [boxes], 1), rtol=1e-6, atol=1e-15)
    assert pooled[0].item() == pytest.approx(MAP.sum().item() / 1e12, rel=1e-6)
    assert torch.autograd.grad(pooled.sum(), maps)[0].isfinite().all()
    found = prroi_pool2d(MAP.float(), [boxes.float()], 1, 1, method=method)
    torch.testing.assert_close(found.double(), pooled, rtol=1e-3, atol=1e-12)
    expected = slopes(lambda b: precise_reference(MAP, [b], 1), boxes, torch.ones_like(pooled), step=1e-2)
    torch.testing.assert_close(first_gradient(boxes, method), expected.detach(), rtol=1e-2, atol=1e-8)


@both_methods
def test_a_side_beyond_the_numbers_is_an_error(method):
    """Both ends are finite in float32, their distance is not. The kernel has no errors, only NaN."""
    if method == "triton":
        pytest.skip("see test_invalid_rois_are_nan_on_a_gpu")
    with pytest.raises(ValueError, match="rois must be finite"):
        prroi_pool2d(MAP.float(), torch.tensor([[0, -3e38, 1, 3e38, 4]]), 2, 2, method=method)


# --- Methods ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bags(monkeypatch):
    """The rows that each call of embedding_bag reads. Only the gather calls it."""
    calls, original = [], F.embedding_bag

    def embedding_bag(input, *args, **kwargs):
        calls.append(input)
        return original(input, *args, **kwargs)

    monkeypatch.setattr(F, "embedding_bag", embedding_bag)
    return calls


def several_images():
    boxes = torch.cat([general_boxes(6, SIZE, seed=1), torch.tensor([[0, 0, 7, 5], [3, 1, 3, 4], [9, 9, 12, 12.0]])])
    return randn(3, 4, *SIZE).requires_grad_(), with_index([2, 0, 2, 0, 0, 2, 2, 0, 2], boxes).requires_grad_()


def test_methods_agree_to_rounding():
    """In values, gradients and second derivatives, for RoIs in no order and an image without any."""
    results, (maps, rois) = [], several_images()
    for method in METHODS:
        pooled = prroi_pool2d(maps, rois, 2, 3, 0.9, method=method)
        plain = torch.autograd.grad(pooled.square().sum(), [maps, rois], retain_graph=True)
        first = torch.autograd.grad(pooled.pow(3).sum(), [maps, rois], create_graph=True)
        total = sum((gradient * randn(*gradient.shape, seed=1)).sum() for gradient in first)
        results.append([pooled, *plain, *first, *torch.autograd.grad(total, [maps, rois])])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-9)
    assert all(tensor.any() for tensor in results[0])
    assert not results[0][2][:, 0].any()  # the image's index


def test_auto_takes_the_gather_for_more_multiplications_than_a_limit(bags, monkeypatch):
    boxes = [general_boxes(5, SIZE)]
    expected = prroi_pool2d(MAP, boxes, 2, 3, 0.9)
    assert not bags
    module = sys.modules[prroi_pool2d.__module__]
    monkeypatch.setattr(module, "MAX_PRODUCTS", 2 * 5 * MAP.numel() - 1)
    torch.testing.assert_close(prroi_pool2d(MAP, boxes, 2, 3, 0.9), expected, rtol=0, atol=1e-12)
    assert bags
    bags.clear()
    prroi_pool2d(MAP, boxes, 2, 3, 0.9, method="products")
    prroi_pool2d(MAP, [boxes[0][:-1]], 2, 3, 0.9)
    assert not bags
    prroi_pool2d(MAP, [boxes[0][:-1]], 2, 3, 0.9, method="gather")
    assert bags


def test_auto_keeps_images_apart():
    """In products, a pixel that is not finite spreads to the RoIs of all images."""
    maps, rois = several_images()
    expected = prroi_pool2d(maps, rois, 2, 3, 0.9)
    maps = maps.detach().clone()
    maps[1] = torch.nan
    kept = rois[:, 0] != 1
    torch.testing.assert_close(prroi_pool2d(maps, rois, 2, 3, 0.9)[kept], expected[kept], rtol=0, atol=1e-12)


def test_auto_is_precise_in_a_backward_under_autocast():
    maps, rois = torch.rand(1, 16, *SIZE, requires_grad=True), with_index([0] * 5, general_boxes(5, SIZE).float())
    rois.requires_grad_()
    expected = torch.autograd.grad(prroi_pool2d(maps, rois, 3, 3).square().sum(), [maps, rois])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(prroi_pool2d(maps, rois, 3, 3).square().sum(), [maps, rois])
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_the_gather_takes_rois_in_groups_of_similar_size(bags):
    boxes = torch.tensor([[1.0, 1, 4, 4], [0, 0, 30, 30], [2, 2, 5, 5], [1, 1, 29, 29.0]])
    prroi_pool2d(torch.rand(1, 3, 32, 32), [boxes], 2, 2, method="gather")
    assert len(bags) == 2
    assert bags[0].shape[1] < bags[1].shape[1] / 9


def test_the_module_equals_the_function():
    maps, rois = several_images()
    for method in ("auto", "products", "gather"):
        module = PrRoIPool2D(2, 3, 0.5, method=method)
        assert torch.equal(module(maps, rois), prroi_pool2d(maps, rois, 2, 3, 0.5, method=method))
        assert repr(module) == f"PrRoIPool2D(pooled_height=2, pooled_width=3, spatial_scale=0.5, method={method})"
        assert not module.state_dict()


@pytest.mark.parametrize(("sizes", "error"), [((0, 2), ValueError), ((2, -1), ValueError), ((2.0, 2), TypeError)])
def test_invalid_sizes_and_methods(sizes, error):
    for call in (lambda: prroi_pool2d(MAP, [], *sizes), lambda: PrRoIPool2D(*sizes, 1.0)):
        with pytest.raises(error, match="pooled_height and pooled_width"):
            call()
    with pytest.raises(ValueError, match=r"method must be one of auto, products, gather, triton, got 'matrices'"):
        prroi_pool2d(MAP, [], 2, 2, method="matrices")
    with pytest.raises(ValueError, match="method must be one of"):
        PrRoIPool2D(2, 2, 1.0, method="matrices")
