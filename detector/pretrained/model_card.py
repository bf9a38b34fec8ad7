"""The model card of a saved detector."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from detector.errors import DataError
from detector.pretrained.description import DetectorDescription
from detector.text import clean

# The scores of boxes, masks and keypoints in a report, with their meaning.
MAIN_SCORES = {"AP": "mean over IoU 0.50 to 0.95", "AP50": "at IoU 0.50", "AP75": "at IoU 0.75"}
SIZES = {"APs": "objects below 32 x 32 pixels", "APm": "32 x 32 to 96 x 96", "APl": "larger"}
BOX_SCORES = MAIN_SCORES | {"AP90": "at IoU 0.90"} | SIZES | {"AR100": "recall, up to 100 detections an image"}
KEYPOINT_SCORES = {name: meaning.replace("IoU", "OKS") for name, meaning in MAIN_SCORES.items()}
# By annotation type: the network, Hugging Face's task, the report's section, its scores' prefix and meaning.
BOXES = ("Faster R-CNN", "object-detection", "", "", BOX_SCORES)
MASKS = ("Mask R-CNN", "image-segmentation", "segm", "mask ", MAIN_SCORES)
KEYPOINTS = ("Keypoint R-CNN", "keypoint-detection", "keypoints", "keypoints ", KEYPOINT_SCORES)
MAX_NAMES = 100
# Cards with this line may be replaced.
GENERATED = "<!-- Written by affine-crop-rcnn. Delete this line to keep the file when the detector is saved again. -->"


def is_generated(path: Path) -> bool:
    """Return whether a file is a card that may be replaced, or does not exist."""
    try:
        return GENERATED in path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True


def model_card(description: DetectorDescription, report: dict[str, Any] | None = None) -> ModelCard:
    """Return a model card in Hugging Face's format.

    Args:
        description: the detector.
        report: the content of a ``report.json``. Without one the card says that there are no scores.

    Raises:
        DataError: the report lacks what the card shows.
    """
    settings, names, points = description.settings, description.category_names, description.keypoints
    network, task, *_ = {"masks": MASKS, "keypoints": KEYPOINTS}.get("".join(settings.annotation_types), BOXES)
    tags = sorted(["object-detection", "torchvision", network.lower().replace(" ", "-")])
    data = ModelCardData(library_name="affine-crop-rcnn", pipeline_tag=task, tags=tags)
    title = f"Affine-crop R-CNN: {settings.name}"
    affine = "the affine crop, which has RoIAlign's values and gradients to the boxes"
    cropping = affine if description.crop == "affine" else "RoIAlign"
    each = ", each with a mask" if network == MASKS[0] else ""
    each = f", each with {len(points)} keypoints ({_listed(points.names)})" if points is not None else each
    scores, refinement = "It was not evaluated before it was saved (`tools/eval.py` does that).", ""
    if (config := description.refinement) is not None:
        steps = f" and {config.ascent_steps} steps of gradient ascent on the predicted IoU"
        refinement = f"\nIts boxes are refined in {config.iterations} iterations{steps if config.ascent_steps else ''}."
        refinement += " `detector.refinement.enabled = False` stops that.\n"
    if report is not None:
        try:
            scores, data.eval_results = _scores(report)
            data.model_name = title
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"report: not of tools/eval.py, or damaged: {type(error).__name__} {error}") from None
    # Not from a template of the hub: the names are untrusted.
    return ModelCard(f"""---
{data.to_yaml()}
---

{GENERATED}

# {title}

A {network} (`{settings.name}`) that crops its feature maps with {cropping}.
It detects {len(names)} classes{each}: {_listed(names)}.
Test images are resized to {settings.min_size} pixels on the shorter side, at most {settings.max_size} on the longer.
{refinement}
To load it, run `pip install -e {'".[timm]"' if settings.name.startswith("timm/") else "."}` in a clone of \
affine-crop-rcnn.

```python
from detector import load_detector

detector = load_detector("FOLDER OR HUB NAME")
print(detector.detect("photo.jpg"))  # names, scores and boxes; a notebook shows a picture
```

## Scores

{scores}
""")


def _scores(report: dict[str, Any]) -> tuple[str, list[EvalResult]]:
    """Return the text about a report's scores, and the scores for Hugging Face."""
    about, rows, results = report["about"], [], []
    data = Path(about["data"]).name  # its folder is private
    split = f"{data}, {about['split']}" if about.get("split") else data
    for _, task, section, prefix, meanings in (BOXES, MASKS, KEYPOINTS):
        scores = (report if not section else report.get(section) or {"scores": None})["scores"]
        for name, meaning in meanings.items() if scores is not None else ():
            score = scores.get(name)
            rows.append(f"| {prefix}{name} | {'-' if score is None else f'{score:.3f}'} | {meaning} |")
            if score is not None and name in MAIN_SCORES:
                results.append(EvalResult(task, data, split, name, round(score, 4), metric_name=prefix + name))
    unrefined = ", without the refinement" if about.get("refinement") == "off" else ""
    title = f"By {_code(about['evaluator'])} on {int(about['images'])} images with {int(about['objects'])} objects of"
    title += f" {_code(split)}, {_code(about['time'][:10])}{unrefined}:"
    notes = [f"- {_code(note)}\n" for note in report["notes"]]
    # Without private folders: --root=/home/me/bccd becomes --root=bccd.
    words = [re.sub(r"^(--?\w+=)?(/|~|\.\.).*/(?=.)", r"\1", word) for word in shlex.split(about["command"])]
    command = " ".join(shlex.join(words).split()).replace("`", "'")
    lines = [title, "", "| | | |", "|---|---|---|", *rows, "", *notes, "```sh", command, "```"]
    return "\n".join(lines), results


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(_code, names[:MAX_NAMES])) + more


def _code(text: str) -> str:
    """Quote text so that Markdown shows it as it is, on one line."""
    plain = clean(text).replace("`", "'").replace("|", "/")
    return f"`{plain or ' '}`"
