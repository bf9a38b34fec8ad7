"""A truth and results to be scored."""

import json
import tempfile
from pathlib import Path

import numpy as np

from detector.data.annotations import read_annotations
from detector.data.results import read_results, results_file
from detector.evaluation.truth import index_coco


def annotations_of(content, *, annotation_types=()):
    """Return the annotations of a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(content))
        return read_annotations(path, annotation_types=annotation_types)


def read(path, annotations):
    """The results in a file."""
    return read_results(results_file(path), annotations)[0]


def notes_on(path, annotations):
    """The notes on the results in a file."""
    return read_results(results_file(path), annotations)[1]


def truth(boxes, *, crowd=()):
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": int(i in crowd)}
        for i, (image, category, box) in enumerate(boxes, start=1)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2)]
    return index_coco({"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "a"}]})


def result(image, box, score=0.9):
    return {"image_id": image, "category_id": 5, "bbox": box, "score": score}


def jittered(coco, seed=0, spread=0.05):
    """The truth, crowds too, moved a little, some under a wrong class, and some false detections."""
    rng = np.random.default_rng(seed)
    categories = sorted(coco.cats)
    found = []
    for annotation in coco.anns.values():
        x, y, w, h = annotation["bbox"]
        dx, dy, dw, dh = rng.normal(size=4) * spread
        wrong = rng.random() < 0.2
        box = [x + dx * w, y + dy * h, w * float(np.exp(dw)), h * float(np.exp(dh))]
        category = int(rng.choice(categories)) if wrong else annotation["category_id"]
        found.append({"image_id": annotation["image_id"], "category_id": category, "bbox": box})
        found[-1]["score"] = float(rng.random())
        if rng.random() < 0.5:
            box = [float(v) for v in rng.uniform(1, 200, size=4)]
            found.append(found[-1] | {"bbox": box, "score": float(rng.random())})
    return found
