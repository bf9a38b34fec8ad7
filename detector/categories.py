"""Which category of a data set each label of a detector stands for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detector.coco import CocoDetection
from detector.errors import ModelError
from detector.models import published_names
from detector.pretrained import PretrainedDetector


def match_categories(detector: PretrainedDetector, data: CocoDetection) -> Sequence[int | None]:
    """The category ids of a detector's labels, as the data has them.

    A trained detector's classes must be the data's, by id and name, but for some of which the data has no object. Of
    torchvision's published ones, with COCO's 90 ids, those that are there are used. Of weights that name no classes
    only the number must be the data's.

    Returns:
        The category id of each label, from label 1 on; ``None`` for one to leave out.

    Raises:
        ModelError: not the same set of classes; says which.
    """
    known = dict(zip(data.category_ids, data.category_names))
    ids, names = detector.category_ids, detector.category_names
    if not any(category is not None for category in ids):
        if len(ids) != len(data.category_ids):
            raise ModelError(f"the weights have {len(ids)} classes, the data has {len(data.category_ids)}")
        return data.category_ids
    if names == published_names()[1:]:
        same = [category if known.get(category) == name else None for category, name in enumerate(names, start=1)]
        if any(category is not None for category in same):
            return same
        raise ModelError(
            "the weights have COCO's 90 category ids, and the data has no category of the same id and name"
        )
    for category, name in zip(ids, names):
        if category is not None and known.get(category) != name:
            raise ModelError(
                f"the checkpoint was trained on category {category} {name!r}, which is "
                f"{known.get(category, 'missing')!r} in the data: not the same set of classes"
            )
    for category in sorted({data.category_ids[label - 1] for _, labels in data.targets for label in labels.tolist()}):
        if category not in ids:
            raise ModelError(
                f"the data has objects of category {category} {known[category]!r}, on which the checkpoint was not "
                "trained: not the same set of classes"
            )
    return ids


def labels_of_targets(category_ids: Sequence[int | None], data: CocoDetection) -> Tensor | None:
    """The detector's label for each of the data's, [n + 1] with background first; ``None`` if one is missing."""
    label = {category: label for label, category in enumerate(category_ids, start=1) if category is not None}
    used = {int(one) for _, labels in data.targets for one in labels.unique()}
    if any(data.category_ids[one - 1] not in label for one in used):
        return None
    return torch.tensor([0, *(label.get(category, 0) for category in data.category_ids)])
