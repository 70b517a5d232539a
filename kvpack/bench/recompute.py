"""Computes a capture's cache again from its tokens, which is what replay does, and counts what that takes.

The row ``recompute`` has the bytes of the tokens as 32-bit integers and the seconds of running the model over them. It
is no file: it says how small and how slow replay is at its simplest, and stands in for the codec ``replay`` where a
bench has no such row. Its cache is judged like a codec's, so that the row also says whether this machine makes the
capture's bits again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvpack.bench.bounds import Simulated
from kvpack.bench.results import RECOMPUTE
from kvpack.cache.flops import Network, network_of_capture
from kvpack.cache.metadata import parse_metadata
from kvpack.capture import Model
from kvpack.capture.run import parameters, run_steps
from kvpack.errors import FormatError
from kvpack.fidelity import CacheReader
from kvpack.formats.records import layer_tensors, token_ids
from kvpack.numerics.floats import TORCH_NAMES, Bits, from_torch

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values ``[H, T, D]`` of every layer, in the model's dtype, on its device."""


@dataclass(frozen=True)
class Recompute:
    """The subject of the row ``recompute``."""

    name: str = RECOMPUTE


def tokens_of(capture: CacheReader) -> list[int]:
    """Return the capture's token ids.

    Raises:
        FormatError: The capture has none.

    """
    tokens = token_ids(capture)
    if tokens is None:
        raise FormatError("the capture has no tokens: its cache cannot be computed again")
    return [int(token) for token in tokens]


def schedule_of(capture: CacheReader) -> list[int]:
    """Return how many tokens each of the runs took that made the capture: prefill chunks, then one for a decode step.

    Where the capture does not say, or says something that does not add up to its tokens, it is one prefill.
    """
    count = len(tokens_of(capture))
    schedule = parse_metadata(capture.metadata).schedule_of(count)
    return list(schedule.steps()) if schedule is not None else [count]


def run_schedule(model: Model, tokens: Sequence[int], runs: Sequence[int]) -> Layers:
    """Run the model over ``tokens``, as many at a time as ``runs`` says, and return its cache."""
    return [(layer.keys[0], layer.values[0]) for layer in run_steps(model, tokens, runs).layers]


def as_reader(capture: CacheReader, layers: Layers) -> Simulated:
    """Return the capture with other keys and values, which are rounded to its dtype where theirs is another."""
    replaced: dict[str, Bits] = {}
    elements = 0
    for names, pair in zip(layer_tensors(capture).values(), layers, strict=True):
        for name, tensor in zip((names["keys"], names["values"]), pair, strict=True):
            dtype: torch.dtype = getattr(torch, TORCH_NAMES[capture.tensors[name].dtype])
            replaced[name] = from_torch(tensor.to("cpu", dtype).contiguous())
            elements += replaced[name].size
    size = sum(bits.nbytes for bits in replaced.values())
    return Simulated(capture.tensors, capture.metadata, replaced, capture, 8 * size / elements)


def recompute(model: Model, capture: CacheReader) -> tuple[Simulated, float]:
    """Compute the cache again by the capture's schedule; return it, and the seconds of the second of two runs.

    The seconds end with the cache in the memory of the model's device: no file is written.
    """
    tokens, runs = tokens_of(capture), schedule_of(capture)
    seconds = 0.0
    for _ in range(2):
        _finish(model)
        start = time.perf_counter()
        layers = run_schedule(model, tokens, runs)
        _finish(model)
        seconds = time.perf_counter() - start
    return as_reader(capture, layers), seconds


def _finish(model: Model) -> None:
    """Wait until the GPU, if the model is on one, has done all that it was given."""
    if model.network.device.type == "cuda":
        torch.cuda.synchronize(model.network.device)


def network_of(model: Model, capture: CacheReader) -> Network:
    """Return what decides how many operations the model takes: by the capture's metadata, else by counting its weights.

    Learned positions, biases and norms count as if every token were multiplied by them.
    """
    found = network_of_capture(parse_metadata(capture.metadata))
    if found is not None:
        return found
    counted = parameters(model)
    keys = next(iter(layer_tensors(capture).values()))["keys"]
    config = model.config
    return Network(
        layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
        head_dim=capture.tensors[keys].shape[2],
        weights=counted["parameters"] - counted["embedding_parameters"],
        output_head=config.vocab_size * config.hidden_size,
    )


def token_bytes(capture: CacheReader) -> int:
    """Return the size of the capture's tokens as 32-bit integers."""
    return len(tokens_of(capture)) * np.dtype(np.int32).itemsize
