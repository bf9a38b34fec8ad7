"""A whole detector as one ONNX file of standard operators, checked against PyTorch before it is written.

``torch.onnx.export(dynamo=False)`` traces the detector. The newer exporter (``dynamo=True``), and ``torch.export``, do
not get through torchvision's own code: ``batched_nms`` asks whether there are any boxes ("Could not guard on
data-dependent expression Eq(4*u1, 0)", torch 2.14). The crop alone goes through both.
"""

import copy
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

OPSETS = range(16, 21)  # GridSample came with 16; torch's exporter ends at 20
# The outputs of an image, by what finds them, and what they hold.
OUTPUTS = {
    "boxes": {
        "boxes": "(x1, y1, x2, y2) in pixels of the image",
        "labels": "1 is the first class",
        "scores": "best first",
    },
    "masks": {"masks": "probabilities of the object's pixels, in pixels of the image"},
    "keypoints": {
        "keypoints": "(x, y, 1) in pixels of the image",
        "keypoints_scores": "of the heatmap at the keypoint, a logit",
    },
}
# How far onnxruntime may be from PyTorch: in pixels for each pixel of the image's longer side, and in scores. Deep
# models of random weights are a tenth of it apart, as PyTorch's float32 is from its float64; a wrong graph is more.
BOX_TOLERANCE, SCORE_TOLERANCE = 3e-4, 2e-3
# The share of detections that must be the same: rounding puts one now and then on the other side of a threshold.
SHARE = 0.9
COMPARED = 15  # detections, at least, of each image that are compared: the score threshold is set for them
# The least IoU of two masks that are the same: pasting rounds a box to whole pixels, and may round it to the next one.
MASK_IOU = 0.9


@dataclass(frozen=True)
class OnnxExport:
    """The outcome of an export.

    Args:
        compared: whether onnxruntime was installed, and the graph compared with PyTorch.
        left_out: what the graph lacks of the detector, as a sentence; ``None`` if it lacks nothing.
    """

    compared: bool
    left_out: str | None


class ExportError(UserError, RuntimeError):
    """Why a detector cannot be exported, or what is wrong with the file that came of it."""


def export_onnx(
    model: GeneralizedRCNN,
    path: str | Path,
    *,
    batch_size: int = 1,
    example_size: tuple[int, int] | None = None,
    opset: int = 18,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int | None] | None = None,
) -> OnnxExport:
    """Write a Faster, Mask or Keypoint R-CNN as one ONNX file, in an atomic write. The model is left as it is.

    The graph takes ``images`` [batch_size, 3, height, width], float32, RGB in 0..1, of any height and width; it
    normalises and resizes them itself. It gives ``boxes`` [L, 4] float32 (x1, y1, x2, y2) in pixels of the image,
    ``labels`` [L] int64 (1 is the first class) and ``scores`` [L] float32, best first; L may be 0. Of a Mask R-CNN
    there are also ``masks`` [L, 1, height, width] float32, probabilities, in pixels of the image; of a Keypoint R-CNN
    ``keypoints`` [L, K, 3] float32 (x, y, 1) in pixels of the image, and ``keypoints_scores`` [L, K] float32, logits.
    With a batch of several images their names are ``boxes_0``, ``labels_0``, ``scores_0``, ``boxes_1`` and so on.

    A swapped model crops by GridSample, whatever its sampler, a stock one by RoiAlign; masks are pasted into the image,
    and keypoints sought in their heatmaps, one detection after the other, by Loop. Before the file is written the
    graph is checked: it is valid, and, where onnxruntime is installed, finds what PyTorch does in noise of another size
    than the example's: boxes, masks and keypoints.

    A refinement is in the graph, if it is enabled: its iterations and the rescoring. Masks and keypoints are those of
    the refined boxes. Gradient ascent needs gradients, which no graph has, so it is left out.

    Args:
        model: swapped or stock, in eval mode, on the CPU, in float32.
        path: the file to write.
        batch_size: images in a call, all of one size.
        example_size: height and width of the image that the model is traced with, by default a square of the size
            that the model resizes images to. A stock model that has not run yet takes its strides from it for good,
            as torchvision's models do from the first image that they see.
        opset: version of ONNX's operators, 16 to 20.
        class_names: of labels 1, 2, ...; kept with the category ids in the file's metadata, under "classes", a JSON
            list of objects with "label", "name" and "category_id".
        category_ids: of labels 1, 2, ..., in the data set; ``None`` for one that has none.

    Returns:
        Whether the graph was compared, and what it lacks.

    Raises:
        ExportError: a package is missing, the model is not an R-CNN that can be exported, or the graph is wrong.
        ValueError: ``batch_size``, ``example_size``, ``opset``, ``class_names`` or ``category_ids`` do not fit.
        OSError: the file cannot be written.
    """
    onnx = _package("onnx")
    _check_model(model)
    side = min(model.transform.min_size[-1], model.transform.max_size)
    height, width = example_size or (side, side)
    if batch_size < 1 or height < 1 or width < 1:
        raise ValueError(f"batch_size and example_size must be at least 1, got {batch_size} and {(height, width)}")
    if opset not in OPSETS:
        raise ValueError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    metadata = _metadata(model, class_names, category_ids)

    with _as_in_a_graph(model):
        graph = onnx.load_from_string(_trace(model, torch.rand(batch_size, 3, height, width), opset))
    onnx.helper.set_model_props(graph, metadata)
    try:
        onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid: {error}") from None
    compared = importlib.util.find_spec("onnxruntime") is not None
    if compared:
        with _as_in_a_graph(model):
            _compare(model, graph.SerializeToString(), side, batch_size)
    for name, threshold in _thresholds(model).items():
        _fix_threshold(graph, name, threshold)
    write_atomically(Path(path), graph.SerializeToString())
    return OnnxExport(compared, left_out(model))


def fields_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a graph's outputs for an image, in order; those of a batch have ``_0``, ``_1``, ... appended."""
    return tuple(_outputs(model))


def _outputs(model: nn.Module) -> dict[str, str]:
    """What the outputs hold, by their names."""
    return {name: held for part in ("boxes", *annotation_types_of(model)) for name, held in OUTPUTS[part].items()}


def left_out(model: nn.Module) -> str | None:
    """Return what the graph lacks of a detector's refinement, as a sentence; ``None`` if it lacks nothing."""
    refinement = refinement_of(model)
    if refinement is None or not refinement.enabled or not refinement.config.ascent_steps:
        return None
    return "The graph has the refinement iterations, but not the gradient ascent, which needs gradients"


@contextmanager
def _as_in_a_graph(model: nn.Module) -> Iterator[None]:
    """Within, a refinement does no more than its graph does."""
    refinement = refinement_of(model)
    if refinement is None:
        yield
        return
    with overridden(refinement, config=replace(refinement.config, ascent_steps=0)):
        yield


def compare_speed(
    model: GeneralizedRCNN, path: str | Path, size: tuple[int, int], repeats: int = 10
) -> dict[str, float]:
    """Time an exported file beside its model, on the same noise and with as many threads, in turns.

    Args:
        model: as :func:`export_onnx` takes it.
        path: what it wrote.
        size: height and width of the images.
        repeats: of each; both run once more before.

    Returns:
        The median seconds of a call, "pytorch" and "onnxruntime", without gradient ascent, and "ratio",
        onnxruntime's over PyTorch's.

    Raises:
        ExportError: onnxruntime is missing, or cannot run the file.
    """
    session = _session(Path(path).read_bytes())
    images = torch.rand(session.get_inputs()[0].shape[0], 3, *size, generator=torch.Generator().manual_seed(0))
    listed, fed = list(images), {"images": images.numpy()}
    seconds: dict[str, list[float]] = {"pytorch": [], "onnxruntime": []}
    with torch.inference_mode(), _as_in_a_graph(model):
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(listed)
            middle = time.perf_counter()
            session.run(None, fed)
            seconds["pytorch"].append(middle - start)
            seconds["onnxruntime"].append(time.perf_counter() - middle)
    medians = {name: median(taken[1:]) for name, taken in seconds.items()}  # the first call of each allocates
    return {**medians, "ratio": medians["onnxruntime"] / medians["pytorch"]}


class _TracedTransform(GeneralizedRCNNTransform):
    """torchvision's transform, which traced works out the resized size in float32: one pixel off for one in seven."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, None]:
        if self.fixed_size is not None:
            size = [self.fixed_size[1], self.fixed_size[0]]
        else:
            sides = shape_as_tensor(image)[-2:].double()
            # Of one dimension: what has none the exporter makes float32. And no numbers, for one over a tensor is
            # traced as a product with the reciprocal, which rounds once more.
            shortest, longest = (sides.new_full((1,), n) for n in (self.min_size[-1], self.max_size))
            scale = torch.minimum(shortest / sides.amin(0, keepdim=True), longest / sides.amax(0, keepdim=True))
            size = list((sides * scale).floor().clamp(min=1).long().unbind(0))
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0], None


class _Traced(nn.Module):
    """A detector with tensors for arguments and results, the score thresholds among them."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        # Copies that share all modules and weights, to change a few attributes of.
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
        self.fields = fields_of(model)
        self.training = False

    def forward(
        self, images: Tensor, score_threshold: Tensor, refinement_threshold: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        self.detector.roi_heads.score_thresh = score_threshold
        if self.refinement is not None and refinement_threshold is not None:
            self.refinement.score_threshold = refinement_threshold
        return tuple(found[field] for found in self.detector(list(images.unbind(0))) for field in self.fields)


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ExportError(
            f'export needs the package {name} ({error}): pip install "affine-crop-rcnn[export]"'
        ) from None


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, GeneralizedRCNN) or not isinstance(getattr(model, "roi_heads", None), RoIHeads):
        raise ExportError(f"{type(model).__name__} cannot be exported: it must be one of torchvision's R-CNNs")
    if model.training:
        raise ExportError("the model must be in eval mode to be exported: call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ExportError(
                f"the model must be on the CPU in float32 to be exported, {name} is {tensor.dtype} on {tensor.device}: "
                "call model.float().cpu() first"
            )
    refinement = refinement_of(model)
    heads = model.roi_heads
    pools = {
        "the RoI pool": heads.box_roi_pool,
        "the masks' RoI pool": heads.mask_roi_pool,
        "the keypoints' RoI pool": heads.keypoint_roi_pool,
    }
    if refinement is not None and refinement.enabled:
        pools["the refinement"] = refinement.pool
    for name, pool in pools.items():
        if not isinstance(pool, MultiScaleAffineCrop):
            continue
        if pool.sampling_ratio <= 0:
            raise ExportError(
                f"{name} takes a number of samples that goes with the box (sampling_ratio 0 or less), which no graph "
                "can; one with a fixed sampling_ratio, as torchvision's builders set, can be exported"
            )


def _metadata(
    model: GeneralizedRCNN, class_names: Sequence[str] | None, category_ids: Sequence[int | None] | None
) -> dict[str, str]:
    count = getattr(getattr(model.roi_heads.box_predictor, "cls_score", None), "out_features", None)
    for name, given in (("class_names", class_names), ("category_ids", category_ids)):
        if given is not None and count is not None and len(given) != count - 1:
            raise ValueError(f"{name} must be {count - 1}, one for each class without the background, got {len(given)}")
    known: dict[str, Sequence[Any] | None] = {"name": class_names, "category_id": category_ids}
    classes = [
        {"label": i + 1} | {name: values[i] for name, values in known.items() if values is not None}
        for i in range(len(class_names or category_ids or ()))
    ]
    inputs = {"name": "images", "dtype": "float32", "layout": "NCHW", "colors": "RGB", "range": [0, 1]}
    metadata: dict[str, Any] = {
        "input": inputs | {"size": "any; normalised and resized in the graph"},
        "outputs": _outputs(model),
        "classes": classes,
    }
    return {name: json.dumps(value) for name, value in metadata.items()}


def _trace(model: GeneralizedRCNN, images: Tensor, opset: int) -> bytes:
    suffixes = [""] if len(images) == 1 else [f"_{i}" for i in range(len(images))]
    axes = {field + suffix: {0: f"detections{suffix}"} for suffix in suffixes for field in fields_of(model)}
    size = {2: "height", 3: "width"}
    for name in axes:
        if name.startswith("masks"):
            axes[name] |= size
    content = io.BytesIO()
    thresholds = list(_thresholds(model))
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
        except Exception as error:  # it raises what it likes, and so does the model's own code
            raise ExportError(f"{type(model).__name__} cannot be exported to ONNX: {_first_line(error)}") from error
    return content.getvalue()


def _session(content: bytes) -> Any:
    onnxruntime = _package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its idle threads would slow PyTorch's
    options.log_severity_level = 4  # what goes wrong is raised as well
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no base class for its errors
        raise ExportError(f"onnxruntime does not take the graph: {_first_line(error)}") from None


def _compare(model: GeneralizedRCNN, content: bytes, side: int, batch_size: int) -> None:
    """Raise unless onnxruntime and PyTorch detect the same in noise of other sizes than the example's."""
    session = _session(content)
    generator, fields = torch.Generator().manual_seed(0), fields_of(model)
    # Sizes for which a stock model tells its strides as for a square.
    for height, width in ((side * 4 // 5 + 1, side + 3), (side + 5, side * 9 // 10)):
        images = torch.rand(batch_size, 3, height, width, generator=generator)
        expected, thresholds = _detect(model, images)
        try:
            results = session.run(None, {"images": images.numpy(), **thresholds})
        except Exception as error:  # onnxruntime has no base class for its errors
            raise ExportError(f"onnxruntime cannot run the graph: {_first_line(error)}") from None
        for i, wanted in enumerate(expected):
            given = dict(zip(fields, (torch.from_numpy(r) for r in results[len(fields) * i :])))
            same = _same(wanted, given, BOX_TOLERANCE * max(height, width))
            for side_of, found in (("PyTorch", same.any(1)), ("onnxruntime", same.any(0))):
                if found.sum() < SHARE * len(found):
                    raise ExportError(
                        f"onnxruntime does not detect what PyTorch does: for an image of {height} x {width}, "
                        f"{int((~found).sum())} of {len(found)} detections are {side_of}'s alone"
                    )


def _same(wanted: dict[str, Tensor], given: dict[str, Tensor], pixels: float) -> Tensor:
    """Which detections [L] are which of the others [M]: label, box, score, mask and keypoints. [L, M]"""
    boxes = (wanted["boxes"][:, None] - given["boxes"]).abs().amax(2) <= pixels
    scores = (wanted["scores"][:, None] - given["scores"]).abs() <= SCORE_TOLERANCE
    same = boxes & scores & (wanted["labels"][:, None] == given["labels"])
    for i, j in same.nonzero().tolist():
        one, other = ({name: values[k] for name, values in found.items()} for found, k in ((wanted, i), (given, j)))
        if "masks" in one:
            same[i, j] &= _same_mask(one["masks"], other["masks"])
        if "keypoints" in one:
            same[i, j] &= _same_keypoints(one, other, pixels)
    return same


def _same_mask(wanted: Tensor, given: Tensor) -> bool:
    """Whether two masks [1, H, W] are the same: their IoU, not of 0 and 1 but of probabilities, for which no pixel lies
    by rounding on the other side of 0.5, and a mask below it is not as good as none. Less than one pixel is none.
    """
    common, either = torch.minimum(wanted, given).sum(), torch.maximum(wanted, given).sum()
    return bool(either - common <= (1 - MASK_IOU) * either.clamp(min=1))


def _same_keypoints(wanted: dict[str, Tensor], given: dict[str, Tensor], pixels: float) -> bool:
    """Whether the keypoints of two detections are as high, and nearly all in the same place.

    Of two pixels of a heatmap that are as high as one another either may be taken: most often its neighbour.
    """
    heights = (wanted["keypoints_scores"] - given["keypoints_scores"]).abs()
    places = (wanted["keypoints"] - given["keypoints"]).abs().amax(1) <= pixels + 1
    alike = bool((heights <= SCORE_TOLERANCE * wanted["keypoints_scores"].abs().clamp(min=1)).all())
    return alike and int(places.sum()) >= SHARE * len(places)


def _detect(model: GeneralizedRCNN, images: Tensor) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """PyTorch's detections, all refined, and thresholds by which each image has some: noise has few objects."""
    heads, refinement = model.roi_heads, refinement_of(model)
    before = heads.score_thresh
    refining = nullcontext() if refinement is None else overridden(refinement, score_threshold=0.0)
    try:
        with torch.no_grad(), refining:
            heads.score_thresh = -1.0
            scores = [image["scores"] for image in model(list(images))]
            if all(len(of_image) for of_image in scores):
                heads.score_thresh = min(float(of_image[:COMPARED][-1]) for of_image in scores) * (1 - 1e-3)
            given = _thresholds(model)
            return model(list(images)), {name: torch.tensor(value).numpy() for name, value in given.items()}
    finally:
        heads.score_thresh = before


def _thresholds(model: GeneralizedRCNN) -> dict[str, float]:
    """Those that are inputs of a graph until it is compared, by name, as the model has them."""
    refinement = refinement_of(model)
    thresholds = {"score_threshold": float(model.roi_heads.score_thresh)}
    if refinement is not None and refinement.enabled:
        thresholds["refinement_threshold"] = float(refinement.score_threshold)
    return thresholds


def _fix_threshold(graph: Any, name: str, threshold: float) -> None:
    """Turn the input of that name into the constant that it is to the model."""
    onnx = _package("onnx")
    (given,) = (value for value in graph.graph.input if value.name == name)
    graph.graph.input.remove(given)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor(threshold).numpy(), given.name))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
