"""Take a detector elsewhere: one ONNX file, or a folder for Hugging Face's hub.

python tools/export.py --checkpoint runs/quickstart/checkpoints/last.ckpt --output detector.onnx
python tools/export.py --checkpoint runs/quickstart/checkpoints/last.ckpt --output my-detector --format pretrained
python tools/export.py --help
"""

from jsonargparse import auto_cli

from detector.command_line import export

if __name__ == "__main__":
    auto_cli(export)
