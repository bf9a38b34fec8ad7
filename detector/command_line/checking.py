"""What ``tools/check.py`` does."""

import argparse
import io
import sys
from functools import partial
from typing import Any

from detector.command_line.arguments import read_yaml
from detector.data.checking import check_dataset, report
from detector.errors import DataError, UsageError, UserError, in_a_sentence, sentence
from detector.models.anchors import anchor_advice
from detector.models.config import DetectorConfig

# Settings of a detector, by configuration and by flag.
ANCHORS = ("min_size", "max_size", "anchor_sizes", "aspect_ratios")


def detector_settings(options: argparse.Namespace) -> DetectorConfig:
    """Of the configuration and the flags, those that decide which anchors an object meets."""
    found: Any = {}
    if options.config is not None:
        found = read_yaml(options.config)
        for name in ("model", "detector"):
            if not isinstance(found, dict) or not isinstance(found.setdefault(name, {}), dict):
                raise DataError(f"{options.config}: not the settings of a training: {name} must be a dict")
            found = found[name]
    found |= {name: value for name in ANCHORS if (value := getattr(options, name)) is not None}
    return DetectorConfig(**{name: value for name, value in found.items() if name in ANCHORS})


def check(options: argparse.Namespace) -> int:
    """Print the report. Returns the exit code."""
    with in_a_sentence():
        try:
            settings = detector_settings(options)
        except (UserError, OSError) as error:
            raise UsageError(sentence(error)) from None
        if options.other_images is not None and options.other is None:
            raise UsageError("--other_images needs --other")
        return _report_on(options, settings)


def _report_on(options: argparse.Namespace, settings: DetectorConfig) -> int:
    findings = check_dataset(
        options.annotations,
        options.images,
        decode=not options.quick,
        workers=options.workers,
        other=options.other,
        other_images=options.other_images,
        anchor_advice=partial(anchor_advice, settings=settings),
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names in letters that the terminal lacks
    if options.images is None:
        print("No image was looked at: that takes --images DIR.\n")
    elif options.quick:
        print("No image was opened: that takes a run without --quick.\n")
    if options.other is not None and (options.quick or None in (options.images, options.other_images)):
        print("Of the other split only names were compared: more takes --images and --other_images, without --quick.\n")
    print(report(findings, examples=options.examples))
    levels = {problem.level for problem in findings.problems}
    return 2 if "error" in levels else 1 if "flaw" in levels else 0
