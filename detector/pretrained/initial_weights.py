"""The weights of a whole detector that a training starts from: out of a run, a saved folder or a file of a state_dict.

What fits by name and shape is taken. Of the class predictor that is the rows of the classes with the same name, and the
predictor of keypoints is taken if they are of the same names.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
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
MASKS = "roi_heads.mask_predictor.mask_fcn_logits."  # the layer of the mask predictor that has rows of classes
BY_CLASS = (PREDICTOR, MASKS)
KEYPOINTS = "roi_heads.keypoint_predictor."
REFINEMENT = "roi_heads.refinement."
TRUNK = re.compile(rf"{re.escape(REFINEMENT)}head\.trunk\.(.*)")  # copies of the box head
CLASSES = f"{PREDICTOR}cls_score.bias"  # of as many rows as there are classes, with the background
LEAST = 0.5  # of the numbers outside of the predictor that must fit: less is another network
# What training scripts, and torch.compile, put before each name.
WRAPPERS = ("", "module.", "model.", "module.model.", "model.module.", "_orig_mod.", "module._orig_mod.")


@dataclass(frozen=True)
class _Source:
    """Weights, and what is known of the detector that they are of.

    Args:
        state: by torchvision's names.
        names: of the classes of labels 1, 2, ...; ``None`` if nothing says them.
        eps: see :func:`~detector.models.published.batch_norm_eps`.
        detector: that was built from its own settings, ``None`` of a bare state_dict.
    """

    state: dict[str, Tensor]
    names: list[str] | None = None
    eps: dict[str, float] = field(default_factory=dict)
    detector: Detector | None = None


def load_initial_weights(
    model: FasterRCNN,
    config: DetectorConfig,
    category_names: Sequence[str] | None = None,
    keypoints: KeypointLayout | None = None,
) -> str:
    """Load the weights that ``config.weights`` names into a detector, in place. Nothing is unpickled.

    Args:
        model: built by ``config``, with random weights: what does not fit stays as it is.
        config: whose ``weights`` are a run's folder, a checkpoint, a folder of save_pretrained or its name on Hugging
            Face's hub, or a file of a state_dict, bare or under "state_dict" or "model".
        category_names: the names of the model's labels, from 1 on, by which the predictor's rows are taken over.
        keypoints: the model's keypoints, if it finds any and they are known.

    Returns:
        A sentence: what was loaded, and what was not.

    Raises:
        ModelError: the file or folder is not there or damaged, holds NaN, is of another network, or of a detector
            that normalises images in another way.
    """
    given = str(config.weights)
    source = _read(given, config)
    called = f"weights of {given}"
    expected, found = _without_counts(model.state_dict()), _without_counts(source.state)
    body = {name: value for name, value in expected.items() if not name.startswith(BY_CLASS)}
    theirs = source.detector.keypoints if source.detector is not None else None
    if keypoints is not None and theirs is not None and not keypoints.fits(theirs):
        found = {name: value for name, value in found.items() if not name.startswith(KEYPOINTS)}
    taken = {name: found[name] for name, value in body.items() if name in found and found[name].shape == value.shape}
    with as_model_error(called):
        taken_of_body, whole_body = (_numbers(part) for part in (taken, body))
        if taken_of_body < LEAST * whole_body:
            rest = {name: value for name, value in found.items() if not name.startswith(BY_CLASS)}
            settings = source.detector and source.detector.settings
            of = f"are of {settings.name} and " if settings else ""
            raise ModelError(f"they {of}do not fit {config.name}: {'; '.join(_first(differences(rest, body)))}")
        _refuse_another_normalisation(model, config, source)
        classes, rows = _rows(source, expected, found, category_names)
        predictor = [name for name in expected if name not in body and (name in found or name.startswith(PREDICTOR))]
        predictor = predictor if rows else []
        check_tensors(taken | {name: found[name] for name in predictor}, expected)
    for name in body.keys() - taken.keys():  # the head of a refinement begins as the box head
        if (part := TRUNK.fullmatch(name)) and (like := f"roi_heads.box_head.{part[1]}") in taken:
            taken[name] = taken[like]
    changed = {name: _with_rows(name, expected[name], found[name], rows) for name in predictor}
    model.load_state_dict(taken | changed, strict=False)
    eps = batch_norm_eps(model)
    set_batch_norm_eps(model, {name: value for name, value in source.eps.items() if name in eps})
    whole = len(predictor) if len(rows) == len(expected[CLASSES]) else 0
    parts = [f"{called}: {len(taken) + whole} of {len(expected)} tensors", classes]
    anew = [name for name in expected if name not in taken | changed and not name.startswith(PREDICTOR)]
    left = [name for name in found if name not in expected]
    parts += [f"{len(anew)} that do not fit begin anew ({listed(anew)})"] if anew else []
    parts += [f"{len(left)} of the file have no place in the model ({listed(left)})"] if left else []
    if source.detector is None and config.name.startswith("timm/"):
        flag = f"--model.detector.weights_backbone {config.weights_backbone or 'null'}"
        parts.append(f"the file does not say how images are normalised: they are by {flag}")
    return "; ".join(parts)


def _read(given: str, config: DetectorConfig) -> _Source:
    """The weights, wherever they are."""
    path = Path(checkpoint_of(given))
    if path.is_file():
        content = read_weights(path, legacy=True)
        if CHECKPOINT_KEY not in content:
            return _bare(path, content)
        return _known(detector_of(content, path))
    if path.is_dir() or is_hub_name(path):
        return _known(load_detector(given))
    if config.name.startswith("timm/"):
        others = "nobody publishes whole timm detectors"
    else:
        others = f"torchvision publishes none of that name for {config.name}"
    raise ModelError(f"weights: {given!r}: no such file or folder, and {others}")


def _known(detector: Detector) -> _Source:
    named = any(category is not None for category in detector.category_ids)
    names = detector.category_names if named else None
    return _Source(detector.model.state_dict(), names, batch_norm_eps(detector.model), detector)


def _bare(path: Path, content: dict[str, Any]) -> _Source:
    """A state_dict as any training script may have saved it."""
    for key in ("state_dict", "model_state_dict", "model", "model_ema"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    wrapper = next((one for one in WRAPPERS if f"{one}{CLASSES}" in state), None)
    if wrapper is None:
        wrapper = max(WRAPPERS, key=lambda one: sum(name.startswith(f"{one}backbone.") for name in state))
    state = {name.removeprefix(wrapper): value for name, value in state.items() if name.startswith(wrapper)}
    state = with_new_names(state)
    coco = published_names()
    names = coco[1:] if CLASSES in state and state[CLASSES].shape == (len(coco),) else None
    if path.name in COCO_V1_FILES:  # which torchvision runs with an eps of 0
        norms = [name.removesuffix(".running_var") for name in state if name.endswith(".running_var")]
        return _Source(state, names, dict.fromkeys(norms, 0.0))
    return _Source(state, names)


def _numbers(state: dict[str, Tensor]) -> int:
    """How many there are of the network, without a refinement of its boxes."""
    return sum(value.numel() for name, value in state.items() if not name.startswith(REFINEMENT))


def _first(lines: list[str], most: int = 3) -> list[str]:
    return lines[:most] + ([f"and {len(lines) - most:,} more"] if len(lines) > most else [])


def _without_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the numbers of batches, which older files lack and nothing reads."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _refuse_another_normalisation(model: FasterRCNN, config: DetectorConfig, source: _Source) -> None:
    """A network sees other colours than those it was trained on, and nothing would say so."""
    if source.detector is None or source.detector.settings is None:
        return
    transforms: list[Any] = [model.transform, source.detector.model.transform]
    ours, theirs = ([*transform.image_mean, *transform.image_std] for transform in transforms)
    if ours != theirs:
        before = source.detector.settings.weights_backbone or "null"
        raise ModelError(
            f"they were trained on images normalised as weights_backbone {before} has it, this run has "
            f"{config.weights_backbone or 'null'}: add --model.detector.weights_backbone {before} (nothing of it is "
            "loaded)"
        )


def _rows(
    source: _Source, expected: dict[str, Tensor], found: dict[str, Tensor], category_names: Sequence[str] | None
) -> tuple[str, dict[int, int]]:
    """What is said of the classes, and for each label of the model's the source's that is taken over, background too.

    That is all of them, some, or none.
    """
    ours = len(expected[CLASSES]) - 1
    theirs = len(found[CLASSES]) - 1 if CLASSES in found and found[CLASSES].dim() else 0
    fits = theirs > 0 and all(
        name in found and found[name].shape == (_rows_of_a_class(name) * (theirs + 1), *value.shape[1:])
        for name, value in expected.items()
        if name.startswith(PREDICTOR) or (name.startswith(MASKS) and name in found)
    )
    if not fits:
        return f"it has no class predictor that fits: that of {ours} classes begins anew", {}
    all_of_them = {label: label for label in range(ours + 1)}
    if source.names is not None and category_names is not None:
        if list(source.names) == list(category_names):
            return "its classes are the data's", all_of_them
        places = same_names(category_names, source.names)
        kept = {label: place + 1 for label, place in enumerate(places, start=1) if place is not None}
        if kept or theirs != ours or source.detector is not None:  # else the number alone suggested COCO's names
            names = [category_names[label - 1] for label in kept]
            what = f"kept by name: {quoted(names)}" if kept else "none has the name of one of the data's"
            if why := mixed_up(category_names, source.names):
                what = f"{what}; {why}"
            begins = "is put in the data's order" if len(kept) == ours == theirs else f"begins anew for {ours}"
            return f"the predictor of its {theirs} classes {begins} ({what})", {0: 0} | kept
    if theirs == ours:
        return f"its {ours} classes are taken for the data's, in order: it does not name them", all_of_them
    return f"the predictor of its {theirs} classes, which it does not name, begins anew for {ours}", {}


def _rows_of_a_class(name: str) -> int:
    return 4 if "bbox_pred" in name else 1  # of the predictor's tensor of that name


def _with_rows(name: str, mine: Tensor, theirs: Tensor, rows: dict[int, int]) -> Tensor:
    """A tensor of the predictor with the rows of some classes of theirs."""
    changed, by_class = mine.clone(), (-1, _rows_of_a_class(name))
    changed.unflatten(0, by_class)[list(rows)] = theirs.unflatten(0, by_class)[list(rows.values())].to(mine)
    return changed
