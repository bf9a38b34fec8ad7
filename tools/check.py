"""Check a data set in COCO's format before training: everything that is wrong with it, at once.

python tools/check.py data/digits/annotations/instances_val.json --images data/digits/val
python tools/check.py instances.json --images photos --quick    # that the images are there, without opening them
python tools/check.py instances.json                            # the annotation file alone
python tools/check.py val.json --images val --other train.json --other_images train    # which images are in both
python tools/check.py train.json --config configs/bccd.yaml     # whether the anchors of a training fit the boxes

Errors are what training or scoring refuses: fields, ids, references, boxes in 0..1 instead of pixels, images that are
missing, broken or of another size. Flaws are what it leaves out, clips or counts wrong: empty boxes, boxes that reach
outside their image by more than a pixel (and whether they look like corners or centres), boxes given twice, names used
twice, images that another split has, too. Notes are worth knowing: images without annotations, categories never used,
anchors that most objects lie outside of, and which would fit.

exit code: 0 nothing is wrong (but for notes), 1 flaws, 2 errors (or a mistake in the command line), 130 interrupted
"""

import argparse
import io
import sys
from typing import TYPE_CHECKING, Any

from first_look import underscored

if TYPE_CHECKING:
    from detector.models import DetectorConfig

# Settings of a detector, by configuration and by flag.
ANCHORS = ("min_size", "max_size", "anchor_sizes", "aspect_ratios")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("annotations", metavar="ANNOTATIONS.json", help="the annotation file of a split")
    add("--images", metavar="DIR", help="the folder that file_name is relative to; default: no image is looked at")
    add("--quick", action="store_true", help="look whether the images are there, but open none")
    add("--workers", type=int, default=4, metavar="N", help="threads that open images; default: 4")
    add("--examples", type=int, default=3, metavar="N", help="problems to show of each kind; default: 3")
    add("--other", metavar="OTHER.json", help="the annotation file of another split: say which images are in both")
    add("--other_images", metavar="DIR", help="its folder of images; default: only file names are compared")
    anchors = parser.add_argument_group(
        "anchors", "what the boxes are compared with; tools/train.py's --model.detector.*"
    )
    add = anchors.add_argument
    add("--config", metavar="CONFIG.yaml", help="take them from a training's settings; flags override it")
    add("--min_size", type=int, metavar="N", help="pixels of the shorter side of an image as resized; default: 800")
    add("--max_size", type=int, metavar="N", help="the most pixels of the longer side; default: 1333")
    add("--anchor_sizes", type=int, nargs=5, metavar="N", help="default: 32 64 128 256 512")
    add("--aspect_ratios", type=float, nargs=3, metavar="R", help="height over width; default: 0.5 1 2")
    options = parser.parse_args(underscored(sys.argv[1:] if arguments is None else arguments))
    if options.workers < 1 or options.examples < 0:
        parser.error("--workers must be at least 1, --examples at least 0")
    if options.other_images is not None and options.other is None:
        parser.error("--other_images needs --other")
    return options


def detector_settings(options: argparse.Namespace) -> "DetectorConfig":
    """Of the configuration and the flags, those that decide which anchors an object meets."""
    import yaml  # type: ignore[import-untyped]

    from detector.errors import DataError
    from detector.models import DetectorConfig

    found: Any = {}
    if options.config is not None:
        try:
            with open(options.config, "rb") as file:
                found = yaml.safe_load(file)
        except (ValueError, yaml.YAMLError) as error:
            raise DataError(f"{options.config}: not valid YAML: {' '.join(str(error).split())}") from None
        for name in ("model", "detector"):
            if not isinstance(found, dict) or not isinstance(found.setdefault(name, {}), dict):
                raise DataError(f"{options.config}: not the settings of a training: {name} must be a dict")
            found = found[name]
    found |= {name: value for name in ANCHORS if (value := getattr(options, name)) is not None}
    return DetectorConfig(**{name: value for name, value in found.items() if name in ANCHORS})


def check(options: argparse.Namespace) -> int:
    """Print the report. Returns the exit code."""
    # Not above: torch takes seconds to import, in which --help is read, or Ctrl-C pressed.
    from tqdm import tqdm

    from detector.checks import check_dataset, report
    from detector.errors import UserError

    try:
        settings = detector_settings(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tqdm(desc="opening images", unit="image", leave=False, delay=1, disable=None) as bar:

        def show(left: int) -> None:
            bar.total = bar.total or left
            bar.update(bar.total - left - bar.n)

        findings = check_dataset(
            options.annotations,
            options.images,
            decode=not options.quick,
            workers=options.workers,
            on_image=show,
            other=options.other,
            other_images=options.other_images,
            detector=settings,
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names in letters that the terminal lacks
    if options.images is None:
        print("No image was looked at: that takes --images DIR.\n")
    elif options.quick:
        print("No image was opened: that takes a run without --quick.\n")
    if options.other is not None and (options.quick or None in (options.images, options.other_images)):
        print("Of the other split only names were compared: more takes --images and --other_images, without --quick.\n")
    print(report(findings, examples=options.examples))
    levels = {problem.level for problem in findings.problems}
    return 2 if "error" in levels else 1 if "flaw" in levels else 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        from detector.errors import in_a_sentence

        with in_a_sentence():
            return check(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
