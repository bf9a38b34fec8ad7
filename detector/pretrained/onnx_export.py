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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
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

from detector.crop.pyramid import MultiScaleAffineCrop
from detector.errors import UserError
from detector.files import write_atomically
from detector.models.resizing import DetectorTransform
from detector.models.rle_detections import annotation_types_of
from detector.overriding import overridden
from detector.refinement.attach import refinement_of
from detector.text import short

OPSETS = range(16, 21)  # GridSample needs 16; torch's exporter ends at 20
OUTPUTS = {  # for an image, by what the detector finds
    "boxes": {"boxes": "(x1, y1, x2, y2) in pixels", "labels": "1 is the first class", "scores": "best first"},
    "masks": {"masks": "probabilities, per pixel of the image"},
    "keypoints": {"keypoints": "(x, y, 1) in pixels", "keypoints_scores": "logits"},
}
# Tolerances of the comparison with PyTorch. They admit the rounding errors of deep networks with random weights.
BOX_TOLERANCE = 3e-4  # times the longer side of the image
SCORE_TOLERANCE = 2e-3
MIN_MASK_IOU = 0.9  # pasting rounds boxes to whole pixels
MIN_SHARE = 0.9  # of detections with a counterpart: rounding may move a score across a threshold
MIN_COMPARED = 15  # detections per image, if there are as many: the score threshold is lowered for them


class ExportError(UserError, RuntimeError):
    """A detector cannot be exported, or its graph is wrong."""


@dataclass(frozen=True)
class OnnxExport:
    """The outcome of an export."""

    compared: bool  # with PyTorch, which needs onnxruntime
    left_out: str | None  # a message about what the graph lacks


@dataclass(frozen=True)
class Times:
    """Median seconds of a call."""

    size: tuple[int, int]  # height and width of the images
    pytorch: float
    onnxruntime: float


def export_onnx(
    model: GeneralizedRCNN,
    path: str | Path,
    *,
    batch_size: int = 1,
    opset: int = 18,
    classes: Sequence[tuple[str, int | None]] = (),
) -> OnnxExport:
    """Write a Faster, Mask or Keypoint R-CNN to an ONNX file, in an atomic write. The model is not changed.

    The graph takes ``images`` [batch_size, 3, height, width], float32, RGB in 0..1, of any height and width, and
    normalises and resizes them. It returns ``boxes`` [L, 4] float32 (x1, y1, x2, y2) in pixels of the image, ``labels``
    [L] int64 (from 1 on) and ``scores`` [L] float32, best first. A Mask R-CNN adds ``masks`` [L, 1, height, width]
    float32, probabilities; a Keypoint R-CNN adds ``keypoints`` [L, K, 3] float32 (x, y, 1) in pixels and
    ``keypoints_scores`` [L, K] float32, logits. For several images the names are ``boxes_0``, ``labels_0``, and so on.

    A swapped model crops with GridSample, a stock one with RoiAlign. The gradient ascent of a refinement is left out,
    as graphs have no gradients. With onnxruntime installed the graph is compared with PyTorch on noise.

    Args:
        model: swapped or stock, in eval mode, on the CPU, in float32. A stock model that has never run takes its
            strides from the traced example, a square.
        path: the file to write.
        batch_size: number of images per call, all of one size.
        opset: version of ONNX's operators, 16 to 20.
        classes: the name and the category id of each label, stored in the file's metadata under "classes".

    Raises:
        ExportError: a package is missing, the model cannot be exported, or the graph is wrong.
        ValueError: ``batch_size``, ``opset`` or ``classes`` is invalid.
        OSError: the file cannot be written.
    """
    onnx = _import("onnx")
    _check_model(model)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if opset not in OPSETS:
        raise ValueError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    metadata, side = _metadata(model, classes), _example_side(model)
    compared = importlib.util.find_spec("onnxruntime") is not None
    with _without_ascent(model) as left_out:
        graph = onnx.load_from_string(_trace(model, torch.rand(batch_size, 3, side, side), opset))
        onnx.helper.set_model_props(graph, metadata)
        try:
            onnx.checker.check_model(graph)
        except onnx.checker.ValidationError as error:
            raise ExportError(f"the exported graph is not valid: {error}") from None
        if compared:
            _compare(model, graph.SerializeToString(), side, batch_size)
    for name, threshold in _thresholds(model).items():  # the inputs of the comparison become constants
        (given,) = (value for value in graph.graph.input if value.name == name)
        graph.graph.input.remove(given)
        graph.graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor(threshold).numpy(), name))
    write_atomically(Path(path), graph.SerializeToString())
    return OnnxExport(compared, left_out)


def compare_speed(model: GeneralizedRCNN, path: str | Path, repeats: int = 10) -> Times:
    """Time an exported file and its model in turns, on the same noise and with the same number of threads.

    Raises:
        ExportError: onnxruntime is missing, or cannot run the file.
    """
    session = _session(Path(path).read_bytes())
    size = (_example_side(model),) * 2
    images = torch.rand(session.get_inputs()[0].shape[0], 3, *size, generator=torch.Generator().manual_seed(0))
    seconds: list[tuple[float, float]] = []
    with torch.inference_mode(), _without_ascent(model):
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(list(images))
            middle = time.perf_counter()
            session.run(None, {"images": images.numpy()})
            seconds.append((middle - start, time.perf_counter() - middle))
    pytorch, onnxruntime = map(median, zip(*seconds[1:]))  # the first calls allocate
    return Times(size, pytorch, onnxruntime)


def _outputs(model: nn.Module) -> dict[str, str]:
    """Return the names of the outputs for an image, in order, and their meaning."""
    return {name: held for kind in ("boxes", *annotation_types_of(model)) for name, held in OUTPUTS[kind].items()}


def _example_side(model: GeneralizedRCNN) -> int:
    return min(model.transform.min_size[-1], model.transform.max_size)


@contextmanager
def _without_ascent(model: nn.Module) -> Iterator[str | None]:
    """Switch gradient ascent off, and yield a message if it was on."""
    refinement = refinement_of(model)
    if refinement is None or not refinement.enabled or not refinement.config.ascent_steps:
        yield None
        return
    with overridden(refinement, config=replace(refinement.config, ascent_steps=0)):
        yield "The graph refines boxes without the gradient ascent, which needs gradients."


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
    """A detector from tensors to tensors, with the score thresholds among its inputs."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        # Shallow copies with a few other attributes. They share modules and weights with the model.
        self.detector = copy.copy(model)
        self.detector._modules = dict(model._modules)
        self.detector.roi_heads = heads = copy.copy(model.roi_heads)
        self.refinement = None
        if (refinement := refinement_of(model)) is not None:
            heads._modules = dict(heads._modules)
            heads.refinement = self.refinement = copy.copy(refinement)
        if type(model.transform) in (GeneralizedRCNNTransform, DetectorTransform):
            self.detector.transform = copy.copy(model.transform)
            self.detector.transform.__class__ = _TracedTransform
        self.names = tuple(_outputs(model))
        self.training = False

    def forward(
        self, images: Tensor, score_threshold: Tensor, refinement_threshold: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        self.detector.roi_heads.score_thresh = score_threshold
        if self.refinement is not None and refinement_threshold is not None:
            self.refinement.score_threshold = refinement_threshold
        return tuple(found[name] for found in self.detector(list(images.unbind(0))) for name in self.names)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"the package {name} is missing ({error}): pip install 'affine-crop-rcnn[export]'") from None


def _check_model(model: nn.Module) -> None:
    heads = getattr(model, "roi_heads", None)
    if not isinstance(model, GeneralizedRCNN) or not isinstance(heads, RoIHeads):
        raise ExportError(f"{type(model).__name__} cannot be exported: it must be one of torchvision's R-CNNs")
    if model.training:
        raise ExportError("the model must be in eval mode: call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            where = f"{tensor.dtype} on {tensor.device}"
            raise ExportError(f"{name} is {where}, not float32 on the CPU: call model.float().cpu() first")
    pools = {kind: getattr(heads, f"{kind}_roi_pool") for kind in ("box", "mask", "keypoint")}
    refinement = refinement_of(model)
    if refinement is not None and refinement.enabled:
        pools["refinement"] = refinement.pool
    for name, pool in pools.items():
        if isinstance(pool, MultiScaleAffineCrop) and pool.sampling_ratio <= 0:
            raise ExportError(f"the {name} pool needs a fixed sampling_ratio above 0, got {pool.sampling_ratio}")


def _metadata(model: GeneralizedRCNN, classes: Sequence[tuple[str, int | None]]) -> dict[str, str]:
    count = getattr(getattr(model.roi_heads.box_predictor, "cls_score", None), "out_features", None)
    if classes and count is not None and len(classes) != count - 1:
        raise ValueError(f"classes must be {count - 1}, without the background, got {len(classes)}")
    images = {"name": "images", "dtype": "float32", "layout": "NCHW", "colors": "RGB", "range": [0, 1], "size": "any"}
    labelled = [{"label": i, "name": name, "category_id": c} for i, (name, c) in enumerate(classes, start=1)]
    metadata = {
        "input": images | {"size": "any; resized in the graph"},
        "outputs": _outputs(model),
        "classes": labelled,
    }
    return {name: json.dumps(value) for name, value in metadata.items()}


def _trace(model: GeneralizedRCNN, images: Tensor, opset: int) -> bytes:
    suffixes = [""] if len(images) == 1 else [f"_{i}" for i in range(len(images))]
    axes = {name + suffix: {0: f"detections{suffix}"} for suffix in suffixes for name in _outputs(model)}
    size = {2: "height", 3: "width"}
    for name in axes:
        if name.startswith("masks"):
            axes[name] |= size
    content, thresholds = io.BytesIO(), list(_thresholds(model))
    # The exporter is deprecated, and warns of each branch that it follows; torchvision's are meant to be followed.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                _Traced(model),
                (images, *(torch.tensor(0.5) for _ in thresholds)),
                content,  # type: ignore[arg-type]
                input_names=["images", *thresholds],
                output_names=list(axes),
                dynamic_axes=axes | {"images": size},
                opset_version=opset,
                dynamo=False,
            )
        except Exception as error:  # the exporter and the model raise many types
            raise ExportError(f"{type(model).__name__} cannot be exported to ONNX: {short(str(error), 300)}") from error
    return content.getvalue()


def _session(content: bytes) -> Any:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow PyTorch down
    options.log_severity_level = 4  # errors are raised as well
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base class
        raise ExportError(f"onnxruntime does not accept the graph: {short(str(error), 300)}") from None


def _compare(model: GeneralizedRCNN, content: bytes, side: int, batch_size: int) -> None:
    """Raise unless onnxruntime and PyTorch detect the same objects in noise of other sizes than the example's."""
    session = _session(content)
    generator, names = torch.Generator().manual_seed(0), tuple(_outputs(model))
    # A stock model derives the same strides from these sizes as from the example.
    for height, width in ((side * 4 // 5 + 1, side + 3), (side + 5, side * 9 // 10)):
        images = torch.rand(batch_size, 3, height, width, generator=generator)
        expected, thresholds = _detect(model, images)
        try:
            results = session.run(None, {"images": images.numpy(), **thresholds})
        except Exception as error:  # onnxruntime's errors have no base class
            raise ExportError(f"onnxruntime cannot run the graph: {short(str(error), 300)}") from None
        for i, wanted in enumerate(expected):
            given = dict(zip(names, (torch.from_numpy(result) for result in results[len(names) * i :])))
            same = _same(wanted, given, BOX_TOLERANCE * max(height, width))
            for source, found in (("PyTorch", same.any(1)), ("onnxruntime", same.any(0))):
                if found.sum() < MIN_SHARE * len(found):
                    raise ExportError(
                        f"the graph's detections differ from PyTorch's: for an image of {height} x {width}, "
                        f"{int((~found).sum())} of {len(found)} are {source}'s alone"
                    )


def _same(wanted: dict[str, Tensor], given: dict[str, Tensor], pixels: float) -> Tensor:
    """Return which detections [L] equal which others [M] within the tolerances. [L, M]"""
    boxes = (wanted["boxes"][:, None] - given["boxes"]).abs().amax(2) <= pixels
    scores = (wanted["scores"][:, None] - given["scores"]).abs() <= SCORE_TOLERANCE
    same = boxes & scores & (wanted["labels"][:, None] == given["labels"])
    for i, j in same.nonzero().tolist():
        if "masks" in wanted:
            same[i, j] &= _same_mask(wanted["masks"][i], given["masks"][j])
        if "keypoints" in wanted:
            points, logits = ((wanted[name][i], given[name][j]) for name in OUTPUTS["keypoints"])
            same[i, j] &= _same_keypoints(*points, *logits, pixels)
    return same


def _same_mask(wanted: Tensor, given: Tensor) -> bool:
    """Compare masks [1, H, W] by the IoU of their probabilities, so that rounding at 0.5 does not matter."""
    intersection, union = torch.minimum(wanted, given).sum(), torch.maximum(wanted, given).sum()
    return bool(union - intersection <= (1 - MIN_MASK_IOU) * union.clamp(min=1))


def _same_keypoints(wanted: Tensor, given: Tensor, logits: Tensor, given_logits: Tensor, pixels: float) -> bool:
    """Compare all logits [K] of two detections, and most keypoints [K, 3]: a heatmap may have several maxima."""
    close = (logits - given_logits).abs() <= SCORE_TOLERANCE * logits.abs().clamp(min=1)
    near = (wanted - given).abs().amax(1) <= pixels + 1
    return bool(close.all()) and int(near.sum()) >= MIN_SHARE * len(near)


def _detect(model: GeneralizedRCNN, images: Tensor) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Return PyTorch's detections, all of them refined, and thresholds low enough to have some in noise."""
    heads, refinement = model.roi_heads, refinement_of(model)
    refining = nullcontext() if refinement is None else overridden(refinement, score_threshold=0.0)
    with torch.no_grad(), refining, overridden(heads, score_thresh=-1.0):
        scores = [image["scores"] for image in model(list(images))]
        if all(len(of_image) for of_image in scores):
            heads.score_thresh = min(float(of_image[:MIN_COMPARED][-1]) for of_image in scores) * (1 - 1e-3)
        return model(list(images)), {name: torch.tensor(value).numpy() for name, value in _thresholds(model).items()}


def _thresholds(model: GeneralizedRCNN) -> dict[str, float]:
    """Return the model's score thresholds, which are inputs of the graph until it has been compared."""
    refinement = refinement_of(model)
    thresholds = {"score_threshold": float(model.roi_heads.score_thresh)}
    if refinement is not None and refinement.enabled:
        thresholds["refinement_threshold"] = float(refinement.score_threshold)
    return thresholds
