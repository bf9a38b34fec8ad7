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

from detector.data.dataset import CocoDetection
from detector.models.rle_detections import detect
from detector.overriding import overridden
from detector.refinement.roi_heads import RefinedRoIHeads

STAGES = ("decode and transform", "backbone", "RPN", "crop", "head", "refinement", "post-processing")
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
        among: take only images of the first so many.
        device: where the model is.
        on_image: called with 1 after each image.

    Returns:
        ``images``, and in ``rows`` a dict for each stage that the model has, and for the total: ``stage``, ``ms`` (the
        median of an image), ``low`` and ``high`` (the middle 80 %), and ``images_per_second`` (of that stage alone).
    """
    training = model.training
    model.eval()
    split = split.boxes_alone()
    device = torch.device(device)
    first = len(split) if among is None else among
    stage_of = _stages(model)
    spent: dict[str, float] = {}  # seconds of the image under way
    times: dict[str, list[float]] = defaultdict(list)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    try:
        with _timed(stage_of, spent, now), _refinement_timed(model, spent, now):
            for number in range(-WARM_UP, images):
                spent.clear()
                spent.update(dict.fromkeys(stage_of.values(), 0.0))
                start = now()
                image = split[(number * first) // images % first][0].to(device)
                spent["decode and transform"] += now() - start
                detect(model, [image])
                total = now() - start
                rest = total - sum(spent.values())
                for stage, seconds in {**spent, "post-processing": rest, "total": total}.items():
                    if number >= 0:
                        times[stage].append(1000 * seconds)
                on_image(1)
    finally:
        model.train(training)
    rows = []
    for stage in (*STAGES, "total"):
        if stage in times:
            ms, middle = sorted(times[stage]), median(times[stage])
            row = {"stage": stage, "ms": middle, "low": ms[len(ms) // 10], "high": ms[-1 - len(ms) // 10]}
            rows.append(row | {"images_per_second": 1000 / max(middle, 1e-6)})
    return {"images": images, "rows": rows}


def _stages(model: Any) -> dict[nn.Module, str]:
    """The stage of each of a detector's parts. What no part accounts for is post-processing."""
    parts = {"decode and transform": [model.transform], "backbone": [model.backbone]}
    if isinstance(model, GeneralizedRCNN):
        heads, kinds = model.roi_heads, ("box", "mask", "keypoint")
        parts["RPN"] = [model.rpn]
        parts["crop"] = [getattr(heads, f"{kind}_roi_pool") for kind in kinds]
        parts["head"] = [getattr(heads, f"{kind}_{part}") for kind in kinds for part in ("head", "predictor")]
    else:
        parts["head"] = [model.head]
    return {module: stage for stage, modules in parts.items() for module in modules if module is not None}


@contextmanager
def _timed(stage_of: dict[nn.Module, str], spent: dict[str, float], now: Callable[[], float]) -> Iterator[None]:
    """Within, each call of a part adds its seconds to those spent in its stage."""
    begun: dict[nn.Module, float] = {}

    def begin(module: nn.Module, inputs: Any) -> None:
        begun[module] = now()

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        spent[stage_of[module]] += now() - begun[module]

    handles = [part.register_forward_pre_hook(begin) for part in stage_of]
    handles += [part.register_forward_hook(end) for part in stage_of]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _refinement_timed(model: Any, spent: dict[str, float], now: Callable[[], float]) -> Iterator[None]:
    """Time the refinement as a stage."""
    heads = getattr(model, "roi_heads", None)
    if not isinstance(heads, RefinedRoIHeads) or not heads.refinement.enabled:
        yield
        return
    refined = heads.refined

    def timed(*arguments: Any) -> Any:
        start = now()
        result = refined(*arguments)
        spent["refinement"] = spent.get("refinement", 0.0) + now() - start
        return result

    with overridden(heads, refined=timed):
        yield
