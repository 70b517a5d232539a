"""Measures what compression lost, without the model: reconstruction error and attention fidelity."""

from kvpack.fidelity.attention import Attention
from kvpack.fidelity.reconstruction import Reconstruction
from kvpack.fidelity.report import LayerReport, Report, compare

__all__ = ["Attention", "LayerReport", "Reconstruction", "Report", "compare"]
