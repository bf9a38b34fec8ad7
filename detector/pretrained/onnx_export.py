"""Export of a whole detector as one ONNX file of standard operators, compared with PyTorch before it is written.

The exporter is ``torch.onnx.export(dynamo=False)``, which traces: ``torch.export`` fails in torchvision's
``batched_nms``, which asks whether there are any boxes. The crop alone goes through ``torch.export``.
"""

import copy
import importlib
import importlib.util
import io
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detector.errors import UserError
from detector.files import write_atomically
from detector.models.resizing import DetectorTransform
from detector.models.rle_detections import annotation_types_of
from detector.rcnn.pooler import MultiScaleAffineCrop
from detector.refinement.attach import refinement_of
from detector.text import short

OUTPUTS = {  # for an image, by annotation type
    "boxes": {"boxes": "(x1, y1, x2, y2) in pixels", "labels": "1 is the first class", "scores": "best first"},
    "masks": {"masks": "probabilities, per pixel of the image"},
    "keypoints": {"keypoints": "(x, y, 1) in pixels", "keypoints_scores": "logits"},
}
INPUT = {"name": "images", "dtype": "float32", "layout": "NCHW", "colors": "RGB", "range": [0, 1], "size": "any"}
THRESHOLD = "score_threshold"  # an input of the graph until it has been compared
# Tolerances of the comparison with PyTorch. They allow for the rounding errors of deep networks with random weights.
BOX_TOLERANCE = 3e-4  # times the longer side of the image
SCORE_TOLERANCE = 2e-3
MIN_MASK_IOU = 0.9  # pasting rounds boxes to whole pixels
MIN_SHARE = 0.9  # of detections with a counterpart: rounding may move a score across a threshold
MIN_COMPARED = 15  # detections per image, if there are as many: the score threshold is lowered for them


class ExportError(UserError, RuntimeError):
    """A detector cannot be exported, or its graph is wrong."""


def export_onnx(
    model: GeneralizedRCNN,
    path: str | Path,
    *,
    batch_size: int = 1,
    opset: int = 18,
    classes: Sequence[tuple[str, int | None]] = (),
) -> list[str]:
    """Write a Faster, Mask or Keypoint R-CNN to an ONNX file, atomically. The model does not change.

    The graph takes ``images`` [batch_size, 3, height, width], float32, RGB in 0..1, of any height and width, and
    normalises and resizes them. It returns ``boxes`` [L, 4] float32 (x1, y1, x2, y2) in pixels of the image, ``labels``
    [L] int64 (from 1 on) and ``scores`` [L] float32, best first. A Mask R-CNN adds ``masks`` [L, 1, height, width]
    float32, probabilities; a Keypoint R-CNN adds ``keypoints`` [L, K, 3] float32 (x, y, 1) in pixels and
    ``keypoints_scores`` [L, K] float32, logits. For several images the names are ``boxes_0``, ``labels_0``, and so on.

    A swapped model crops with GridSample, a stock one with RoiAlign. The gradient ascent of a refinement is left out,
    as graphs have no gradients. With onnxruntime installed the graph is compared with PyTorch on noise.

    Args:
        model: swapped or stock, in eval mode, on the CPU, in float32. A stock model that has never run derives its
            strides from the traced example, a square.
        path: the file to write.
        batch_size: number of images per call, all of one size.
        opset: version of ONNX's operators, 16 to 20.
        classes: the name and the category id of each label, stored in the file's metadata under "classes".

    Returns:
        Notes: whether the graph was compared with PyTorch, and what it lacks.

    Raises:
        ExportError: a package is missing, an argument is out of its range, the model cannot be exported, or the graph
            is wrong.
        OSError: the file cannot be written.
    """
    onnx = _import("onnx")
    if not 16 <= opset <= 20:  # PyTorch would print the whole graph
        raise ExportError(f"opset must be 16 to 20, got {opset}")
    if batch_size < 1:
        raise ExportError(f"batch_size must be at least 1, got {batch_size}")
    _check_model(model)
    side, refinement = _example_side(model), refinement_of(model)
    graph = onnx.load_from_string(_trace(model, torch.rand(batch_size, 3, side, side), opset))
    labelled = [{"label": i, "name": name, "category_id": c} for i, (name, c) in enumerate(classes, start=1)]
    metadata = {"input": INPUT, "outputs": _outputs(model), "classes": labelled}
    onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.checker.check_model(graph)
    notes = ["not compared with PyTorch: onnxruntime is not installed"]
    if importlib.util.find_spec("onnxruntime") is not None:
        _compare(model, graph.SerializeToString(), batch_size)
        notes = ["onnxruntime's detections equal PyTorch's"]
    (given,) = (value for value in graph.graph.input if value.name == THRESHOLD)  # the comparison's becomes a constant
    graph.graph.input.remove(given)
    threshold = torch.as_tensor(model.roi_heads.score_thresh).numpy()
    graph.graph.initializer.append(onnx.numpy_helper.from_array(threshold, THRESHOLD))
    write_atomically(Path(path), graph.SerializeToString())
    if refinement is not None and refinement.enabled and refinement.config.ascent_steps:
        notes.append("the graph refines boxes without the gradient ascent, which needs gradients")
    return notes


def compare_speed(model: GeneralizedRCNN, path: str | Path, repeats: int = 10) -> tuple[int, float, float]:
    """Time an exported file and its model in turns, on the same noise and with the same number of threads.

    Returns:
        The side of the images in pixels, and the median seconds of a call of PyTorch and of onnxruntime.

    Raises:
        ExportError: onnxruntime is missing, or cannot run the file.
    """
    session, side, network = _session(Path(path).read_bytes()), _example_side(model), _without_ascent(model)
    images = torch.rand(session.get_inputs()[0].shape[0], 3, side, side, generator=torch.Generator().manual_seed(0))
    seconds: list[tuple[float, float]] = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            network(list(images))
            middle = time.perf_counter()
            session.run(None, {"images": images.numpy()})
            seconds.append((middle - start, time.perf_counter() - middle))
    pytorch, onnxruntime = map(median, zip(*seconds[1:]))  # the first calls allocate
    return side, pytorch, onnxruntime


@contextmanager
def _as_export_error(what: str) -> Iterator[None]:
    """Raise any error as an :class:`ExportError`: those of onnx, onnxruntime and models have no base class."""
    try:
        yield
    except Exception as error:
        raise ExportError(f"{what}: {short(str(error), 300)}") from error


def _import(name: str) -> Any:
    with _as_export_error(f"the package {name} is missing: pip install 'affine-crop-rcnn[export]'"):
        return importlib.import_module(name)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, GeneralizedRCNN) or not isinstance(getattr(model, "roi_heads", None), RoIHeads):
        raise ExportError(f"{type(model).__name__} cannot be exported: it must be one of torchvision's R-CNNs")
    if model.training:
        raise ExportError("the model must be in eval mode: call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ExportError(f"{name} is not float32 on the CPU: call model.float().cpu() first")
    for name, pool in model.named_modules():
        if isinstance(pool, MultiScaleAffineCrop) and pool.sampling_ratio <= 0:
            raise ExportError(f"{name} needs a fixed sampling_ratio above 0, got {pool.sampling_ratio}")


def _outputs(model: nn.Module) -> dict[str, str]:
    """Return the names of the outputs for an image, in order, and their meaning."""
    return {name: held for kind in ("boxes", *annotation_types_of(model)) for name, held in OUTPUTS[kind].items()}


def _example_side(model: GeneralizedRCNN) -> int:
    return min(model.transform.min_size[-1], model.transform.max_size)


def _without_ascent(model: GeneralizedRCNN) -> GeneralizedRCNN:
    """Return a shallow copy that shares the weights, without gradient ascent. Its threshold may be changed."""
    model = copy.copy(model)
    model._modules = dict(model._modules)
    model.roi_heads = heads = copy.copy(model.roi_heads)
    if (refinement := refinement_of(model)) is not None:
        heads._modules = dict(heads._modules)
        heads.refinement = copy.copy(refinement)
        heads.refinement.config = replace(refinement.config, ascent_steps=0)
    return model


class _TracedTransform(GeneralizedRCNNTransform):
    """torchvision's transform, with the resized size in float64: float32 is one pixel off for every seventh size."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, None]:
        if self.fixed_size is not None:
            size = [self.fixed_size[1], self.fixed_size[0]]
        else:
            sides = shape_as_tensor(image)[-2:].double()
            # The exporter makes 0-dimensional tensors float32, and traces a number over a tensor as a product with the
            # reciprocal, which rounds once more. 1-dimensional tensors avoid both.
            shortest, longest = (sides.new_full((1,), n) for n in (self.min_size[-1], self.max_size))
            scale = torch.minimum(shortest / sides.amin(0, keepdim=True), longest / sides.amax(0, keepdim=True))
            size = list((sides * scale).floor().clamp(min=1).long().unbind(0))
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0], None


class _Traced(nn.Module):
    """A detector from tensors to tensors, with the score threshold among its inputs."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.detector, self.names = _without_ascent(model), tuple(_outputs(model))
        if type(model.transform) in (GeneralizedRCNNTransform, DetectorTransform):
            self.detector.transform = copy.copy(model.transform)
            self.detector.transform.__class__ = _TracedTransform
        self.training = False

    def forward(self, images: Tensor, score_threshold: Tensor) -> tuple[Tensor, ...]:
        self.detector.roi_heads.score_thresh = score_threshold
        return tuple(found[name] for found in self.detector(list(images.unbind(0))) for name in self.names)


def _trace(model: GeneralizedRCNN, images: Tensor, opset: int) -> bytes:
    suffixes = [""] if len(images) == 1 else [f"_{i}" for i in range(len(images))]
    size, content = {2: "height", 3: "width"}, io.BytesIO()
    names = [(name, suffix) for suffix in suffixes for name in _outputs(model)]
    axes = {name + end: {0: f"detections{end}"} | (size if name == "masks" else {}) for name, end in names}
    # The exporter is deprecated, and warns of each branch that it follows; torchvision's are meant to be followed.
    with torch.no_grad(), warnings.catch_warnings(), _as_export_error(f"{type(model).__name__} cannot be exported"):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Traced(model),
            (images, torch.tensor(0.5)),
            content,  # type: ignore[arg-type]
            input_names=["images", THRESHOLD],
            output_names=list(axes),
            dynamic_axes=axes | {"images": size},
            opset_version=opset,
            dynamo=False,
        )
    return content.getvalue()


def _session(content: bytes) -> Any:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow PyTorch down
    options.log_severity_level = 4  # errors are raised as well
    with _as_export_error("onnxruntime does not accept the graph"):
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _compare(model: GeneralizedRCNN, content: bytes, batch_size: int) -> None:
    """Raise unless onnxruntime and PyTorch detect the same objects in noise of other sizes than the example's."""
    session, side, generator = _session(content), _example_side(model), torch.Generator().manual_seed(0)
    # A stock model derives the same strides from these sizes as from the example.
    for height, width in ((side * 4 // 5 + 1, side + 3), (side + 5, side * 9 // 10)):
        images = torch.rand(batch_size, 3, height, width, generator=generator)
        expected, threshold = _detect(_without_ascent(model), images)
        inputs = {"images": images.numpy(), THRESHOLD: threshold.numpy()}
        with _as_export_error("onnxruntime cannot run the graph"):
            results = map(torch.from_numpy, session.run(None, inputs))
        for wanted in expected:
            same = _same(wanted, dict(zip(_outputs(model), results)), BOX_TOLERANCE * max(height, width))
            for source, found in (("PyTorch", same.any(1)), ("onnxruntime", same.any(0))):
                if found.sum() < MIN_SHARE * len(found):
                    raise ExportError(
                        f"the graph's detections differ from PyTorch's: for an image of {height} x {width}, "
                        f"{int((~found).sum())} of {len(found)} occur only in {source}"
                    )


def _detect(model: GeneralizedRCNN, images: Tensor) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Return detections in noise, and the score threshold. The model's is lowered for it."""
    heads, threshold = model.roi_heads, model.roi_heads.score_thresh
    with torch.no_grad():
        heads.score_thresh = -1.0
        scores = [image["scores"] for image in model(list(images))]
        lowered = min((float(of_image[:MIN_COMPARED][-1]) for of_image in scores if len(of_image)), default=threshold)
        heads.score_thresh = lowered * (1 - 1e-3)
        return model(list(images)), torch.as_tensor(heads.score_thresh)


def _same(wanted: dict[str, Tensor], given: dict[str, Tensor], pixels: float) -> Tensor:
    """Return which detections [L] equal which others [M] within the tolerances. [L, M]"""
    boxes = (wanted["boxes"][:, None] - given["boxes"]).abs().amax(2) <= pixels
    scores = (wanted["scores"][:, None] - given["scores"]).abs() <= SCORE_TOLERANCE
    same = boxes & scores & (wanted["labels"][:, None] == given["labels"])
    for i, j in same.nonzero().tolist():
        one, other = ({name: values[n] for name, values in found.items()} for n, found in ((i, wanted), (j, given)))
        if "masks" in one:  # the IoU of probabilities, so that rounding at 0.5 does not matter
            common, union = (f(one["masks"], other["masks"]).sum() for f in (torch.minimum, torch.maximum))
            same[i, j] &= union - common <= (1 - MIN_MASK_IOU) * union.clamp(min=1)
        if "keypoints" in one:  # all logits, and most keypoints: a heatmap may have several maxima
            near = (one["keypoints"] - other["keypoints"]).abs().amax(1) <= pixels + 1
            logits = (one["keypoints_scores"], other["keypoints_scores"], SCORE_TOLERANCE, SCORE_TOLERANCE)
            same[i, j] &= torch.allclose(*logits) and bool(near.sum() >= MIN_SHARE * len(near))
    return same
