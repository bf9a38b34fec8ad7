"""Time pycocotools beside faster-coco-eval on made-up detections of the size of COCO's val split.

    python .github/assets/evaluators.py
    python .github/assets/evaluators.py --images 500 --detections 50000

5,000 images, 36,000 boxes of 80 classes (1 in 100 a crowd), 500,000 detections: truths moved a little, with a class and
a score that are mostly right, and boxes of nothing.
"""

import argparse
import time

import numpy as np

from detector.evaluation.metric import SUMMARY, evaluate, evaluator_version
from detector.evaluation.truth import index_coco

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=int, default=5000)
parser.add_argument("--boxes", type=int, default=36000)
parser.add_argument("--detections", type=int, default=500000)
parser.add_argument("--rounds", type=int, default=3, help="of faster-coco-eval; pycocotools runs once")
options = parser.parse_args()

generator = np.random.default_rng(0)
classes = 80
annotations = []
for number in range(1, options.boxes + 1):
    w, h = np.exp(generator.normal(4, 1, 2)).clip(4, 400)
    x, y = generator.uniform(0, [640 - w, 480 - h]) if w < 640 and h < 480 else (0.0, 0.0)
    annotations.append(
        {
            "id": number,
            "image_id": int(generator.integers(1, options.images + 1)),
            "category_id": int(generator.zipf(1.5) % classes) + 1,
            "bbox": [float(x), float(y), float(w), float(h)],
            "area": float(w * h * 0.6),
            "iscrowd": int(generator.random() < 0.01),
        }
    )
images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, options.images + 1)]
categories = [{"id": i, "name": f"class {i}"} for i in range(1, classes + 1)]
truth = index_coco({"images": images, "annotations": annotations, "categories": categories})
results = []
for number in range(options.detections):
    annotation = annotations[number % options.boxes]
    x, y, w, h = annotation["bbox"]
    right = number < options.boxes
    spread = 0.08 if right else 0.4
    dx, dy, dw, dh = generator.normal(0, spread, 4)
    kept = generator.random() < (0.9 if right else 0.5)
    results.append(
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"] if kept else int(generator.integers(1, classes + 1)),
            "bbox": [float(x + dx * w), float(y + dy * h), float(w * np.exp(dw)), float(h * np.exp(dh))],
            "score": float(generator.beta(4, 2) if right else generator.beta(1, 5)),
        }
    )
crowds = sum(annotation["iscrowd"] for annotation in annotations)
print(f"{len(images):,} images, {len(annotations):,} boxes ({crowds} crowds), {len(results):,} detections")

scores = {}
for evaluator, rounds in (("pycocotools", 1), ("faster-coco-eval", options.rounds)):
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        scores[evaluator] = evaluate(truth, results, evaluator=evaluator)[0]
        seconds.append(time.perf_counter() - start)
    spread = f" ({min(seconds):.1f} to {max(seconds):.1f})" if rounds > 1 else ""
    median = sorted(seconds)[len(seconds) // 2]
    print(f"{evaluator_version(evaluator)}: {median:.1f} s{spread}, AP {scores[evaluator]['AP']:.4f}")
worst = max(abs(scores["pycocotools"][name] - scores["faster-coco-eval"][name]) for name in SUMMARY)
print(f"largest difference of the 12 numbers: {worst:.1e}")
