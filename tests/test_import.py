import subprocess
import sys

import pytest

import detector


def test_import_detector_imports_neither_lightning_nor_what_training_needs():
    code = (
        "import sys, detector\n"
        "heavy = ('lightning', 'pytorch_lightning', 'jsonargparse', 'tensorboard', 'pycocotools', 'timm', 'sklearn')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "AffineCrop",
        "BoxGradient",
        "MultiScaleAffineCrop",
        "affine_crop",
        "boxes_to_theta",
        "denormalize_boxes",
        "normalize_boxes",
        "restore_roi_align",
        "swap_crop_head",
    ],
)
def test_public_name(name):
    assert name in detector.__all__
    assert getattr(detector, name).__doc__


@pytest.mark.parametrize(
    "module",
    [
        "command_line.evaluate",
        "command_line.predict",
        "command_line.export",
        "pretrained",
        "evaluation",
        "export",
        "image_files",
    ],
)
def test_what_comes_after_training_does_not_import_lightning(module):
    code = f"import sys, detector.{module}; print('lightning' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
