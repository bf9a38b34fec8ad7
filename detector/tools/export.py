"""Take a detector elsewhere: one ONNX file, or a folder for Hugging Face's hub.

python tools/export.py --checkpoint runs/quickstart/checkpoints/last.ckpt --output detector.onnx
python tools/export.py --checkpoint runs/quickstart/checkpoints/last.ckpt --output my-detector --format pretrained

The ONNX file holds the whole detector, from pixels to boxes, masks and keypoints, in standard operators; it takes
images of any size. It is run by onnxruntime and compared with PyTorch before it is called done. The folder holds
model.safetensors, config.json and a model card with the scores of the last evaluation of these weights.

exit code: 0 done, 1 a mistake in what was given, 2 in the command line, 130 interrupted
"""

from collections.abc import Sequence

from detector.tools.arguments import ToolParser, add_batch_size, add_detector, add_output, add_speed


def make_parser() -> ToolParser:
    """The flags of ``tools/export.py``."""
    parser = ToolParser(__doc__, settings=True, files=("config", "checkpoint"))
    add_detector(parser)
    formats = ("onnx", "pretrained")
    parser.add_argument("--format", choices=formats, default="onnx", help="a file or a folder; default: onnx")
    add_output(parser, default="detector.onnx or pretrained/ beside the checkpoint, or in runs/")
    add_batch_size(parser, default=1, note="of the ONNX file, which takes just so many")
    add_speed(parser, what="of onnxruntime beside PyTorch on so many rounds, of an ONNX file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a detector as a command line says. Returns the exit code."""
    options = make_parser().read(arguments)
    from detector.tools.exporting import export

    export(**vars(options))
    return 0
