"""Measure the time and memory of RoI poolers side by side, then of a whole detector with each.

python tools/benchmark.py                                                everything, 19 minutes on 2 CPU cores
python tools/benchmark.py --device cuda --repeats 20 --sampler triton \
  --detectors fasterrcnn_resnet50_fpn maskrcnn_resnet50_fpn --batches 1 8 --detector_dtypes float32 bfloat16    on a GPU
python tools/benchmark.py --render runs/benchmark/.../benchmark.json     write the tables again

Each round runs every pooler once, in changing order, and ratios are taken within a round. All poolers but torchvision's
compute gradients of boxes. Forward is timed as in training, with the tensors for the backward kept.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import FasterRCNN
from torchvision.ops import MultiScaleRoIAlign, box_convert
from torchvision.ops.poolers import LevelMapper
from tqdm import tqdm

from detector import BoxGradient, MultiScaleAffineCrop, prroi_pool2d, roi_align_rotated, swap_crop_head
from detector.crop.crop import Sampler
from detector.crop.triton_sampler import why_not

STRIDES = (4, 8, 16, 32)
REFERENCE = "torchvision"
DETERMINISTIC = "gather, deterministic"
DETECTORS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
TRACKERS = {"36 x 36 pixels": 36, "18 x 18 pixels": 18}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Maps and RoIs for the poolers."""

    maps: str  # "FPN": strides 4 to 32; "single level": stride 16; a key of TRACKERS: one map of stride 16
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
    cases += [Case("single level", dtypes[0], layout, count, 7) for layout in layouts for count in rois[:2]]
    return cases + [Case(maps, dtypes[0], "NCHW", 10, 5) for maps in TRACKERS]


class Inputs:
    """Features and boxes of a case, seeded. Sides of boxes are 16 to 512 pixels, with equal numbers in each octave."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        size, images = tuple(options.size), options.images
        if case.maps in TRACKERS:
            size, images = (16 * TRACKERS[case.maps],) * 2, 1
        multiple = 16 if case.maps in TRACKERS else 32  # to which torchvision's transform pads
        height, width = (-(-side // multiple) * multiple for side in size)
        self.features = {}
        for level, stride in enumerate(STRIDES):
            if case.maps == "FPN" or stride == 16:
                shape = (images, options.channels, height // stride, width // stride)
                values = torch.randn(shape, generator=generator).to(options.device, DTYPES[case.dtype])
                self.features[str(level)] = values.contiguous(memory_format=LAYOUTS[case.layout])
        frame = torch.tensor([size[1], size[0]], dtype=torch.float32)
        self.boxes = []
        for image in range(images):
            count = case.rois // images + (image < case.rois % images)
            sides = 16 * 2 ** (5 * torch.rand(count, 2, generator=generator))
            middle = frame * torch.rand(count, 2, generator=generator)
            corners = torch.cat([middle - sides / 2, middle + sides / 2], dim=1)
            self.boxes.append(corners.clamp(min=0).minimum(frame.repeat(2)).to(options.device))
        self.image_shapes = [size] * images
        crops = (case.rois, options.channels, case.bins, case.bins)
        self.upstream = torch.randn(crops, generator=generator).to(options.device, DTYPES[case.dtype])

    def fewest_bytes(self, bins: int, sampling_ratio: int) -> dict[str, int]:
        """Return the bytes that must be moved: each pixel next to a sample is read once, and every result written."""
        pixels = 0
        for boxes in (boxes.cpu() for boxes in self.boxes):
            levels = LevelMapper(2, 5)([boxes]) if len(self.features) > 1 else torch.zeros(len(boxes))
            for number, (name, feature) in enumerate(self.features.items()):
                read = torch.zeros(feature.shape[2:], dtype=torch.bool)
                for x1, y1, x2, y2 in (boxes[levels == number] / STRIDES[int(name)]).tolist():
                    rows = _neighbours(y1, y2, bins, sampling_ratio, read.shape[0])
                    read[rows[:, None], _neighbours(x1, x2, bins, sampling_ratio, read.shape[1])] = True
                pixels += int(read.sum())
        read_bytes = pixels * feature.shape[1] * feature.element_size()
        forward = read_bytes + self.upstream.nbytes
        backward = self.upstream.nbytes + sum(f.nbytes for f in self.features.values())
        return {"forward": forward, "forward_backward": forward + backward, "box_gradient": read_bytes}


def _neighbours(start: float, end: float, bins: int, sampling_ratio: int, size: int) -> Tensor:
    """Return the pixels along an axis that RoIAlign (aligned=False) reads for an RoI."""
    extent = max(end - start, 1.0)
    samples = bins * (sampling_ratio if sampling_ratio > 0 else -int(-extent // bins))
    position = start + (torch.arange(samples) + 0.5) * extent / samples
    low = position.clamp(0, size - 1).floor().long()
    return torch.cat([low, low + 1]).clamp(max=size - 1).unique()


class SingleLevel(nn.Module):
    """An operator as a pooler of one level of stride 16. It gets the map and the boxes."""

    def __init__(self, crop: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.crop = crop

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        (source,) = x.values()
        return self.crop(source, boxes)


def _prroi_pool(source: Tensor, boxes: list[Tensor], bins: int, method: Any) -> Tensor:
    return prroi_pool2d(source, boxes, bins, bins, 1 / 16, method=method)


def turned(boxes: list[Tensor]) -> list[Tensor]:
    """Boxes of the same centres and sides, turned by 30 degrees."""
    return [torch.cat([box_convert(b, "xyxy", "cxcywh"), torch.full_like(b[:, :1], 30)], dim=1) for b in boxes]


def make_poolers(case: Case, options: argparse.Namespace) -> dict[str, nn.Module]:
    names = [str(level) for level, stride in enumerate(STRIDES) if case.maps == "FPN" or stride == 16]
    arguments = (names, case.bins, options.sampling_ratio)
    poolers: dict[str, nn.Module] = {REFERENCE: MultiScaleRoIAlign(*arguments)}
    samplers: list[Any] = ["gather", "triton"] if why_not(options.device) is None else ["gather"]
    for sampler in ("grid_sample", *samplers):
        poolers[sampler] = MultiScaleAffineCrop(*arguments, sampler=sampler)
    if case.maps != "FPN":
        geometry = (case.bins, 1 / 16, options.sampling_ratio)
        for method in ["auto", *samplers[1:]]:
            name = "prroi_pool2d" if method == "auto" else f"prroi_pool2d, {method}"
            poolers[name] = SingleLevel(partial(_prroi_pool, bins=case.bins, method=method))
        poolers["roi_align_rotated"] = SingleLevel(lambda x, b: roi_align_rotated(x, turned(b), *geometry))
    if (case.maps, case.bins, case.dtype, case.layout) == ("FPN", 7, "float32", "channels_last"):
        poolers[DETERMINISTIC] = poolers["gather"]
    return poolers


def run_pooler(pooler: nn.Module, inputs: Inputs, device: torch.device, deterministic: bool) -> tuple[float, float]:
    """Return the seconds of one forward, and of forward and backward."""
    features = {name: f.detach().requires_grad_() for name, f in inputs.features.items()}
    boxes = [b.clone().requires_grad_(type(pooler) is not MultiScaleRoIAlign) for b in inputs.boxes]
    wanted = [tensor for tensor in (*features.values(), *boxes) if tensor.requires_grad]
    # torchvision's operator has no bfloat16 on a CPU; autocast casts for it, as in training.
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=inputs.upstream.dtype != torch.float32)
    torch.use_deterministic_algorithms(deterministic)
    try:
        start = now(device)
        with autocast:
            crops = pooler(features, boxes, inputs.image_shapes)
        forward = now(device) - start
        upstream = inputs.upstream.to(crops.dtype)
        # crops.backward() would convert each gradient to the leaf's layout, which no network needs.
        return forward, forward + seconds_of(lambda: torch.autograd.grad(crops, wanted, upstream), device)
    finally:
        torch.use_deterministic_algorithms(False)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    start = now(device)
    run()
    return now(device) - start


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the peak of bytes in use during a run, less those in use before; ``None`` where unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory must not serve the run unnoticed
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = _resident("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux with glibc
        return None
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Return the bytes per second, read and written, of a copy between two tensors of 256 MiB."""
    source, target = torch.ones(2, 2**26, device=device)
    seconds = [seconds_of(lambda: target.copy_(source), device) for _ in range(max(repeats, 3) + 1)]
    return 2 * source.nbytes / median(seconds[1:])


def rounds(runs: dict[Any, Any], repeats: int, progress: str) -> tuple[dict[Any, list[Any]], dict[Any, str]]:
    """Run each job once a round, in turning order, after a round to warm up; return results and errors by job."""
    results: dict[Any, list[Any]] = {name: [] for name in runs}
    errors: dict[Any, str] = {}
    for turn in tqdm(range(repeats + 1), desc=progress, file=sys.stderr, disable=None, leave=False):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            try:
                results[name] += [runs[name]()] if name not in errors else []
            except RuntimeError as error:  # out of memory, most likely; others may fit
                errors[name] = str(error).splitlines()[0]
    return {name: values[1:] for name, values in results.items()}, errors


def measure_poolers(cases: list[Case], options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Yield a result for each case and pooler, or the error of one that fails."""
    for case in cases:
        inputs = Inputs(case, options)
        poolers = make_poolers(case, options).items()
        runs = {name: partial(run_pooler, p, inputs, options.device, name == DETERMINISTIC) for name, p in poolers}
        measured, errors = rounds(runs, options.repeats, f"{case}, {case.rois} RoIs")
        fewest = inputs.fewest_bytes(case.bins, options.sampling_ratio)
        gc.collect()
        for name, run in runs.items():
            result: dict[str, Any] = {"case": asdict(case), "pooler": name}
            if name in errors:
                yield result | {"error": errors[name]}
                continue
            peaks = [peak_memory(run, options.device) for _ in range(3)]
            for key, values in zip(("forward", "forward_backward"), zip(*measured[name])):
                of_boxes = fewest["box_gradient"] if key == "forward_backward" and name != REFERENCE else 0
                result[key] = {"seconds": list(values), "floor": (fewest[key] + of_boxes) / bandwidth}
            yield result | {"peak_bytes": None if None in peaks else peaks}


@dataclass(frozen=True)
class DetectorCase:
    """A detector of torchvision's with random weights, and what it gets."""

    name: str
    images: int
    dtype: str  # bfloat16: under autocast, as bf16-mixed training
    layout: str


def make_detector(case: DetectorCase, options: argparse.Namespace, swapped: bool) -> FasterRCNN:
    torch.manual_seed(0)
    sizes = {"min_size": min(options.size), "max_size": max(options.size)}
    model = getattr(detection, case.name)(weights=None, weights_backbone=None, **sizes)
    model = model.to(options.device, memory_format=LAYOUTS[case.layout])
    losses = BoxGradient(losses=("box", "mask")) if "mask" in case.name else BoxGradient()
    return swap_crop_head(model, losses, sampler=options.sampler) if swapped else model


def measure_detectors(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the times of training steps and inferences of detectors, stock and swapped."""
    axes = (options.detectors, options.batches, options.detector_dtypes, options.layouts)
    for case in (DetectorCase(*values) for values in itertools.product(*axes)):
        models = {swapped: make_detector(case, options, swapped) for swapped in (False, True)}
        images = [torch.rand(3, *options.size, device=options.device) for _ in range(case.images)]
        targets = _reachable_targets(models[False], images)
        optimizers = {swapped: torch.optim.SGD(model.parameters(), lr=0.0) for swapped, model in models.items()}
        autocast = partial(torch.autocast, options.device.type, torch.bfloat16, case.dtype == "bfloat16")
        for task, job in {"training step": train, "inference": infer}.items():
            inputs = (images, targets, autocast)
            runs = {swapped: partial(job, model, optimizers[swapped], *inputs) for swapped, model in models.items()}
            timed = {swapped: partial(seconds_of, run, options.device) for swapped, run in runs.items()}
            seconds, errors = rounds(timed, options.repeats, f"{task} of {case.name}")
            if errors:
                raise RuntimeError(next(iter(errors.values())))
            for swapped, values in seconds.items():
                entry = {"case": asdict(case), "task": task, "swapped": swapped, "seconds": values}
                yield entry | {"peak_bytes": peak_memory(runs[swapped], options.device)}


def train(model: FasterRCNN, optimizer: torch.optim.Optimizer, images: Any, targets: Any, autocast: Any) -> None:
    torch.manual_seed(0)  # the sampling of RoIs
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with autocast():
        losses = model(images, [dict(target) for target in targets])
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()  # of size 0, so that every round has the same weights


def infer(model: FasterRCNN, optimizer: torch.optim.Optimizer, images: Any, targets: Any, autocast: Any) -> None:
    with torch.no_grad(), autocast():
        model.eval()(images)


def _reachable_targets(model: FasterRCNN, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """Return boxes near the model's own proposals, because at random weights others would have no positives."""
    with torch.no_grad():
        transformed, _ = model.eval().transform(images)
        features = model.backbone(transformed.tensors)
        proposals_of_images = model.rpn(transformed, features)[0]
    targets = []
    for image, proposals in zip(images, proposals_of_images):
        sides = proposals[:, 2:] - proposals[:, :2]
        boxes = (proposals + 0.1 * F.pad(sides, (2, 0)))[sides.amin(dim=1) > 16][:20]
        boxes = boxes.minimum(boxes.new_tensor(image.shape[:0:-1]).repeat(2))
        masks = torch.ones(len(boxes), *image.shape[1:], dtype=torch.uint8, device=boxes.device)
        labels = torch.ones(len(boxes), dtype=torch.int64, device=boxes.device)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return targets


def machine(device: torch.device) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else [*models, platform.machine()][0],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def spread(values: list[float], digits: int = 2, unit: str = "") -> str:
    return f"{median(values):.{digits}f}{unit} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratio(values: list[float], reference: list[float]) -> str:
    """Return the median of the ratios within each round, and their range."""
    return spread([ours / theirs for ours, theirs in zip(values, reference)])


def pooler_table(results: list[dict[str, Any]]) -> str:
    """Return a row for each case and pooler: torchvision's times, and the others' over them."""
    rows = [["features and crop", "RoIs", "pooler", "forward", "forward + backward", "peak memory", "times the floor"]]
    references = {Case(**entry["case"]): entry for entry in results if entry["pooler"] == REFERENCE}
    for entry in results:
        name, case = entry["pooler"], Case(**entry["case"])
        stock, row = references[case], [str(case), str(case.rois), name]
        if "error" in entry or "error" in stock:
            rows.append([*row, entry.get("error", "no reference"), "", "", ""])
            continue
        floors = []
        for key in ("forward", "forward_backward"):
            seconds = entry[key]["seconds"]
            times = spread([1000 * second for second in seconds], 1, " ms")
            row.append(times if name == REFERENCE else ratio(seconds, stock[key]["seconds"]))
            floors.append(f"{median(seconds) / entry[key]['floor']:.1f}")
        memory = "unknown"
        if entry["peak_bytes"] and stock["peak_bytes"]:
            peak, reference = median(entry["peak_bytes"]), median(stock["peak_bytes"])
            memory = f"{peak / 2**20:.0f} MiB" if name == REFERENCE else f"{peak / max(reference, 1):.2f}"
        rows.append([*row, memory, ", ".join(floors)])
    return _markdown(rows)


def detector_table(results: list[dict[str, Any]]) -> str:
    """Return a row for each case and task."""
    rows = [["detector", "task", "images", "dtype and layout", "stock", "swapped", "swapped / stock", "peak memory"]]
    cases: dict[Any, dict[bool, Any]] = {(entry["task"], DetectorCase(**entry["case"])): {} for entry in results}
    for entry in results:
        cases[entry["task"], DetectorCase(**entry["case"])][entry["swapped"]] = entry
    for (task, case), entries in cases.items():
        if len(entries) < 2:  # interrupted
            continue
        stock, ours = entries[False], entries[True]
        times = [spread(entry["seconds"], 3, " s") for entry in (stock, ours)]
        peaks = [entry["peak_bytes"] for entry in (stock, ours)]
        memory = f"{peaks[1] / max(peaks[0], 1):.2f}" if all(peaks) else "unknown"
        row = [case.name, task, str(case.images), f"{case.dtype}, {case.layout}", *times]
        rows.append([*row, ratio(ours["seconds"], stock["seconds"]), memory])
    return f"{_markdown(rows)}\n\nRandom weights, frozen batch norm. A training step is forward, backward and SGD."


def report(data: dict[str, Any]) -> str:
    where, settings = data["machine"], data["settings"]
    size = " x ".join(map(str, settings["size"]))
    parts = [
        f"`{data['command']}`",
        f"{where['device']}, {where['cpus']} CPUs, {where['threads']} threads; torch {where['torch']}, torchvision "
        f"{where['torchvision']}; {where['date'][:10]}. Maps of {settings['images']} images of {size}, "
        f"{settings['channels']} channels, sampling_ratio {settings['sampling_ratio']}; medians of "
        f"{settings['repeats']} rounds (lowest-highest). torchvision's rows are times, without a gradient to boxes. "
        "The others are over torchvision's in the same round, with that gradient. The floor, of forward and of forward "
        f"+ backward, is the bytes that must move, at the speed of a copy: {data['bandwidth'] / 1e9:.1f} GB/s.",
    ]
    if data["poolers"]:
        parts.append(pooler_table(data["poolers"]))
    if data["detector"]:
        parts.append(detector_table(data["detector"]))
    return "\n\n".join(parts)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def write(data: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json.part").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "benchmark.json.part").replace(folder / "benchmark.json")


def render(data: dict[str, Any], folder: Path) -> None:
    text = report(data)
    print(text, flush=True)
    (folder / "benchmark.md").write_text(text + "\n")
    print(f"\nWritten: {folder / 'benchmark.md'}", file=sys.stderr)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rois", type=positive, nargs="+", default=[100, 1000, 4000], help="numbers of RoIs, of all images together")
    add("--size", type=positive, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"), help="size of the images")
    add("--images", type=positive, default=2, help="images in the poolers' batch")
    add("--channels", type=positive, default=256, help="channels of the feature maps")
    add("--sampling_ratio", type=int, default=2, help="samples per bin and axis; 0 depends on the RoI's size")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes of the features")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="layouts of features and detectors")
    add("--repeats", type=positive, default=5, help="rounds, after one to warm up")
    add("--threads", type=positive, help="CPU threads; default: torch's choice")
    add("--device", default="cpu", help="cpu, cuda or cuda:1")
    add("--detectors", nargs="*", choices=DETECTORS, default=list(DETECTORS[:1]), help="detectors; none: only poolers")
    add("--batches", type=positive, nargs="+", default=[1], help="images in the detectors' batches")
    add("--detector_dtypes", nargs="+", choices=DTYPES, default=["float32"], help="bfloat16 is under autocast")
    add("--sampler", choices=get_args(Sampler), default="auto", help="of the swapped detectors")
    add("--folder", type=Path, help="folder of the results; default: runs/benchmark/ and the time")
    add("--render", type=Path, metavar="JSON", help="measure nothing; write the tables of these results beside them")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    options.folder = options.folder or Path("runs", "benchmark", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if not options.render and (options.folder / "benchmark.json").exists():
        parser.error(f"--folder {options.folder} has results; give another, or --render them")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.render:
        render(json.loads(options.render.read_text()), options.render.parent)
        return
    torch.set_num_threads(options.threads or torch.get_num_threads())
    command = ["python", "tools/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)]
    data: dict[str, Any] = {"machine": machine(options.device), "command": " ".join(command)}
    data["settings"] = {name: v for name, v in vars(options).items() if name not in ("folder", "render", "device")}
    data |= {"bandwidth": copy_bandwidth(options.device, options.repeats), "poolers": [], "detector": []}
    cases = make_cases(options.rois, options.dtypes, options.layouts)
    try:
        for result in measure_poolers(cases, options, data["bandwidth"]):
            data["poolers"].append(result)
            write(data, options.folder)
        for result in measure_detectors(options):
            data["detector"].append(result)
            write(data, options.folder)
    finally:  # also what was measured before Ctrl-C, or before the memory was full
        if data["poolers"]:
            render(data, options.folder)


if __name__ == "__main__":
    main()
