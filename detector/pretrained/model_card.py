"""The model card of a saved detector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from detector.data.annotation_types import AnnotationType
from detector.errors import DataError
from detector.pretrained.description import DetectorDescription
from detector.refinement.config import RefinementConfig
from detector.text import clean

SCORES = {  # of a report, with their meaning
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "AP90": "at IoU 0.90",
    "APs": "objects below 32 x 32 pixels",
    "APm": "32 x 32 to 96 x 96",
    "APl": "larger",
    "AR100": "recall, up to 100 detections an image",
}
NETWORKS: dict[tuple[AnnotationType, ...], tuple[str, str]] = {  # with Hugging Face's task
    (): ("Faster R-CNN", "object-detection"),
    ("masks",): ("Mask R-CNN", "image-segmentation"),
    ("keypoints",): ("Keypoint R-CNN", "keypoint-detection"),
}
# The task of each section of scores in a report, and the prefix of their names.
SECTIONS = {
    "": ("object-detection", ""),
    "segm": ("image-segmentation", "mask "),
    "keypoints": ("keypoint-detection", "keypoints "),
}
MAX_NAMES = 100
# Cards with this line may be replaced.
GENERATED = "<!-- Written by affine-crop-rcnn. Delete this line to keep the file when the detector is saved again. -->"


def is_generated(path: Path) -> bool:
    """Whether a file is a card that may be replaced, or does not exist."""
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
    settings, names, keypoints = description.settings, description.category_names, description.keypoints
    network, task = NETWORKS[settings.annotation_types]
    tags = sorted(["object-detection", "torchvision", network.lower().replace(" ", "-")])
    data = ModelCardData(library_name="affine-crop-rcnn", pipeline_tag=task, tags=tags)
    title = f"Affine-crop R-CNN: {settings.name}"
    affine = "the affine crop, which has RoIAlign's values and gradients to the boxes"
    cropping = affine if description.crop == "affine" else "RoIAlign"
    install = 'pip install -e ".[timm]"' if settings.name.startswith("timm/") else "pip install -e ."
    found = ", each with a mask" if "masks" in settings.annotation_types else ""
    if keypoints is not None:
        found = f", each with {len(keypoints)} keypoints ({_listed(keypoints.names)})"
    text = f"""{GENERATED}

# {title}

A {network} (`{settings.name}`) that crops its feature maps with {cropping}, made with affine-crop-rcnn.
It detects {len(names)} classes{found}: {_listed(names)}.
Test images are resized to {settings.min_size} pixels on the shorter side, at most {settings.max_size} on the longer.
{_refinement(description.refinement)}
To load it, run `{install}` in a clone of the project's repository.

```python
from detector import load_detector

detector = load_detector("FOLDER OR HUB NAME")
found = detector.detect("photo.jpg")  # a path, a PIL image, an array or a tensor
print(found)  # names, scores and boxes; a notebook shows a picture
```

## Scores

"""
    if report is None:
        text += "It was not evaluated before it was saved (`tools/eval.py` does that).\n"
    else:
        try:
            text += _scores(report)
            data.model_name, data.eval_results = title, _results(report)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"report: not of tools/eval.py, or damaged: {type(error).__name__} {error}") from None
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")  # not from a template: the names are untrusted


def _refinement(config: RefinementConfig | None) -> str:
    if config is None:
        return ""
    steps = f" and {config.ascent_steps} steps of gradient ascent on the predicted IoU" if config.ascent_steps else ""
    return f"""
Its boxes are refined in {config.iterations} iterations{steps}. `detector.refinement.enabled = False` stops that.
"""


def _scored_sections(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    others = {section: report[section]["scores"] for section in SECTIONS if section and report.get(section)}
    return {"": report["scores"]} | others


def _scores(report: dict[str, Any]) -> str:
    about, rows = report["about"], []
    for section, scores in _scored_sections(report).items():
        for name in ("AP", "AP50", "AP75") if section else SCORES:
            score = scores.get(name)
            meaning = SCORES[name].replace("IoU", "OKS") if section == "keypoints" else SCORES[name]
            rows.append(f"| {SECTIONS[section][1]}{name} | {'-' if score is None else f'{score:.3f}'} | {meaning} |")
    unrefined = ", without the refinement" if about.get("refinement") == "off" else ""
    table = "\n".join(["| | | |", "|---|---|---|", *rows])
    notes = "".join(f"- {_code(note)}\n\n" for note in report["notes"])
    command = " ".join(about["command"].split()).replace("`", "'")
    return f"""By {_code(about["evaluator"])} on {int(about["images"])} images with {int(about["objects"])} objects of \
{_code(_data_name(about))}, {_code(about["time"][:10])}{unrefined}:

{table}

{notes}```sh
{command}
```
"""


def _results(report: dict[str, Any]) -> list[EvalResult]:
    about = report["about"]
    return [
        EvalResult(
            task_type=SECTIONS[section][0],
            dataset_type=Path(about["data"]).name,
            dataset_name=_data_name(about),
            metric_type=name,
            metric_name=SECTIONS[section][1] + name,
            metric_value=round(scores[name], 4),
        )
        for section, scores in _scored_sections(report).items()
        for name in ("AP", "AP50", "AP75")
        if scores.get(name) is not None
    ]


def _data_name(about: dict[str, Any]) -> str:
    """Return the name of the data set, without its folder, which is private."""
    name = Path(about["data"]).name
    return f"{name}, {about['split']}" if about.get("split") else name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(_code, names[:MAX_NAMES])) + more


def _code(text: str) -> str:
    """Quote text so that Markdown shows it as it is, on one line."""
    plain = clean(text).replace("`", "'").replace("|", "/")
    return f"`{plain or ' '}`"
