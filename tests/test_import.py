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
        "exact_crop",
        "normalize_boxes",
        "restore_roi_align",
        "swap_crop_head",
        "watch_box_gradient",
    ],
)
def test_public_name(name):
    assert name in detector.__all__
    assert getattr(detector, name).__doc__


def test_what_comes_after_training_does_not_import_lightning():
    modules = ("command_line.evaluating", "command_line.predicting", "command_line.exporting", "pretrained.onnx_export")
    code = f"import sys, {', '.join(f'detector.{module}' for module in modules)}; print('lightning' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
