"""The text beside a saved detector: what it is, how to use it, how well it scores."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from detector.data.annotation_types import AnnotationType
from detector.data.keypoints import KeypointLayout
from detector.errors import DataError
from detector.models.config import DetectorConfig
from detector.refinement.config import RefinementConfig
from detector.text import clean

# The numbers of a report that the card shows, and what they are.
SCORES = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "AP90": "at IoU 0.90",
    "APs": "objects below 32 x 32 pixels",
    "APm": "32 x 32 to 96 x 96",
    "APl": "larger",
    "AR100": "recall, up to 100 detections an image",
}
KINDS: dict[tuple[AnnotationType, ...], str] = {
    (): "Faster R-CNN",
    ("masks",): "Mask R-CNN",
    ("keypoints",): "Keypoint R-CNN",
}
PIPELINES: dict[tuple[AnnotationType, ...], str] = {  # Hugging Face's
    (): "object-detection",
    ("masks",): "image-segmentation",
    ("keypoints",): "keypoint-detection",
}
TASKS = {"segm": "mask", "keypoints": "keypoints"}  # of scores beside the boxes'
PARTS: dict[str, tuple[AnnotationType, ...]] = {"": (), "segm": ("masks",), "keypoints": ("keypoints",)}
LISTED = 100  # class names
PACKAGE = "affine-crop-rcnn"
# By this line a card is known as one that nobody wrote by hand.
GENERATED = (
    "<!-- Written by affine-crop-rcnn, which replaces this file when it saves again; to keep it, delete this line -->"
)


def is_generated(path: Path) -> bool:
    """Whether the file is a card of :func:`model_card`, or not there."""
    try:
        return GENERATED in path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True


def project_url() -> str | None:
    """Where the project is at home: the first of pyproject.toml's ``[project.urls]``, if it has any."""
    try:
        addresses = metadata.metadata(PACKAGE).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    return next((address.partition(", ")[2] for address in addresses), None)


def model_card(
    data: ModelCardData,
    settings: DetectorConfig,
    crop: str | None,
    names: Sequence[str],
    report: dict[str, Any] | None = None,
    *,
    refinement: RefinementConfig | None = None,
    keypoints: KeypointLayout | None = None,
) -> ModelCard:
    """A model card in Hugging Face's format.

    Args:
        data: the metadata that all cards of this project have.
        settings: what the detector was built by.
        crop: "affine" or "roi_align".
        names: of the classes.
        refinement: that of the boxes, if there is one.
        keypoints: the layout of the keypoints, if it finds any.
        report: the dict of a ``report.json``; without one the card says that there are no scores.

    Raises:
        DataError: the report lacks what the card shows.
    """
    data = ModelCardData(**data.to_dict())
    data.pipeline_tag = PIPELINES[settings.annotation_types]
    data.tags = sorted(
        {*(data.tags or []), KINDS[settings.annotation_types].lower().replace("-", "").replace(" ", "-")}
    )
    title = f"Affine-crop R-CNN: {settings.name}"
    by = "an affine grid, whose boxes get gradients (RoIAlign's values)" if crop == "affine" else "RoIAlign"
    listed = ", ".join(map(_code, names[:LISTED])) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    url = project_url()
    project, clone = (PACKAGE, "its repository") if url is None else (f"[{PACKAGE}]({url})", f"[its repository]({url})")
    install = 'pip install -e ".[timm]"' if settings.name.startswith("timm/") else "pip install -e ."
    text = f"""{GENERATED}

# {title}

A {KINDS[settings.annotation_types]} (`{settings.name}`) that crops its features by {by}, made with {project}.
It finds {len(names)} classes{_parts(settings, keypoints)}: {listed}. \
Test images are resized to {settings.min_size} pixels on the shorter side, at most {settings.max_size} on the longer.\
{_refined(refinement)}

To load it, `{install}` in a clone of {clone}.

```python
from detector.pretrained import Detector

detector = Detector.from_pretrained("FOLDER OR HUB NAME")
found = detector.detect("photo.jpg")  # a path, a PIL image, an array or a tensor
print(found)  # names, scores, boxes; a notebook draws it
```

## Scores

"""
    if report is None:
        text += "It was not scored before it was saved (`tools/eval.py` does that).\n"
    else:
        try:
            text += _scores(report)
            data.model_name = title
            data.eval_results = _results(report)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"report: not of tools/eval.py, or damaged: {type(error).__name__} {error}") from None
    # Not a template: names come from files that anybody wrote.
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _parts(settings: DetectorConfig, keypoints: KeypointLayout | None) -> str:
    if "masks" in settings.annotation_types:
        return ", each with a mask"
    return (
        f", each with {len(keypoints)} keypoints ({', '.join(map(_code, keypoints.names[:LISTED]))})"
        if keypoints
        else ""
    )


def _refined(refinement: RefinementConfig | None) -> str:
    if refinement is None:
        return ""
    return f"""

Its boxes are refined: {refinement.iterations} refinement iterations, {refinement.ascent_steps} gradient ascent steps \
on the predicted IoU. `detector.refinement.enabled = False` switches that off."""


def _scores(report: dict[str, Any]) -> str:
    about, scores = report["about"], report["scores"]
    rows = "\n".join(f"| {name} | {_number(scores.get(name))} | {meaning} |" for name, meaning in SCORES.items())
    rows += "".join(
        f"\n| {what} {name} | {_number(report[kind]['scores'].get(name))} | {_meaning(kind, name)} |"
        for kind, what in TASKS.items()
        if report.get(kind)
        for name in ("AP", "AP50", "AP75")
    )
    unrefined = ", without the refinement" if about.get("refinement") == "off" else ""
    notes = "".join(f"- {_code(note)}\n\n" for note in report["notes"])
    return f"""By {_code(about["evaluator"])} on {int(about["images"])} images with {int(about["objects"])} objects of \
{_code(_where(about))}, {_code(about["time"][:10])}{unrefined}:

| | | |
|---|---|---|
{rows}

{notes}```sh
{" ".join(about["command"].split()).replace("`", "'")}
```
"""


def _results(report: dict[str, Any]) -> list[EvalResult]:
    about, scores = report["about"], report["scores"]
    kinds = {"": scores} | {kind: report[kind]["scores"] for kind in TASKS if report.get(kind)}
    return [
        EvalResult(
            task_type=PIPELINES[PARTS[kind]],
            dataset_type=Path(about["data"]).name,
            dataset_name=_where(about),
            metric_type=name,
            metric_name=f"{TASKS[kind]} {name}" if kind else name,
            metric_value=round(of_kind[name], 4),
        )
        for kind, of_kind in kinds.items()
        for name in ("AP", "AP50", "AP75")
        if of_kind.get(name) is not None
    ]


def _meaning(kind: str, name: str) -> str:
    """Of a score of masks or keypoints; the latter are compared by object keypoint similarity."""
    return SCORES[name].replace("IoU", "OKS") if kind == "keypoints" else SCORES[name]


def _where(about: dict[str, Any]) -> str:
    """The data set's name, not where it lies on somebody's disk."""
    name = Path(about["data"]).name
    return f"{name}, {about['split']}" if about.get("split") else name


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _code(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    plain = clean(text).replace("`", "'").replace("|", "/")
    return f"`{plain or ' '}`"
