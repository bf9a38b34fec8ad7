"""Images a second of one reading process, from JPEGs of COCO's sizes to what training takes, stage by stage.

    python .github/assets/coco_sized.py FOLDER --images 400 --val_images 8
    python .github/assets/loader_stages.py FOLDER

Each image is flipped at random and resized to 800 pixels, 1333 at most. Beside it, in turns in the same run: the
transforms of torchvision's references/detection ("multiscale" with one size and "hflip"), with Pillow's images and with
tensors, written here from their description. One thread; medians of the rounds, and their range.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from detector.data.dataset import CocoDetection, as_float
from detector.data.folder import DataFolder
from detector.data.images import read_image
from detector.data.loading import collate

ROUNDS, IMAGES = 5, 160


class Reference(Dataset[Any]):
    """The images and boxes of a data set, read and transformed as torchvision's references do."""

    def __init__(self, data: CocoDetection, *, tensors: bool) -> None:
        first = [v2.PILToTensor()] if tensors else []
        last = [] if tensors else [v2.PILToTensor()]
        augment = [v2.RandomShortestSize([800], 1333), v2.RandomHorizontalFlip()]
        end = [v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
        self.transform = v2.Compose([*first, *augment, *last, *end])
        self.files = data.files()
        self.targets = [(target["boxes"], target["labels"]) for _, target in (data[i] for i in range(len(data)))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        image = Image.open(self.files[index]).convert("RGB")
        boxes, labels = self.targets[index]
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width))
        return self.transform(image, {"boxes": boxes, "labels": labels})


def each(function: Callable[[Any], Any], items: Iterable[Any]) -> float:
    """Milliseconds an item."""
    items = list(items)
    start = time.perf_counter()
    for item in items:
        function(item)
    return 1000 * (time.perf_counter() - start) / len(items)


def loaded(data: Dataset[Any]) -> float:
    """Milliseconds an image with one worker, from its second batch on."""
    loader = iter(DataLoader(data, batch_size=2, num_workers=1, collate_fn=collate))
    next(loader)
    start, images = time.perf_counter(), 0
    for batch, _ in loader:
        images += len(batch)
    return 1000 * (time.perf_counter() - start) / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="what coco_sized.py wrote")
    root = parser.parse_args().root
    torch.set_num_threads(1)
    flip, resize = v2.RandomHorizontalFlip(), v2.RandomShortestSize([800], 1333, antialias=False)
    data = DataFolder(root).dataset("train2017")
    data.keep(data.image_ids[:IMAGES])
    references = {name: Reference(data, tensors=name == "tensors") for name in ("Pillow", "tensors")}
    data.transform = v2.Compose([flip, resize])
    compact = data.as_bytes()
    files = data.files()
    pixels = [tv_tensors.Image(read_image(file)) for file in files[:32]]
    resized = [resize(one) for one in pixels]
    stages = {
        "decode": lambda: each(read_image, files),
        "flip": lambda: each(flip, pixels),
        "resize": lambda: each(resize, pixels),
        "to float": lambda: each(as_float, resized),
        "an item, float": lambda: each(data.__getitem__, range(IMAGES)),
        "an item, bytes": lambda: each(compact.__getitem__, range(IMAGES)),
        "one worker, float": lambda: loaded(data),
        "one worker, bytes (as training reads)": lambda: loaded(compact),
    }
    for name, reference in references.items():
        stages[f"references, {name}: an item"] = lambda one=reference: each(one.__getitem__, range(IMAGES))
        stages[f"references, {name}: one worker"] = lambda one=reference: loaded(one)
    times: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(ROUNDS):
        for name, stage in stages.items():
            times[name].append(stage())
    print("| stage | ms an image | images a second |\n|---|---|---|")
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle:.2f} ({min(found):.2f} to {max(found):.2f}) | {1000 / middle:.0f} |")


if __name__ == "__main__":
    main()
