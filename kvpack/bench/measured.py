"""Measures on one capture what :mod:`kvpack.bench.claims` computes from a shape: real files, and their price."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvpack.bench.claims import Basis, Line
from kvpack.bench.coding import can_replay, needs_model, through_file
from kvpack.bench.recompute import network_of, recompute, token_bytes, tokens_of
from kvpack.bench.results import REPLAY
from kvpack.capture import Model
from kvpack.capture.entropy import token_bits
from kvpack.codecs.protocol import Need
from kvpack.codecs.recipes import codec_named
from kvpack.errors import FormatError, naming
from kvpack.fidelity.model import require_weights
from kvpack.formats.records import layer_tensors
from kvpack.formats.source import Capture
from kvpack.profiles import Profile

CHOSEN = ("lossless", "turboquant-3", "fisher-5", REPLAY)
"""The codecs whose files are measured; calibrated ones only where a profile is given, replay where the model can."""

Progress = Callable[[int, int], None]


def measured_lines(
    path: Path, model: Model, profile: Profile | None, turboquant_bits: float, progress: Progress | None = None
) -> list[Line]:
    """Return the lines of the capture ``path``. Bits are those of whole ``.kvp`` files without probes, per token.

    ``turboquant_bits`` are the bits per element of the TurboQuant that ratios refer to. The prefill's seconds are
    measured with ``model`` on its device, by the capture's schedule.

    Raises:
        MismatchError: The capture is of another model.
        FormatError: The capture has no tokens, or no keys and values.

    """
    capture = Capture.open(path)
    with naming(str(path)):
        require_weights(model, capture)
    count = len(tokens_of(capture))
    tensors = [capture.tensors[name] for names in layer_tensors(capture).values() for name in names.values()]
    if not tensors:
        raise FormatError(f"{path}: no layers.N.keys or layers.N.values")
    elements, size = sum(spec.elements for spec in tensors), sum(spec.nbytes for spec in tensors)
    raw, each = 8 * size / count, elements // count
    basis = Basis(f"{model.name}, {count} tokens", each, raw, each * turboquant_bits)
    codecs = [
        codec for codec in map(codec_named, CHOSEN) if profile is not None or Need.PROFILE not in codec.traits.needs
    ]
    if not can_replay(path, model):
        codecs = [codec for codec in codecs if not needs_model(codec)]
    steps = len(codecs) + 2
    network = network_of(model, capture)
    prefill = network.prefill(count) / count
    _, seconds = recompute(model, capture)
    _report(progress, 1, steps)
    table = [
        basis.line("raw", raw, "measured"),
        basis.line(f"TurboQuant, {turboquant_bits:g} bits per element", basis.turboquant_bits, "computed"),
    ]
    for done, codec in enumerate(codecs):
        bits = 8 * through_file(path, codec, profile, model).size / count
        if needs_model(codec):
            table.append(basis.replay(codec.name, bits, "measured", prefill, seconds))
        else:
            table.append(basis.line(codec.name, bits, "measured"))
        _report(progress, done + 2, steps)
    bits = 8 * token_bytes(capture) / count
    table.append(basis.replay("tokens as 32-bit integers, replayed", bits, "measured", prefill, seconds))
    entropy, _ = token_bits(model, tokens_of(capture))
    both = (network.prediction(count) + network.prefill(count)) / count
    table.append(basis.replay("tokens by their entropy, replayed", entropy, "measured", both, seconds))
    _report(progress, steps, steps)
    return table


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress:
        progress(done, total)
