"""Matching the categories of detectors and data sets by name."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from detector.data.dataset import CocoDetection
from detector.errors import DataError, ModelError, short_repr
from detector.text import alike, listed

Category = tuple[int | None, str]  # id and name


class Labelled(Protocol):
    """A detector or a data set with labels 1, 2, ...; the id of a label without a category is ``None``."""

    @property
    def category_ids(self) -> Sequence[int | None]: ...

    @property
    def category_names(self) -> Sequence[str]: ...


def same_names(ours: Sequence[str], theirs: Sequence[str]) -> list[int | None]:
    """Return the index of each of our names in theirs; ``None`` if it is missing, or repeated on either side."""
    place = {name: number for number, name in enumerate(theirs)}
    once = {name for name, count in Counter(ours).items() if count == 1}
    once &= {name for name, count in Counter(theirs).items() if count == 1}
    return [place[name] if name in once else None for name in ours]


def same_categories(ours: Sequence[Category], theirs: Sequence[Category]) -> list[int | None]:
    """Return the id of their category with the same name for each of ours; ``None`` if there is none.

    Raises:
        DataError: a name is repeated on either side, and the ids differ.
    """
    names = [name for _, name in theirs]
    ids: list[int | None] = []
    for category, place in zip(ours, same_names([name for _, name in ours], names)):
        if place is None and category[1] in names and category not in theirs:
            raise DataError(
                f"several categories are called {short_repr(category[1])}, and none of those on the other side has the "
                f"id {category[0]}: they cannot be matched"
            )
        ids.append(theirs[place][0] if place is not None else category[0] if category[1] in names else None)
    return ids


def match_categories(detector: Labelled, data: CocoDetection) -> Sequence[int | None]:
    """Find the category ids of a detector's labels in a data set, see :func:`match_ids`."""
    return match_ids(detector, _categories(data))


def match_ids(detector: Labelled, categories: Sequence[Category]) -> Sequence[int | None]:
    """Find the ids of a detector's classes among categories, by name.

    Weights without class names must have as many classes as there are categories, in the order of the ids.

    Returns:
        The category id of each label, from label 1 on; ``None`` where no category has its name.

    Raises:
        ModelError: no class has the name of a category, or the numbers of classes differ.
        DataError: see :func:`same_categories`.
    """
    if not any(category is not None for category in detector.category_ids):
        if len(detector.category_ids) != len(categories):
            raise ModelError(f"the weights have {len(detector.category_ids)} classes, the data has {len(categories)}")
        return [category for category, _ in categories]
    ours = [category for category in _categories(detector) if category[0] is not None]  # others are gaps, as in COCO
    found = dict(zip(ours, same_categories(ours, categories), strict=True))
    ids = [found.get(category) for category in _categories(detector)]
    if not any(category is not None for category in ids):
        names, theirs = [name for _, name in ours], [name for _, name in categories]
        what = f"no class of the detector ({quoted(names)}) has the name of a category of the data ({quoted(theirs)})"
        raise ModelError(f"{what}: {mixed_up(names, theirs) or 'not the same set of classes'}")
    return ids


def label_as(data: CocoDetection, other: CocoDetection) -> list[str]:
    """Relabel a data set, in place, with the labels of another, matched by category name.

    Objects of other categories leave its targets, but stay in the annotations that scoring uses.

    Returns:
        Notes, see :func:`match_notes`.

    Raises:
        DataError: no category has the same name; see also :func:`same_categories`.
    """
    ids = same_categories(_categories(other), _categories(data))
    if all(category is None for category in ids):
        raise DataError(no_shared_name(data.category_names, other.category_names))
    notes = match_notes(other, ids, data, name="training split")
    data.relabel(ids, other.category_names)
    return notes


def match_notes(
    detector: Labelled, category_ids: Sequence[int | None], data: CocoDetection, *, name: str = "detector"
) -> list[str]:
    """Describe how the labels of a detector, or of a split, were matched, the most important first."""
    notes = []
    unknown: Counter[str] = Counter()  # objects by class
    for label, count in data.label_counts().items():
        if data.category_ids[label - 1] not in category_ids:
            unknown[data.category_names[label - 1]] += count
    if unknown:
        why, names = mixed_up(detector.category_names, list(unknown)), quoted(list(unknown))
        what = f"their objects ({unknown.total():,}) count as missed{f' ({why})' if why else ''}"
        notes.append(f"The {name} does not know the classes {names}: {what}.")
    pairs = [(i, called, found) for (i, called), found in zip(_categories(detector), category_ids) if i is not None]
    if moved := [called for i, called, found in pairs if found not in (None, i)]:
        notes.append(f"Classes are matched by name: {quoted(moved)} have other ids in the data than in the {name}.")
    if left := [called for _, called, found in pairs if found is None]:
        what = f"{len(pairs) - len(left):,} of the {name}'s {len(pairs):,} classes"
        notes.append(f"The data has {what}: detections of the others ({quoted(left)}) are left out.")
    return notes


def quoted(names: Sequence[str]) -> str:
    """List the first names, in quotes to show leading and trailing blanks."""
    return listed([short_repr(name) for name in names])


def no_shared_name(ours: Sequence[str], theirs: Sequence[str], *, of: str = "to train on") -> str:
    """Return the message that two sets of categories share no name, with the reason if it is known."""
    why = mixed_up(ours, theirs)
    return f"no category ({quoted(ours)}) has the name of one {of} ({quoted(theirs)}){f': {why}' if why else ''}"


def names_alike(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """Find pairs of names that differ only by case, blanks, hyphens, underscores or Unicode form."""
    by_key = {alike(name): name for name in theirs if name not in set(ours)}
    pairs = [(name, by_key.get(alike(name))) for name in ours if name not in set(theirs)]
    return [(name, other) for name, other in pairs if other is not None]


def difference(name: str, other: str) -> str:
    """Describe the difference of two names that are alike."""
    what = "case" if name.lower() == other.lower() else "case, blanks, hyphens, underscores or Unicode form"
    return f"{short_repr(name)} and {short_repr(other)} differ only by {what}"


def mixed_up(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """Describe the first pair of :func:`names_alike`, and count the others; ``None`` if there is none."""
    pairs = names_alike(ours, theirs)
    more = f", and {len(pairs) - 1:,} more" if len(pairs) > 1 else ""
    return f"{difference(*pairs[0])}{more}" if pairs else None


def _categories(labelled: Labelled) -> list[Category]:
    return list(zip(labelled.category_ids, labelled.category_names, strict=True))
