"""Initial weights of a training: from a run, a saved detector, the hub, or a file of a state_dict.

Tensors are loaded if their names and shapes match. The class predictors keep the rows of classes with the same name.
The keypoint predictor is kept if its keypoints have the same names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models.detection import FasterRCNN

from detector.data.categories import mixed_up, quoted, same_names
from detector.data.keypoints import KeypointLayout
from detector.errors import ModelError
from detector.models.config import DetectorConfig
from detector.models.published import COCO_V1_FILES, batch_norm_eps, published_names, set_batch_norm_eps, with_new_names
from detector.models.weights import as_model_error, check_tensors, differences, read_weights
from detector.pretrained.detector import Detector
from detector.pretrained.hub import is_hub_name
from detector.pretrained.loading import CHECKPOINT_KEY, checkpoint_of, detector_of, load_detector
from detector.text import listed

PREDICTOR = "roi_heads.box_predictor."
MASKS = "roi_heads.mask_predictor.mask_fcn_logits."  # the layer of the mask predictor with a row per class
BY_CLASS = (PREDICTOR, MASKS)
KEYPOINTS = "roi_heads.keypoint_predictor."
REFINEMENT = "roi_heads.refinement."
TRUNK, BOX_HEAD = f"{REFINEMENT}head.trunk.", "roi_heads.box_head."  # the trunk is a copy of the box head
CLASSES = f"{PREDICTOR}cls_score.bias"  # one number per class, with the background
MIN_SHARE = 0.5  # fraction of the weights outside the predictors that must fit; otherwise it is another network
# Prefixes that training scripts and torch.compile add to names, and the keys that they save a state_dict under.
PREFIXES = ("", "module.", "model.", "module.model.", "model.module.", "_orig_mod.", "module._orig_mod.")
KEYS = ("state_dict", "model_state_dict", "model", "model_ema")


@dataclass(frozen=True)
class _Source:
    """Weights by torchvision's names, and what is known of their detector, which is ``None`` for a bare state_dict."""

    state: dict[str, Tensor]
    names: list[str] | None  # the class names of labels 1, 2, ...
    eps: dict[str, float]  # see published.batch_norm_eps
    detector: Detector | None = None


def load_initial_weights(
    model: FasterRCNN,
    config: DetectorConfig,
    category_names: Sequence[str] | None = None,
    keypoints: KeypointLayout | None = None,
) -> str:
    """Load the weights that ``config.weights`` names into a detector, in place. Nothing is unpickled.

    Args:
        model: built with ``config``. Tensors that do not fit keep their values.
        config: its ``weights`` are a run folder, a checkpoint, a saved detector, its name on Hugging Face's hub, or a
            file of a state_dict, bare or under "state_dict" or "model".
        category_names: the class names of the model's labels, from 1 on, if known.
        keypoints: the model's keypoints, if known.

    Returns:
        A message about what was loaded, and what was not.

    Raises:
        ModelError: the source is missing or damaged, holds NaN, is another network, or normalises images differently.
    """
    source = _read(config)
    expected, found = _without_counts(model.state_dict()), _without_counts(source.state)
    theirs = source.detector.keypoints if source.detector is not None else None
    if keypoints is not None and theirs is not None and not keypoints.fits(theirs):
        found = {name: value for name, value in found.items() if not name.startswith(KEYPOINTS)}
    body = {name: value for name, value in expected.items() if not name.startswith(BY_CLASS)}
    taken = {name: found[name] for name, value in body.items() if name in found and found[name].shape == value.shape}
    _refuse_another_network(config, source, body, taken)
    _refuse_another_normalisation(model, config, source)
    rows, classes = _class_rows(source, expected, found, category_names)
    by_class = [name for name in expected.keys() & found.keys() if name not in body] if rows else []
    with as_model_error(f"weights of {config.weights}"):
        check_tensors(taken | {name: found[name] for name in by_class}, expected)
    taken |= {n: taken[like] for n in body if n not in taken and (like := n.replace(TRUNK, BOX_HEAD)) in taken}
    for name in by_class:
        taken[name], size = expected[name].clone(), (-1, _rows_per_class(name))
        theirs_by_class = found[name].unflatten(0, size)[list(rows.values())]
        taken[name].unflatten(0, size)[list(rows)] = theirs_by_class.to(taken[name])
    model.load_state_dict(taken, strict=False)
    own_eps = batch_norm_eps(model)
    set_batch_norm_eps(model, {name: value for name, value in source.eps.items() if name in own_eps})
    count = len(taken) - (len(by_class) if len(rows) < len(expected[CLASSES]) else 0)
    notes = [f"weights of {config.weights}: {count} of {len(expected)} tensors", classes]
    if initial := [name for name in expected if name not in taken and not name.startswith(PREDICTOR)]:
        notes.append(f"{len(initial)} do not fit and keep their initial values ({listed(initial)})")
    if unused := [name for name in found if name not in expected]:
        notes.append(f"{len(unused)} of the file are not in the model ({listed(unused)})")
    if source.detector is None and config.name.startswith("timm/"):
        backbone = config.weights_backbone or "null"
        notes.append(f"the file does not say how images are normalised: as for weights_backbone {backbone}")
    return "; ".join(notes)


def _read(config: DetectorConfig) -> _Source:
    given = str(config.weights)
    path = Path(checkpoint_of(given))
    if path.is_file():
        content = read_weights(path, legacy=True)
        if CHECKPOINT_KEY not in content:
            return _bare_source(path, content)
        detector = detector_of(content, path)
    elif path.is_dir() or is_hub_name(path):
        detector = load_detector(given)
    else:
        raise _refusal(config, f"no such file or folder, and no published weights of {config.name}")
    names = detector.category_names if any(i is not None for i in detector.category_ids) else None
    return _Source(detector.model.state_dict(), names, batch_norm_eps(detector.model), detector)


def _bare_source(path: Path, content: dict[str, Any]) -> _Source:
    """Read a state_dict as training scripts save it."""
    content = next((content[key] for key in KEYS if isinstance(content.get(key), dict)), content)
    state = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    backbone = {one: sum(name.startswith(f"{one}backbone.") for name in state) for one in PREFIXES}
    prefix = max(PREFIXES, key=lambda one: (f"{one}{CLASSES}" in state, backbone[one]))
    state = with_new_names({n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)})
    coco = published_names()
    names = coco[1:] if CLASSES in state and state[CLASSES].shape == (len(coco),) else None
    norms = [name.removesuffix(".running_var") for name in state if name.endswith(".running_var")]
    return _Source(state, names, dict.fromkeys(norms, 0.0) if path.name in COCO_V1_FILES else {})


def _without_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the batch norms' counts, which nothing reads and some files lack."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _refuse_another_network(
    config: DetectorConfig, source: _Source, body: dict[str, Tensor], taken: dict[str, Tensor]
) -> None:
    sizes = [sum(v.numel() for name, v in state.items() if not name.startswith(REFINEMENT)) for state in (taken, body)]
    if sizes[0] < MIN_SHARE * sizes[1]:
        wrong = differences({n: v for n, v in source.state.items() if not n.startswith(BY_CLASS)}, body)
        settings = source.detector and source.detector.settings
        network = f"the weights of {settings.name}" if settings else "the weights"
        raise _refusal(config, f"{network} do not fit {config.name}: {wrong[0]}; {len(wrong):,} tensors differ")


def _refuse_another_normalisation(model: FasterRCNN, config: DetectorConfig, source: _Source) -> None:
    """Refuse weights trained with another normalisation of images: they would load, but detect badly."""
    if source.detector is None or source.detector.settings is None:
        return
    transforms: list[Any] = [model.transform, source.detector.model.transform]
    ours, theirs = ([*transform.image_mean, *transform.image_std] for transform in transforms)
    if ours != theirs:
        before, now = (settings.weights_backbone or "null" for settings in (source.detector.settings, config))
        what = f"trained on images normalised as for weights_backbone {before}, and this run has {now}"
        raise _refusal(config, what, f"set {{weights_backbone}} {before} (it is not fetched)")


def _class_rows(
    source: _Source, expected: dict[str, Tensor], found: dict[str, Tensor], category_names: Sequence[str] | None
) -> tuple[dict[int, int], str]:
    """Return which label of the source each label of the model takes its rows from, and a message about it."""
    ours = len(expected[CLASSES]) - 1
    theirs = len(found[CLASSES]) - 1 if CLASSES in found and found[CLASSES].dim() else 0
    by_class = [name for name in expected if name.startswith(PREDICTOR) or (name.startswith(MASKS) and name in found)]
    shapes = {name: (_rows_per_class(name) * (theirs + 1), *expected[name].shape[1:]) for name in by_class}
    if theirs <= 0 or any(name not in found or found[name].shape != shape for name, shape in shapes.items()):
        return {}, f"no class predictor fits: the one for {ours} classes keeps its initial values"
    every = {label: label for label in range(ours + 1)}
    if source.names is not None and category_names is not None:
        if list(source.names) == list(category_names):
            return every, "its classes are the data's"
        places = same_names(category_names, source.names)
        kept = {label: place + 1 for label, place in enumerate(places, start=1) if place is not None}
        if kept or theirs != ours or source.detector is not None:  # otherwise the names are only a guess: COCO's
            names = quoted([category_names[label - 1] for label in kept])
            what = f"kept by name: {names}" if kept else "no class has the name of one of the data's"
            why = mixed_up(category_names, source.names)
            done = "is reordered" if len(kept) == ours == theirs else f"is replaced by one for {ours}"
            return {0: 0} | kept, f"the predictor for its {theirs} classes {done} ({what}{f'; {why}' if why else ''})"
    if theirs == ours:
        return every, f"its {ours} classes, which have no names, are matched to the data's, in order"
    return {}, f"the predictor for its {theirs} classes, which have no names, is replaced by one for {ours}"


def _refusal(config: DetectorConfig, what: str, *hints: str) -> ModelError:
    return ModelError(what, setting="detector.weights", value=config.weights, hints=hints)


def _rows_per_class(name: str) -> int:
    return 4 if "bbox_pred" in name else 1
