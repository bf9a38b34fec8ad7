"""The time of each stage of a detector, from the file to the detections."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from tqdm import tqdm

from detector.data.dataset import CocoDetection
from detector.models.rle_detections import detect
from detector.overriding import eval_mode, overridden
from detector.refinement.attach import refinement_of

STAGES = ("decode and transform", "backbone", "RPN", "crop", "head", "refinement", "post-processing")
WARM_UP = 3  # number of images


@torch.inference_mode()
def measure_stages(
    model: nn.Module,
    split: CocoDetection,
    *,
    images: int = 50,
    among: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Time the stages of a detector, one image at a time, in this process, with a progress bar.

    Args:
        model: a torchvision detector on ``device``.
        split: the data, without a transform.
        images: number of images, spread over the split; repeated if it has fewer.
        among: use only this number of images from the start of the split.
        device: where the model is.

    Returns:
        ``images``, and ``rows`` with a dict for each stage of the model and for the total: ``stage``, ``ms`` (the
        median), ``low`` and ``high`` (the middle 80 %), and ``images_per_second``.
    """
    split, device = split.boxes_alone(), torch.device(device)
    first = len(split) if among is None else among
    spent: dict[str, float] = {}  # seconds of the current image
    times: list[dict[str, float]] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start, others = now(), sum(spent.values())
            result = function(*arguments, **options)
            inner = sum(spent.values()) - others  # the refinement calls the box head
            spent[stage] += now() - start - inner
            return result

        return call

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        calls = _calls(model)
        for stage, module, method in calls:
            stack.enter_context(overridden(module, **{method: timed(stage, getattr(module, method))}))
        for number in tqdm(range(-WARM_UP, images), desc="timing", unit="image", leave=False, disable=None):
            spent.update({stage: 0.0 for stage, _, _ in calls})
            start = now()
            image = split[(number * first) // images % first][0].to(device)
            spent["decode and transform"] += now() - start
            detect(model, [image])
            total = now() - start
            times.append({**spent, "post-processing": total - sum(spent.values()), "total": total})
    rows = []
    for stage in (stage for stage in (*STAGES, "total") if stage in times[0]):
        ms = sorted(1000 * one[stage] for one in times[WARM_UP:])
        middle, edge = median(ms), len(ms) // 10
        row = {"stage": stage, "ms": middle, "low": ms[edge], "high": ms[-1 - edge]}
        rows.append({**row, "images_per_second": 1000 / max(middle, 1e-6)})
    return {"images": images, "rows": rows}


def _calls(model: Any) -> list[tuple[str, nn.Module, str]]:
    """Return the stage, the module and the method of each call that is timed. The rest is post-processing."""
    calls = [("decode and transform", model.transform, "forward"), ("backbone", model.backbone, "forward")]
    if not isinstance(model, GeneralizedRCNN):
        return [*calls, ("head", model.head, "forward")]
    heads, refinement = model.roi_heads, refinement_of(model)
    calls.append(("RPN", model.rpn, "forward"))
    for kind in ("box", "mask", "keypoint"):
        for name, stage in (("roi_pool", "crop"), ("head", "head"), ("predictor", "head")):
            calls.append((stage, getattr(heads, f"{kind}_{name}"), "forward"))
    if refinement is not None and refinement.enabled:
        calls.append(("refinement", heads, "refined"))
    return [call for call in calls if call[1] is not None]
