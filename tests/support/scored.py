"""A truth and results to be scored."""

import json
import tempfile
from pathlib import Path

from detector.data.annotations import read_annotations
from detector.data.results import read_results, results_file
from detector.evaluation.truth import index_coco


def annotations_of(content, *, annotation_types=()):
    """What is read of an annotation file with this content."""
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
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(number in crowd),
        }
        for number, (image, category, box) in enumerate(boxes, start=1)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2)]
    return index_coco({"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "a"}]})


def result(image, box, score=0.9):
    return {"image_id": image, "category_id": 5, "bbox": box, "score": score}
