"""Check a data set in COCO's format before training: everything that is wrong with it, at once.

python tools/check.py data/digits/annotations/instances_val.json --images data/digits/val
python tools/check.py instances.json --images photos --quick    # that the images are there, without opening them
python tools/check.py instances.json                            # the annotation file alone

Errors are what training or scoring refuses: fields, ids, references, images that are missing, broken or of another
size. Flaws are what it leaves out, clips or counts wrong: empty boxes, boxes that reach outside their image by more
than a pixel, names used twice. Notes are worth knowing: images without annotations, categories never used.

exit code: 0 nothing is wrong (but for notes), 1 flaws, 2 errors (or a mistake in the command line), 130 interrupted
"""

import argparse
import io
import sys


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("annotations", metavar="ANNOTATIONS.json", help="the annotation file of a split")
    add("--images", metavar="DIR", help="the folder that file_name is relative to; default: no image is looked at")
    add("--quick", action="store_true", help="look whether the images are there, but open none")
    add("--workers", type=int, default=4, metavar="N", help="threads that open images; default: 4")
    add("--examples", type=int, default=3, metavar="N", help="problems to show of each kind; default: 3")
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.examples < 0:
        parser.error("--workers must be at least 1, --examples at least 0")
    return options


def check(options: argparse.Namespace) -> int:
    """Print the report. Returns the exit code."""
    # Not above: torch takes seconds to import, in which --help is read, or Ctrl-C pressed.
    from tqdm import tqdm

    from detector.checks import check_dataset, report

    with tqdm(desc="opening images", unit="image", leave=False, delay=1, disable=None) as bar:

        def show(left: int) -> None:
            bar.total = bar.total or left
            bar.update(bar.total - left - bar.n)

        findings = check_dataset(
            options.annotations, options.images, decode=not options.quick, workers=options.workers, on_image=show
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names in letters that the terminal lacks
    if options.images is None:
        print("No image was looked at: that takes --images DIR.\n")
    elif options.quick:
        print("No image was opened: that takes a run without --quick.\n")
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
