"""Check a data set in COCO's format before training: everything that is wrong with it, at once.

python tools/check.py data/digits/annotations/instances_val.json --images data/digits/val
python tools/check.py instances.json --images photos --quick    # that the images are there, without opening them
python tools/check.py instances.json                            # the annotation file alone
python tools/check.py val.json --images val --other train.json --other_images train    # which images are in both
python tools/check.py train.json --config configs/bccd.yaml     # whether the anchors of a training fit the boxes

Errors are what training or scoring refuses: fields, ids, references, boxes in 0..1 instead of pixels, images that are
missing, broken or of another size, files without a box to train on, masks or keypoints that have nothing to do with
their boxes. Warnings are what it leaves out, clips or counts wrong: empty boxes, boxes that reach outside their image
by more than a pixel (and whether they look like corners or centres), boxes given twice, areas far from the boxes' or
the masks', file or category names used twice, category names that are almost the same, images that another split has,
too; single masks and keypoints that are broken, which boxes can be trained without, or that some objects lack. Notes
are worth knowing: images without annotations, categories never used, images whose EXIF orientation matters, annotations
with ignore 1, anchors that most objects lie outside of, and which would fit.

exit code: 0 nothing is wrong (but for notes), 1 warnings, 2 errors (or a mistake in the command line), 130 interrupted
"""

from collections.abc import Sequence

from detector.tools.arguments import ToolParser, add_orientation, add_workers, at_least


def make_parser() -> ToolParser:
    """The flags of ``tools/check.py``."""
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("annotations", metavar="ANNOTATIONS.json", help="the annotation file of a split")
    add("--images", metavar="DIR", help="the folder that file_name is relative to; default: no image is looked at")
    add("--quick", action="store_true", help="look whether the images are there, but open none")
    add_workers(parser, default=4, least=1)
    add_orientation(add)
    add("--examples", type=at_least(0), default=3, metavar="N", help="problems to show of each kind; default: 3")
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
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a data set as a command line says. Returns the exit code."""
    options = make_parser().read(arguments)
    from detector.tools.checking import check

    return check(options)
