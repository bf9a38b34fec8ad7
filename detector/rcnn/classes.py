"""Changing the class of a module that exists already: a mix-in is put in front of its own class, and taken out."""

from torch import nn


def mix_in(module: nn.Module, mixin: type[nn.Module], stock: type[nn.Module]) -> None:
    """Change a module's class to ``mixin``, in front of a user's own subclass of ``stock`` if it is one.

    A class of both that has been written down is taken, for pickle finds it; else one is made on the spot.
    """
    kind = type(module)
    if not isinstance(module, mixin):
        module.__class__ = mixin if kind is stock else _both(mixin, kind, stock)


def _both(mixin: type[nn.Module], kind: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """``mixin`` in front of ``kind``: AttachedRoIHeads and RefinedRoIHeads are AttachedRefinedRoIHeads."""
    name = f"{mixin.__name__.removesuffix(stock.__name__)}{kind.__name__}"
    for known in mixin.__subclasses__():
        if known.__name__ == name and known.__bases__ == (mixin, kind):
            return known
    return type(name, (mixin, kind), {})


def take_out(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Undo :func:`mix_in`; of several mix-ins the last one first."""
    classes = type(module).__mro__
    module.__class__ = classes[classes.index(mixin) + 1]


def refuse_own_forward(part: nn.Module, stock: type[nn.Module]) -> None:
    """A forward of the part's class, or set on the instance, would run instead of a mix-in's, without a word.

    Raises:
        TypeError: it has one that is neither ``stock``'s nor of this project.
    """
    forward = type(part).forward
    ours = forward.__module__.partition(".")[0] == __name__.partition(".")[0]
    if (forward is not stock.forward and not ours) or "forward" in part.__dict__:
        raise TypeError(f"{type(part).__name__} has a forward of its own, which the swap cannot see into")
