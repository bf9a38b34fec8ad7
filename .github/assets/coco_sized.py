"""Write a data set of COCO 2017's size: its numbers of images, objects and classes, with made-up boxes and polygons.

    python .github/assets/coco_sized.py FOLDER
    python .github/assets/coco_sized.py FOLDER --images 1000 --val_images 200

FOLDER gets ``annotations/instances_{train,val}2017.json``, ``train2017/`` and ``val2017/``, in COCO's own layout. The
image files are hard links to eight JPEGs of COCO's usual sizes, cut from scikit-learn's two photographs. It takes a
minute, and 700 MB.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

SIZES = ((640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (640, 360), (612, 612), (375, 500))
# COCO 2017's own numbers: images and annotations.
SPLITS = {"train2017": (118_287, 860_001), "val2017": (5_000, 36_781)}
CROWDS, EMPTY = 0.012, 0.009  # the share of crowds among annotations, and of images without any
POINTS = 25  # of a polygon, on average


def write_images(folder: Path, count: int, jpegs: list[Path]) -> list[str]:
    """Link the image files of a split, and return their entries."""
    folder.mkdir(parents=True)
    entries = []
    for number in range(count):
        (width, height), image_id = SIZES[number % len(SIZES)], 5 * number + 9
        name = f"{image_id:012}.jpg"
        os.link(jpegs[number % len(SIZES)], folder / name)
        entries.append(
            f'{{"license":3,"file_name":"{name}","coco_url":"http://images.cocodataset.org/{folder.name}/{name}",'
            f'"height":{height},"width":{width},"date_captured":"2013-11-14 17:02:52","id":{image_id}}}'
        )
    return entries


def polygon(random: np.random.Generator, box: np.ndarray) -> str:
    """An outline within a box."""
    x, y, w, h = box
    angle = np.sort(random.uniform(0, 2 * np.pi, random.integers(6, 2 * POINTS)))
    radius = random.uniform(0.3, 0.5, len(angle))
    points = np.stack([x + w / 2 + w * radius * np.cos(angle), y + h / 2 + h * radius * np.sin(angle)], axis=1)
    return ",".join(map(str, points.round(2).ravel().tolist()))


def write_annotations(file: Path, entries: list[str], count: int, random: np.random.Generator) -> None:
    """Write the annotation file of a split, with the annotations in no order, as in COCO's own."""
    images = len(entries)
    with_objects = random.permutation(images)[: max(round(images * (1 - EMPTY)), 1)]
    of_image = random.choice(with_objects, count)
    categories = [(i, name) for i, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])]
    categories = [(i, name) for i, name in categories if name not in ("__background__", "N/A")]
    of_category = random.choice([i for i, _ in categories], count)
    sizes = np.array(SIZES)[of_image % len(SIZES)]
    shapes = (sizes * np.exp(random.normal(-2, 0.8, (count, 2)))).clip(3, 0.95 * sizes)
    boxes = np.concatenate([random.uniform(0, sizes - shapes), shapes], axis=1).round(2)
    crowds = random.random(count) < CROWDS
    annotations = []
    for number, (box, (width, height)) in enumerate(zip(boxes, sizes.tolist())):
        if crowds[number]:
            runs = random.integers(1, width * height // 60, 50)
            runs[-1] += width * height - runs.sum()
            segmentation = f'{{"counts":{runs.tolist()},"size":[{height},{width}]}}'.replace(" ", "")
        else:
            segmentation = f"[[{polygon(random, box)}]]"
        area = round(float(box[2] * box[3]) * 0.6, 4)
        annotations.append(
            f'{{"segmentation":{segmentation},"area":{area},"iscrowd":{int(crowds[number])},'
            f'"image_id":{5 * int(of_image[number]) + 9},"bbox":{box.tolist()},"category_id":{of_category[number]},'
            f'"id":{number + 1}}}'.replace(", ", ",")
        )
    named = ",".join(f'{{"supercategory":"thing","id":{i},"name":"{name}"}}' for i, name in categories)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="ascii") as out:
        out.write('{"info":{"description":"made up, of the size of COCO 2017"},"licenses":[],"images":[')
        out.write(",".join(entries))
        out.write('],"annotations":[')
        out.write(",".join(annotations))
        out.write(f'],"categories":[{named}]}}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it is not there; must be empty")
    parser.add_argument("--images", type=int, default=SPLITS["train2017"][0], help="of train2017")
    parser.add_argument("--val_images", type=int, default=SPLITS["val2017"][0], help="of val2017")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    jpegs = []
    photographs = [Image.fromarray(one).resize((960, 640)) for one in load_sample_images().images]
    for number, (width, height) in enumerate(SIZES):
        jpegs.append(options.folder / f"{number}.jpg")
        photographs[number % 2].crop((160, 0, 160 + width, height)).save(jpegs[-1], quality=95)
    random = np.random.default_rng(0)
    for (split, (all_images, objects)), images in zip(SPLITS.items(), (options.images, options.val_images)):
        entries = write_images(options.folder / split, images, jpegs)
        file = options.folder / "annotations" / f"instances_{split}.json"
        count = round(objects * images / all_images)
        write_annotations(file, entries, count, random)
        print(f"{file}: {images:,} images, {count:,} annotations, {file.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
