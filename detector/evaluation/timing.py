"""How long each stage of a detector takes, from the file to the detections."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.coco import CocoDetection

STAGES = ("decode and transform", "backbone", "RPN", "crop", "head", "post-processing")
WARM_UP = 3  # images that are not counted


@torch.inference_mode()
def measure_stages(
    model: nn.Module,
    split: CocoDetection,
    *,
    images: int = 50,
    among: int | None = None,
    device: torch.device | str = "cpu",
    on_image: Callable[[int], Any] = lambda images: None,
) -> dict[str, Any]:
    """Time the stages of a detector, one image at a time, in this process.

    Args:
        model: a torchvision detector, stock or swapped; put in eval mode for the run.
        split: the data, without a transform.
        images: how many are counted, spread over the split, some more than once if it has fewer.
        among: only of the first so many.
        device: where the model is.
        on_image: called with 1 after each image.

    Returns:
        ``images``, and in ``rows`` a dict for each stage that the model has, and for the total: ``stage``, ``ms`` (the
        median of an image), ``low`` and ``high`` (the middle 80 %), and ``images_per_second`` (of that stage alone).
    """
    training = model.training
    model.eval()
    device = torch.device(device)
    times: dict[str, list[float]] = defaultdict(list)
    first = len(split) if among is None else among
    try:
        with _Stopwatch(model, device).running() as watch:
            for number in range(-WARM_UP, images):
                index = (number * first) // images % first
                watch.reset()
                start = watch.now()
                image = split[index][0].to(device)
                watch.seconds["decode and transform"] += watch.now() - start
                model([image])
                total = watch.now() - start
                spent = dict(watch.seconds)
                spent["post-processing"] = total - sum(spent.values())
                if number >= 0:
                    for stage, seconds in spent.items():
                        times[stage].append(seconds)
                    times["total"].append(total)
                on_image(1)
    finally:
        model.train(training)
    rows = []
    for stage in (*STAGES, "total"):
        if stage in times:
            ms = sorted(1000 * seconds for seconds in times[stage])
            middle = median(ms)
            low, high = ms[len(ms) // 10], ms[-1 - len(ms) // 10]
            rows.append(
                {"stage": stage, "ms": middle, "low": low, "high": high, "images_per_second": 1000 / max(middle, 1e-6)}
            )
    return {"images": images, "rows": rows}


class _Stopwatch:
    """Adds up the seconds of a detector's parts. What no part accounts for is post-processing."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._begun: dict[nn.Module, float] = {}
        self._parts: list[tuple[nn.Module, str]] = [
            (model.transform, "decode and transform"),
            (model.backbone, "backbone"),
        ]
        if isinstance(model, GeneralizedRCNN):
            heads = model.roi_heads
            self._parts.append((model.rpn, "RPN"))
            for kind in ("box", "mask", "keypoint"):
                self._parts.append((getattr(heads, f"{kind}_roi_pool"), "crop"))
                self._parts += [(getattr(heads, f"{kind}_{part}"), "head") for part in ("head", "predictor")]
        else:
            self._parts.append((model.head, "head"))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reset(self) -> None:
        self.seconds = {stage: 0.0 for part, stage in self._parts if part is not None}

    @contextmanager
    def running(self) -> Iterator["_Stopwatch"]:
        stage_of = {part: stage for part, stage in self._parts if part is not None}

        def begin(module: nn.Module, inputs: Any) -> None:
            self._begun[module] = self.now()

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            self.seconds[stage_of[module]] += self.now() - self._begun[module]

        handles = [
            handle
            for part in stage_of
            for handle in (part.register_forward_pre_hook(begin), part.register_forward_hook(end))
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
