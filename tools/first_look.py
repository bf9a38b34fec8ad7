"""What is done with a command line before torch is imported, which takes seconds."""

import sys
from collections.abc import Sequence
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


def underscored(arguments: Sequence[str]) -> list[str]:
    """The options of a command line as they are called: hyphens in their names do as well."""
    end = arguments.index("--") if "--" in arguments else len(arguments)  # behind it all are names of files
    named = [argument.partition("=") if argument.startswith("--") else ("", "", argument) for argument in arguments]
    options = [f"{name[:2]}{name[2:].replace('-', '_')}{equals}{value}" for name, equals, value in named]
    return [*options[:end], *arguments[end:]]
