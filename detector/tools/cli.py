"""Command lines made from typed functions. Does not import torch, so ``--help`` answers at once."""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser

from detector.errors import DataError, UsageError, exit_on_user_error

SWITCH = "{true,false}"  # the metavar of booleans
# What the error messages call a type.
TYPE_NAMES = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "PositiveInt": "an integer of at least 1",
    "NonNegativeInt": "an integer of at least 0",
    "NonNegativeFloat": "a number of at least 0",
    "ClosedUnitInterval": "a number from 0 to 1",
}


def run_tool(
    function: Callable[..., Any],
    arguments: Sequence[str] | None = None,
    *,
    exit_code: Callable[[Any], int] = lambda result: 0,
    files: Sequence[str] = (),
) -> int:
    """Call a function with the options of a command line.

    Its parameters become flags: ``name: int = 2`` becomes ``--name N``. Parameters without a default become positional
    arguments. Hyphens may replace the underscores of a name. ``--flag`` alone means ``--flag true``, and ``--no_flag``
    means ``--flag false``. The docstring becomes the help, except its sections ``Returns`` and ``Raises``. All types
    must be imported at runtime, but the return annotation may be a string. ``--config`` reads flags from a YAML file,
    and ``--print_config`` prints them, unless the function has a parameter ``config`` itself.

    Args:
        function: a typed function with a Google-style docstring. It raises user errors, see :mod:`detector.errors`.
        arguments: the command line; default: this process's.
        exit_code: maps the function's result to the exit code.
        files: names of the parameters that are input files. A missing one is refused before the call.

    Returns:
        The exit code. User errors, ``--help`` and ``--print_config`` raise ``SystemExit``.
    """
    parser = make_parser(function)
    with exit_on_user_error(FlagNames(parser)):
        options = read_options(parser, sys.argv[1:] if arguments is None else arguments, files)
        return exit_code(function(**options))


class FlagNames:
    """Maps the name of a setting to the flag of a parser: "refinement.iterations" to "--iterations"."""

    def __init__(self, parser: ArgumentParser | None = None) -> None:
        self.parser = parser

    def __call__(self, name: str) -> str | None:
        """Return the shortest flag that ends with the most components of the name; ``None`` if there is none."""
        actions = [] if self.parser is None else self.parser._actions
        flags = sorted((flag for action in actions for flag in action.option_strings if flag[:2] == "--"), key=len)
        while name:
            for flag in flags:
                if f".{flag[2:]}".endswith(f".{name}"):
                    return flag
            name = name.partition(".")[2]
        return None


def make_parser(function: Callable[..., Any]) -> ArgumentParser:
    """Return the parser for the parameters of a function, see :func:`run_tool`."""
    description, texts = _parse_docstring(inspect.getdoc(function) or "")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False, exit_on_error=False)
    positional = ""
    for name, parameter in inspect.signature(function).parameters.items():
        hint, default = parameter.annotation, parameter.default
        options: dict[str, Any] = {"type": hint, "help": texts[name].replace("%", "%%")}
        if default is inspect.Parameter.empty:
            metavar = name.upper()
            if get_origin(hint) is Sequence:
                metavar = metavar.removesuffix("S")
                options |= {"type": get_args(hint)[0], "nargs": "+"}
            positional += f"{metavar}{' ...' if 'nargs' in options else ''} "
            parser.add_argument(name, metavar=metavar, **options)
            continue
        types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if get_origin(types[0]) is tuple:
            options["nargs"], types = len(get_args(types[0])), get_args(types[0])[:1]
            options["type"] = types[0]
        if default is not None:
            options["help"] += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        parser.add_argument(f"--{name}", default=default, metavar=_metavar(types), **options)
    if "config" not in texts:
        parser.add_argument("--config", metavar="FILE.yaml", help="Read flags from a YAML file. The command line wins.")
        text = "Print all flags as such a file."
        parser.add_argument("--print_config", type=bool, default=False, metavar=SWITCH, help=text)
    parser.usage = f"%(prog)s {positional}[--FLAG VALUE ...]"
    return parser


def read_options(parser: ArgumentParser, arguments: Sequence[str], files: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options of a command line by name. Raises :class:`UsageError`, or :class:`DataError` for a file."""
    reads_config = any(action.dest == "print_config" for action in parser._actions)
    check_arguments(parser.description, arguments, files=("config", *files) if reads_config else files)
    options = _parse(parser, arguments)
    if not reads_config:
        return options
    if options["config"] is not None:
        options = _parse(parser, [*_flags_in(options["config"]), *arguments])
    del options["config"]
    if options.pop("print_config"):
        flags = {action.dest for action in parser._actions if action.option_strings}
        print(yaml.safe_dump({name: options[name] for name in options if name in flags}, sort_keys=False), end="")
        sys.exit(0)
    return options


def check_arguments(description: str | None, arguments: Sequence[str], *, files: Sequence[str]) -> None:
    """Refuse an empty command line, and a missing file. Names on a hub, and "last", are no files.

    Args:
        description: printed if the command line is empty.
        arguments: the command line.
        files: the flags that name input files, without their hyphens.
    """
    if not arguments:
        print(description, file=sys.stderr)
        raise UsageError("no arguments were given; --help lists them")
    for name, value in named_flags(underscored(arguments)):
        is_file = value.endswith((".yaml", ".yml", ".json", ".ckpt")) and "://" not in value
        if name in files and is_file and not Path(value).exists():
            raise DataError(f"--{name} {value}: no such file")


def read_yaml(path: str | Path, loader: type[Any] = yaml.SafeLoader) -> Any:
    """Return the content of a YAML file."""
    try:
        return yaml.load(Path(path).read_bytes().decode(), loader)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}): save it as UTF-8") from None
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def underscored(arguments: Sequence[str], switches: Iterable[str] = ()) -> list[str]:
    """Return a command line with underscores for the hyphens in names, and a value for each switch."""
    end = arguments.index("--") if "--" in arguments else len(arguments)  # file names follow
    found = []
    for argument, following in zip(arguments[:end], [*arguments[1:], ""], strict=False):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name[2:].replace("-", "_")
            if name in switches and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
            elif not equals and name.removeprefix("no_") in switches and name not in switches:
                name, equals, value = name.removeprefix("no_"), "=", "false"
            argument = f"--{name}{equals}{value}"
        found.append(argument)
    return [*found, *arguments[end:]]


def usage_error(error: argparse.ArgumentError) -> UsageError:
    """Return the error for a command line that jsonargparse refuses, with its message shortened to a line."""
    text = str(error)
    setting = re.search(r'^Parser key "(.+?)"', text)
    names = re.findall(r"(?:Expected an?|Not of type) (?:<class '|typing\.)?([\w.]+(?:\[.*?\])?)", text)
    if setting is None or not names:
        return UsageError(" ".join(text.removeprefix("argument ").split()))
    value = re.search(r"(?:Got value:|Given value:|base 10:|to float:) (.*)$|: (\S+) does not conform", text)
    given = "" if value is None else (value[1] or value[2]).strip("'")
    allowed: list[str] = []
    for name in names:
        if name.startswith("Literal["):
            allowed += name[8:-1].replace("'", "").split(", ")
        elif name != "NoneType":
            allowed.append(TYPE_NAMES.get(name, name))
    *others, last = dict.fromkeys(allowed)
    return UsageError(f"must be {', '.join(others)}{' or ' if others else ''}{last}", setting=setting[1], value=given)


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    switches = {action.dest for action in parser._actions if action.metavar == SWITCH}
    try:
        options = parser.parse_args(underscored(arguments, switches)).as_dict()
    except argparse.ArgumentError as error:
        raise usage_error(error) from None
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    """Return a number without jsonargparse's type, such as PositiveInt."""
    kinds = [kind for kind in (bool, int, float) if isinstance(value, kind)]
    return kinds[0](value) if kinds else value


def named_flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each flag, written as ``--name value`` or ``--name=value``."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            yield name, value if equals else following


def _flags_in(path: str) -> list[str]:
    settings = read_yaml(path, yaml.BaseLoader)  # all values as text: on and off are no booleans
    if not isinstance(settings, dict):
        raise DataError(f"{path}: must be a dict of flags")
    flags: list[str] = []
    for name, value in settings.items():
        if value not in ("", "null"):
            flags += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def _metavar(kinds: Sequence[Any]) -> str | None:
    if bool in kinds:
        return SWITCH
    shown = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    shown += ["N" for kind in kinds if isinstance(kind, type) and issubclass(kind, (int, float))]
    return "N" if shown == ["N"] else f"{{{','.join(shown)}}}" if shown else None


def _parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description of a Google-style docstring, and the text of each parameter."""
    shown, texts = [], {}
    for block in re.split(r"\n\n(?=\S)", text.replace("``", "")):
        heading = block.partition(":\n")[0]
        if heading == "Args":
            for entry in re.split(r"\n {4}(?=\w)", block)[1:]:
                name, _, words = entry.partition(":")
                texts[name] = " ".join(words.split())
        elif heading not in ("Returns", "Raises"):
            shown.append(block)
    return "\n\n".join(shown), texts
