"""A file of detections in COCO's results format, read and checked."""

from collections import Counter
from pathlib import Path

from pycocotools.coco import COCO

from detector.checks import result_problems
from detector.coco import read_json, refuse
from detector.evaluation.metric import Result


def read_results(path: str | Path, truth: COCO) -> list[Result]:
    """Read a results file and check it against the annotations that it is to be scored with.

    Args:
        path: a JSON list of dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels) and
            ``score``; what else they hold is left out.
        truth: the annotations.

    Raises:
        DataError: the file cannot be read, is no such list, an entry has a wrong field, or is for an image or a
            category that the annotations do not have: the first problem, and how many more there are.
    """
    data = read_json(path)
    refuse(result_problems(path, data, truth.imgs.keys(), truth.cats.keys()))
    # Scores as floats: numpy would sort the largest integers by their negative, which is no integer of 64 bits.
    return [
        {**{name: entry[name] for name in ("image_id", "category_id", "bbox")}, "score": float(entry["score"])}
        for entry in data
    ]


def crowded(results: list[Result], most: int = 100) -> int:
    """How many images have more results of one class than COCO's metric looks at."""
    counts = Counter((result["image_id"], result["category_id"]) for result in results)
    return len({image for (image, _), count in counts.items() if count > most})
