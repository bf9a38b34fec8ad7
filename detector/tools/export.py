"""tools/export.py: write a detector as an ONNX file, or as a folder for Hugging Face's hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from detector.choices import Crop
from detector.errors import DataError, UsageError
from detector.tools.cli import run_tool

if TYPE_CHECKING:
    from detector.pretrained import Detector


def export(
    *,
    checkpoint: str | Path | None = None,
    model: str | None = None,
    weights: str | None = None,
    crop: Crop | None = None,
    format: Literal["onnx", "pretrained"] = "onnx",
    output: str | Path | None = None,
    batch_size: PositiveInt = 1,
    speed: NonNegativeInt = 0,
) -> Path:
    """Export a detector: one ONNX file, or a folder for Hugging Face's hub.

    The ONNX file holds the whole detector, from pixels to boxes, masks and keypoints, in standard operators. It takes
    images of any size. Before it is written, onnxruntime runs it, and its detections are compared with PyTorch's.

    The folder holds model.safetensors, config.json and a model card, README.md, with the scores of the last evaluation
    of these weights.

    Examples:
        python tools/export.py --checkpoint runs/quickstart --output detector.onnx
        python tools/export.py --checkpoint runs/quickstart --output my-detector --format pretrained

    Args:
        checkpoint: A checkpoint, its run folder (the last checkpoint), a saved folder, or OWNER/NAME on Hugging Face.
        model: A torchvision detector, such as fasterrcnn_resnet50_fpn. Needs weights.
        weights: A state_dict file for the model, or the name of published weights, such as DEFAULT.
        crop: Crop with the affine crop or with RoIAlign. Default: as the detector was trained.
        format: onnx writes a file, pretrained a folder.
        output: The file or folder. Default: detector.onnx or pretrained/ in the run folder, or in runs/.
        batch_size: Number of images that the ONNX file takes.
        speed: Number of calls to time, of onnxruntime and of PyTorch.

    Returns:
        The file or folder.

    Exit codes:
        0: success.
        1: wrong input, or a detector that cannot be exported.
        2: wrong command line.
        130: interrupted.
    """
    from detector.pretrained.onnx_export import compare_speed
    from detector.run_folders import run_folder
    from detector.tools.source import load_source

    given: Any = {"setting": "output", "value": output and str(output)}
    suffix = "" if output is None or Path(output).is_dir() else Path(output).suffix
    if format == "onnx" and suffix not in ("", ".onnx"):
        hint = "name the file NAME.onnx, or write a folder with {format} pretrained"
        raise UsageError(f"no {suffix} file can be written", **given, hints=[hint])
    if format == "pretrained" and (suffix == ".onnx" or batch_size > 1 or speed):
        what = "writes a folder; a .onnx file, batch_size and speed need another format"
        raise UsageError(what, setting="format", value=format, hints=["use {format} onnx"])
    detector, called = load_source(checkpoint, model, weights, crop)
    home = run_folder(Path(called)) if checkpoint is not None and Path(called).exists() else Path("runs")
    target = home / ("pretrained" if format == "pretrained" else "detector.onnx") if output is None else Path(output)
    if format == "pretrained":
        _save(detector, target, home)
        return target
    if target.is_dir():
        raise DataError("is a folder; name a file in it", **given)
    target.parent.mkdir(parents=True, exist_ok=True)
    notes = detector.export(target, batch_size=batch_size)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB; {'; '.join(notes)}")
    if speed:
        side, pytorch, onnxruntime = compare_speed(detector.model, target, speed)
        times = f"PyTorch {1000 * pytorch:.1f} ms, onnxruntime {1000 * onnxruntime:.1f} ms"
        ratio = f"{onnxruntime / pytorch:.2f} times"
        print(f"{batch_size} x {side} x {side} pixels, {speed} calls: {times}, {ratio}")
    return target


def _save(detector: "Detector", folder: Path, home: Path) -> None:
    from detector.evaluation.report import newest_report
    from detector.files import read_json
    from detector.pretrained.hub import CARD, CONFIG, WEIGHTS
    from detector.pretrained.model_card import is_generated

    try:
        replaced = not folder.exists() or not any(folder.iterdir()) or "weights_digest" in read_json(folder / CONFIG)
    except (DataError, TypeError, NotADirectoryError):  # another program's
        replaced = False
    if not replaced:
        raise DataError("holds other files; give another folder", setting="output", value=str(folder))
    report, generated = newest_report(home, weights=detector.digest()), is_generated(folder / CARD)
    detector.save(folder, report=None if report is None else report.to_dict())
    card = "the model card, without scores: tools/eval.py has not scored these weights in this run folder"
    if report is not None:
        card = f"the model card, with the scores of {report.about['time']}"
    card = card if generated else "which was edited, and stays as it is"
    print(f"{folder}/: {WEIGHTS}, {CONFIG} and {CARD}, {card}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    return run_tool(export, arguments)
