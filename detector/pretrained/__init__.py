"""Trained detectors: loading from checkpoints, saved folders and the hub, detection in images, and export."""

from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector
from detector.pretrained.initial_weights import load_initial_weights
from detector.pretrained.loading import load_checkpoint, load_detector

__all__ = ["Detector", "DetectorDescription", "load_checkpoint", "load_detector", "load_initial_weights"]
