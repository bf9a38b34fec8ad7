"""The exact crop: the mean of the bilinear surface over each bin, against integration and roi_align's limit."""

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from detector import affine_crop, exact_crop


def exact(maps, boxes, *, scale=1.0, aligned=True, size=3, sampler="auto"):
    return exact_crop(maps, boxes, size, scale, aligned)


def some_boxes(seed=0, count=24, low=-8.0, high=28.0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 4, generator=generator, dtype=torch.float64) * (high - low) + low
    first, second = torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])
    return torch.cat([first, second], 1)


def surface(image, y, x):
    """Bilinear, replicated one pixel beyond the border, then zero; numpy, [Y] and [X] to [Y, X]."""

    def axis(at, size):
        on_map = np.clip(at, 0, size - 1)
        low = np.clip(np.floor(on_map), 0, max(size - 2, 0)).astype(int)
        matrix = np.zeros((len(at), size))
        matrix[np.arange(len(at)), low] += 1 - (on_map - low)
        if size > 1:
            matrix[np.arange(len(at)), low + 1] += on_map - low
        return matrix * ((at >= -1) & (at <= size))[:, None]

    return axis(y, image.shape[0]) @ image @ axis(x, image.shape[1]).T


@pytest.mark.parametrize("aligned", [True, False])
def test_is_the_integral_over_each_bin(aligned):
    image = torch.rand(1, 1, 13, 17, dtype=torch.float64)
    boxes = some_boxes(low=-6, high=22)
    found = exact(image, [boxes], aligned=aligned)
    points = (np.arange(600) + 0.5) / 600
    for box, crop in zip(boxes.numpy() - (0.5 if aligned else 0), found[:, 0]):
        side = box[2:] - box[:2] if aligned else np.maximum(box[2:] - box[:2], 1)
        at = [box[axis] + side[axis] * (np.arange(3)[:, None] + points) / 3 for axis in (0, 1)]
        for row in range(3):
            for column in range(3):
                wanted = surface(image[0, 0].numpy(), at[1][row], at[0][column]).mean()
                assert crop[row, column].item() == pytest.approx(wanted, abs=1e-3)


def test_roi_align_converges_to_it():
    maps, boxes = torch.rand(2, 5, 20, 24, dtype=torch.float64), some_boxes()
    of_images = [boxes[:10], boxes[10:]]
    found = exact(maps, of_images, scale=0.8)
    points = [roi_align(maps, of_images, 3, 0.8, ratio, aligned=True) for ratio in (2, 8, 32)]
    far = [(crops - found).abs().mean().item() for crops in points]
    assert far[0] > 4 * far[1] > 8 * far[2]
    assert far[2] < 1e-3


@pytest.mark.parametrize("sampler", ["gather", "grid_sample"])
@pytest.mark.parametrize("aligned", [True, False])
def test_gradients_also_of_integer_boxes(sampler, aligned):
    maps = torch.rand(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    whole = torch.tensor([[1, 1, 4, 5], [0, 0, 6, 5], [2, 3, 5, 5], [0, 2, 5, 4]], dtype=torch.float64)
    boxes = torch.cat([whole, some_boxes(3, 4, 0.3, 5.7)]).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, b: exact(m, [b], aligned=aligned, size=2, sampler=sampler), (maps, boxes))


def test_second_derivatives():
    maps = torch.rand(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    boxes = some_boxes(4, 2, 0.6, 4.2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda m, b: exact(m, [b], size=2), (maps, boxes))


def test_its_box_gradient_is_continuous_across_pixel_centres():
    maps = torch.rand(1, 1, 9, 9, dtype=torch.float64)

    def slope(x, **options):
        box = torch.tensor([[x, 2.0, x + 3, 5.0]], dtype=torch.float64, requires_grad=True)
        crop = (
            affine_crop(maps, [box], 1, aligned=True, **options)
            if options
            else exact_crop(maps, [box], 1, aligned=True)
        )
        crop.sum().backward()
        return box.grad[0, 0].item()

    def jump_at(x, **options):
        return abs(slope(x + 1e-7, **options) - slope(x - 1e-7, **options))

    for x in (2.0, 2.5, 3.0):  # at 2 and 3 the only sample of the points lies on a pixel centre, at 2.5 both sides do
        assert jump_at(x) < 1e-6
    assert jump_at(2.0, sampling_ratio=1) > 1e-3


def test_both_samplers_agree_and_take_any_layout_and_dtype():
    maps, boxes = torch.rand(2, 40, 30, 34), some_boxes(5, 60, -20, 60).float()
    of_images = [boxes[:25], boxes[25:]]
    wanted = exact(maps, of_images, sampler="grid_sample", size=7)
    assert torch.allclose(exact(maps, of_images, size=7), wanted, atol=1e-5)
    last = maps.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(exact(last, of_images, size=7), wanted, atol=1e-5)
    half = exact(maps.bfloat16(), of_images, size=7)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), wanted, atol=2e-2)


def test_huge_tiny_empty_inverted_and_far_boxes():
    maps = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    boxes = torch.tensor(
        [[-1e6, -1e6, 1e6, 1e6], [3.2, 4.1, 3.2, 4.1], [3, 3, 3.001, 3.001], [8, 9, 2, 3], [900, 900, 950, 950]],
        dtype=torch.float64,
    )
    found = exact(maps, [boxes])
    wanted = roi_align(maps, [boxes], 3, 1.0, 64, aligned=True)
    assert found[0].abs().max() < 1e-6  # the map is a millionth of it
    assert torch.allclose(found[1:], wanted[1:], atol=5e-3)
    assert not found[4].any()


def test_no_boxes():
    assert exact(torch.rand(2, 3, 8, 8), [torch.rand(0, 4), torch.rand(0, 4)]).shape == (0, 3, 3, 3)
