"""What ``tools/export.py`` does."""

from pathlib import Path
from typing import Any, Literal

from detector.errors import DataError, UsageError, UserError, exit_on_user_error
from detector.evaluation.report import newest_report
from detector.files import read_json
from detector.pretrained.description import Crop
from detector.pretrained.hub import CARD, CONFIG, WEIGHTS
from detector.pretrained.model_card import is_generated
from detector.pretrained.onnx_export import compare_speed
from detector.run_folders import run_folder
from detector.tools.source import load_source


def export(
    *,
    checkpoint: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    crop: Crop | None = None,
    format: Literal["onnx", "pretrained"] = "onnx",
    output: str | None = None,
    batch_size: int = 1,
    speed: int = 0,
) -> None:
    """Export a detector, as ``tools/export.py --help`` says."""
    with exit_on_user_error():
        suffix = "" if output is None or Path(output).is_dir() else Path(output).suffix
        if format == "onnx" and suffix not in ("", ".onnx"):
            raise UsageError(
                f"--output {output}: no {suffix} file can be written, but by --format onnx NAME.onnx, by --format "
                "pretrained a folder"
            )
        if format == "pretrained" and suffix == ".onnx":
            raise UsageError(f"--output {output}: --format pretrained writes a folder; leave it out for an ONNX file")
        if format == "pretrained" and (batch_size > 1 or speed):
            raise UsageError("--batch_size and --speed are of --format onnx")
        detector, called = load_source(checkpoint, model, weights, crop)
        home = run_folder(Path(called)) if checkpoint is not None and Path(called).exists() else Path("runs")
        if format == "pretrained":
            target = home / "pretrained" if output is None else Path(output)
            if not _may_save_to(target):
                raise UserError(f"--output {target}: holds something else already; give a folder of its own")
            report = newest_report(home, detector.digest())
            generated = is_generated(target / CARD)
            detector.save(target, report=None if report is None else report.to_dict())
            print(f"{target}/: {WEIGHTS}, {CONFIG} and {CARD}, the model card")
            if not generated:
                print(f"{CARD} is as it was: it is not one that this program wrote.")
            elif report is None:
                print("The card has no scores: tools/eval.py has not scored these weights in this run's folder.")
            else:
                print(f"The card has the scores of {report.about['time']}.")
            return
        file = home / "detector.onnx" if output is None else Path(output)
        if file.is_dir():
            raise UserError(f"--output {file}: is a folder; name a file, such as {file / 'detector.onnx'}")
        file.parent.mkdir(parents=True, exist_ok=True)
        network: Any = detector.model
        done = detector.export(file, batch_size=batch_size)
        same = (
            "onnxruntime detects what PyTorch does" if done.compared else "not compared: onnxruntime is not installed"
        )
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB; {same}")
        if done.left_out:
            print(f"{done.left_out}.")
        if speed:
            side = min(network.transform.min_size[-1], network.transform.max_size)
            seconds = compare_speed(network, file, (side, side), speed)
            print(
                f"{batch_size} x {side} x {side} pixels, {speed} rounds: PyTorch {1000 * seconds['pytorch']:.1f} ms, "
                f"onnxruntime {1000 * seconds['onnxruntime']:.1f} ms, {seconds['ratio']:.2f} times"
            )


def _may_save_to(folder: Path) -> bool:
    """Whether a folder is not there, empty, or one of save_pretrained, which may be replaced."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    try:
        return not any(folder.iterdir()) or "weights_digest" in read_json(folder / CONFIG)
    except (DataError, TypeError):  # another program's
        return False
