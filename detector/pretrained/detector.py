"""A trained detector and its categories, saved to and loaded from a folder or repository of Hugging Face's hub."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import safetensors.torch
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from detector.crop.pyramid import MultiScaleAffineCrop
from detector.data.images import Orientation
from detector.data.keypoints import KeypointLayout
from detector.errors import DataError, ModelError
from detector.files import read_json, write_atomically, write_json
from detector.models.config import DetectorConfig
from detector.models.detecting import Found, detect, kept
from detector.models.narrow_images import take_narrow_images
from detector.models.published import batch_norm_eps
from detector.models.weights import refusing
from detector.pretrained.description import Crop, DetectorDescription
from detector.pretrained.detections import Detections
from detector.pretrained.hub import CARD, CONFIG, WEIGHTS, fetch
from detector.pretrained.image_tensors import ImageLike, batches_of_one_size, image_tensor
from detector.pretrained.model_card import is_generated, model_card
from detector.rcnn.swap import restore_roi_align, swap_crop_head
from detector.refinement.attach import refinement_of
from detector.refinement.head import Refinement
from detector.text import short

FIELDS = ("boxes", "labels", "scores", "segmentations", "keypoints", "keypoints_scores")  # of what is found in an image
BATCH_SIZE = 8  # of a list of images, those of one size that follow one another


class Detector(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="affine-crop-rcnn",
    pipeline_tag="object-detection",
    tags=["object-detection", "torchvision"],
):
    """A torchvision detector with the categories that its labels stand for, in eval mode.

    ``Detector.from_pretrained(folder or hub name)`` and :meth:`save_pretrained` are Hugging Face's, with
    the weights in safetensors; ``push_to_hub`` is inherited. :func:`~detector.pretrained.load_detector` also takes
    checkpoints.

    Args:
        model: the detector. Its transform, if it is torchvision's own, is made to take images of any shape.
        category_ids: of each label, from 1 on; ``None`` where no category belongs to one.
        category_names: likewise.
        settings: what ``model`` was built by, without which it cannot be saved.
        keypoints: the layout of the keypoints that it finds, if it finds any.
    """

    def __init__(
        self,
        model: nn.Module,
        category_ids: Sequence[int | None],
        category_names: Sequence[str],
        *,
        settings: DetectorConfig | None = None,
        keypoints: KeypointLayout | None = None,
    ) -> None:
        super().__init__()
        take_narrow_images(model)
        self.model = model
        self.category_ids, self.category_names = list(category_ids), list(category_names)
        self.settings = settings
        self.keypoints = keypoints
        self.eval()

    @classmethod
    def described_by(cls, description: DetectorDescription, weights: Any) -> "Detector":
        """The detector of a file's description and weights. Raises :class:`ModelError` if they do not fit."""
        ids, names = description.category_ids, description.category_names
        keypoints = description.keypoints
        return cls(description.build(weights), ids, names, settings=description.settings, keypoints=keypoints)

    @property
    def crop(self) -> Crop | None:
        """How its pools crop; ``None`` for a detector without them."""
        heads = getattr(self.model, "roi_heads", None)
        if heads is None:
            return None
        return "affine" if isinstance(heads.box_roi_pool, MultiScaleAffineCrop) else "roi_align"

    @property
    def refinement(self) -> Refinement | None:
        """That of its boxes, ``None`` if it has none.

        ``refinement.enabled = False`` leaves the boxes as they were, until it is ``True`` again; a detector that was
        loaded has it on.
        """
        return refinement_of(self.model)

    def crop_by(self, crop: Crop) -> None:
        """Swap the affine crop in, or out.

        Raises:
            ModelError: the detector has no second stage, or none that can be swapped, or restored.
        """
        try:
            (swap_crop_head if crop == "affine" else restore_roi_align)(self.model)
        except (TypeError, ValueError) as error:
            raise ModelError(f"crop {crop}: {error}") from None

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """The detector's own call: images [3, H, W] in 0..1, and for each a dict of boxes, labels and scores."""
        return self.model(images)

    @overload
    def detect(
        self,
        image: ImageLike,
        *,
        min_score: float = 0.5,
        orientation: Orientation = "upright",
        max_pixels: int | None = None,
    ) -> Detections: ...

    @overload
    def detect(
        self,
        image: list[Any] | tuple[Any, ...],
        *,
        min_score: float = 0.5,
        orientation: Orientation = "upright",
        max_pixels: int | None = None,
    ) -> list[Detections]: ...

    def detect(
        self,
        image: ImageLike | list[Any] | tuple[Any, ...],
        *,
        min_score: float = 0.5,
        orientation: Orientation = "upright",
        max_pixels: int | None = None,
    ) -> Detections | list[Detections]:
        """Find the objects in an image, or in each of a list.

        Args:
            image: a path, a PIL image, an array [H, W, 3] or [H, W], or a tensor [3, H, W] or [1, H, W]; uint8, or
                float in 0..1; RGB. Or a list or tuple of these, of any kinds and sizes; neighbours of one size go
                through the detector together.
            min_score: detections below it are left out, 0 to 1.
            orientation: "stored": images at paths and PIL images are not turned upright by their EXIF orientation, for
                a detector that was trained so.
            max_pixels: the most that an image at a path may have; ``None``: Pillow's ``Image.MAX_IMAGE_PIXELS``,
                about 89 million. A large image takes about 40 bytes a pixel.

        Returns:
            What was found, the best first; a notebook draws it. Of a list, or tuple, a list.

        Raises:
            DataError: an image cannot be read or used; says why, and which of a list.
            ModelError: the weights are not float32.
        """
        several = isinstance(image, list | tuple)
        images: list[Tensor] = []
        for one in image if isinstance(image, list | tuple) else [image]:
            try:
                images.append(image_tensor(one, orientation=orientation, max_pixels=max_pixels))
            except DataError as error:
                raise DataError(f"images[{len(images)}]: {error}" if several else str(error)) from None
        batches = batches_of_one_size(images, lambda pixels: pixels, BATCH_SIZE)
        found = [one for batch in batches for one in self.detect_batch(batch)]
        detections = []
        for pixels, one in zip(images, found, strict=True):
            shown = kept(one, one["scores"] >= min_score)
            boxes, labels, scores = (shown[name] for name in ("boxes", "labels", "scores"))
            parts = {name: shown.get(name) for name in FIELDS[3:]}
            detections.append(
                Detections(pixels, boxes, labels, scores, self.category_names, layout=self.keypoints, **parts)
            )
        return detections if several else detections[0]

    @torch.no_grad()
    def detect_batch(self, images: Sequence[Tensor]) -> list[Found]:
        """Find the objects in images of one size, in eval mode; afterwards each module has the mode that it had.

        Args:
            images: [3, H, W] each, uint8, on any device.

        Returns:
            For each, on the CPU: ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels, ``labels`` [L] and ``scores`` [L]; of a
            Mask R-CNN ``segmentations``, L RLE, of a Keypoint R-CNN ``keypoints`` [L, K, 3], in pixels, and
            ``keypoints_scores`` [L, K].

        Raises:
            ModelError: the weights are not float32.
        """
        self._refuse_other_floats()
        device = next(self.parameters()).device
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            found = detect(self.model, [pixels.to(device).float().div_(255) for pixels in images])
        finally:
            for module, mode in modes:
                module.training = mode
        # One-stage detectors have an output for label 0 as well, which is the background.
        found = [kept({name: one[name] for name in FIELDS if name in one}, one["labels"] > 0) for one in found]
        return [{n: v.cpu() if isinstance(v, Tensor) else v for n, v in one.items()} for one in found]

    def _refuse_other_floats(self) -> None:
        """Images are float32, and so must be the weights. Boxes of 16 bits would be off by whole pixels."""
        for name, value in self.model.named_parameters():
            if value.is_floating_point() and value.dtype != torch.float32:
                kind = str(value.dtype).removeprefix("torch.")
                raise ModelError(
                    f"the detector's weights are {kind} ({name}); detect needs float32: call detector.float() first"
                )

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

        What is there is replaced, each file in an atomic write; but a model card that somebody else wrote stays.

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
            ModelError: the detector was not built from a :class:`~detector.models.config.DetectorConfig`.
            DataError: the report lacks what the card shows.
            OSError: the files cannot be written.
        """
        if self.settings is None or self.crop is None:
            raise ModelError("only detectors that tools/train.py can build can be saved: torchvision's R-CNNs")
        card = self.generate_model_card(**(model_card_kwargs or {}))
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.cpu().contiguous() for name, value in self.model.state_dict().items()}
        # Where the weights came from is nobody's business: the name is kept, the folder is not.
        settings = replace(self.settings, weights=self.settings.weights and Path(self.settings.weights).name)
        description = DetectorDescription(
            settings,
            self.crop,
            self.category_ids,
            self.category_names,
            batch_norm_eps(self.model),
            None if self.refinement is None else self.refinement.config,
            self.keypoints,
        )
        # Not the mixin's own, which deletes config.json before the rest is written, and leaves old scores in a card.
        write_atomically(folder / WEIGHTS, safetensors.torch.save(weights))
        write_json(folder / CONFIG, description.to_dict() | {"weights_digest": digest_of(weights)}, indent=2)
        if is_generated(folder / CARD):
            write_atomically(folder / CARD, str(card).encode())
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **options)
        return None

    def generate_model_card(self, *args: Any, report: dict[str, Any] | None = None, **options: Any) -> ModelCard:
        """The text of ``README.md`` beside the weights."""
        assert self.settings is not None
        return model_card(
            self._hub_mixin_info.model_card_data,
            self.settings,
            self.crop,
            self.category_names,
            report,
            refinement=None if self.refinement is None else self.refinement.config,
            keypoints=self.keypoints,
        )

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
    ) -> "Detector":
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
            fetching = {"revision": revision, "token": token, "cache_dir": cache_dir, "force_download": force_download}
            folder = fetch(str(folder), local_files_only, **fetching)
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
        with refusing(f"{folder / CONFIG}: not of a detector of this project, or damaged"):
            description = DetectorDescription.from_dict(config)
            if config["weights_digest"] != digest_of(weights):
                raise ModelError(f"{WEIGHTS} beside it is damaged, or of another detector")
            detector = cls.described_by(description, weights)
        return detector.to(map_location)


def digest_of(weights: dict[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and values."""
    total = hashlib.sha256()
    for name, value in sorted(weights.items()):
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()}"
