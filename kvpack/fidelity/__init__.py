"""How near a reconstructed cache is to the original: tensor error and attention fidelity, without the model.

``docs/fidelity.md`` explains every figure.
"""

from kvpack.fidelity.attention import Attention
from kvpack.fidelity.meter import AttentionMeter, measure_attention
from kvpack.fidelity.reconstruction import Reconstruction, measure_reconstruction
from kvpack.fidelity.report import compare
from kvpack.fidelity.source import CacheReader
from kvpack.fidelity.summary import Extras, LayerReport, Report, check

__all__ = [
    "Attention",
    "AttentionMeter",
    "CacheReader",
    "Extras",
    "LayerReport",
    "Reconstruction",
    "Report",
    "check",
    "compare",
    "measure_attention",
    "measure_reconstruction",
]
