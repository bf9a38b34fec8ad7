"""What is seen to be wrong with a command line before torch is imported, which takes seconds."""

import sys
from pathlib import Path


def refuse(usage: str | None, *files: str) -> None:
    """End with the usage if there is no argument at all, or in a sentence if a file is missing.

    Args:
        usage: what to show.
        files: the flags that take a file.
    """
    arguments = sys.argv[1:]
    if not arguments:
        print(usage, file=sys.stderr)
        sys.exit(2)
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        flag, equals, value = argument.partition("=")
        value = value if equals else following
        local = value.endswith((".yaml", ".yml", ".json", ".ckpt")) and "://" not in value  # no hub's name, no "last"
        if flag in files and local and not Path(value).exists():
            sys.exit(f"error: {flag} {value}: no such file")
