"""Detectors by name: their settings, their weights, and how they are built."""

from detector.models.build import build_detector
from detector.models.config import DetectorConfig

__all__ = ["DetectorConfig", "build_detector"]
