"""Draw training images as the model sees them: augmented and resized, with their boxes.

python tools/browse.py --config configs/bccd.yaml --output sheet.png
python tools/browse.py --config configs/bccd.yaml --data.augmentation+ RandomPhotometricDistort
python tools/browse.py --help
"""

import sys

if __name__ == "__main__":
    from first_look import refuse

    refuse(__doc__, "-c", "--config")
    try:
        from detector.training.command_line import browse_training_images

        browse_training_images()
    except KeyboardInterrupt:  # while torch is imported, which takes seconds
        print("interrupted", file=sys.stderr)
        sys.exit(130)
