"""Detect objects in images: pictures with boxes, names and scores, and the numbers as JSON.

python tools/predict.py photo.jpg --checkpoint runs/quickstart/checkpoints/last.ckpt
python tools/predict.py photos "more/*.png" --checkpoint FOLDER --output found --min-score 0.3
python tools/predict.py val2017 --model fasterrcnn_resnet50_fpn --weights DEFAULT --annotations instances_val2017.json

Of the detector: a checkpoint of tools/train.py, a folder of save_pretrained, a name on Hugging Face's hub, or one of
torchvision's with weights. Of the images: files, folders with all below them, patterns. Written are pictures/,
predictions.json (by image and name) and detections.json (all detections in COCO's results format, which
tools/eval.py --results scores if --annotations gave the image ids).

exit code: 0 every image was looked at, 1 a mistake in what was given, 2 in the command line, 3 some images could not be
read (they are named, also in predictions.json), 130 interrupted (what was found by then is written)
"""

import argparse
import sys


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER|GLOB", help="what to look at")
    add("--checkpoint", metavar="FILE", help="a checkpoint, a folder of save_pretrained, or OWNER/NAME on the hub")
    add("--model", metavar="NAME", help="or a torchvision detector, such as fasterrcnn_resnet50_fpn")
    add("--weights", metavar="FILE", help="with its weights: a state_dict file, or DEFAULT (fetched)")
    add("--crop", choices=("affine", "roi_align"), help="swapped or stock; default: as trained; stock")
    add("--output", metavar="FOLDER", help="where to write; default: runs/predict, or the next free number")
    add("--min-score", type=float, default=0.5, metavar="S", help="least score in pictures; default: 0.5")
    add("--annotations", metavar="FILE.json", help="COCO annotations that give the images' ids, by file name")
    add("--no-pictures", action="store_true", help="the numbers alone")
    add("--batch-size", type=int, default=8, metavar="N", help="images of one size at a time, at most; default: 8")
    add("--workers", type=int, default=2, metavar="N", help="processes that read images; default: 2")
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.workers < 0 or not 0 <= options.min_score <= 1:
        parser.error("--batch-size must be at least 1, --workers at least 0, --min-score from 0 to 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = vars(parse(arguments))
    # Not above: torch takes seconds to import, in which --help is read, or Ctrl-C pressed.
    from detector.command_line.predict import predict

    return predict(options.pop("images"), pictures=not options.pop("no_pictures"), **options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
