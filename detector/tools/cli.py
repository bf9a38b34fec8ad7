"""Command lines made from typed functions. Does not import torch, so ``--help`` answers at once."""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_loader

from detector.errors import FlagOf, UsageError, exit_on_user_error

# Values in a file are text, as on the command line: "refine: off" is no boolean.
set_loader("text", lambda text: yaml.load(text, yaml.BaseLoader), (yaml.YAMLError,))


TYPE_NAMES = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "PositiveInt": "an integer of at least 1",
    "NonNegativeInt": "an integer of at least 0",
    "NonNegativeFloat": "a number of at least 0",
    "PositiveFloat": "a number above 0",
    "ClosedUnitInterval": "a number from 0 to 1",
}


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's formatter, without wrapping the description."""


def run_tool(
    function: Callable[..., Any],
    arguments: Sequence[str] | None = None,
    *,
    exit_code: Callable[[Any], int] = lambda result: 0,
) -> int:
    """Call a function with the options of a command line.

    Its parameters become flags: ``name: int = 2`` becomes ``--name NAME``. Parameters without a default become
    positional arguments. The docstring becomes the help, except its sections ``Returns`` and ``Raises``. ``--config``
    reads flags from a YAML file, and ``--print_config`` prints them, unless the function has a parameter ``config``.

    Args:
        function: a typed function with a Google-style docstring. It raises user errors, see :mod:`detector.errors`.
        arguments: the command line; default: this process's.
        exit_code: maps the function's result to the exit code.

    Returns:
        The exit code. User errors, ``--help`` and ``--print_config`` raise ``SystemExit``.
    """
    parser = make_parser(function)
    with exit_on_user_error(flag_names(parser)):
        options = parse_arguments(parser, given_arguments(arguments, parser.description))
        plain = json.loads(parser.dump(options, format="json"))  # without jsonargparse's types, such as PositiveInt
        return exit_code(function(**plain))


def make_parser(function: Callable[..., Any]) -> ArgumentParser:
    """Return the parser for the parameters of a function, see :func:`run_tool`."""
    text = inspect.getdoc(function) or ""
    description = re.sub(r"\n\n(Args|Returns|Raises):\n.*?(?=\n\n\S|\Z)", "", text, flags=re.DOTALL)
    parser = new_parser(description, config="config" not in inspect.signature(function).parameters)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    action: Any
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if get_origin(hint) is Sequence:  # several arguments, not a list in brackets
            action._typehint, action.nargs, action.metavar = get_args(hint)[0], "+", None
    return parser


def new_parser(description: str | None, *, mode: str = "text", config: bool = True) -> ArgumentParser:
    """Return a parser, with ``--config`` and ``--print_config`` or without them."""
    parser = ArgumentParser(
        description=description,
        formatter_class=HelpFormatter,
        parser_mode=mode,
        allow_abbrev=False,
        exit_on_error=False,
    )
    if config:
        parser.add_argument("--config", action="config", help="Read flags from a YAML file. Later flags win.")
    return parser


def given_arguments(arguments: Sequence[str] | None, description: str | None) -> Sequence[str]:
    """Return the arguments, or this process's; print the description and raise :class:`UsageError` without any."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        print(description, file=sys.stderr)
        raise UsageError("no arguments were given; --help lists them")
    return given


def parse_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Return the options of a command line, or raise :class:`UsageError`.

    Hyphens may replace the underscores of a flag. ``--flag`` alone means ``--flag true``, and ``--no_flag`` means
    ``--flag false``.
    """
    switches = [action.dest for action in parser._actions if getattr(action, "_typehint", None) is bool]
    try:
        return parser.parse_args(underscored(arguments, switches))
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        raise UsageError(_unknown_name(str(error), parser) or _wrong_value(str(error))) from None


def _unknown_name(text: str, parser: ArgumentParser) -> str | None:
    """Name the flag, setting or class that does not exist, or return ``None`` for other errors of jsonargparse."""
    if text.startswith("unrecognized arguments:"):
        flags = [flag for action in parser._actions for flag in action.option_strings]
        flag = next((word.partition("=")[0] for word in text.split() if word.startswith("--")), "")
        close = get_close_matches(flag, flags, n=1)
        return f"{text}; did you mean {close[0]}?" if close else text
    name = ".".join(re.findall('Parser key "(.+?)":', text))
    if unknown := re.search("Option '(.+?)' is not accepted", text):
        return f"--{name}: has no setting {unknown[1]!r}"
    if unknown := re.search("Group '(.+?)' does not accept option '(.+?)'", text):
        return f"--{f'{name}.' if name else ''}{unknown[1]}: has no setting {unknown[2]!r}"
    if unknown := re.search("dot import path string: (.+?)(\\. Got value.*)?$", text, re.MULTILINE):
        return f"--{name}: there is no class {unknown[1]!r}"
    return None


def _wrong_value(text: str) -> str:
    """Say in one line which value is wrong, from jsonargparse's message of several lines."""
    *outer, inner = text.split('Parser key "')[1:] or [text]
    if outer:  # a setting of a class: the innermost message says it
        text = f'Parser key "{".".join(one.partition(chr(34))[0] for one in outer)}.{inner.partition("    - ")[0]}'
    # The first line is the key; the others are reasons, one for each type that the value could have had.
    key, *lines = text.splitlines()
    reasons = [line.strip()[2:] for line in lines if line.strip()[:2] == "- " and "NoneType" not in line] or lines
    given = [line.replace("Given value:", "got") for line in lines if "Given value:" in line]
    return _readable(" ".join(" ".join([key, *reasons, *given]).split()))


def _readable(message: str) -> str:
    """Say which values a flag takes, instead of jsonargparse's types."""
    key = re.match(r'Parser key "(.+?)": ', message)
    types = re.findall(r"(?:Expected an?|Not of type) (?:<class '|typing\.)?([\w.]+(?:\[.*?\])?)", message)
    if key is None or not types or "elements" in message:  # a tuple of another length
        return re.sub(r'^Parser key "(.+?)"', r"--\1", message)
    values = [TYPE_NAMES.get(one, re.sub(r"Literal|[]['\"]", "", one).replace(", ", " or ")) for one in types]
    given = re.search(r"(?:[Gg]ot(?: value:)?|base 10:|to float:|restriction .*:) '?([^']*)|: (\S+) does not", message)
    got = f", got {(given[1] or given[2]).strip()}" if given else ""
    return f"--{key[1]}: must be {' or '.join(dict.fromkeys(values))}{got}"


def underscored(arguments: Sequence[str], switches: Iterable[str] = ()) -> list[str]:
    """Return a command line with underscores for the hyphens in names, and a value for each switch."""
    found: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":  # file names follow
            return [*found, *arguments[index:]]
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name in switches and not equals and "".join(arguments[index + 1 : index + 2]) not in ("true", "false"):
                equals, value = "=", "true"
            elif name.removeprefix("no_") in switches and name not in switches and not equals:
                name, equals, value = name.removeprefix("no_"), "=", "false"
            argument = f"--{name}{equals}{value}"
        found.append(argument)
    return found


def flag_names(parser: ArgumentParser) -> FlagOf:
    """Return the map from the names of settings to flags: "refinement.iterations" to "--iterations".

    It is the shortest flag that ends with the most components of the name; ``None`` if there is none.
    """
    flags = sorted((flag for action in parser._actions for flag in action.option_strings), key=len)

    def flag_of(name: str) -> str | None:
        while name:
            for flag in flags:
                if flag.replace("--", ".").endswith(f".{name}"):
                    return flag
            name = name.partition(".")[2]
        return None

    return flag_of
