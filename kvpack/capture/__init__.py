"""Runs a model over a text and saves its KV cache; ``docs/capture-format.md`` specifies the file."""

from kvpack.capture.model import Model, load_model
from kvpack.capture.run import CaptureOptions, CapturedCache, run
from kvpack.capture.write import write_capture

__all__ = ["CaptureOptions", "CapturedCache", "Model", "load_model", "run", "write_capture"]
