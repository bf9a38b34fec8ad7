"""A disk that fails."""

import errno
import io
import os

from detector import files


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file that takes the first bytes of what is written."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        fail()


BREAK = {
    "write": lambda patch: patch.setattr(files, "open", FullDisk, raising=False),
    "fsync": lambda patch: patch.setattr(os, "fsync", fail),
    "replace": lambda patch: patch.setattr(os, "replace", fail),
}
