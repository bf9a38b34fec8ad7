"""Score a detector, or a file of detections, on a split of a data set in COCO's format.

python tools/eval.py --checkpoint runs/quickstart/checkpoints/last.ckpt --root data/digits --split val
python tools/eval.py --model fasterrcnn_resnet50_fpn --weights DEFAULT --crop affine --root COCO_FOLDER
python tools/eval.py --results detections.json --annotations instances_val.json
python tools/eval.py --help

exit code: 0 every image was looked at, 1 a mistake in what was given, or an image that cannot be read (what was found
before it is scored), 2 in the command line, 3 images were left out with --skip_broken (0 of several processes, of which
torchrun would make a failure), 130 interrupted (what was found by then is scored)
"""

import sys

from predict import underscored  # tools/predict.py

if __name__ == "__main__":
    from first_look import refuse

    refuse(__doc__, "--config", "--checkpoint", "--results")
    try:
        from jsonargparse import auto_cli

        from detector.command_line.evaluate import score

        auto_cli(score, args=underscored(sys.argv[1:]))
    except KeyboardInterrupt:  # while torch is imported, which takes seconds
        print("interrupted", file=sys.stderr)
        sys.exit(130)
