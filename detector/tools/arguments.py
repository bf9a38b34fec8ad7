"""How the flags of a tool are read, and those that several tools share; torch, which takes seconds, is not imported."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]

from detector.errors import DataError, UsageError, exit_on_user_error


class ToolParser(argparse.ArgumentParser):
    """argparse's, whose mistakes are a :class:`UsageError`; hyphens in the names of flags do as well as underscores.

    Args:
        description: what ``--help`` shows first, as it is.
        files: names of options that are files; a missing one ends the tool before anything heavy is imported.
        settings: ``--config`` may give flags in a file, and ``--print_config`` shows such a file.
        options: see ``argparse.ArgumentParser``.
    """

    def __init__(
        self, description: str | None, *, files: Sequence[str] = (), settings: bool = False, **options: Any
    ) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self.files = files
        self.settings = settings
        if settings:
            text = "take flags from a file, NAME: VALUE; the command line overrides it"
            self.add_argument("--config", metavar="FILE.yaml", help=text)
            self.add_argument("--print_config", action="store_true", help="print the flags as such a file, and end")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument ").replace(": must be", " must be", 1))

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The options of a command line, by default of this process; a mistake ends it in a sentence."""
        given = sys.argv[1:] if arguments is None else arguments
        with exit_on_user_error():
            options = self._read_all(given)
            if not self.settings:
                return options
            if options.config is not None:
                options = self._read_all([*_flags_in(options.config), *given])
            del options.config
            if vars(options).pop("print_config"):
                print(yaml.safe_dump(vars(options), sort_keys=False), end="")
                self.exit()
            return options

    def read_known(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and what is left of the command line; refuses an empty one, and files that are missing."""
        if not arguments:
            print(self.description, file=sys.stderr)
            self.error("no arguments were given; --help lists them")
        options, others = self.parse_known_args(underscored(arguments))
        for name in self.files:
            value = getattr(options, name)
            if value is not None and _looks_local(value) and not Path(value).exists():
                raise DataError(f"--{name} {value}: no such file")
        return options, others

    def _read_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        options, others = self.read_known(arguments)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return options


GONE = ("flip", "sizes")  # flags of earlier versions, which their files name though they were not set


def _flags_in(path: str) -> list[str]:
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise DataError(f"{path}: must be a dict of flags")
    if gone := [name for name in GONE if settings.get(name)]:
        raise UsageError(f"{path}: {gone[0]} {settings[gone[0]]}: this version has no test-time augmentation")
    given = {name: value for name, value in settings.items() if value is not None and name not in GONE}
    return [f"--{name}={value}" for name, value in given.items()]


def first_look(description: str | None, arguments: Sequence[str] | None) -> None:
    """Refuse, before Lightning is imported, an empty command line of a training, and files that are missing."""
    parser = ToolParser(description, files=("config", "ckpt_path"), add_help=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("--ckpt_path")
    with exit_on_user_error():
        parser.read_known(sys.argv[1:] if arguments is None else arguments)


def _looks_local(name: str) -> bool:
    """Whether a value is a file, not a name on a hub, nor "last"."""
    return name.endswith((".yaml", ".yml", ".json", ".ckpt")) and "://" not in name


def read_yaml(path: str) -> Any:
    """What is in a file of settings."""
    try:
        return yaml.safe_load(Path(path).read_bytes().decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}): save it as UTF-8") from None
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def underscored(arguments: Sequence[str]) -> list[str]:
    """The options of a command line as they are called: hyphens in their names do as well."""
    end = arguments.index("--") if "--" in arguments else len(arguments)  # behind it all are names of files
    named = [argument.partition("=") if argument.startswith("--") else ("", "", argument) for argument in arguments]
    options = [f"{name[:2]}{name[2:].replace('-', '_')}{equals}{value}" for name, equals, value in named]
    return [*options[:end], *arguments[end:]]


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag: an integer from so many on."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return integer


def score(text: str) -> float:
    """The type of a flag: a score."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {value}")
    return value


def boolean(text: str) -> bool:
    """The type of a flag: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text}")
    return text.lower() == "true"


def switch(text: str) -> str:
    """The type of a flag: on or off, which YAML reads as true or false; other words are left as they are."""
    return {"true": "on", "false": "off"}.get(text.lower(), text)


def add_refine(parser: argparse.ArgumentParser, *, choices: Sequence[str], effect: str) -> None:
    """Whether a refinement moves the detections' boxes."""
    text = f"the refinement that a detector may have; {effect}; default: on, if it has one"
    parser.add_argument("--refine", type=switch, choices=choices, help=text)


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Which detector: what :func:`detector.tools.source.load_source` takes."""
    add = parser.add_argument_group("the detector").add_argument
    add(
        "--checkpoint",
        metavar="FILE",
        help="a checkpoint of tools/train.py or its run's folder (the last one), a folder of save_pretrained, or "
        "OWNER/NAME on Hugging Face's hub",
    )
    add("--model", metavar="NAME", help="or a torchvision detector, such as fasterrcnn_resnet50_fpn")
    add(
        "--weights",
        metavar="FILE",
        help="with its weights: a state_dict file, or a name that torchvision publishes (DEFAULT; fetched)",
    )
    add("--crop", choices=("affine", "roi_align"), help="swapped or stock; default: as it was trained; stock")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where the detector runs."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Which split of which data set."""
    add = parser.add_argument_group("the data").add_argument
    add(
        "--root",
        metavar="FOLDER",
        help="the data set's folder; default: DATASET in the folder that DETECTOR_DATA names",
    )
    add("--dataset", metavar="DATASET", help="the data set's name, a folder of DETECTOR_DATA; used without --root")
    add("--split", default="val2017", metavar="NAME", help="the split; default: val2017")
    add(
        "--annotations",
        metavar="FILE",
        help="annotation file of a split, relative to root; {split} stands for the split; default: "
        "annotations/instances_{split}.json",
    )
    add("--images", default="{split}", metavar="FOLDER", help="images of a split, relative to root; default: {split}")
    add_orientation(add)


def add_orientation(add: Callable[..., Any]) -> None:
    """Whether photographs are turned upright."""
    add(
        "--orientation",
        choices=("upright", "stored"),
        default="upright",
        help="upright: turn images by their EXIF orientation, as viewers and label tools do; stored: take them as "
        "stored. Where the annotated size fits only one, that one is taken; default: upright",
    )


def add_workers(parser: argparse.ArgumentParser, *, default: int, least: int = 0) -> None:
    """How many processes or threads read images."""
    text = f"how many read images at the same time; default: {default}"
    parser.add_argument("--workers", type=at_least(least), default=default, metavar="N", help=text)


def add_batch_size(parser: argparse.ArgumentParser, *, default: int, note: str) -> None:
    """How many images the detector takes at a time, and what follows from it."""
    text = f"images at a time; {note}; default: {default}"
    parser.add_argument("--batch_size", type=at_least(1), default=default, metavar="N", help=text)


def add_output(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Where to write."""
    parser.add_argument("--output", metavar="PATH", help=f"where to write; default: {default}")


def add_min_score(parser: argparse.ArgumentParser, *, effect: str, kind: Callable[[str], Any] = score) -> None:
    """The least score that counts, and where."""
    text = f"least score, 0 to 1, {effect}; default: 0.5"
    parser.add_argument("--min_score", type=kind, default=0.5, metavar="S", help=text)


def add_speed(parser: argparse.ArgumentParser, *, what: str) -> None:
    """How many times something is timed, and what."""
    text = f"also measure times, {what}; default: 0"
    parser.add_argument("--speed", type=at_least(0), default=0, metavar="N", help=text)
