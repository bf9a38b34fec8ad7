"""The text beside a saved detector: what it is, how to use it, how well it scores."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from detector.models import DetectorConfig

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
LISTED = 100  # class names


def model_card(
    data: ModelCardData,
    settings: DetectorConfig,
    crop: str | None,
    names: Sequence[str],
    report: dict[str, Any] | None = None,
) -> ModelCard:
    """A model card in Hugging Face's format.

    Args:
        data: the metadata that all cards of this project have.
        settings: what the detector was built by.
        crop: "affine" or "roi_align".
        names: of the classes.
        report: the dict of a ``report.json``; without one the card says that there are no scores.
    """
    data = ModelCardData(**data.to_dict())
    title = f"Affine-crop R-CNN: {settings.name}"
    by = "an affine grid, whose boxes get gradients (RoIAlign's values)" if crop == "affine" else "RoIAlign"
    listed = ", ".join(map(_code, names[:LISTED])) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    lines = [
        f"# {title}",
        "",
        f"A Faster R-CNN (`{settings.name}`) that crops its features by {by}, made with affine-crop-rcnn.",
        f"It finds {len(names)} classes: {listed}. Test images are resized to {settings.min_size} pixels on the "
        f"shorter side, at most {settings.max_size} on the longer.",
        "",
        "```python",
        "from detector.pretrained import PretrainedDetector",
        "",
        'detector = PretrainedDetector.from_pretrained("FOLDER OR HUB NAME")',
        'found = detector.detect("photo.jpg")  # a path, a PIL image, an array or a tensor',
        "print(found)  # names, scores, boxes; a notebook draws it",
        "```",
        "",
        "## Scores",
        "",
    ]
    if report is None:
        lines += ["It was not scored before it was saved (`tools/eval.py` does that)."]
    else:
        about, scores = report["about"], report["scores"]
        where = f"{about['data']}, {about['split']}" if about.get("split") else str(about["data"])
        lines += [
            f"By {about['evaluator']} on {about['images']} images with {about['objects']} objects of {_code(where)}, "
            f"{about['time'][:10]}:",
            "",
            "| | | |",
            "|---|---|---|",
            *(f"| {name} | {_number(scores.get(name))} | {meaning} |" for name, meaning in SCORES.items()),
            "",
            "```sh",
            " ".join(about["command"].split()).replace("`", "'"),
            "```",
        ]
        data.model_name = title
        data.eval_results = [
            EvalResult(
                task_type="object-detection",
                dataset_type=str(about["data"]),
                dataset_name=where,
                metric_type=name,
                metric_value=round(scores[name], 4),
            )
            for name in ("AP", "AP50", "AP75")
            if scores.get(name) is not None
        ]
    # Not a template: names come from files that anybody wrote.
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _code(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"
