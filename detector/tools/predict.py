"""Detect objects in images: pictures with boxes, names, scores, masks and keypoints, and the numbers as JSON.

python tools/predict.py photo.jpg --checkpoint runs/quickstart/checkpoints/last.ckpt
python tools/predict.py photos "more/*.png" --checkpoint FOLDER --output found --min_score 0.3
python tools/predict.py photos --checkpoint runs/bccd/checkpoints/last.ckpt --min_score auto
python tools/predict.py val2017 --model fasterrcnn_resnet50_fpn --weights DEFAULT --annotations instances_val2017.json

Of the detector: a checkpoint of tools/train.py, a folder of save_pretrained, a name on Hugging Face's hub, or one of
torchvision's with weights. Of the images: files, folders with all below them, patterns. Written are pictures/,
predictions.json (by image and name) and detections.json (all detections in COCO's results format, which
tools/eval.py --results scores if --annotations gave the image ids). Of an earlier run in the same --output those
pictures go that its predictions.json names, and nothing else.

Of a folder are taken whatever Pillow reads here: JPEG, PNG, GIF, BMP, TIFF, WebP, PPM, JPEG 2000 and AVIF. Images of
other kinds (.heic, camera raw, .svg, ...) are counted at the end. Of several frames or pages the first is taken. Images
of 16 bits are scaled by as many as their largest value needs (8, 10, 12, 14 or 16), floats up to 1 to 0 to 255, in
training as well. The end says what was done to how many images, predictions.json to which.

exit code: 0 every image was looked at (those of other kinds in a folder are none), 1 a mistake in what was given, 2 in
the command line, 3 some images could not be read (they are named, also in predictions.json), 130 interrupted (what was
found by then is written)
"""

from collections.abc import Sequence

from detector.tools.arguments import (
    ToolParser,
    add_batch_size,
    add_detector,
    add_device,
    add_min_score,
    add_orientation,
    add_output,
    add_refine,
    add_workers,
    at_least,
    score,
)


def score_or_auto(text: str) -> float | str:
    """The type of a flag: a score, or "auto"."""
    return text if text == "auto" else score(text)


def make_parser() -> ToolParser:
    """The flags of ``tools/predict.py``."""
    parser = ToolParser(__doc__, files=("checkpoint", "annotations"))
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER|GLOB", help="what to look at")
    add_detector(parser)
    add_refine(parser, choices=("on", "off"), effect="off leaves the boxes as they were")
    add_device(parser)
    add_output(parser, default="runs/predict, or the next free number")
    add_min_score(
        parser,
        effect="in pictures and predictions.json; auto: of each class that with the highest F1 in the last report of "
        "tools/eval.py on these weights, beside the checkpoint or in runs/",
        kind=score_or_auto,
    )
    add(
        "--annotations",
        metavar="FILE.json",
        help="a COCO file that gives the images' ids, by file name; images and categories are enough",
    )
    add_orientation(add)
    add("--no_pictures", action="store_true", help="the numbers alone")
    add_batch_size(parser, default=8, note="of one size each, and at most so many")
    add_workers(parser, default=2)
    add(
        "--max_pixels",
        type=at_least(1),
        metavar="N",
        help="read images of up to so many pixels; default: 89478485, Pillow's limit, for a small file may unpack to "
        "anything; a large image takes about 40 bytes of memory a pixel",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Detect objects as a command line says. Returns the exit code."""
    options = vars(make_parser().read(arguments))
    from detector.tools.predicting import predict

    return predict(options.pop("images"), pictures=not options.pop("no_pictures"), **options)
