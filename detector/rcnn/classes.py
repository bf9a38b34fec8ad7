"""Mix-ins that are added to the class of an existing module, and removed again."""

from torch import nn


def mix_in(module: nn.Module, mixin: type[nn.Module], stock: type[nn.Module]) -> None:
    """Put ``mixin`` in front of the module's class, which is ``stock`` or a subclass of it."""
    cls = type(module)
    if not isinstance(module, mixin):
        module.__class__ = mixin if cls is stock else _combined(mixin, cls, stock)


def _combined(mixin: type[nn.Module], cls: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """Return a defined class of both, which pickle finds, such as AttachedRefinedRoIHeads, or make one."""
    name = f"{mixin.__name__.removesuffix(stock.__name__)}{cls.__name__}"
    defined = (known for known in mixin.__subclasses__() if known.__name__ == name and known.__bases__ == (mixin, cls))
    return next(defined, None) or type(name, (mixin, cls), {})


def take_out(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Undo :func:`mix_in`. The last mix-in has to be taken out first."""
    classes = type(module).__mro__
    module.__class__ = classes[classes.index(mixin) + 1]


def refuse_own_forward(module: nn.Module, stock: type[nn.Module]) -> None:
    """Raise TypeError for a module whose forward is a user's own, which would bypass a mix-in."""
    forward = type(module).forward
    ours = forward.__module__.partition(".")[0] == __name__.partition(".")[0]
    if (forward is not stock.forward and not ours) or "forward" in module.__dict__:
        raise TypeError(f"{type(module).__name__} has its own forward, so it cannot be swapped")
