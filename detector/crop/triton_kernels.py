"""The crop as a Triton kernel, launched once for the values, and once more for the gradients of all maps and boxes.

The rules are those of :mod:`detector.crop.rois` and :mod:`detector.crop.precise`. Maps are NCHW or channels_last, both
dense. Geometry is in float32, or in float64 if maps or boxes are.
"""

import torch
import triton
import triton.language as tl

from detector.crop import precise

PRECISE: tl.constexpr = tl.constexpr(precise.PRECISE)
MIN_BIN: tl.constexpr = tl.constexpr(precise.MIN_BIN[torch.float32])
MIN_BIN_64: tl.constexpr = tl.constexpr(precise.MIN_BIN[torch.float64])


@triton.jit
def _divide(a, b):
    # In float32 "/" is not rounded correctly on a GPU, which moves samples across the border.
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _is_finite(a):
    return tl.where(tl.abs(a) < float("inf"), 1, 0)  # 0 for NaN


@triton.jit
def _axis(low, high, scale, ALIGNED: tl.constexpr, RATIO: tl.constexpr):
    """Return a box's start and extent along one axis in map pixels, its fixed part, and if it is finite (0 or 1).

    If not ALIGNED, and with samples, boxes are widened to a pixel. The high end of a widened box (1) moves with its low
    end, and of a box of just a pixel half of it does, as in torch.maximum.
    """
    start, end = low * scale, high * scale
    if ALIGNED and RATIO != PRECISE:
        start, end = start - 0.5, end - 0.5
    extent = end - start
    finite = _is_finite(start) * _is_finite(end) * _is_finite(extent)
    start, extent = tl.where(finite > 0, start, 0.0), tl.where(finite > 0, extent, 1.0)
    fixed = tl.zeros_like(extent)
    if not ALIGNED and RATIO != PRECISE:
        fixed = tl.where(extent < 1, 1.0, tl.where(extent == 1, 0.5, 0.0)).to(extent.dtype)
        extent = tl.maximum(extent, 1.0)
    return start, extent, fixed, finite


@triton.jit
def _steps(start, extent, size, bin, BINS: tl.constexpr, RATIO: tl.constexpr):
    """Return for one axis: samples per bin (a precise bin's last pixel), each bin's first, and the most of a bin.

    Only samples that may be on the map are counted, with two to spare, so that huge boxes take no longer.
    """
    if RATIO > 0:
        count, first, steps = tl.full([], RATIO, start.dtype), tl.zeros_like(bin), RATIO
    elif RATIO == PRECISE:
        low, high, _, _ = _edges(start, extent, bin, BINS)
        first = tl.minimum(tl.maximum(tl.floor(low), 0.0), size - 1)
        count = tl.minimum(tl.maximum(tl.ceil(high), 0.0), size - 1)
        steps = tl.max(count - first, axis=0).to(tl.int32) + 1
    else:
        bin_size = _divide(extent, tl.full([], BINS, start.dtype))
        count = tl.maximum(tl.ceil(bin_size), 0.0)
        step = tl.where(count > 0, bin_size / tl.maximum(count, 1.0), 1.0)
        bin_start = start + bin * bin_size
        first = tl.minimum(tl.maximum(tl.floor((-1 - bin_start) / step - 0.5) - 2, 0.0), count)
        end = tl.minimum(tl.maximum(tl.ceil((size - bin_start) / step - 0.5) + 3, 0.0), count)
        steps = tl.max(end - first, axis=0).to(tl.int32)
    return count, first, steps


@triton.jit
def _taps(number, start, extent, size, bin, count, BINS: tl.constexpr, RATIO: tl.constexpr):
    """Return what sample or pixel ``number`` of each bin reads along one axis.

    Returns: a pixel and the next one (of samples only), whether they count, their weights, and the slopes of the first
    weight by the low and the high end of the RoI. Those of the second weight are the negatives.
    """
    if RATIO == PRECISE:
        low, high, low_at, high_at = _edges(start, extent, bin, BINS)
        low_integral, low_hat = _integral(low - number)
        high_integral, high_hat = _integral(high - number)
        per_pixel = tl.where(extent > 0, 1 / tl.where(extent > 0, high - low, 1.0), 0.0)
        pixel, next_pixel, counts = number, number, number <= count
        weight = (high_integral - low_integral) * per_pixel
        next_weight = weight
        of_low, of_high = (weight - low_hat) * per_pixel, (high_hat - weight) * per_pixel
        low_slope = of_low * (1 - low_at) + of_high * (1 - high_at)
        high_slope = of_low * low_at + of_high * high_at
    else:
        middle = number + 0.5
        divisor = tl.maximum(count, 1.0) + tl.zeros_like(middle)
        bin_size = _divide(extent, tl.full([], BINS, start.dtype))
        # In roi_align's order of operations: samples of integer boxes lie exactly on the border.
        position = start + bin * bin_size + _divide(middle * bin_size, divisor)
        counts = (position >= -1) & (position <= size) & (number < count)
        slope = tl.where((position > 0) & (position < size - 1), -1.0, 0.0)  # flat beyond the outer pixels' centres
        at = (bin + middle / divisor) / BINS  # 0 at the low end of the RoI, 1 at its high end
        position = tl.minimum(tl.maximum(position, 0.0), size - 1)
        pixel = tl.floor(position)
        next_pixel = tl.minimum(pixel + 1, size - 1)
        next_weight = position - pixel
        weight = 1 - next_weight
        low_slope, high_slope = slope * (1 - at), slope * at
    return pixel, next_pixel, counts, weight, next_weight, low_slope, high_slope


@triton.jit
def _edges(start, extent, bin, BINS: tl.constexpr):
    """Return the two edges of bins in map pixels, and where on the RoI they are, from 0 to 1."""
    bin_size = extent / BINS
    least = MIN_BIN_64 if start.dtype == tl.float64 else MIN_BIN
    narrow = bin_size < least  # widened around the middle
    middle, half = start + (bin + 0.5) * bin_size, tl.maximum(bin_size, least) / 2
    low_at, high_at = (bin + tl.where(narrow, 0.5, 0.0)) / BINS, (bin + tl.where(narrow, 0.5, 1.0)) / BINS
    return middle - half, middle + half, low_at, high_at


@triton.jit
def _integral(to):
    """Return the integral of a hat around 0 from -1 to a position, and the hat there."""
    at = tl.minimum(tl.maximum(to, -1.0), 1.0)
    return tl.where(at < 0, (1 + at) * (1 + at) / 2, 1 - (1 - at) * (1 - at) / 2), 1 - tl.abs(at)


@triton.jit
def _find_map(heights, widths, x1, y1, x2, y2, SCALES: tl.constexpr, AREAS: tl.constexpr, GEOMETRY: tl.constexpr):
    """Return the level of a box (-1: none), and the height, width and scale of its map."""
    level = tl.full([], 0, tl.int32)
    if len(AREAS) > 0:
        area = (x2 - x1) * (y2 - y1)
        level = tl.where(area < 0, -1, 0)
        for number in tl.static_range(len(AREAS)):
            level += tl.where(area >= tl.full([], AREAS[number], GEOMETRY), 1, 0)
        level = tl.where(level < len(SCALES), level, -1)
    height, width = tl.full([], heights[0], GEOMETRY), tl.full([], widths[0], GEOMETRY)
    scale = tl.full([], SCALES[0], GEOMETRY)
    for number in tl.static_range(1, len(SCALES)):
        if level == number:
            height, width = tl.full([], heights[number], GEOMETRY), tl.full([], widths[number], GEOMETRY)
            scale = tl.full([], SCALES[number], GEOMETRY)
    return level, height, width, scale


@triton.jit
def _image(index, images):
    """Return the image of an RoI, and whether it is one of the batch, as 0 or 1."""
    given = tl.load(index)
    if given.dtype.is_floating():
        given = given.to(tl.float32)  # in bfloat16 256 images would be 257
    inside = tl.where((given >= 0) & (given < images), 1, 0)  # 0 for NaN
    image = tl.where(inside > 0, given, 0).to(tl.int64)
    return image, tl.where(image.to(given.dtype) == given, inside, 0)


@triton.jit
def _bins(vector, CHANNELS_LAST: tl.constexpr):
    """Return one value per bin as the bins of a tile: [bins, channels] if channels_last, otherwise [channels, bins]."""
    return tl.expand_dims(vector, 1 if CHANNELS_LAST else 0)


@triton.jit
def _channels(vector, CHANNELS_LAST: tl.constexpr):
    return tl.expand_dims(vector, 0 if CHANNELS_LAST else 1)


@triton.jit
def _store_slopes(part, low, high, fixed):
    """Write the sums of two tiles, by the low and the high end of a box; a part of the high end moves with the low."""
    low, high = tl.sum(tl.sum(low, 1), 0), tl.sum(tl.sum(high, 1), 0)
    tl.store(part, low + high * fixed)
    tl.store(part + 2, high * (1 - fixed))


# Sizes are floats, because Triton compiles anew for each pattern of ones and multiples of 16 in a tuple of integers.
@triton.jit(do_not_specialize=["rois", "images", "box_stride", "index_stride"])
def crop_kernel(
    maps, heights, widths, boxes, index, crops, map_gradient, box_gradient, rois, images, box_stride, index_stride,
    TASK: tl.constexpr, C: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, SCALES: tl.constexpr,
    AREAS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    GEOMETRY: tl.constexpr, SUM: tl.constexpr, OFFSET: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Crop, or take the gradient of maps, boxes or both. A program has a block of one RoI's bins and of channels.

    Args:
        maps, heights, widths: a tuple each, one entry per level. Maps are [N, C, H, W], dense.
        boxes, index: [K, 4] (x1, y1, x2, y2) and [K], of any strides between rows.
        crops: [K, C, bins y, bins x], the result if TASK is "crop", else its gradient.
        map_gradient: zeros, one flat tensor for all maps, each in its own layout. Added to.
        box_gradient: [blocks, K, 4], written: the part of each program of an RoI.
    """
    BINS_BLOCKS: tl.constexpr = tl.cdiv(BINS_Y * BINS_X, BLOCK_BINS)
    roi = (tl.program_id(0) % rois).to(tl.int64)
    block = tl.program_id(0) // rois
    box = boxes + roi * box_stride
    left, top = tl.load(box).to(GEOMETRY), tl.load(box + 1).to(GEOMETRY)
    right, bottom = tl.load(box + 2).to(GEOMETRY), tl.load(box + 3).to(GEOMETRY)
    level, height, width, scale = _find_map(heights, widths, left, top, right, bottom, SCALES, AREAS, GEOMETRY)
    y_start, y_extent, y_fixed, y_finite = _axis(top, bottom, scale, ALIGNED, RATIO)
    x_start, x_extent, x_fixed, x_finite = _axis(left, right, scale, ALIGNED, RATIO)
    image, known = _image(index + roi * index_stride, images)
    valid = known * y_finite * x_finite
    source = maps[0]
    start_of_map = tl.full([], 0, tl.int64)
    for number in tl.static_range(1, len(SCALES)):
        if level == number:
            source = maps[number]
        before = tl.full([], heights[number - 1], tl.int64) * tl.full([], widths[number - 1], tl.int64) * C * images
        start_of_map += tl.where(level >= number, before, 0)
    pixels_of_map = height.to(tl.int64) * width.to(tl.int64)
    source += image * C * pixels_of_map
    map_gradient += start_of_map + image * C * pixels_of_map
    if CHANNELS_LAST:
        row, column, channel = width.to(OFFSET) * C, C, 1
    else:
        row, column, channel = width.to(OFFSET), 1, pixels_of_map.to(OFFSET)

    b = block % BINS_BLOCKS * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    c = block // BINS_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    in_tile = _bins(b < BINS_Y * BINS_X, CHANNELS_LAST) & _channels(c < C, CHANNELS_LAST)
    of_crop = roi * (C * BINS_Y * BINS_X)
    of_crop += _bins(b.to(tl.int64), CHANNELS_LAST) + _channels(c.to(tl.int64) * (BINS_Y * BINS_X), CHANNELS_LAST)
    reads_map = in_tile & (tl.where(level >= 0, valid, 0) > 0)
    y_bin, x_bin = (b // BINS_X).to(GEOMETRY), (b % BINS_X).to(GEOMETRY)
    sums = tl.zeros(in_tile.shape, SUM)  # values, or slopes by y1
    y2_slopes, x1_slopes, x2_slopes = sums, sums, sums
    upstream, samples = sums, tl.full([], 1, SUM)
    y_count, y_first, y_steps = _steps(y_start, y_extent, height, y_bin, BINS_Y, RATIO)
    x_count, x_first, x_steps = _steps(x_start, x_extent, width, x_bin, BINS_X, RATIO)
    if RATIO != PRECISE:
        samples = tl.maximum(y_count * x_count, 1.0).to(SUM)
    if TASK != "crop":
        upstream = tl.load(crops + of_crop, mask=reads_map, other=0.0).to(SUM) / samples
    of_channels = _channels(c.to(OFFSET) * channel, CHANNELS_LAST)
    for y_step in range(y_steps):
        y0, y1, y_counts, y0_weight, y1_weight, y_low, y_high = _taps(
            y_first + y_step, y_start, y_extent, height, y_bin, y_count, BINS_Y, RATIO
        )
        for x_step in range(x_steps):
            x0, x1, x_counts, x0_weight, x1_weight, x_low, x_high = _taps(
                x_first + x_step, x_start, x_extent, width, x_bin, x_count, BINS_X, RATIO
            )
            reads = reads_map & _bins(y_counts & x_counts, CHANNELS_LAST)
            for tap in tl.static_range(1 if RATIO == PRECISE else 4):
                y, y_weight, y_sign = (y0, y0_weight, 1) if tap < 2 else (y1, y1_weight, -1)
                x, x_weight, x_sign = (x0, x0_weight, 1) if tap % 2 == 0 else (x1, x1_weight, -1)
                at = of_channels + _bins(y.to(OFFSET) * row + x.to(OFFSET) * column, CHANNELS_LAST)
                weight = _bins((y_weight * x_weight).to(SUM), CHANNELS_LAST)
                if TASK == "maps" or TASK == "both":
                    tl.atomic_add(map_gradient + at, weight * upstream, mask=reads, sem="relaxed")
                if TASK != "maps":
                    values = tl.load(source + at, mask=reads, other=0.0).to(SUM)
                if TASK == "crop":
                    sums += weight * values
                elif TASK != "maps":
                    sums += _bins((y_sign * y_low * x_weight).to(SUM), CHANNELS_LAST) * values
                    y2_slopes += _bins((y_sign * y_high * x_weight).to(SUM), CHANNELS_LAST) * values
                    x1_slopes += _bins((x_sign * x_low * y_weight).to(SUM), CHANNELS_LAST) * values
                    x2_slopes += _bins((x_sign * x_high * y_weight).to(SUM), CHANNELS_LAST) * values
    if TASK == "crop":
        tl.store(crops + of_crop, tl.where(valid == 0, float("nan"), sums / samples), mask=in_tile)
    if TASK == "boxes" or TASK == "both":
        part = box_gradient + (block * rois + roi) * 4
        upstream *= scale.to(SUM)
        _store_slopes(part, x1_slopes * upstream, x2_slopes * upstream, x_fixed.to(SUM))
        _store_slopes(part + 1, sums * upstream, y2_slopes * upstream, y_fixed.to(SUM))


INTERPRETED = triton.knobs.runtime.interpret
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.int32: tl.int32, torch.int64: tl.int64}
