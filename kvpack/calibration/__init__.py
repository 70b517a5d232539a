"""Learns from captures of a corpus what calibrated codecs need, once a model: the ``.kvprofile``."""

from kvpack.calibration.corpus import CorpusOptions, Sample, collect
from kvpack.calibration.prediction import PredictorOptions
from kvpack.calibration.run import SECTIONS, FisherOptions, calibrate, metadata

__all__ = [
    "SECTIONS",
    "CorpusOptions",
    "FisherOptions",
    "PredictorOptions",
    "Sample",
    "calibrate",
    "collect",
    "metadata",
]
