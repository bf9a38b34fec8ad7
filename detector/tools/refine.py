"""Train a refinement of a detector's boxes: a small head, and nothing else, in minutes.

python tools/refine.py --checkpoint runs/bccd --root BCCD --train_split train --split val
python tools/refine.py --model fasterrcnn_resnet50_fpn --weights DEFAULT --crop affine --root COCO_FOLDER

The detector stays as it is to the last bit. The head crops the detector's own feature maps at a box, and predicts where
the object's box is, and the IoU of the two. It learns from the boxes of the train split, whatever their classes. The
features of images are kept in memory, up to --cache_gb. Then the split is scored without the refinement and with it.

The run folder gets checkpoints/last.ckpt, which eval, predict, export and load_detector take as any other, scores.json
with the scores before and after, detections.json, report.json and report.html.

exit code: 0 all is well, 1 a mistake in what was given, 2 in the command line, 130 interrupted (--ckpt_path last goes
on)
"""

import argparse
from collections.abc import Callable, Sequence

from detector.tools.arguments import (
    ToolParser,
    add_data,
    add_detector,
    add_device,
    add_workers,
    at_least,
    boolean,
    switch,
)


def between(low: float, high: float) -> Callable[[str], float]:
    """The type of a flag: a number in a range, without its ends."""

    def number(text: str) -> float:
        value = float(text)
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must be above {low:g} and below {high:g}, got {text}")
        return value

    return number


def make_parser() -> ToolParser:
    """The flags of ``tools/refine.py``."""
    parser = ToolParser(__doc__, settings=True, files=("config", "checkpoint", "ckpt_path"))
    add_detector(parser)
    add_data(parser)
    add = parser.add_argument
    add("--train_split", default="train2017", metavar="NAME", help="the split to learn from; default: train2017")
    add_device(parser)
    add = parser.add_argument_group("the run").add_argument
    add(
        "--run_dir",
        metavar="FOLDER",
        help="a new run beside an old one gets a number; default: RUN-refined beside the checkpoint's run folder, "
        "runs/refined-MODEL",
    )
    add(
        "--ckpt_path",
        metavar="{last,FILE}",
        help="last: go on, exactly, from the last checkpoint of the last run in run_dir; FILE: from that one",
    )
    add("--save_every", type=at_least(1), default=500, metavar="N", help="steps between checkpoints; default: 500")
    add = parser.add_argument_group("the refinement").add_argument
    add("--iterations", type=at_least(0), default=2, metavar="N", help="refinement iterations; default: 2")
    add(
        "--train_iterations",
        type=at_least(1),
        default=3,
        metavar="N",
        help="refinement iterations in training; default: 3",
    )
    add(
        "--ascent_steps",
        type=at_least(0),
        default=0,
        metavar="N",
        help="maximum number of gradient ascent steps on the predicted IoU; default: 0",
    )
    add(
        "--box_gradient",
        type=switch,
        choices=("exact", "bound", "off"),
        default="exact",
        help="gradient through the boxes between the training iterations: exact: the derivative; bound: at most a "
        "tenth of each iteration's own gradient; off: boxes are constants, as in a cascade; default: exact",
    )
    add = parser.add_argument_group("the training").add_argument
    add("--max_steps", type=at_least(1), default=600, metavar="N", help="its length; default: 600")
    add("--epochs", type=at_least(1), metavar="N", help="or so many passes over the images")
    add("--batch_size", type=at_least(1), default=4, metavar="N", help="images a step and device; default: 4")
    add(
        "--cache_gb",
        type=between(-1, 10_000),
        default=2.0,
        metavar="GB",
        help="memory for features of images: a 320 x 320 image with 128 channels takes 4.4 MB, one of 800 x 1333 with "
        "256 channels 91 MB; what does not fit is computed anew each time; default: 2",
    )
    add("--lr", type=between(0, 10), default=1e-3, metavar="R", help="peak learning rate of AdamW; default: 0.001")
    add("--weight_decay", type=float, default=1e-4, metavar="R", help="default: 0.0001")
    add(
        "--ema", type=between(0, 1), metavar="D", help="decay of an average of the weights, such as 0.99; default: none"
    )
    add(
        "--flip",
        type=boolean,
        default=True,
        metavar="{true,false}",
        help="flip every second image; false where right and left differ, as in digits; default: true",
    )
    add("--seed", type=at_least(0), default=0, metavar="N", help="of all that is drawn; default: 0")
    add("--devices", type=at_least(1), metavar="N", help="processes, one a device; default: 1, or torchrun's")
    add(
        "--precision",
        choices=("32-true", "bf16-mixed", "16-mixed"),
        default="32-true",
        help="of the training; boxes are float32 always, and scores are taken in 32-true; default: 32-true",
    )
    add(
        "--deterministic",
        type=boolean,
        default=False,
        metavar="{true,false}",
        help="the same weights to the last bit on a GPU as well; default: false",
    )
    add_workers(parser, default=2)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Refine what a command line names. Returns the exit code."""
    options = make_parser().read(arguments)
    from detector.tools.refining import refine

    return refine(options)
