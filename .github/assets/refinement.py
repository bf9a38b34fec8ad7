"""Compare ways to refine boxes: the detector's own head again, iterations, and ascent with and without a gradient.

Only boxes differ between the rows: scores stay the same, except in the last row.

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
from detector.pretrained import load_detector
from detector.rcnn.forward import Found, detect_boxes, propose
from detector.refinement.boxes import move
from detector.refinement.inference import refine_detections

CROPS = 24  # of an ascent without a gradient
SPREAD = 0.04  # of its candidates, in units of the box's sides

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
trained = replace(refinement.config, iterations=2, ascent_steps=0)
boxes_alone = replace(trained, iou_power=0.0)


def with_settings(**settings: Any) -> Callable[..., Found]:
    def method(features: Any, found: Found, sizes: Any) -> Found:
        refinement.config = replace(boxes_alone, **settings)
        return refine_detections(refinement, features, found, sizes, classify=lambda crops: own_outputs(crops)[0])

    return method


def own_outputs(crops: Tensor) -> tuple[Tensor, Tensor]:
    """Class scores and deltas of the detector's own box head."""
    heads = model.roi_heads
    outputs: tuple[Tensor, Tensor] = heads.box_predictor(heads.box_head(crops))
    return outputs


def own_head(features: Any, found: Found, sizes: Any) -> Found:
    """The detector's own box head, with its detections as proposals; each box keeps its class."""
    heads = model.roi_heads
    boxes, scores, labels = found
    _, deltas = own_outputs(heads.box_roi_pool(features, boxes, sizes))
    decoded = heads.box_coder.decode(deltas, boxes)  # [L, classes, 4]
    moved = decoded[torch.arange(len(decoded)), labels[0]]
    return [clip_boxes_to_image(moved, sizes[0])], scores, labels


def random_ascent(features: Any, found: Found, sizes: Any) -> Found:
    """Move each box to random candidates around it where its predicted IoU rises."""

    def predicted_iou(boxes: Tensor) -> Tensor:
        logits: Tensor = refinement(features, [boxes], sizes)[1]
        return logits

    best = found[0][0]
    iou = predicted_iou(best)
    for _ in range(CROPS - 1):
        candidates = clip_boxes_to_image(move(best, SPREAD * torch.randn_like(best)), sizes[0])
        new = predicted_iou(candidates)
        best = torch.where((new > iou)[:, None], candidates, best)
        iou = torch.maximum(iou, new)
    return [best], *found[1:]


METHODS: dict[str, Callable[..., Found]] = {
    "plain": lambda features, found, sizes: found,
    "its own head once more": own_head,
    "1 iteration": with_settings(iterations=1),
    "2 iterations": with_settings(iterations=2),
    "4 iterations": with_settings(iterations=4),
    f"ascent without a gradient, {CROPS} crops": random_ascent,
    "gradient ascent, 8 steps": with_settings(iterations=0, ascent_steps=8),
    "2 iterations, then 8 steps": with_settings(iterations=2, ascent_steps=8),
    "2 iterations, rescored, without NMS": with_settings(iterations=2, iou_power=trained.iou_power),
}

category_ids = match_categories(detector, data)
results: dict[str, list[Any]] = {name: [] for name in METHODS}
spent = dict.fromkeys(METHODS, 0.0)
with torch.no_grad():
    for index in tqdm(range(len(data)), unit="image"):
        image, target = data[index]
        proposed = propose(model, [image])
        sizes = proposed.image_sizes
        found = detect_boxes(model.roi_heads, proposed.features, proposed.boxes, sizes)
        if not len(found[0][0]):
            continue
        for name, method in METHODS.items():
            start = time.perf_counter()
            refined = method(proposed.features, found, sizes)
            spent[name] += time.perf_counter() - start
            dicts = [dict(zip(("boxes", "scores", "labels"), one)) for one in zip(*refined)]
            one = model.transform.postprocess(dicts, sizes, [(image.shape[-2], image.shape[-1])])
            results[name] += to_results(one, [int(target["image_id"])], category_ids)
print("| boxes | AP | AP50 | AP75 | AP90 | ms an image |\n|---|---|---|---|---|---|")
for name, refined in results.items():
    with contextlib.redirect_stdout(io.StringIO()):
        scores = evaluate(coco_of(data.annotations), refined)[0]
    row = [f"{scores[key]:.3f}" for key in ("AP", "AP50", "AP75", "AP90")]
    print(f"| {name} | {' | '.join(row)} | {1000 * spent[name] / len(data):.0f} |")
