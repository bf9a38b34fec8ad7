"""Detect objects in images: pictures with boxes, names and scores, and the numbers as JSON.

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

import argparse
import sys
from collections.abc import Sequence

from first_look import refuse, underscored


def score(text: str) -> float | str:
    """A score from 0 to 1, or "auto"."""
    if text != "auto" and not 0 <= float(text) <= 1:
        raise ValueError
    return text if text == "auto" else float(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER|GLOB", help="what to look at")
    add("--checkpoint", metavar="FILE", help="a checkpoint, a folder of save_pretrained, or OWNER/NAME on the hub")
    add("--model", metavar="NAME", help="or a torchvision detector, such as fasterrcnn_resnet50_fpn")
    add("--weights", metavar="FILE", help="with its weights: a state_dict file, or DEFAULT (fetched)")
    add("--crop", choices=("affine", "roi_align"), help="swapped or stock; default: as trained; stock")
    add("--output", metavar="FOLDER", help="where to write; default: runs/predict, or the next free number")
    add(
        "--min_score",
        type=score,
        default=0.5,
        metavar="S|auto",
        help="least score in pictures and predictions.json, 0 to 1; auto: of each class that with the highest F1 in "
        "the last report of tools/eval.py on these weights, beside the checkpoint or in runs/; default: 0.5",
    )
    add("--annotations", metavar="FILE.json", help="COCO annotations that give the images' ids, by file name")
    add("--no_pictures", action="store_true", help="the numbers alone")
    add("--batch_size", type=int, default=8, metavar="N", help="images of one size at a time, at most; default: 8")
    add("--workers", type=int, default=2, metavar="N", help="processes that read images; default: 2")
    add(
        "--max_pixels",
        type=int,
        metavar="N",
        help="read images of up to so many pixels; default: 89478485, Pillow's limit, for a small file may unpack to "
        "anything; a large image takes about 40 bytes of memory a pixel",
    )
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    options = parser.parse_args(underscored(sys.argv[1:] if arguments is None else arguments))
    if options.batch_size < 1 or options.workers < 0 or (options.max_pixels is not None and options.max_pixels < 1):
        parser.error("--batch_size and --max_pixels must be at least 1, --workers at least 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = vars(parse(arguments))
    # Not above: torch takes seconds to import, in which --help is read, or Ctrl-C pressed.
    from detector.command_line.predict import predict

    return predict(options.pop("images"), pictures=not options.pop("no_pictures"), **options)


if __name__ == "__main__":
    refuse(__doc__, "--checkpoint", "--annotations")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
