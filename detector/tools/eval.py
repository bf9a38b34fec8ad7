"""Score a detector, or a file of detections, on a split of a data set in COCO's format.

python tools/eval.py --checkpoint runs/quickstart/checkpoints/last.ckpt --root data/digits --split val
python tools/eval.py --model fasterrcnn_resnet50_fpn --weights DEFAULT --crop affine --root COCO_FOLDER
python tools/eval.py --results detections.json --annotations instances_val.json

Masks (segm) and keypoints are scored beside boxes where the detector, or the file, and the annotations have them.
Written are report.html (plots, the worst and the best images), report.json, scores.json and detections.json (COCO's
results format). torchrun --nproc-per-node N tools/eval.py ... spreads the images over N devices. Classes are the data's
by their names, whatever the ids.

exit code: 0 every image was looked at, 1 a mistake in what was given, or an image that cannot be read (what was found
before it is scored), 2 in the command line, 3 images were left out with --skip_broken (0 of several processes, of which
torchrun would make a failure), 130 interrupted (what was found by then is scored)
"""

from collections.abc import Sequence

from detector.tools.arguments import (
    ToolParser,
    add_batch_size,
    add_data,
    add_detector,
    add_device,
    add_min_score,
    add_output,
    add_refine,
    add_speed,
    add_workers,
    at_least,
    boolean,
)


def make_parser() -> ToolParser:
    """The flags of ``tools/eval.py``."""
    parser = ToolParser(__doc__, settings=True, files=("config", "checkpoint", "results"))
    add_detector(parser)
    add_data(parser)
    add = parser.add_argument
    add("--results", metavar="FILE.json", help="no detector but a file of detections in COCO's results format")
    add_refine(parser, choices=("on", "off", "both"), effect="both scores with and without it, and shows what it did")
    add_device(parser)
    add_output(parser, default="eval-SPLIT in the checkpoint's run folder; runs/eval-MODEL-SPLIT")
    add("--limit", type=at_least(1), metavar="N", help="score only the first so many images")
    add(
        "--skip_broken",
        type=boolean,
        default=False,
        metavar="{true,false}",
        help="leave out images that cannot be read, with their objects, and name them; the exit code is then 3; "
        "without it the first one ends the run, and what was found by then is scored; default: false",
    )
    add_min_score(parser, effect="in the confusion matrix and the pictures")
    add(
        "--evaluator",
        choices=("pycocotools", "faster-coco-eval"),
        default="pycocotools",
        help="faster-coco-eval (a package of its own) computes the same numbers in C++; default: pycocotools",
    )
    add(
        "--pictures",
        type=at_least(0),
        default=6,
        metavar="N",
        help="how many of the worst images the page shows, and of the best, each 0.1 to 0.2 MB; default: 6",
    )
    add_speed(parser, what="of each stage on so many images, one at a time, after the scoring; 50 is a good number")
    add_batch_size(parser, default=1, note="more than 1 are padded to one size, which changes scores a little")
    add_workers(parser, default=2)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Score what a command line names. Returns the exit code."""
    options = make_parser().read(arguments)
    from detector.tools.evaluating import score

    return score(options)
