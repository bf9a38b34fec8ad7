"""tools/check.py: check a data set before training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse.typing import NonNegativeInt, PositiveInt

from detector.choices import Orientation
from detector.tools.cli import run_tool

if TYPE_CHECKING:
    from detector.data.check_dataset import DatasetReport


def check(
    annotations: str,
    images: str | None = None,
    *,
    quick: bool = False,
    workers: PositiveInt = 4,
    orientation: Orientation = "upright",
    examples: NonNegativeInt = 3,
    other: str | None = None,
    other_images: str | None = None,
    config: str | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    anchor_sizes: tuple[int, int, int, int, int] | None = None,
    aspect_ratios: tuple[float, float, float] | None = None,
) -> "DatasetReport":
    """Check a data set in COCO's format before training, and print all errors and warnings.

    Examples:
        python tools/check.py data/digits/annotations/instances_val.json --images data/digits/val
        python tools/check.py instances.json --images photos --quick   # check that the images exist
        python tools/check.py instances.json                           # the annotation file alone
        python tools/check.py val.json --images val --other train.json --other_images train   # images in both splits
        python tools/check.py train.json --config configs/bccd.yaml   # whether its anchors fit the boxes

    Errors prevent training or scoring: wrong fields and references, normalised boxes, images that are missing,
    broken or of another size, no box to train on, masks or keypoints outside their boxes. Warnings concern what is left
    out, clipped or counted wrong: boxes that are empty, outside their image or duplicate, or look like corners or
    centres; areas that do not fit; duplicate or similar names; images of another split; broken or missing masks and
    keypoints. Notes: unused images and categories, EXIF orientations that matter, annotations with ignore 1, anchors
    that fit few boxes.

    Args:
        annotations: Annotation file of a split.
        images: Folder that file_name is relative to. Without it no image is checked.
        quick: Check whether the images exist, but open none.
        workers: Number of threads that open images.
        orientation: "upright" applies EXIF orientations, "stored" ignores them.
        examples: Number of examples shown of each kind.
        other: Annotation file of another split, to find images that are in both.
        other_images: Image folder of the other split. Without it only file names are compared.
        config: Training configuration whose anchors are compared with the boxes. The flags below override it.
        min_size: Pixels of the shorter side of resized images. Default: 800.
        max_size: Maximum pixels of the longer side. Default: 1333.
        anchor_sizes: Five anchor sizes in pixels. Default: [32, 64, 128, 256, 512].
        aspect_ratios: Three ratios of height to width. Default: [0.5, 1, 2].

    Returns:
        The findings.

    Raises:
        UsageError: the settings of the anchors are wrong, or ``other_images`` has no ``other``.

    Exit codes:
        0: no errors or warnings.
        1: warnings.
        2: errors, or a wrong command line.
        130: interrupted.
    """
    import io
    import sys
    from functools import partial

    from detector.data.check_dataset import check_dataset
    from detector.errors import UsageError, UserError, one_line
    from detector.models.anchors import anchor_advice
    from detector.models.config import DetectorConfig

    if other_images is not None and other is None:
        raise UsageError("needs the annotation file of the other split", setting="other_images", value=other_images)
    given = {"min_size": min_size, "max_size": max_size, "anchor_sizes": anchor_sizes, "aspect_ratios": aspect_ratios}
    try:
        settings = {} if config is None else _detector_settings(config)
        settings |= {name: value for name, value in given.items() if value is not None}
        detector = DetectorConfig(**{name: value for name, value in settings.items() if name in given})
    except OSError as error:
        raise UsageError(one_line(error)) from None
    except UserError as error:
        raise UsageError(error.message, setting=error.setting, value=error.value, hints=error.hints) from None
    report = check_dataset(
        annotations,
        images,
        decode=not quick,
        orientation=orientation,
        workers=workers,
        other=other,
        other_images=other_images,
        anchor_advice=partial(anchor_advice, settings=detector),
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack letters of file names
    if images is None:
        print("No image was checked: give --images DIR.\n")
    elif quick:
        print("No image was opened: run without --quick.\n")
    if other is not None and (quick or None in (images, other_images)):
        print("Only names were compared with the other split: give --images and --other_images, without --quick.\n")
    print(report.to_text(examples))
    return report


def _detector_settings(path: str) -> dict:
    import yaml  # type: ignore[import-untyped]

    from detector.errors import DataError, one_line

    with open(path, encoding="utf-8") as file:
        try:
            settings = yaml.safe_load(file)
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"{path}: not valid YAML: {one_line(error)}") from None
    for name in ("model", "detector"):
        if not isinstance(settings, dict) or not isinstance(settings.setdefault(name, {}), dict):
            raise DataError(f"{path}: not a training configuration: {name} must be a dict")
        settings = settings[name]
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tools/check.py. Returns the exit code."""
    return run_tool(check, arguments, exit_code=lambda report: report.exit_code)
