"""A trained detector and its categories: out of a checkpoint, or a folder or repository of Hugging Face's hub."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, overload

import safetensors.torch
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import HfHubHTTPError
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d

from detector.coco import read_json
from detector.errors import DataError, ModelError, sentence, shown
from detector.files import write_json, write_whole
from detector.inference import Detections, ImageLike, as_image, of_one_size
from detector.model_card import is_generated, model_card
from detector.models import (
    DetectorConfig,
    batch_norm_eps,
    build_detector,
    load_torchvision_detector,
    load_weights,
    number_of_classes,
    published_names,
    read_weights,
    refuse_narrow,
    saved_settings,
    set_batch_norm_eps,
    settings_of,
)
from detector.names import short
from detector.pooler import MultiScaleAffineCrop
from detector.swap import restore_roi_align, swap_crop_head

CHECKPOINT_KEY = "affine_crop_rcnn"  # of what a training checkpoint holds for this file
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"  # the hub's names

Crop = Literal["affine", "roi_align"]
BATCH_SIZE = 8  # of a list of images, those of one size that follow one another


class PretrainedDetector(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="affine-crop-rcnn",
    pipeline_tag="object-detection",
    tags=["object-detection", "torchvision", "faster-rcnn"],
):
    """A torchvision detector with the categories that its labels stand for, in eval mode.

    ``PretrainedDetector.from_pretrained(folder or hub name)`` and :meth:`save_pretrained` are Hugging Face's, with
    the weights in safetensors; ``push_to_hub`` is inherited. :func:`load_detector` also takes checkpoints.

    Args:
        model: the detector.
        category_ids: of each label, from 1 on; ``None`` where no category belongs to one.
        category_names: likewise.
        settings: what ``model`` was built by, without which it cannot be saved.
    """

    def __init__(
        self,
        model: nn.Module,
        category_ids: Sequence[int | None],
        category_names: Sequence[str],
        *,
        settings: DetectorConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.category_ids, self.category_names = list(category_ids), list(category_names)
        self.settings = settings
        self.eval()

    @property
    def crop(self) -> Crop | None:
        """How its pools crop; ``None`` for a detector without them."""
        heads = getattr(self.model, "roi_heads", None)
        if heads is None:
            return None
        return "affine" if isinstance(heads.box_roi_pool, MultiScaleAffineCrop) else "roi_align"

    def crop_by(self, crop: Crop) -> None:
        """Swap the affine crop in, or out.

        Raises:
            ModelError: the detector has no second stage, or none that can be swapped.
        """
        try:
            (swap_crop_head if crop == "affine" else restore_roi_align)(self.model)
        except TypeError as error:
            raise ModelError(f"--crop {crop}: {error}") from None

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """The detector's own call: images [3, H, W] in 0..1, and for each a dict of boxes, labels and scores."""
        return self.model(images)

    @overload
    def detect(self, image: ImageLike, *, min_score: float = 0.5, max_pixels: int | None = None) -> Detections: ...

    @overload
    def detect(
        self, image: list[Any] | tuple[Any, ...], *, min_score: float = 0.5, max_pixels: int | None = None
    ) -> list[Detections]: ...

    def detect(
        self,
        image: ImageLike | list[Any] | tuple[Any, ...],
        *,
        min_score: float = 0.5,
        max_pixels: int | None = None,
    ) -> Detections | list[Detections]:
        """Find the objects in an image, or in each of a list.

        Args:
            image: a path, a PIL image, an array [H, W, 3] or [H, W], or a tensor [3, H, W] or [1, H, W]; uint8, or
                float in 0..1; RGB. Or a list or tuple of these, of any kinds and sizes; those of one size that follow
                one another are looked at together.
            min_score: detections below it are left out, 0 to 1.
            max_pixels: the most that an image at a path may have; ``None``: Pillow's ``Image.MAX_IMAGE_PIXELS``,
                about 89 million. A large image takes about 40 bytes a pixel.

        Returns:
            What was found, the best first; a notebook draws it. Of a list, or tuple, a list.

        Raises:
            DataError: an image cannot be read or used; says why, and which of a list.
        """
        if not isinstance(image, list | tuple):
            return self._detect([as_image(image, max_pixels=max_pixels)], min_score)[0]
        images = []
        for number, one in enumerate(image):
            try:
                pixels = as_image(one, max_pixels=max_pixels)
                refuse_narrow(self.model, *pixels.shape[1:])
                images.append(pixels)
            except DataError as error:
                raise DataError(f"images[{number}]: {error}") from None
        return self._detect(images, min_score)

    def _detect(self, images: Sequence[Tensor], min_score: float) -> list[Detections]:
        found = [one for batch in of_one_size(images, lambda image: image, BATCH_SIZE) for one in self.look_at(batch)]
        detections = []
        for pixels, one in zip(images, found, strict=True):
            kept = one["scores"] >= min_score
            boxes, labels, scores = (one[name][kept] for name in ("boxes", "labels", "scores"))
            detections.append(Detections(pixels, boxes, labels, scores, self.category_names))
        return detections

    @torch.no_grad()
    def look_at(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Find the objects in images of one size, in eval mode, which is left as it was.

        Args:
            images: [3, H, W] each, uint8, on any device.

        Returns:
            For each, on the CPU: ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels, ``labels`` [L] and ``scores`` [L].

        Raises:
            DataError: they are so narrow that nothing is left of them in the size that the detector sees.
        """
        refuse_narrow(self.model, images[0].shape[1], images[0].shape[2])
        device = next(self.parameters()).device
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            found = self.model([pixels.to(device).float().div_(255) for pixels in images])
        finally:
            for module, mode in modes:
                module.training = mode
        # One-stage detectors have an output for label 0 as well, which is the background.
        return [{name: one[name][one["labels"] > 0].cpu() for name in ("boxes", "labels", "scores")} for one in found]

    def digest(self) -> str:
        """A hash of all weights, by which a report of scores knows them again."""
        return digest_of(self.model.state_dict())

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        model_card_kwargs: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        config: None = None,
        **options: Any,
    ) -> str | None:
        """Write ``model.safetensors``, ``config.json`` and ``README.md``, a model card, to a folder.

        What is there is replaced, each file whole or not at all; but a model card that somebody else wrote stays.

        Args:
            save_directory: the folder; made if it is not there.
            model_card_kwargs: ``report``: the dict of a ``report.json`` of ``tools/eval.py``, whose scores the card
                shows.
            push_to_hub: also to Hugging Face's hub.
            repo_id: the repository there; the folder's name by default.
            config: not used; Hugging Face's ``push_to_hub`` passes it.
            options: of Hugging Face's ``push_to_hub``.

        Returns:
            The address on the hub, if it went there.

        Raises:
            ModelError: the detector was not built from a :class:`~detector.models.DetectorConfig`.
            DataError: the report lacks what the card shows.
            OSError: the files cannot be written.
        """
        if self.settings is None:
            raise ModelError("only detectors that tools/train.py can build can be saved: a Faster R-CNN")
        card = self.generate_model_card(**(model_card_kwargs or {}))
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # Not the mixin's own, which deletes config.json before the rest is written, and leaves old scores in a card.
        self._save_pretrained(folder)
        if is_generated(folder / CARD):
            write_whole(folder / CARD, str(card).encode())
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **options)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        assert self.settings is not None
        weights = {name: value.cpu().contiguous() for name, value in self.model.state_dict().items()}
        write_whole(save_directory / WEIGHTS, safetensors.torch.save(weights))
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.category_names)]
        config = {
            "detector": asdict(self.settings) | {"weights": self.settings.weights and Path(self.settings.weights).name},
            "crop": self.crop,
            "categories": categories,
            "batch_norm_eps": batch_norm_eps(self.model),
            "weights_digest": digest_of(weights),
        }
        write_json(save_directory / CONFIG, config, indent=2)

    def generate_model_card(self, *args: Any, report: dict[str, Any] | None = None, **options: Any) -> ModelCard:
        """The text of ``README.md`` beside the weights."""
        assert self.settings is not None
        return model_card(self._hub_mixin_info.model_card_data, self.settings, self.crop, self.category_names, report)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        map_location: str | torch.device = "cpu",
    ) -> "PretrainedDetector":
        """Load what :meth:`save_pretrained` wrote. Nothing is unpickled.

        Args:
            pretrained_model_name_or_path: the folder, for which no network is tried, or the name of a repository of
                Hugging Face's hub (fetched).
            revision, token, cache_dir, force_download, local_files_only: Hugging Face's, of the fetching.
            map_location: the device to load it to.

        Raises:
            ModelError: there is no such folder and it cannot be fetched, or a file is missing, damaged, or not of a
                detector of this project.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            for name in (CONFIG, WEIGHTS):
                if not (folder / name).is_file():
                    raise ModelError(f"{folder}: not a folder of save_pretrained: it has no {name}")
        else:
            folder = _fetch(
                str(folder),
                local_files_only,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
            )
        try:
            config = read_json(folder / CONFIG)
        except DataError as error:
            raise ModelError(str(error)) from None
        try:
            weights = safetensors.torch.load_file(folder / WEIGHTS)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{folder / WEIGHTS}: cannot be read as weights (cut off?): {short(str(error), 300)}"
            ) from None
        refusal = "not of a detector of this project, or damaged"
        with _refusing(folder / CONFIG, refusal):
            if not isinstance(config, dict):
                raise TypeError(f"it must hold a dict, not a {type(config).__name__}")
            if config["weights_digest"] != digest_of(weights):
                raise ModelError(f"{WEIGHTS} beside it is damaged, or of another detector")
            categories = [(category["id"], category["name"]) for category in config["categories"]]
            detector = _assemble(
                config["detector"], config["crop"], categories, weights, config["batch_norm_eps"], refusal
            )
        return detector.to(map_location)


def _fetch(repository: str, local_files_only: bool, **options: Any) -> Path:
    """The folder of the hub's cache that the files of a repository are fetched to."""
    unreachable = None
    try:
        if not local_files_only:
            try:
                address = hf_hub_url(repository, CONFIG, revision=options["revision"])
                get_hf_file_metadata(address, token=options["token"])
            except (HfHubHTTPError, ValueError):  # it answers, or is not asked: what is wrong is said below
                pass
            except Exception as error:  # of the network; the download would try again for half a minute
                unreachable = error
        local_files_only |= unreachable is not None
        files = [
            hf_hub_download(repository, name, local_files_only=local_files_only, **options)
            for name in (CONFIG, WEIGHTS)
        ]
    except Exception as error:  # of the hub's client, and of what it fetches by
        reason = f"cannot be reached: {sentence(unreachable)}" if unreachable else f"has it not to give: {error}"
        raise ModelError(f"{repository}: no such folder, and the hub {' '.join(reason.split())}") from None
    return Path(files[-1]).parent


@contextmanager
def _refusing(path: Path, refusal: str) -> Iterator[None]:
    """What goes wrong with a file's content, of whatever type, as a :class:`ModelError` that names the file."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except KeyError as error:
        raise ModelError(f"{path}: {refusal}: it has no {error}") from None
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: {refusal}: {sentence(error)}") from None


def load_detector(source: str | Path) -> PretrainedDetector:
    """A trained detector from wherever it is. Nothing is unpickled.

    Args:
        source: a checkpoint of ``tools/train.py`` or the folder of its run (the last one is taken), a folder of
            :meth:`PretrainedDetector.save_pretrained`, or the name of a repository of Hugging Face's hub, "owner/name".

    Raises:
        ModelError: it is not there, damaged, or another program's; says which.
    """
    path = Path(checkpoint_of(source))
    if path.is_dir() and not (path / CONFIG).exists():
        raise ModelError(
            f"{path}: not a folder of save_pretrained: it has no {CONFIG}; nor of a training run: it has no "
            "checkpoints/last.ckpt"
        )
    if path.is_dir() or is_hub_name(path):
        return PretrainedDetector.from_pretrained(source)
    return load_checkpoint(path)


def is_hub_name(path: Path) -> bool:
    """Whether it is no file or folder, and may be "owner/name" on Hugging Face's hub."""
    weights = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
    return not path.exists() and len(path.parts) == 2 and path.suffix not in weights


def checkpoint_of(source: str | Path) -> str:
    """The last checkpoint of a run, if ``source`` is a run's folder; else ``source``."""
    last = Path(source) / "checkpoints" / "last.ckpt"
    return str(last) if last.is_file() and not (Path(source) / CONFIG).exists() else str(source)


def load_checkpoint(path: str | Path) -> PretrainedDetector:
    """Build the detector of a checkpoint of ``tools/train.py`` and load its weights. Nothing is unpickled.

    Raises:
        ModelError: the file is missing, broken, or not such a checkpoint.
    """
    return detector_of(read_weights(path), path)


def detector_of(checkpoint: dict[str, Any], path: str | Path) -> PretrainedDetector:
    """The detector of a checkpoint that was read already, see :func:`load_checkpoint`; ``path`` is for messages."""
    refusal = "not a checkpoint of tools/train.py, or damaged"
    with _refusing(Path(path), refusal):
        saved = checkpoint[CHECKPOINT_KEY]
        if not isinstance(saved, dict):
            raise TypeError(f"{CHECKPOINT_KEY} must be a dict, not a {type(saved).__name__}")
        weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
        categories = list(zip(saved["category_ids"], saved["category_names"], strict=True))
        return _assemble(saved["detector"], saved["crop"], categories, weights, saved["batch_norm_eps"], refusal)


def load_published(name: str, weights: str) -> PretrainedDetector:
    """A torchvision detector by name, with weights.

    Args:
        name: one of :func:`~detector.models.torchvision_detectors`.
        weights: a file of its state_dict, or a name that torchvision publishes ("DEFAULT"; fetched).

    Returns:
        The detector. With 91 classes its categories are COCO's; of others nothing is known but their number: then
        the ids are ``None`` and the names "class 1", "class 2", ...

    Raises:
        ModelError: the name is not known, or the weights cannot be had or are another model's.
    """
    model = load_torchvision_detector(name, weights)
    classes = number_of_classes(name, model.state_dict())
    assert classes is not None
    settings = settings_of(name, model) if isinstance(model, FasterRCNN) and name.startswith("fasterrcnn") else None
    published = published_names()
    if classes == len(published):
        ids = [i if known != "N/A" else None for i, known in enumerate(published)][1:]
        return PretrainedDetector(model, ids, published[1:], settings=settings)
    names = [f"class {label}" for label in range(1, classes)]
    return PretrainedDetector(model, [None] * (classes - 1), names, settings=settings)


def digest_of(weights: dict[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and values."""
    total = hashlib.sha256()
    for name, value in sorted(weights.items()):
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()}"


def _assemble(
    settings: Any, crop: Any, categories: list[tuple[Any, Any]], weights: Any, eps: Any, refusal: str
) -> PretrainedDetector:
    """Build a detector from what a file says, of which nothing is trusted."""
    if crop not in ("affine", "roi_align"):
        raise ModelError(f"{refusal}: crop must be affine or roi_align, got {shown(crop)}")
    for category_id, name in categories:
        if (type(category_id) is not int and category_id is not None) or type(name) is not str:
            got = f"{shown(category_id)} and {shown(name)}"
            raise ModelError(f"{refusal}: a category must have an id and a name, got {got}")
    try:
        config = saved_settings(settings)
    except ModelError as error:
        raise ModelError(f"{refusal}: {error}") from None
    model = load_weights(lambda: build_detector(config, len(categories), pretrained=False), weights, refusal)
    known = batch_norm_eps(model)
    # Earlier versions left out timm's frozen ones, whose eps is that of the builder.
    named = {name for name in known if isinstance(model.get_submodule(name), (nn.BatchNorm2d, FrozenBatchNorm2d))}
    if not isinstance(eps, dict) or not named <= eps.keys() <= known.keys():
        raise ModelError(f"{refusal}: batch_norm_eps does not name the model's batch norms")
    if not all(type(value) in (int, float) and 0 <= value <= 1 for value in eps.values()):
        raise ModelError(f"{refusal}: batch_norm_eps must be numbers from 0 to 1")
    set_batch_norm_eps(model, eps)
    if crop == "affine":
        swap_crop_head(model)
    return PretrainedDetector(
        model, [category_id for category_id, _ in categories], [name for _, name in categories], settings=config
    )
