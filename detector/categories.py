"""Which category of a data set each label of a detector, or of another data set, stands for: that of the same name."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from detector.coco import CocoDetection
from detector.errors import DataError, ModelError
from detector.names import listed, short
from detector.pretrained import PretrainedDetector

Category = tuple[int | None, str]  # id and name


def same_names(ours: Sequence[str], theirs: Sequence[str]) -> list[int | None]:
    """For each of our names the place of theirs; ``None`` if it is not there, or on either side more than once."""
    place = {name: number for number, name in enumerate(theirs)}
    once = {name for name, count in Counter(ours).items() if count == 1}
    once &= {name for name, count in Counter(theirs).items() if count == 1}
    return [place[name] if name in once else None for name in ours]


def same_categories(ours: Sequence[Category], theirs: Sequence[Category]) -> list[int | None]:
    """For each of our categories the place of theirs, by name, whatever the ids; ``None`` if it is not there.

    Where a name is there more than once, on either side, the ids must be the same too.

    Raises:
        DataError: they are not.
    """
    names = [name for _, name in theirs]
    places = same_names([name for _, name in ours], names)
    by_both = {category: place for place, category in enumerate(theirs)}
    for number, category in enumerate(ours):
        if places[number] is None and category[1] in names:
            places[number] = by_both.get(category)
            if places[number] is None:
                raise DataError(
                    f"several categories are called {short(category[1])!r}, and the one with id {category[0]} has no "
                    "other with that id and name: it cannot be told which is which"
                )
    return places


def match_categories(detector: PretrainedDetector, data: CocoDetection) -> Sequence[int | None]:
    """The category ids of a detector's labels, as the data has them: those of the same names, see :func:`match_ids`."""
    return match_ids(detector, list(zip(data.category_ids, data.category_names, strict=True)))


def match_ids(detector: PretrainedDetector, categories: Sequence[Category]) -> Sequence[int | None]:
    """The ids of a detector's classes in a data set: those of the categories with the same names.

    Of weights that name no classes only the number must be the data's: labels are its categories in order.

    Args:
        detector: what is scored.
        categories: of the data, in the order of their ids.

    Returns:
        The category id of each label, from label 1 on; ``None`` for one to leave out: the data has no such class.

    Raises:
        ModelError: not one class has the same name; or weights that name none have another number of them.
        DataError: see :func:`same_categories`.
    """
    if not any(category is not None for category in detector.category_ids):
        if len(detector.category_ids) != len(categories):
            raise ModelError(f"the weights have {len(detector.category_ids)} classes, the data has {len(categories)}")
        return [category for category, _ in categories]
    # Labels without an id are gaps, as in COCO's numbers.
    ours = [category for category in zip(detector.category_ids, detector.category_names) if category[0] is not None]
    places = iter(same_categories(ours, categories))
    ids = [
        None if i is None or (place := next(places)) is None else categories[place][0] for i in detector.category_ids
    ]
    if not any(category is not None for category in ids):
        raise ModelError(
            f"no class of the detector ({listed([name for _, name in ours])}) has the name of a category of the data "
            f"({listed([name for _, name in categories])}): not the same set of classes"
        )
    return ids


def label_as(data: CocoDetection, other: CocoDetection) -> list[str]:
    """Give a data set the labels of another, in place, by the categories' names: a val split those of training.

    Objects of classes that the other lacks go out of its targets; the annotations that it is scored by still have them.

    Returns:
        Sentences on what differs.

    Raises:
        DataError: not one category has the same name; or see :func:`same_categories`.
    """
    ours = list(zip(other.category_ids, other.category_names, strict=True))
    theirs = list(zip(data.category_ids, data.category_names, strict=True))
    ids = [None if place is None else theirs[place][0] for place in same_categories(ours, theirs)]
    if not any(category is not None for category in ids):
        raise DataError(
            f"no category ({listed(data.category_names)}) has the name of one to train on "
            f"({listed(other.category_names)})"
        )
    notes = []
    if moved := [name for (i, name), found in zip(ours, ids) if found is not None and found != i]:
        notes.append(f"categories are matched by name: {listed(moved)} have other ids than in training")
    unknown = Counter(
        name for _, labels in data.targets for i, name in (theirs[n - 1] for n in labels.tolist()) if i not in ids
    )
    if unknown:
        notes.append(
            f"objects of classes that are not trained on ({listed(list(unknown))}) count as missed: {unknown.total():,}"
        )
    data.relabel(ids, other.category_names)
    return notes


def match_notes(detector: PretrainedDetector, category_ids: Sequence[int | None], data: CocoDetection) -> list[str]:
    """What is to be said of how :func:`match_categories` matched them, the most important first.

    Args:
        detector: what is scored.
        category_ids: what was matched.
        data: what it is scored on.
    """
    notes = []
    objects = Counter(label for _, labels in data.targets for label in labels.tolist())
    unknown = [label for label in sorted(objects) if data.category_ids[label - 1] not in category_ids]
    if unknown:
        names = listed([data.category_names[label - 1] for label in unknown])
        count = sum(objects[label] for label in unknown)
        notes.append(
            f"Of classes that the detector does not know ({names}) it finds none: their objects ({count:,}) count as "
            "missed."
        )
    known = [
        (i, name, found)
        for i, name, found in zip(detector.category_ids, detector.category_names, category_ids)
        if i is not None
    ]
    moved = [name for i, name, found in known if found is not None and found != i]
    if moved:
        notes.append(f"Classes are matched by name: {listed(moved)} have other ids in the data than in the detector.")
    left = [name for _, name, found in known if found is None]
    if left:
        notes.append(
            f"The data has {len(known) - len(left):,} of the detector's {len(known):,} classes: what is detected of "
            f"the others ({listed(left)}) is left out."
        )
    return notes


def labels_of_targets(category_ids: Sequence[int | None], data: CocoDetection) -> Tensor | None:
    """The detector's label for each of the data's, [n + 1] with background first; ``None`` if one is missing."""
    label = {category: label for label, category in enumerate(category_ids, start=1)}
    used = {int(one) for _, labels in data.targets for one in labels.unique()}
    if any(data.category_ids[one - 1] not in label for one in used):
        return None
    return torch.tensor([0, *(label.get(category, 0) for category in data.category_ids)])
