"""Learns what calibrated codecs need from the caches of a corpus, once per model; the result is a ``.kvprofile``."""

from kvpack.calibration.corpus import CorpusOptions, Sample, collect
from kvpack.calibration.prediction import PredictorOptions
from kvpack.calibration.run import FisherOptions, calibrate, metadata
from kvpack.calibration.work import Work

__all__ = [
    "CorpusOptions",
    "FisherOptions",
    "PredictorOptions",
    "Sample",
    "Work",
    "calibrate",
    "collect",
    "metadata",
]
