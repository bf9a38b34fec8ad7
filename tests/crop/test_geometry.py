import pytest
import torch
import torch.nn.functional as F

from detector import affine_crop, boxes_to_theta, denormalize_boxes, normalize_boxes

BOX = [-0.5, -0.3, 0.7, 0.8]


def some_boxes(dtype=torch.float64):
    return torch.tensor([[3.1, 4.7, 20.3, 17.9], [-5.2, 2.4, 9.6, 40.8], [12.0, 8.0, 6.0, 3.0]], dtype=dtype)


@pytest.mark.parametrize("corner", [(-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0)])
def test_theta_maps_the_unit_frame_onto_the_box(corner):
    boxes = torch.tensor([BOX, [0.2, 0.9, -0.6, -1.4], [-1, -1, 1, 1]], dtype=torch.float64)  # one is inverted
    u, v = corner
    x1, y1, x2, y2 = boxes.unbind(1)
    expected = torch.stack([x1 + (x2 - x1) * (u + 1) / 2, y1 + (y2 - y1) * (v + 1) / 2], 1)
    point = torch.tensor([u, v, 1], dtype=torch.float64)
    torch.testing.assert_close(boxes_to_theta(boxes) @ point, expected, rtol=0, atol=1e-15)


def test_theta_by_hand():
    expected = torch.tensor([[[0.6, 0, 0.1], [0, 0.55, 0.25]]], dtype=torch.float64)
    torch.testing.assert_close(boxes_to_theta(torch.tensor([BOX], dtype=torch.float64)), expected)


def test_theta_of_no_boxes():
    assert boxes_to_theta(torch.zeros(0, 4)).shape == (0, 2, 3)


def test_normalize_corners_of_the_map():
    # The outer corners of a 40 x 60 map of stride 4, which lie at 160 and 240 pixels of the image.
    boxes = torch.tensor([[0.0, 0.0, 240.0, 160.0], [120.0, 80.0, 180.0, 40.0]])
    expected = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.5, -0.5]])
    torch.testing.assert_close(normalize_boxes(boxes, (40, 60), 0.25), expected, rtol=0, atol=1e-6)


def test_normalize_not_aligned_samples_half_a_map_pixel_further():
    boxes = some_boxes()
    further = normalize_boxes(boxes, (40, 60), 0.25, aligned=False) - normalize_boxes(boxes, (40, 60), 0.25)
    expected = torch.tensor([1 / 60, 1 / 40, 1 / 60, 1 / 40], dtype=torch.float64).expand(3, 4)
    torch.testing.assert_close(further, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.0625, 0.3])
def test_denormalize_is_the_inverse(scale, aligned):
    boxes = some_boxes().expand(2, 3, 4)  # any leading dimensions
    there = normalize_boxes(boxes, (17, 23), scale, aligned)
    torch.testing.assert_close(denormalize_boxes(there, (17, 23), scale, aligned), boxes, rtol=0, atol=1e-12)
    back = denormalize_boxes(boxes, (17, 23), scale, aligned)
    torch.testing.assert_close(normalize_boxes(back, (17, 23), scale, aligned), boxes, rtol=0, atol=1e-12)


FUNCTIONS = {
    "boxes_to_theta": boxes_to_theta,
    "normalize_boxes": lambda boxes: normalize_boxes(boxes, (300, 500), 0.5),
    "denormalize_boxes": lambda boxes: denormalize_boxes(boxes, (300, 500), 0.5),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(function, given, returned):
    boxes = some_boxes(given)
    result = function(boxes)
    assert result.dtype == returned
    # Not computed in the low dtype and cast at the end: equal to the computation on what came in.
    assert torch.equal(result, function(boxes.to(returned)))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_autocast_does_not_lower_the_dtype(function):
    boxes = some_boxes(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function(boxes)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, function(boxes))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_differentiable(function):
    assert torch.autograd.gradcheck(function, some_boxes().requires_grad_())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("boxes", [torch.zeros(3, 5), torch.zeros(2, 3), torch.zeros(())])
def test_wrong_shape(function, boxes):
    with pytest.raises(ValueError, match=r"boxes must .*\[" + ", ".join(map(str, boxes.shape))):
        function(boxes)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_theta_takes_a_matrix_of_boxes(shape):
    with pytest.raises(ValueError, match=r"boxes must have shape \[K, 4\], got \[" + ", ".join(map(str, shape))):
        boxes_to_theta(torch.zeros(shape))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integer_boxes(function, dtype):
    with pytest.raises(TypeError, match=f"boxes must be a floating point tensor, got {dtype}"):
        function(torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_boxes_that_are_no_tensor(function):
    with pytest.raises(TypeError, match="boxes must be a floating point tensor, got list"):
        function([[0.0, 0.0, 1.0, 1.0]])


@pytest.mark.parametrize("function", [normalize_boxes, denormalize_boxes])
def test_bad_size_and_scale(function):
    for size in [(0, 5), (5, 0), (-1, 5)]:
        with pytest.raises(ValueError, match=rf"size must be .* at least 1, got \({size[0]}, {size[1]}\)"):
            function(some_boxes(), size)
    for scale in [0.0, -1.0, float("nan")]:
        with pytest.raises(ValueError, match=f"spatial_scale must be positive, got {scale}"):
            function(some_boxes(), (5, 5), scale)


# float32: a coordinate on a 224-pixel map is off by about 1e-5 pixels, times a slope of N(0, 1) values; a box
# gradient is a sum over 37,632 samples of slopes times 112 pixels, 2e4 in size.
@pytest.mark.parametrize(("dtype", "atol", "box_atol"), [(torch.float64, 1e-11, 1e-7), (torch.float32, 2e-4, 2.0)])
def test_worked_example(dtype, atol, box_atol):
    """Cropping a batch of images by one normalised box each: the README's example, written out."""
    images = torch.randn(16, 3, 224, 224, dtype=dtype, requires_grad=True)
    box = torch.tensor([BOX] * 16, dtype=dtype, requires_grad=True)
    upstream = torch.randn(16, 3, 112, 112, dtype=dtype)

    # theta by hand, and PyTorch's two functions.
    x1, y1, x2, y2 = box.unbind(1)
    zero = torch.zeros_like(x1)
    theta = torch.stack([(x2 - x1) / 2, zero, (x2 + x1) / 2, zero, (y2 - y1) / 2, (y2 + y1) / 2], 1).view(16, 2, 3)
    grid = F.affine_grid(theta, [16, 3, 112, 112], align_corners=False)
    expected = F.grid_sample(images, grid, align_corners=False)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [images, box])

    assert torch.equal(boxes_to_theta(box), theta)
    pixels = denormalize_boxes(box, (224, 224))
    torch.testing.assert_close(pixels[0], torch.tensor([56.0, 78.4, 190.4, 201.6], dtype=dtype), rtol=0, atol=1e-4)
    crops = affine_crop(images, list(pixels.split(1)), (112, 112), sampling_ratio=1, aligned=True)
    gradients = torch.autograd.grad((crops * upstream).sum(), [images, box])

    torch.testing.assert_close(crops, expected, rtol=0, atol=atol)
    torch.testing.assert_close(gradients[0], expected_gradients[0], rtol=0, atol=atol)
    torch.testing.assert_close(gradients[1], expected_gradients[1], rtol=0, atol=box_atol)
    assert expected_gradients[1].abs().mean() > 1000 * box_atol
