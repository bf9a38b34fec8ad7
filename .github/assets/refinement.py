"""What refines the boxes of a detector, side by side: its own head once more, the looks, and climbing with and without
a gradient. Scores stay as they are (but in the last row), so that boxes alone count.

    python .github/assets/refinement.py RUN --root DATA --split val

RUN is a folder that tools/refine.py wrote.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from tqdm import tqdm

from detector.data.categories import match_categories
from detector.data.folder import DataFolder
from detector.data.results import to_results
from detector.evaluation import evaluate
from detector.evaluation.truth import coco_of
from detector.overriding import overridden
from detector.pretrained import load_detector
from detector.refinement.refining import refine

CROPS = 24  # of a climb without a gradient
SPREAD = 0.04  # of its tries, of a box's sides

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path)
parser.add_argument("--root", type=Path, required=True)
parser.add_argument("--split", default="val")
options = parser.parse_args()

torch.manual_seed(0)
data = DataFolder(options.root).dataset(options.split)
detector = load_detector(options.run).eval()
model: Any = detector.model
refinement: Any = detector.refinement
trained = replace(refinement.config, looks=2, climbs=0)
boxes_alone = replace(trained, fit_power=0.0)


def with_settings(**settings: Any) -> Callable[..., Any]:
    def method(features: Any, boxes: Any, scores: Any, labels: Any, sizes: Any) -> Any:
        refinement.configure(replace(boxes_alone, **settings))
        return refine(refinement, features, boxes, scores, labels, sizes, nms_threshold=model.roi_heads.nms_thresh)

    return method


def own_head(features: Any, boxes: Any, scores: Any, labels: Any, sizes: Any) -> Any:
    """The detector's own box head, from its detections as proposals; each box as its class."""
    heads = model.roi_heads
    _, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))
    decoded = heads.box_coder.decode(deltas, boxes)  # [L, classes, 4]
    moved = decoded[torch.arange(len(decoded)), labels[0]]
    return [clip_boxes_to_image(moved, sizes[0])], scores, labels


def climbed_by_chance(features: Any, boxes: Any, scores: Any, labels: Any, sizes: Any) -> Any:
    """Each box goes where its fit rises, of tries that are drawn around it."""

    def fit_of(some: Tensor) -> Tensor:
        fit: Tensor = refinement.stage(0)(refinement.pool(features, [some], sizes))[1]
        return fit

    best = boxes[0]
    fit = fit_of(best)
    for _ in range(CROPS - 1):
        size = best[:, 2:] - best[:, :2]
        by = SPREAD * torch.randn_like(best)
        centre = (best[:, :2] + best[:, 2:]) / 2 + by[:, :2] * size
        half = size * by[:, 2:].exp() / 2
        tried = clip_boxes_to_image(torch.cat([centre - half, centre + half], dim=1), sizes[0])
        new = fit_of(tried)
        best = torch.where((new > fit)[:, None], tried, best)
        fit = torch.maximum(fit, new)
    return [best], scores, labels


METHODS: dict[str, Callable[..., Any]] = {
    "plain": lambda features, boxes, scores, labels, sizes: (boxes, scores, labels),
    "its own head once more": own_head,
    "one look": with_settings(looks=1),
    "two looks": with_settings(looks=2),
    "four looks": with_settings(looks=4),
    f"climbing without a gradient, {CROPS} crops": climbed_by_chance,
    "climbing by the gradient, 8 steps": with_settings(looks=0, climbs=8),
    "two looks, then 8 steps": with_settings(looks=2, climbs=8),
    "two looks, ranked by the fit": with_settings(looks=2, fit_power=trained.fit_power),
}

category_ids = match_categories(detector, data)
results: dict[str, list[Any]] = {name: [] for name in METHODS}
spent = dict.fromkeys(METHODS, 0.0)
with torch.no_grad():
    for index in tqdm(range(len(data)), unit="image"):
        image, target = data[index]
        batch, _ = model.transform([image])
        features = model.backbone(batch.tensors)
        proposals, _ = model.rpn(batch, features)
        with overridden(refinement, enabled=False):
            found, _ = model.roi_heads(features, proposals, batch.image_sizes)
        if not len(found[0]["boxes"]):
            continue
        given = [[one[name] for one in found] for name in ("boxes", "scores", "labels")]
        for name, method in METHODS.items():
            start = time.perf_counter()
            refined = method(features, *given, batch.image_sizes)
            spent[name] += time.perf_counter() - start
            one = [{"boxes": b, "scores": s, "labels": la} for b, s, la in zip(*refined, strict=True)]
            one = model.transform.postprocess(one, batch.image_sizes, [(image.shape[-2], image.shape[-1])])
            results[name] += to_results(one, [int(target["image_id"])], category_ids)
print("| boxes | AP | AP50 | AP75 | AP90 | ms an image |\n|---|---|---|---|---|---|")
for name, found in results.items():
    with contextlib.redirect_stdout(io.StringIO()):
        scores = evaluate(coco_of(data.annotations), found)[0]
    row = [f"{scores[key]:.3f}" for key in ("AP", "AP50", "AP75", "AP90")]
    print(f"| {name} | {' | '.join(row)} | {1000 * spent[name] / len(data):.0f} |")
