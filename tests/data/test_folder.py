"""Where the splits of a data set lie."""

from pathlib import Path

from support.coco_folders import dataset
from torchvision.transforms import v2

from detector.data.folder import DataFolder


def test_cocos_own_layout_is_the_default():
    folder = DataFolder(Path("coco"))
    assert folder.annotation_file("val2017") == Path("coco/annotations/instances_val2017.json")
    assert folder.image_folder("val2017") == Path("coco/val2017")


def test_only_the_split_is_filled_in():
    folder = DataFolder(Path("a{b}"), "{fold}/{split}{}/{split:>9}.json", "{split}/{split}{")
    assert folder.annotation_file("val") == Path("a{b}/{fold}/val{}/{split:>9}.json")
    assert folder.image_folder("val") == Path("a{b}/val/val{")
    assert folder.image_folder("{split}") == Path("a{b}/{split}/{split}{")


def test_a_split_as_a_data_set(tmp_path):
    dataset(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    flip = v2.RandomHorizontalFlip(1.0)
    data = DataFolder(tmp_path, "{split}.json", "images").dataset(
        "annotations", transform=flip, seed=3, skip_missing=True
    )
    assert (len(data), data.transform, data.seed) == (2, flip, 3)
