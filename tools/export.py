"""Take a detector elsewhere: one ONNX file, or a folder for Hugging Face's hub.

python tools/export.py --checkpoint runs/quickstart/checkpoints/last.ckpt --output detector.onnx
python tools/export.py --checkpoint runs/quickstart/checkpoints/last.ckpt --output my-detector --format pretrained
python tools/export.py --help
"""

import sys

from predict import underscored  # tools/predict.py

if __name__ == "__main__":
    from first_look import refuse

    refuse(__doc__, "--config", "--checkpoint")
    try:
        from jsonargparse import auto_cli

        from detector.command_line.export import export

        auto_cli(export, args=underscored(sys.argv[1:]))
    except KeyboardInterrupt:  # while torch is imported, which takes seconds
        print("interrupted", file=sys.stderr)
        sys.exit(130)
