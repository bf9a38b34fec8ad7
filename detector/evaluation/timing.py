"""The time of each stage of a detector, from the file to the detections."""

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
from detector.overriding import eval_mode, overridden
from detector.refinement.roi_heads import RefinedRoIHeads

STAGES = ("decode and transform", "backbone", "RPN", "crop", "head", "refinement", "post-processing")
WARM_UP = 3  # images that do not count


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
        model: a torchvision detector on ``device``.
        split: the data, without a transform.
        images: number of images, spread over the split; repeated if it has fewer.
        among: use the first images of the split only.
        device: where the model is.
        on_image: called with 1 after each image.

    Returns:
        ``images``, and ``rows`` with a dict for each stage of the model and for the total: ``stage``, ``ms`` (the
        median), ``low`` and ``high`` (the middle 80 %), and ``images_per_second``.
    """
    split, device = split.boxes_alone(), torch.device(device)
    first = len(split) if among is None else among
    stage_of = _stages(model)
    spent: dict[str, float] = defaultdict(float)  # seconds of the current image
    times: dict[str, list[float]] = defaultdict(list)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with eval_mode(model), _timed(model, stage_of, spent, now):
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
    rows = []
    for stage in (*STAGES, "total"):
        if stage in times:
            ms, middle = sorted(times[stage]), median(times[stage])
            row = {"stage": stage, "ms": middle, "low": ms[len(ms) // 10], "high": ms[-1 - len(ms) // 10]}
            rows.append(row | {"images_per_second": 1000 / max(middle, 1e-6)})
    return {"images": images, "rows": rows}


def _stages(model: Any) -> dict[nn.Module, str]:
    """Return the stage of each module. The rest of the time is post-processing."""
    modules = {"decode and transform": [model.transform], "backbone": [model.backbone]}
    if isinstance(model, GeneralizedRCNN):
        heads, kinds = model.roi_heads, ("box", "mask", "keypoint")
        modules["RPN"] = [model.rpn]
        modules["crop"] = [getattr(heads, f"{kind}_roi_pool") for kind in kinds]
        modules["head"] = [getattr(heads, f"{kind}_{name}") for kind in kinds for name in ("head", "predictor")]
    else:
        modules["head"] = [model.head]
    return {module: stage for stage, several in modules.items() for module in several if module is not None}


@contextmanager
def _timed(
    model: Any, stage_of: dict[nn.Module, str], spent: dict[str, float], now: Callable[[], float]
) -> Iterator[None]:
    """Add the seconds of each call of a module, and of the refinement, to its stage."""
    started: dict[nn.Module, float] = {}
    heads: Any = getattr(model, "roi_heads", None)

    def start(module: nn.Module, inputs: Any) -> None:
        started[module] = now()

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        spent[stage_of[module]] += now() - started[module]

    def refined(*arguments: Any) -> Any:
        begun = now()
        result = type(heads).refined(heads, *arguments)
        spent["refinement"] += now() - begun
        return result

    handles = [module.register_forward_pre_hook(start) for module in stage_of]
    handles += [module.register_forward_hook(end) for module in stage_of]
    try:
        if isinstance(heads, RefinedRoIHeads) and heads.refinement.enabled:
            with overridden(heads, refined=refined):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()
