"""Draw training images as the model sees them: augmented and resized, with their boxes.

python tools/browse.py --config configs/bccd.yaml --output sheet.png
python tools/browse.py --config configs/bccd.yaml --data.augmentation+ RandomPhotometricDistort
python tools/browse.py --help
"""

from detector.training.command_line import browse_training_images

if __name__ == "__main__":
    browse_training_images()
