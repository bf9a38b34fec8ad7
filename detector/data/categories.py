"""Which category of a data set each label of a detector, or of another data set, stands for: that of the same name."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from detector.data.dataset import CocoDetection
from detector.errors import DataError, ModelError, short_repr
from detector.text import alike, listed

Category = tuple[int | None, str]  # id and name


class Labelled(Protocol):
    """What has labels, 1, 2, ...: a detector or a data set. A label's id is ``None`` if it has no category."""

    @property
    def category_ids(self) -> Sequence[int | None]: ...

    @property
    def category_names(self) -> Sequence[str]: ...


def same_names(ours: Sequence[str], theirs: Sequence[str]) -> list[int | None]:
    """Find the place of each of our names in theirs; ``None`` if it is not there, or on either side more than once."""
    place = {name: number for number, name in enumerate(theirs)}
    once = {name for name, count in Counter(ours).items() if count == 1}
    once &= {name for name, count in Counter(theirs).items() if count == 1}
    return [place[name] if name in once else None for name in ours]


def same_categories(ours: Sequence[Category], theirs: Sequence[Category]) -> list[int | None]:
    """Find the id of their category with the name of each of ours; ``None`` if it is not there.

    Where a name is there more than once, on either side, the ids must be the same too.

    Raises:
        DataError: they are not.
    """
    names = [name for _, name in theirs]
    ids = [None if place is None else theirs[place][0] for place in same_names([name for _, name in ours], names)]
    for number, (category, name) in enumerate(ours):
        if ids[number] is None and name in names:
            if (category, name) not in theirs:
                raise DataError(
                    f"several categories are called {short_repr(name)}, and the one with id {category} has no "
                    "other with that id and name: it cannot be told which is which"
                )
            ids[number] = category
    return ids


def match_categories(detector: Labelled, data: CocoDetection) -> Sequence[int | None]:
    """Find the category ids that a detector's labels have in the data, by the same names, see :func:`match_ids`."""
    return match_ids(detector, _categories(data))


def match_ids(detector: Labelled, categories: Sequence[Category]) -> Sequence[int | None]:
    """Find the ids of a detector's classes in a data set: those of the categories with the same names.

    Of weights that name no classes only the number must be the data's: labels are its categories in order of their ids.

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
    ours = [category for category in _categories(detector) if category[0] is not None]  # others are gaps, as in COCO's
    found = dict(zip(ours, same_categories(ours, categories), strict=True))
    ids = [found.get(category) for category in _categories(detector)]
    if not any(category is not None for category in ids):
        names, theirs = [name for _, name in ours], [name for _, name in categories]
        raise ModelError(
            f"no class of the detector ({quoted(names)}) has the name of a category of the data ({quoted(theirs)}): "
            f"{mixed_up(names, theirs) or 'not the same set of classes'}"
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
    ids = same_categories(_categories(other), _categories(data))
    if not any(category is not None for category in ids):
        raise DataError(no_shared_name(data.category_names, other.category_names))
    notes = []
    if moved := _moved(other, ids):
        notes.append(f"categories are matched by name: {quoted(moved)} have other ids than in training")
    if unknown := _unknown(ids, data):
        names = quoted(list(unknown))
        why = mixed_up(list(unknown), other.category_names)
        notes.append(
            f"objects of classes that are not trained on ({names}) count as missed: {unknown.total():,}"
            + (f" ({why})" if why else "")
        )
    data.relabel(ids, other.category_names)
    return notes


def match_notes(detector: Labelled, category_ids: Sequence[int | None], data: CocoDetection) -> list[str]:
    """Say how :func:`match_categories` matched a detector's labels, the most important first."""
    notes = []
    if unknown := _unknown(category_ids, data):
        why = mixed_up(detector.category_names, list(unknown))
        notes.append(
            f"The detector does not know the classes {quoted(list(unknown))}: their objects ({unknown.total():,}) "
            f"count as missed{f' ({why})' if why else ''}."
        )
    if moved := _moved(detector, category_ids):
        notes.append(f"Classes are matched by name: {quoted(moved)} have other ids in the data than in the detector.")
    known = [(name, found) for (i, name), found in zip(_categories(detector), category_ids) if i is not None]
    if left := [name for name, found in known if found is None]:
        notes.append(
            f"The data has {len(known) - len(left):,} of the detector's {len(known):,} classes: what is detected of "
            f"the others ({quoted(left)}) is left out."
        )
    return notes


def quoted(names: Sequence[str]) -> str:
    """List the first of some names in quotes, by which blanks at their ends are seen."""
    return listed([short_repr(name) for name in names])


def no_shared_name(ours: Sequence[str], theirs: Sequence[str], *, of: str = "to train on") -> str:
    """The message that two sets of categories share no name, with the reason if it is known."""
    why = mixed_up(ours, theirs)
    return f"no category ({quoted(ours)}) has the name of one {of} ({quoted(theirs)}){f': {why}' if why else ''}"


def names_alike(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """Find pairs of names that differ only by case, blanks, hyphens, underscores or Unicode form."""
    mine, others = set(ours), set(theirs)
    by_key = {alike(name): name for name in theirs if name not in mine}
    pairs = [(name, by_key.get(alike(name))) for name in ours if name not in others]
    return [(name, other) for name, other in pairs if other is not None]


def difference(name: str, other: str) -> str:
    """Say by what two names differ that are alike."""
    one, two = ("".join(text.split()) for text in (name, other))
    if name.lower() == other.lower():
        what = "case"
    elif one == two:
        what = "blanks"
    else:
        what = "case and blanks" if one.lower() == two.lower() else "hyphens, underscores or Unicode form"
    return f"{short_repr(name)} and {short_repr(other)} differ only by {what}"


def mixed_up(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """Name the first pair of :func:`names_alike`, and how many more there are; ``None`` if there is none."""
    pairs = names_alike(ours, theirs)
    more = f", and {len(pairs) - 1:,} more" if len(pairs) > 1 else ""
    return f"{difference(*pairs[0])}{more}" if pairs else None


def _categories(labelled: Labelled) -> list[Category]:
    return list(zip(labelled.category_ids, labelled.category_names, strict=True))


def _moved(labelled: Labelled, ids: Sequence[int | None]) -> list[str]:
    """Name the classes that have another id where they were found."""
    return [name for (i, name), found in zip(_categories(labelled), ids) if None not in (i, found) and found != i]


def _unknown(ids: Sequence[int | None], data: CocoDetection) -> Counter[str]:
    """Count the objects of other categories, by name, in the order of the labels."""
    unknown: Counter[str] = Counter()
    for label, count in data.label_counts().items():
        if data.category_ids[label - 1] not in ids:
            unknown[data.category_names[label - 1]] += count
    return unknown
