"""A trained detector with its categories."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, overload

import safetensors.torch
import torch
from torch import Tensor, nn

from detector.data.folder import DataFolder
from detector.data.images import Orientation
from detector.data.keypoints import KeypointLayout
from detector.errors import DataError, ModelError, UserError
from detector.files import write_atomically, write_json
from detector.models.config import DetectorConfig
from detector.models.published import batch_norm_eps
from detector.models.resizing import accept_narrow_images
from detector.models.rle_detections import DetectionDict, detect, select
from detector.overriding import eval_mode
from detector.pretrained.description import Crop, DetectorDescription
from detector.pretrained.detections import Detections
from detector.pretrained.hub import CARD, CONFIG, WEIGHTS, upload
from detector.pretrained.image_tensors import ImageLike, batches_of_one_size, image_tensor
from detector.pretrained.model_card import is_generated, model_card
from detector.pretrained.onnx_export import export_onnx
from detector.rcnn.pooler import MultiScaleAffineCrop
from detector.rcnn.swap import restore_roi_align, swap_crop_head
from detector.refinement.attach import refinement_of
from detector.refinement.head import Refinement

if TYPE_CHECKING:
    from detector.evaluation.scoring import Evaluation

ImageList = list[Any] | tuple[Any, ...]
BATCH_SIZE = 8  # maximum number of images that detect() runs together


class Detector(nn.Module):
    """A trained torchvision detector with its categories, in eval mode.

    Boxes are (x1, y1, x2, y2) in pixels of the image. Labels count from 1; 0 is the background.
    :func:`~detector.load_detector` loads one.

    Args:
        model: the network. A transform of torchvision's own class is changed to accept images of any shape.
        category_ids: the category id of each label; ``None`` for a label without a category.
        category_names: the category name of each label.
        settings: the settings that ``model`` was built with. Without them it cannot be saved.
        keypoints: the layout of the keypoints, if the detector finds any.
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
        accept_narrow_images(model)
        self.model = model
        self.category_ids, self.category_names = list(category_ids), list(category_names)
        self.settings, self.keypoints = settings, keypoints
        self.eval()

    @classmethod
    def from_description(cls, description: DetectorDescription, weights: Any) -> "Detector":
        """Build the detector of a file. Raises :class:`ModelError` if the weights do not fit the description."""
        ids, names, settings = description.category_ids, description.category_names, description.settings
        return cls(description.build(weights), ids, names, settings=settings, keypoints=description.keypoints)

    @property
    def crop(self) -> Crop | None:
        """The crop of the box head, "affine" or "roi_align"; ``None`` for a detector without a second stage."""
        pool = getattr(getattr(self.model, "roi_heads", None), "box_roi_pool", None)
        return None if pool is None else "affine" if isinstance(pool, MultiScaleAffineCrop) else "roi_align"

    @property
    def refinement(self) -> Refinement | None:
        """The refinement of the boxes, or ``None``. ``refinement.enabled = False`` switches it off."""
        return refinement_of(self.model)

    def crop_by(self, crop: Crop) -> None:
        """Swap the affine crop in ("affine") or out ("roi_align"). Raises :class:`ModelError` if that is impossible."""
        try:
            (swap_crop_head if crop == "affine" else restore_roi_align)(self.model)
        except (TypeError, ValueError) as error:
            raise ModelError(str(error), setting="crop", value=crop) from None

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Run the network on images [3, H, W] in 0..1. Returns torchvision's dict for each image."""
        return self.model(images)

    @overload
    def detect(
        self, image: ImageLike, *, min_score: float = ..., orientation: Orientation = ..., max_pixels: int | None = ...
    ) -> Detections: ...

    @overload
    def detect(
        self, image: ImageList, *, min_score: float = ..., orientation: Orientation = ..., max_pixels: int | None = ...
    ) -> list[Detections]: ...

    def detect(
        self,
        image: ImageLike | ImageList,
        *,
        min_score: float = 0.5,
        orientation: Orientation = "upright",
        max_pixels: int | None = None,
    ) -> Detections | list[Detections]:
        """Detect the objects in an image, or in each image of a list.

        Args:
            image: a path, a PIL image, an RGB array [H, W, 3] or [H, W], or an RGB tensor [3, H, W] or [1, H, W].
                Arrays and tensors are uint8, or float in 0..1. A list or tuple may mix kinds and sizes.
            min_score: minimum score of a detection, 0 to 1.
            orientation: "upright" applies the EXIF orientation of paths and PIL images; "stored" ignores it.
            max_pixels: maximum number of pixels of an image at a path; ``None``: Pillow's ``Image.MAX_IMAGE_PIXELS``.
                An image takes about 40 bytes of memory per pixel.

        Returns:
            The detections, best first; a list of them for a list or tuple.

        Raises:
            DataError: an image cannot be read or used.
            ModelError: the weights are not float32.
            ValueError: min_score is not in 0..1.
        """
        several = isinstance(image, list | tuple)
        images: list[Tensor] = []
        for one in image if isinstance(image, list | tuple) else [image]:
            try:
                images.append(image_tensor(one, orientation=orientation, max_pixels=max_pixels))
            except DataError as error:
                raise DataError(f"images[{len(images)}]: {error}" if several else str(error)) from None
        batches = batches_of_one_size(images, lambda pixels: pixels, BATCH_SIZE)
        found = (one for batch in batches for one in self.detect_batch(batch))
        detections = [self.named(pixels, one, min_score) for pixels, one in zip(images, found, strict=True)]
        return detections if several else detections[0]

    def named(self, pixels: Tensor, found: DetectionDict, min_score: float | Sequence[float]) -> Detections:
        """Return an image's detections with the names of their classes.

        Args:
            pixels: [3, H, W], uint8.
            found: one output of :meth:`detect_batch`.
            min_score: minimum score of a detection; one for all labels, or one for each.

        Raises:
            ValueError: a minimum score is not in 0..1.
        """
        least = torch.tensor(min_score, dtype=torch.float64).expand(len(self.category_names))
        if not ((least >= 0) & (least <= 1)).all():
            raise ValueError(f"min_score must be from 0 to 1, got {min_score}")
        shown = select(found, found["scores"].double() >= least[found["labels"] - 1])
        return Detections(pixels, category_names=self.category_names, layout=self.keypoints, **shown)

    @torch.no_grad()
    def detect_batch(self, images: Sequence[Tensor]) -> list[DetectionDict]:
        """Detect the objects in images of one size, in eval mode. The mode of each module is restored afterwards.

        Args:
            images: [3, H, W] each, uint8, on any device.

        Returns:
            torchvision's dict for each image, on the CPU: ``boxes`` [L, 4], ``labels`` [L] and ``scores`` [L]. A Mask
            R-CNN adds ``segmentations`` (L RLE), a Keypoint R-CNN ``keypoints`` [L, K, 3] and ``keypoints_scores``
            [L, K].

        Raises:
            ModelError: the weights are not float32. Boxes in 16 bits would be off by whole pixels.
        """
        for name, value in self.model.named_parameters():
            if value.is_floating_point() and value.dtype != torch.float32:
                raise ModelError(f"{name} is {value.dtype}; detect needs float32: call detector.float() first")
        device = next(self.parameters()).device
        with eval_mode(self):
            found = detect(self.model, [pixels.to(device).float().div_(255) for pixels in images])
        on_cpu = [{n: v.cpu() if isinstance(v, Tensor) else v for n, v in one.items()} for one in found]
        return [select(one, one["labels"] > 0) for one in on_cpu]  # one-stage detectors also return the background

    def evaluate(
        self, root: str | Path, split: str, *, output: str | Path | None = None, **options: Any
    ) -> "Evaluation":
        """Score the detector on a split of a data set, see ``tools/eval.py`` for other layouts of folders.

        Args:
            root: the folder of the data set, with ``annotations/instances_SPLIT.json`` and the images in ``SPLIT/``.
            split: the name of the split.
            output: a folder to write the report to; ``None``: nothing is written.
            options: see :class:`~detector.evaluation.running.EvaluationOptions`.

        Raises:
            DataError: an image cannot be read. The images before it are scored, and written if there is ``output``.
            KeyboardInterrupt: likewise, after Ctrl-C.
        """
        from detector.evaluation.running import EvaluationOptions
        from detector.evaluation.scoring import evaluate_detector, split_for

        settings = EvaluationOptions(**{"device": next(self.parameters()).device} | options)
        names = {"model": type(self.model).__name__, "root": str(root), "split_name": split}
        data = split_for(self, DataFolder(Path(root)), split, skip_missing=settings.skip_broken)
        evaluation = evaluate_detector(self, data, settings, **names)
        if evaluation is None:
            raise UserError("only the first process has the evaluation: use tools/eval.py with torchrun")
        if output is not None:
            evaluation.write(Path(output))
        if evaluation.stopped is not None:
            raise evaluation.stopped
        return evaluation

    def export(self, path: str | Path, **options: Any) -> list[str]:
        """Write the detector to an ONNX file with :func:`~detector.pretrained.onnx_export.export_onnx`."""
        classes = list(zip(self.category_names, self.category_ids, strict=True))
        return export_onnx(self.model, path, classes=classes, **options)

    def digest(self) -> str:
        """Return a hash of all weights, which links a report of scores to its detector."""
        return digest_of(self.model.state_dict())

    def describe(self) -> DetectorDescription:
        """Return the description that is stored beside the weights.

        Raises:
            ModelError: the detector was not built from a :class:`~detector.models.config.DetectorConfig`.
        """
        if self.settings is None or self.crop is None:
            raise ModelError("only detectors that tools/train.py can build can be saved: torchvision's R-CNNs")
        # The name of the weights' folder is private.
        settings = replace(self.settings, weights=self.settings.weights and Path(self.settings.weights).name)
        refinement = self.refinement.config if self.refinement is not None else None
        categories, eps = (self.category_ids, self.category_names), batch_norm_eps(self.model)
        return DetectorDescription(settings, self.crop, *categories, eps, refinement, self.keypoints)

    def save(self, folder: str | Path, *, report: dict[str, Any] | None = None) -> None:
        """Write ``model.safetensors``, ``config.json`` and a model card, ``README.md``, atomically.

        Existing files are replaced, except an edited model card.

        Args:
            folder: created if it does not exist.
            report: the content of a ``report.json`` of ``tools/eval.py``, whose scores the card shows.

        Raises:
            ModelError: see :meth:`describe`.
            DataError: the report lacks what the card shows.
            OSError: a file cannot be written.
        """
        description = self.describe()
        card = model_card(description, report)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.cpu().contiguous() for name, value in self.model.state_dict().items()}
        write_atomically(folder / WEIGHTS, safetensors.torch.save(weights))
        write_json(folder / CONFIG, description.to_dict() | {"weights_digest": digest_of(weights)}, indent=2)
        if is_generated(folder / CARD):
            write_atomically(folder / CARD, str(card).encode())

    def push_to_hub(self, repository: str, *, report: dict[str, Any] | None = None, **options: Any) -> str:
        """Upload the files of :meth:`save` to Hugging Face's hub, and return their address.

        Args:
            repository: "owner/name", created if it does not exist.
            report: see :meth:`save`.
            options: see ``huggingface_hub.create_repo``, such as ``private`` and ``token``.
        """
        with TemporaryDirectory() as folder:
            self.save(folder, report=report)
            return upload(repository, folder, **options)


def digest_of(weights: dict[str, Tensor]) -> str:
    """Return a hash of the names, dtypes, shapes and values of tensors."""
    total = hashlib.sha256()
    for name, value in sorted(weights.items()):
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()}"
