"""COCO's segmentations as masks: pycocotools' own reading, and what it must not be given."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detector.data.masks import (
    MaskLayers,
    as_rle,
    decode_masks,
    encode_crops,
    encode_masks,
    mask_area,
    mask_box,
)
from detector.data.segmentations import read_segmentation

WIDTH, HEIGHT = 30, 20
SQUARE = [2, 3, 12, 3, 12, 13, 2, 13]


def filled(*polygons):
    """Their inside, and outline, by Pillow."""
    image = Image.new("L", (WIDTH, HEIGHT))
    for polygon in polygons:
        ImageDraw.Draw(image).polygon(polygon, fill=1)
    return np.array(image)


def reason(segmentation, width, height):
    return read_segmentation(json.dumps(segmentation).encode(), width, height)[1]


def runs_of(mask):
    """An uncompressed RLE: the lengths of runs of 0 and 1 in turn, column by column."""
    counts, current = [0], 0
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != current:
            counts.append(0)
            current = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def test_real_segmentations_are_read_as_pycocotools_reads_them(coco_cc):
    kinds = set()
    for path in sorted((coco_cc / "annotations").glob("instances_*.json")):
        coco = COCO(str(path))
        for annotation in coco.anns.values():
            image, segmentation = coco.imgs[annotation["image_id"]], annotation["segmentation"]
            height, width = image["height"], image["width"]
            kinds.add(len(segmentation) > 1 if isinstance(segmentation, list) else type(segmentation["counts"]))
            assert reason(segmentation, width, height) is None
            expected = coco.annToMask(annotation)
            (mask,) = decode_masks([segmentation], height, width).numpy()
            assert np.array_equal(mask, expected)
            rle = as_rle(segmentation, height, width)
            assert mask_area(rle) == expected.sum()
            assert mask_box(rle) == coco_mask.toBbox(coco.annToRLE(annotation)).tolist()
            assert json.loads(json.dumps(rle)) == rle
    assert {True, False, list} <= kinds  # several polygons, one, an uncompressed RLE


def test_polygons_of_an_object_are_one_mask():
    other = [15, 5, 25, 5, 25, 15, 15, 15]
    masks = decode_masks([[SQUARE, other], [SQUARE], [other], None, []], HEIGHT, WIDTH).numpy()
    assert masks.dtype == np.uint8
    assert np.array_equal(masks[0], masks[1] | masks[2])
    # pycocotools takes a pixel whose middle is inside; Pillow also draws the far edge.
    assert 0 <= (filled(SQUARE) - masks[1].astype(int)).sum() <= 22
    assert not masks[3:].any()
    assert decode_masks([], HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)


MASKS = st.builds(
    lambda seed, height, width, share: (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
)


@settings(max_examples=40, deadline=None)
@given(mask=MASKS)
def test_a_mask_comes_back_from_each_kind_of_rle(mask):
    (compressed,) = encode_masks(torch.from_numpy(mask)[None])
    for rle in (compressed, runs_of(mask)):
        assert reason(rle, mask.shape[1], mask.shape[0]) is None
        assert np.array_equal(decode_masks([rle], *mask.shape)[0].numpy(), mask)
        assert mask_area(as_rle(rle, *mask.shape)) == mask.sum()
    rows, columns = np.nonzero(mask)
    left, top = (columns.min(), rows.min()) if len(rows) else (0, 0)
    right, bottom = (columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0)
    assert mask_box(compressed) == [left, top, right - left, bottom - top]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 12), most=st.integers(1, 20))
def test_layers_hold_the_masks(seed, count, most):
    """Whatever overlaps what."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, HEIGHT, WIDTH), np.uint8)
    for mask in masks:
        (top, left), (height, width) = rng.integers(0, (HEIGHT, WIDTH)), rng.integers(0, most, 2)
        mask[top : top + height, left : left + width] = rng.integers(0, 2)
    layers = MaskLayers.of(encode_masks(torch.from_numpy(masks)), HEIGHT, WIDTH)
    assert layers.masks().numpy().tolist() == masks.tolist()
    assert layers.maps.shape[1:] == (HEIGHT, WIDTH)
    assert len(layers.maps) <= count


def test_separate_objects_share_a_layer():
    masks = np.zeros((300, HEIGHT, WIDTH), np.uint8)
    for number, mask in enumerate(masks):
        mask[number // WIDTH, number % WIDTH] = 1
    layers = MaskLayers.of(encode_masks(torch.from_numpy(masks)), HEIGHT, WIDTH)
    assert len(layers.maps) == 2  # 255 numbers fit into a byte
    assert layers.masks().numpy().tolist() == masks.tolist()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.tuples(st.integers(4, 60), st.integers(4, 60)), count=st.integers(0, 3))
def test_layers_are_resized_as_torchvision_resizes_masks(seed, size, count):
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(count, HEIGHT, WIDTH, generator=generator) > 0.7).to(torch.uint8)
    layers = MaskLayers.of(encode_masks(masks), HEIGHT, WIDTH)
    transform = GeneralizedRCNNTransform(min(size), max(size), [0.0] * 3, [1.0] * 3).eval()
    target = {"boxes": torch.zeros(count, 4), "masks": masks}
    _, expected = transform.resize(torch.zeros(3, HEIGHT, WIDTH), target)
    resized = expected["masks"]
    assert torch.equal(layers.resized(tuple(resized.shape[1:])), resized)
    assert torch.equal(layers.to("cpu", non_blocking=True).masks(), masks)


def test_probabilities_are_of_the_object_above_a_half():
    (rle,) = encode_masks(torch.tensor([[[0.5, 0.501], [0.499, 1.0]]]))
    assert decode_masks([rle], 2, 2).tolist() == [[[0, 1], [0, 1]]]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_crops_are_pasted_as_torchvision_pastes_them(seed, size):
    """Also where boxes reach outside the image."""
    generator = torch.Generator().manual_seed(seed)
    crops = torch.rand(3, 1, 28, 28, generator=generator)
    sides = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
    boxes = torch.rand(3, 4, generator=generator)
    corners = boxes[:, :2] * 1.2 - 0.3
    boxes = torch.cat([corners, corners + 0.31 + boxes[:, 2:] * 0.4], dim=1) * sides  # none wholly outside
    expected = (paste_masks_in_image(crops, boxes, size)[:, 0] > 0.5).to(torch.uint8)
    assert torch.equal(decode_masks(encode_crops(crops, boxes, size), *size), expected)


EMPTY_RUNS = [5, 10, 0, 0, WIDTH * HEIGHT - 15]


def test_runs_without_pixels_do_not_end_a_mask():
    # pycocotools' IoU stops at the first of them: it takes this mask and itself for different ones.
    mask = np.zeros(WIDTH * HEIGHT, np.uint8)
    mask[5:15] = 1
    rle = as_rle({"size": [HEIGHT, WIDTH], "counts": EMPTY_RUNS}, HEIGHT, WIDTH)
    assert np.array_equal(coco_mask.decode(rle).T.reshape(-1), mask)
    assert coco_mask.iou([rle], encode_masks(torch.from_numpy(mask.reshape(WIDTH, HEIGHT).T)[None]), [0]).item() == 1.0


NEITHER = "neither polygons"
SIZE = [HEIGHT, WIDTH]
BROKEN = [
    *((value, NEITHER) for value in ("polygons", 3, [3], SQUARE)),
    ([SQUARE, ["a"] * 6], "at `$[1][0]`"),
    ([[True] * 6], "at `$[0][0]`"),
    ([[1, 2, 3, 4]], "of length >= 6 - at `$[0]`"),  # a box, to pycocotools
    ([SQUARE[:-1]], "polygon 0 of 7 numbers"),
    ([[]], "of length >= 6 - at `$[0]`"),
    ([[*SQUARE[:-1], "NaN"]], "at `$[0][7]`"),
    ([[*SQUARE[:-1], 10**400]], "out of range - at `$[0][7]`"),
    ([[*SQUARE[:-1], 41]], "30x20"),
    ([[-31, *SQUARE[1:]]], "far outside"),
    ([[0, 0, 30, 20] * 40_000], "2,400,000"),
    ({"size": [WIDTH, HEIGHT], "counts": [600]}, "size [30, 20]"),
    ({"size": "20x30", "counts": [600]}, "at `$.size`"),
    ({"size": [20.0, 30.0], "counts": [600]}, "at `$.size[0]`"),
    ({"counts": [600]}, "field `size`"),
    ({"size": SIZE}, "field `counts`"),
    ({"size": SIZE, "counts": 600}, "at `$.counts`"),
    ({"size": SIZE, "counts": [599]}, "599 pixels"),
    ({"size": SIZE, "counts": [500, 101]}, "add up to 601"),
    ({"size": SIZE, "counts": [-1, 601]}, "at `$.counts[0]`"),
    ({"size": SIZE, "counts": [600.0]}, "at `$.counts[0]`"),
    ({"size": SIZE, "counts": []}, "add up to 0"),
    ({"size": SIZE, "counts": ""}, "add up to 0"),
    # A letter, a cut-off number, a wrong character, a number of more than 32 bits.
    *(({"size": SIZE, "counts": counts}, "counts are broken") for counts in ("\u00e9", "o", "!", "ooooooo0")),
]


@pytest.mark.parametrize(("value", "words"), BROKEN, ids=range(len(BROKEN)))
def test_broken_segmentations_are_named(value, words):
    assert words in reason(value, WIDTH, HEIGHT)


def test_images_too_large_for_pycocotools_are_refused():
    assert reason([SQUARE], 2**14, 2**12) is None
    assert "67,108,864 at most" in reason([SQUARE], 2**14, 2**12 + 1)


COUNTS = st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=12)


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS | st.lists(st.integers(-3, 700), max_size=6))
def test_valid_rle_fill_the_image(counts):
    rle = {"size": SIZE, "counts": counts}
    if reason(rle, WIDTH, HEIGHT) is None:
        mask = coco_mask.decode(as_rle(rle, HEIGHT, WIDTH))
        assert mask_area(as_rle(rle, HEIGHT, WIDTH)) == mask.sum()
        assert mask.shape == (HEIGHT, WIDTH)
