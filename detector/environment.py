"""What the program runs on."""

from importlib import metadata

PACKAGES = ("torch", "torchvision", "lightning", "timm", "pycocotools", "numpy", "pillow", "affine-crop-rcnn")


def versions() -> dict[str, str | None]:
    """The versions of the packages that results depend on; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
