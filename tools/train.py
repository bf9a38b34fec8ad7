"""Train an affine-crop R-CNN on a data set in COCO's format and score it.

python tools/train.py --config configs/quickstart.yaml
python tools/train.py --config configs/bccd.yaml --data.root FOLDER --trainer.max_epochs 3
python tools/train.py --config configs/bccd.yaml --ckpt_path runs/bccd/checkpoints/last.ckpt
python tools/train.py --help
"""

import sys

from first_look import refuse

if __name__ == "__main__":
    refuse(__doc__, "-c", "--config", "--ckpt_path")
    try:
        from detector.training.command_line import train

        train()
    except KeyboardInterrupt:  # while torch is imported, which takes seconds
        print("interrupted", file=sys.stderr)
        sys.exit(130)
