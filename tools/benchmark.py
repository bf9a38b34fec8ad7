"""Measure the RoI poolers side by side, then whole detectors with each: time, memory, and what of it is needless.

python tools/benchmark.py                                  everything, 15 minutes on 2 CPU cores
python tools/benchmark.py --rois 1000 --repeats 3 --no_detector
python tools/benchmark.py --device cuda
python tools/benchmark.py --render runs/benchmark/.../benchmark.json     the tables and the plot once more

Each round runs every pooler once, in an order that turns from round to round, so that what slows the machine down
slows all of them; a ratio is taken within a round. Boxes get gradients in all but torchvision's, which has none to
give. Forward is timed as in training, with what the backward needs being kept.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import FasterRCNN
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper
from tqdm import tqdm

from detector import BoxGradient, MultiScaleAffineCrop, boxes_to_theta, normalize_boxes, swap_crop_head
from detector.crop.crop import Sampler
from detector.rcnn.box_gradient import LossName

STRIDES = (4, 8, 16, 32)
REFERENCE = "torchvision"
SAMPLERS: tuple[Sampler, ...] = ("grid_sample", "gather")
POOLERS = (REFERENCE, *SAMPLERS)
COPIED = "a map copied per RoI"
DETERMINISTIC = "gather, deterministic"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Losses = tuple[LossName, ...]
BOX: Losses = ("box",)
BOX_MASK: Losses = ("box", "mask")
MASK_REPEATS = 3  # rounds of the Mask R-CNN, at most
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What the poolers are given."""

    maps: str  # "FPN": strides 4 to 32; "single level": stride 16
    dtype: str
    layout: str
    rois: int  # in all images together
    bins: int  # of the crop, along each axis

    def __str__(self) -> str:
        return f"{self.maps}, {self.bins} x {self.bins}, {self.dtype}, {self.layout}"


def make_cases(rois: list[int], dtypes: list[str], layouts: list[str]) -> list[Case]:
    cases = [Case("FPN", dtype, layout, count, 7) for dtype in dtypes for layout in layouts for count in rois]
    # The pool of Mask and Keypoint R-CNN, with as many RoIs as there are positives in a batch of two images.
    cases += [Case("FPN", dtypes[0], layout, min(256, max(rois)), 14) for layout in layouts]
    return cases + [Case("single level", dtypes[0], layout, count, 7) for layout in layouts for count in rois[:2]]


class CopiedMapPooler(nn.Module):
    """The crop as it is often written: each RoI has a copy of its map, and theta goes through affine_grid."""

    def __init__(self, name: str, bins: int, sampling_ratio: int) -> None:
        super().__init__()
        self.name, self.bins, self.sampling_ratio = name, bins, sampling_ratio

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        source = x[self.name]
        scale = 1 / STRIDES[int(self.name)]
        image = torch.repeat_interleave(torch.tensor([len(b) for b in boxes], device=source.device))
        frame = (source.shape[2], source.shape[3])
        theta = boxes_to_theta(normalize_boxes(torch.cat(boxes), frame, scale, aligned=False))
        side = self.bins * self.sampling_ratio
        grid = F.affine_grid(theta, [len(theta), source.shape[1], side, side], align_corners=False)
        samples = F.grid_sample(source[image], grid.to(source.dtype), padding_mode="border", align_corners=False)
        return F.avg_pool2d(samples, self.sampling_ratio)


class Inputs:
    """The features and boxes of a case, from a seed."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        height, width = (-(-side // 32) * 32 for side in options.size)  # padded, as torchvision's transform does
        levels = range(len(STRIDES)) if case.maps == "FPN" else [STRIDES.index(16)]
        self.features = {}
        for level in levels:
            shape = (options.images, options.channels, height // STRIDES[level], width // STRIDES[level])
            values = torch.randn(shape, generator=generator).to(options.device, DTYPES[case.dtype])
            self.features[str(level)] = values.contiguous(memory_format=LAYOUTS[case.layout])
        # Sides from 16 pixels to half a thousand, as many in each octave, and in any place.
        counts = [case.rois // options.images + (i < case.rois % options.images) for i in range(options.images)]
        frame = torch.tensor([options.size[1], options.size[0]], dtype=torch.float32)
        self.boxes = []
        for count in counts:
            sides = 16 * 2 ** (5 * torch.rand(count, 2, generator=generator))
            middle = frame * torch.rand(count, 2, generator=generator)
            corners = torch.cat([middle - sides / 2, middle + sides / 2], dim=1)
            self.boxes.append(corners.clamp(min=0).minimum(frame.repeat(2)).to(options.device))
        self.image_shapes = [tuple(options.size)] * options.images
        crops = (case.rois, options.channels, case.bins, case.bins)
        self.upstream = torch.randn(crops, generator=generator).to(options.device, DTYPES[case.dtype])

    def fewest_bytes(self, bins: int, sampling_ratio: int) -> dict[str, int]:
        """That have to be moved.

        Forward reads each pixel next to a sample once and writes the crops. Backward reads the crops' gradient and
        writes the maps'; for the boxes' gradient those pixels are read once more.
        """
        names = list(self.features)
        pixels = 0
        for boxes in self.boxes:
            boxes = boxes.cpu()
            levels = LevelMapper(2, 5)([boxes]) if len(names) > 1 else torch.zeros(len(boxes))
            for number, name in enumerate(names):
                read = torch.zeros(self.features[name].shape[2:], dtype=torch.bool)
                for x1, y1, x2, y2 in (boxes[levels == number] / STRIDES[int(name)]).tolist():
                    rows = _neighbours(y1, y2, bins, sampling_ratio, read.shape[0])
                    columns = _neighbours(x1, x2, bins, sampling_ratio, read.shape[1])
                    read[rows[:, None], columns] = True
                pixels += int(read.sum())
        feature = next(iter(self.features.values()))
        read_bytes = pixels * feature.shape[1] * feature.element_size()
        forward = read_bytes + self.upstream.nbytes
        backward = self.upstream.nbytes + sum(f.nbytes for f in self.features.values())
        return {"forward": forward, "forward_backward": forward + backward, "box_gradient": read_bytes}


def _neighbours(start: float, end: float, bins: int, sampling_ratio: int, size: int) -> Tensor:
    """The pixels along an axis that RoIAlign (aligned=False) reads for an RoI."""
    extent = max(end - start, 1.0)
    samples = bins * (sampling_ratio if sampling_ratio > 0 else -int(-extent // bins))
    position = start + (torch.arange(samples) + 0.5) * extent / samples
    low = position.clamp(0, size - 1).floor().long()
    return torch.cat([low, low + 1]).clamp(max=size - 1).unique()


def make_poolers(case: Case, options: argparse.Namespace) -> dict[str, nn.Module]:
    names = [str(level) for level in range(len(STRIDES))] if case.maps == "FPN" else [str(STRIDES.index(16))]
    arguments = (names, case.bins, options.sampling_ratio)
    poolers: dict[str, nn.Module] = {REFERENCE: MultiScaleRoIAlign(*arguments)}
    for sampler in SAMPLERS:
        poolers[sampler] = MultiScaleAffineCrop(*arguments, sampler=sampler)
    if case.maps == "single level" and case.rois <= 100 and options.sampling_ratio > 0:
        poolers[COPIED] = CopiedMapPooler(names[0], case.bins, options.sampling_ratio)
    if (case.maps, case.bins, case.dtype, case.layout) == ("FPN", 7, "float32", "channels_last"):
        poolers[DETERMINISTIC] = poolers["gather"]
    return poolers


def run_pooler(
    pooler: nn.Module, inputs: Inputs, device: torch.device, *, deterministic: bool = False
) -> tuple[float, float]:
    """Seconds of one forward, and of it with its backward."""
    features = {name: f.detach().requires_grad_() for name, f in inputs.features.items()}
    boxes = [b.clone().requires_grad_(type(pooler) is not MultiScaleRoIAlign) for b in inputs.boxes]
    wanted = [tensor for tensor in (*features.values(), *boxes) if tensor.requires_grad]
    # torchvision's operator has no bfloat16 on a CPU; autocast casts for it, as it does in training.
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=inputs.upstream.dtype != torch.float32)
    torch.use_deterministic_algorithms(deterministic)
    try:
        start = now(device)
        with autocast:
            crops = pooler(features, boxes, inputs.image_shapes)
        middle = now(device)
        upstream = inputs.upstream.to(crops.dtype)
        before_backward = now(device)
        # Not crops.backward(): of leaves it would turn each gradient into the leaf's layout, which no network needs.
        gradients = torch.autograd.grad(crops, wanted, upstream)
        end = now(device)
        del gradients
    finally:
        torch.use_deterministic_algorithms(False)
    return middle - start, middle - start + end - before_backward


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes in use at once during a run, over those in use before it; ``None`` where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not serve the run unseen
        Path("/proc/self/clear_refs").write_text("5")  # set the high-water mark back
        before = _resident("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux with glibc
        return None
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second, read and written, of a copy between two tensors of 256 MiB."""
    source, target = torch.ones(2, 2**26, device=device)
    target.copy_(source)
    seconds = []
    for _ in range(max(repeats, 3)):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * source.numel() * source.element_size() / median(seconds)


def measure_poolers(cases: list[Case], options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """One result for each case and pooler; of one that fails, the error."""
    for case in tqdm(cases, desc="poolers", file=sys.stderr, disable=None):
        inputs = Inputs(case, options)
        runs = {
            name: partial(run_pooler, pooler, inputs, options.device, deterministic=name == DETERMINISTIC)
            for name, pooler in make_poolers(case, options).items()
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        errors = {}
        for turn in range(options.repeats + 1):
            names = list(runs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name not in errors:
                    try:
                        measured = runs[name]()
                    except RuntimeError as error:  # most likely out of memory; the others may fit
                        errors[name] = str(error).splitlines()[0]
                    else:
                        seconds[name] += [measured] if turn else []  # the first warms up
        fewest = inputs.fewest_bytes(case.bins, options.sampling_ratio)
        gc.collect()
        for name, run in runs.items():
            result: dict[str, Any] = {"case": asdict(case), "pooler": name}
            if name in errors:
                yield result | {"error": errors[name]}
                continue
            peaks = [peak_memory(run, options.device) for _ in range(3)]
            for key, values in zip(("forward", "forward_backward"), zip(*seconds[name])):
                bytes_moved = fewest[key]
                if key == "forward_backward" and name != REFERENCE:
                    bytes_moved += fewest["box_gradient"]
                result[key] = {"seconds": list(values), "floor": bytes_moved / bandwidth}
            yield result | {"peak_bytes": None if None in peaks else peaks}


def measure_detector(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Training steps and inferences of a Faster R-CNN, stock and swapped, and training steps of a Mask R-CNN."""
    tasks = ("training step", "inference")
    yield from _measure_model("fasterrcnn_resnet50_fpn", tasks, (None, BOX), options.layouts, options.repeats, options)
    # In one layout and fewer rounds, for it takes longest.
    layouts, repeats = options.layouts[-1:], min(options.repeats, MASK_REPEATS)
    yield from _measure_model("maskrcnn_resnet50_fpn", tasks[:1], (None, BOX, BOX_MASK), layouts, repeats, options)


def _measure_model(
    name: str,
    tasks: Sequence[str],
    named: Sequence[Losses | None],
    layouts: Sequence[str],
    repeats: int,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """A detector in each layout, swapped with each of these losses named, or stock (``None``)."""
    device = options.device
    torch.manual_seed(0)
    images = [torch.rand(3, *options.size, device=device)]
    settings = {"min_size": min(options.size), "max_size": max(options.size)}

    def build() -> FasterRCNN:
        torch.manual_seed(0)
        return getattr(detection, name)(weights=None, weights_backbone=None, **settings).to(device)

    targets = [_reachable_targets(build(), images)]
    models, optimizers = {}, {}
    for layout in layouts:
        for losses in named:
            model = build().to(memory_format=LAYOUTS[layout])
            if losses is not None:
                swap_crop_head(model, replace(BoxGradient.exact(), losses=losses))
            models[layout, losses] = model
            # Not a step further: all of them see the same weights in every round.
            optimizers[layout, losses] = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def train(key: tuple[str, Losses | None]) -> None:
        torch.manual_seed(0)  # which RoIs are drawn
        losses = _frozen(models[key].train())(images, [dict(target) for target in targets])
        optimizers[key].zero_grad()
        sum(losses.values()).backward()
        optimizers[key].step()

    def infer(key: tuple[str, Losses | None]) -> None:
        with torch.no_grad():
            models[key].eval()(images)

    jobs = {"training step": train, "inference": infer}
    total = (repeats + 1) * len(tasks) * len(models)
    with tqdm(total=total, desc=name, file=sys.stderr, disable=None) as progress:
        for task in tasks:
            seconds: dict[tuple[str, Losses | None], list[float]] = {key: [] for key in models}
            for turn in range(repeats + 1):
                keys = list(models)
                for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
                    start = now(device)
                    jobs[task](key)
                    seconds[key] += [now(device) - start] if turn else []
                    progress.update()
            for (layout, losses), values in seconds.items():
                result = {"model": name, "task": task, "layout": layout, "swapped": losses is not None}
                result |= {"losses": losses, "seconds": values}
                if task == "training step":
                    result |= _what_was_pooled(models[layout, losses], images, targets)
                yield result


def _frozen(model: FasterRCNN) -> FasterRCNN:
    """With batch norm as it is in fine-tuning: from running statistics, which are those of the start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def _reachable_targets(model: FasterRCNN, images: list[Tensor]) -> dict[str, Tensor]:
    """Boxes near to the model's own proposals: at random weights it would have no positives, and so no box loss.

    The masks, where they are learned, are those boxes, filled.
    """
    with torch.no_grad():
        transformed, _ = model.eval().transform(images)
        proposals = model.rpn(transformed, model.backbone(transformed.tensors))[0][0]
    sides = proposals[:, 2:] - proposals[:, :2]
    boxes = proposals[sides.min(dim=1).values > 16][:20].clone()
    boxes[:, 2:] += 0.1 * (boxes[:, 2:] - boxes[:, :2])
    height, width = images[0].shape[1:]
    boxes = boxes.minimum(boxes.new_tensor([width, height, width, height]))
    target = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64, device=boxes.device)}
    if model.roi_heads.has_mask():
        target["masks"] = torch.zeros(len(boxes), height, width, dtype=torch.uint8, device=boxes.device)
        for mask, (x1, y1, x2, y2) in zip(target["masks"], boxes.round().int().tolist()):
            mask[y1:y2, x1:x2] = 1
    return target


def _what_was_pooled(model: FasterRCNN, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Any]:
    """RoIs of a training step, positives among them, and the gradients at the RPN's deltas of box and mask loss."""
    labels: list[Tensor] = []
    original = model.roi_heads.select_training_samples

    def select(*arguments: Any) -> Any:
        selected = original(*arguments)
        labels.extend(selected[2])
        return selected

    torch.manual_seed(0)
    model.roi_heads.select_training_samples = select
    try:
        losses = _frozen(model.train())(images, [dict(target) for target in targets])
    finally:
        del model.roi_heads.select_training_samples
    weight, norms = model.rpn.head.bbox_pred.weight, {}
    for key, loss in {"box": "loss_box_reg", "mask": "loss_mask"}.items():
        if loss in losses:
            (gradient,) = torch.autograd.grad(losses[loss], weight, retain_graph=True, allow_unused=True)
            norms[f"{key}_loss_gradient_at_rpn"] = None if gradient is None else float(gradient.norm())
    drawn = torch.cat(labels)
    return {
        "rois": len(drawn),
        "positives": int((drawn > 0).sum()),
        "truths": len(targets[0]["boxes"]),
        **norms,
    }


def machine(device: torch.device) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "date": datetime.now().isoformat(timespec="seconds"),
    }


# --- What people read ------------------------------------------------------------------------------------------------


def ratio(values: list[float], reference: list[float]) -> str:
    """The median of the ratios within each round, and their range."""
    ratios = [ours / theirs for ours, theirs in zip(values, reference)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def milliseconds(seconds: list[float]) -> str:
    low, middle, high = (1000 * end(seconds) for end in (min, median, max))
    digits = 0 if middle >= 100 else 1
    return f"{middle:.{digits}f} ms ({low:.{digits}f}-{high:.{digits}f})"


def pooler_table(results: list[dict[str, Any]]) -> str:
    """A row for each case and pooler: the time of torchvision's, and the others' over it."""
    rows = [["features and crop", "RoIs", "pooler", "forward", "forward + backward", "peak memory", "times the floor"]]
    rows.append(["---"] * len(rows[0]))
    for case, poolers in _by_case(results):
        stock = poolers[REFERENCE]
        for name, entry in poolers.items():
            row = [str(case), str(case.rois), name]
            if "error" in entry or "error" in stock:
                rows.append([*row, entry.get("error", "no reference"), "", "", ""])
                continue
            floors = []
            for key in ("forward", "forward_backward"):
                seconds = entry[key]["seconds"]
                row.append(milliseconds(seconds) if name == REFERENCE else ratio(seconds, stock[key]["seconds"]))
                floors.append(f"{median(seconds) / entry[key]['floor']:.1f}")
            if not (entry["peak_bytes"] and stock["peak_bytes"]):
                row.append("unknown")
            elif name == REFERENCE:
                row.append(f"{median(stock['peak_bytes']) / 2**20:.0f} MiB")
            else:
                row.append(f"{median(entry['peak_bytes']) / max(median(stock['peak_bytes']), 1):.2f}")
            rows.append([*row, ", ".join(floors)])
    return _markdown(rows)


def growth(results: list[dict[str, Any]]) -> str:
    """What a further RoI costs, from the fewest to the most."""
    lines = []
    for layout in LAYOUTS:
        cases = [(case.rois, entries) for case, entries in _plotted(results) if case.layout == layout]
        if len(cases) < 2:
            continue
        (fewest, first), (most, last) = cases[0], cases[-1]
        slopes = []
        for name in (one for one in POOLERS if one in first):
            ends = [median(entries[name]["forward_backward"]["seconds"]) for entries in (first, last)]
            slopes.append(f"{name} {1e6 * (ends[1] - ends[0]) / (most - fewest):.0f}")
        lines.append(f"- {layout}, from {fewest} to {most} RoIs: {', '.join(slopes)}")
    title = f"Microseconds for a further RoI on an FPN in {results[0]['case']['dtype']}, forward + backward:\n"
    return "\n".join([title, *lines]) if lines else ""


def detector_table(name: str, results: list[dict[str, Any]]) -> str:
    """A row for each task and layout of a detector, and for the losses named, where there are several choices."""
    rows = [[f"{name}, one image", "layout", "stock", "swapped", "swapped / stock"], ["---"] * 5]
    stock = {(r["task"], r["layout"]): r["seconds"] for r in results if not r["swapped"]}
    swapped = [r for r in results if r["swapped"]]
    several = len({str(r.get("losses")) for r in swapped}) > 1
    for entry in swapped:
        reference, seconds = stock[entry["task"], entry["layout"]], entry["seconds"]
        times = [f"{median(v):.2f} s ({min(v):.2f}-{max(v):.2f})" for v in (reference, seconds)]
        named = f", losses: {' and '.join(entry['losses'])}" if several else ""
        rows.append([entry["task"] + named, entry["layout"], *times, ratio(seconds, reference)])
    table = _markdown(rows)
    if counts := next((r for r in reversed(swapped) if "rois" in r), None):
        table += (
            "\n\nRandom weights, frozen batch norm. A training step is forward, backward and SGD, with "
            f"{counts['rois']} RoIs, {counts['positives']} of them positive and {counts['truths']} of those the truth "
            "itself; swapped, the box loss's gradient at the RPN's deltas has the norm "
            f"{counts['box_loss_gradient_at_rpn'] or 0:.2g}"
        )
        if "mask_loss_gradient_at_rpn" in counts:
            table += f", and the mask loss's, where it is named, {counts['mask_loss_gradient_at_rpn'] or 0:.2g}"
            table += f". Rounds: {len(counts['seconds'])}; the positives are cropped to 14 x 14 as well"
        table += "."
    return table


def report(data: dict[str, Any]) -> str:
    where, settings = data["machine"], data["settings"]
    parts = [
        f"`{data['command']}`",
        f"{where['device']}, {where['cpus']} CPUs, {where['threads']} threads; torch {where['torch']}, torchvision "
        f"{where['torchvision']}; {where['date'][:10]}. Maps of {settings['images']} images of {settings['size'][0]} x "
        f"{settings['size'][1]}, {settings['channels']} channels, sampling_ratio {settings['sampling_ratio']}; medians "
        f"of {settings['repeats']} rounds (lowest-highest). torchvision's pooler gives boxes no gradient, and its rows "
        f"are times; the others' are over torchvision's in the same round, with the boxes' gradient. The floor, of "
        f"forward and of forward + backward, is the bytes that must move, at the speed of a copy: "
        f"{data['bandwidth'] / 1e9:.1f} GB/s.",
    ]
    if data["poolers"]:
        parts += [pooler_table(data["poolers"]), growth(data["poolers"])]
    # Results of a time when there was but one detector do not name it.
    names = dict.fromkeys(r.get("model", "fasterrcnn_resnet50_fpn") for r in data["detector"])
    for name in names:
        of_it = [r for r in data["detector"] if r.get("model", name) == name]
        if any(r["swapped"] for r in of_it):
            parts.append(detector_table(name, of_it))
    return "\n\n".join(part for part in parts if part)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(data: dict[str, Any], path: Path) -> None:
    """Time against the number of RoIs, on FPN maps in the first dtype."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colors = {REFERENCE: "#000000", "grid_sample": "#E69F00", "gather": "#0072B2"}
    titles = {"forward": "Forward", "forward_backward": "Forward + backward"}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for panel, (key, title) in zip(panels, titles.items()):
        for layout, style in zip(LAYOUTS, ("--", "-")):
            lines: dict[str, list[tuple[int, list[float], float]]] = {}
            for case, entries in _plotted(data["poolers"]):
                for name in (one for one in POOLERS if one in entries and case.layout == layout):
                    entry = entries[name][key]
                    lines.setdefault(name, []).append((case.rois, entry["seconds"], entry["floor"]))
            for name, points in lines.items():
                rois = [point[0] for point in points]
                label = f"{name}, {layout}" + ("" if name == REFERENCE else " (with box gradient)")
                middle = [1000 * median(point[1]) for point in points]
                panel.plot(rois, middle, style, marker="o", markersize=4, color=colors[name], label=label)
                low, high = ([1000 * end(point[1]) for point in points] for end in (min, max))
                panel.fill_between(rois, low, high, color=colors[name], alpha=0.15, linewidth=0)
            if lines and layout == "channels_last":
                floor = [1000 * point[2] for point in lines["gather"]]
                panel.plot(rois, floor, ":", color="#999999", label="floor: the bytes that must move")
        panel.set(title=title, xscale="log", yscale="log", xlabel="RoIs")
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        counts = sorted({case.rois for case, _ in _plotted(data["poolers"])})
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.minorticks_off()
    panels[0].set_ylabel("milliseconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=8, handlelength=4)
    where = data["machine"]
    dtype = data["poolers"][0]["case"]["dtype"]
    figure.suptitle(f"RoI pooling over an FPN, {dtype}: {where['device']}, {where['threads']} threads", fontsize=10)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _by_case(results: list[dict[str, Any]]) -> list[tuple[Case, dict[str, dict[str, Any]]]]:
    cases: dict[Case, dict[str, dict[str, Any]]] = {}
    for entry in results:
        cases.setdefault(Case(**entry["case"]), {})[entry["pooler"]] = entry
    return [(case, entries) for case, entries in cases.items() if REFERENCE in entries]


def _plotted(results: list[dict[str, Any]]) -> list[tuple[Case, dict[str, dict[str, Any]]]]:
    """The cases whose times are compared over the number of RoIs: 7 x 7 on an FPN, in the first dtype."""
    return [
        (case, entries)
        for case, entries in _by_case(results)
        if (case.maps, case.bins, case.dtype) == ("FPN", 7, results[0]["case"]["dtype"])
        and all("error" not in entries.get(name, {}) for name in POOLERS)
    ]


def write(data: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "benchmark.json.part"
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    unfinished.replace(folder / "benchmark.json")


def render(data: dict[str, Any], folder: Path) -> None:
    text = report(data)
    print(text, flush=True)
    try:
        (folder / "benchmark.md").write_text(text + "\n")
        print(f"\nWritten: {folder / 'benchmark.md'}", file=sys.stderr)
        if _plotted(data["poolers"]):
            plot(data, folder / "benchmark.png")
            print(f"Written: {folder / 'benchmark.png'}", file=sys.stderr)
    except OSError as error:
        sys.exit(f"{folder} cannot be written to: {error}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rois", type=int, nargs="+", default=[100, 1000, 4000], help="numbers of RoIs, of all images together")
    add("--size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"), help="of the images")
    add("--images", type=int, default=2, help="images in the poolers' batch (a detector is given one)")
    add("--channels", type=int, default=256, help="of the feature maps")
    add("--sampling_ratio", type=int, default=2, help="samples per bin and axis; 0 takes them by the RoI's size")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the features; geometry is float32")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of the features, and of the detectors")
    add("--repeats", type=int, default=5, help="rounds, after one to warm up")
    add("--threads", type=int, help="threads for a CPU; default: torch's choice")
    add("--device", default="cpu", help="cpu, cuda or cuda:1")
    add("--no_detector", action="store_true", help="leave out the training steps and inferences")
    add("--folder", type=Path, help="for the results; default: runs/benchmark/ and the time")
    add("--render", type=Path, metavar="JSON", help="measure nothing; tables and plot from these results, beside them")
    options = parser.parse_args(arguments)
    for name in ("images", "channels", "repeats", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    for name in ("rois", "size"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    options.rois = sorted(set(options.rois))
    try:
        options.device = torch.device(options.device)
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    if options.folder is None:
        options.folder = Path("runs", "benchmark", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if not options.render and (options.folder / "benchmark.json").exists():
        parser.error(f"--folder {options.folder} has results already; give another, or --render them")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.render:
        try:
            data = json.loads(options.render.read_text())
            report(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{options.render} has no results of this tool: {type(error).__name__}: {error}")
        render(data, options.render.parent)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth(options.device, options.repeats)
    settings = {name: value for name, value in vars(options).items() if name not in ("folder", "render", "device")}
    command = ["python", "tools/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)]
    data = {
        "machine": machine(options.device),
        "command": " ".join(command),
        "settings": settings,
        "bandwidth": bandwidth,
        "poolers": [],
        "detector": [],
    }
    status = 0
    try:
        for result in measure_poolers(make_cases(options.rois, options.dtypes, options.layouts), options, bandwidth):
            data["poolers"].append(result)
            write(data, options.folder)
        for result in measure_detector(options) if not options.no_detector else ():
            data["detector"].append(result)
            write(data, options.folder)
    except KeyboardInterrupt:
        print("\nStopped; what was measured until then:", file=sys.stderr)
        status = 130
    except (OSError, RuntimeError) as error:  # a full disk; the detector out of memory
        print(f"\nStopped: {error}\nWhat was measured until then:", file=sys.stderr)
        status = 1
    if data["poolers"]:
        render(data, options.folder)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
