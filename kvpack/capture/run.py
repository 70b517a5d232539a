"""Runs prefill chunks and decode steps of a model and collects its KV cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from kvpack import __version__
from kvpack.capture.machine import device_name
from kvpack.capture.model import Model
from kvpack.capture.needles import Needle, plant
from kvpack.capture.probe import Probe, listening
from kvpack.errors import KvpackError, UnsupportedError, UsageError

CAPTURE_VERSION = 1
MASS_WINDOW = 256

IMPLEMENTATION = "sdpa"
"""The attention that captures are computed with: transformers' name of PyTorch's scaled_dot_product_attention."""


@dataclass(frozen=True)
class CaptureOptions:
    """Options of a capture.

    Attributes:
        max_tokens: largest number of tokens of the prompt, or None for the whole text.
        queries: number of probe queries.
        chunk: number of tokens per prefill chunk, or None for one chunk.
        generate: number of greedy decode steps.
        continuation: number of tokens of the text after the prompt that are stored to judge predictions.
        needles: number of facts that are planted in the text.

    """

    max_tokens: int | None = None
    queries: int = 32
    chunk: int | None = None
    generate: int = 0
    continuation: int = 256
    needles: int = 0


@dataclass(frozen=True)
class CapturedCache:
    """A cache on the CPU, with keys and values ``[H_kv, T, D]`` of each layer; see ``docs/capture-format.md``."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    tokens: torch.Tensor
    continuation: torch.Tensor
    attention_mass: torch.Tensor
    queries: list[torch.Tensor]
    query_positions: torch.Tensor
    metadata: dict[str, str] = field(default_factory=dict)


def run(
    model: Model, text: str, options: CaptureOptions, progress: Callable[[int, int], None] | None = None
) -> CapturedCache:
    """Prefill ``text``, decode greedily if the options say so, and return the cache.

    Raises:
        UsageError: The text is empty, it has more tokens than the model has positions, or an option is out of range.
        UnsupportedError: A layer holds something other than plain keys and values.

    """
    ids, continuation, needles = _tokenize(model, text, options)
    return run_tokens(model, ids, options, progress, continuation, needles)


def run_tokens(
    model: Model,
    prompt_ids: list[int],
    options: CaptureOptions,
    progress: Callable[[int, int], None] | None = None,
    continuation: Sequence[int] = (),
    needles: Sequence[Needle] = (),
) -> CapturedCache:
    """Do what :func:`run` does, for token ids instead of a text."""
    ids = torch.tensor([prompt_ids], device=model.network.device)
    prompt = ids.shape[1]
    total = prompt + options.generate
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and total > limit:
        raise UsageError(f"{total} tokens, but the model has {limit} positions: use --max-tokens")
    cache = DynamicCache(config=model.network.config)
    _refuse_unknown_layers(model, cache)
    probe = Probe(probe_positions(total, options.queries), total, min(MASS_WINDOW, total))
    chunks = [min(options.chunk or prompt, prompt - at) for at in range(0, prompt, options.chunk or prompt)]
    with torch.inference_mode(), listening(probe):
        for at, logits in feed(model, ids, chunks, cache):  # noqa: B007 - the last logits are used
            if progress:
                progress(at, total)
        for _ in range(options.generate):
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            ((at, logits),) = feed(model, ids, [1], cache, at)
            if progress:
                progress(at, total)
    _check_recorded(cache, probe)
    layers = range(len(cache.layers))
    return CapturedCache(
        keys=[cache.layers[i].keys[0].cpu().contiguous() for i in layers],
        values=[cache.layers[i].values[0].cpu().contiguous() for i in layers],
        tokens=ids[0].to(torch.int32).cpu(),
        continuation=torch.tensor(continuation, dtype=torch.int32),
        attention_mass=torch.stack([probe.mass[i] for i in layers]).to(torch.float16),
        queries=[torch.cat(probe.queries[i], dim=1).contiguous() for i in layers],
        query_positions=torch.tensor(probe.positions, dtype=torch.int32),
        metadata=_metadata(model, cache, probe, chunks, options, needles),
    )


def feed(
    model: Model, ids: torch.Tensor, steps: Sequence[int], cache: Any, at: int = 0
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run the model over ``ids`` ``[1, N]`` from position ``at`` on, by ``steps`` of so many tokens each.

    Yield after each step the number of tokens in the cache, and the logits ``[1, 1, V]`` at the last of them. A capture
    and its replay both call this, so that they make the same calls.
    """
    for size in steps:
        logits = model.logits(ids[:, at : at + size], cache, logits_to_keep=1)
        at += size
        yield at, logits


def run_steps(
    model: Model,
    tokens: Sequence[int],
    steps: Sequence[int],
    each: Callable[[int, DynamicCache], None] | None = None,
) -> DynamicCache:
    """Run the model over ``tokens`` as :func:`feed` does, without probes, and return its cache on its device.

    ``each`` is called after every step with the number of tokens in the cache, and the cache.
    """
    ids = torch.tensor([list(tokens)], device=model.network.device)
    cache = DynamicCache(config=model.network.config)
    with torch.inference_mode():
        for done, _ in feed(model, ids, steps, cache):
            if each:
                each(done, cache)
    return cache


def prefill(model: Model, ids: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the keys and values ``[H, T, D]`` of every layer from one pass over ``ids``, on the model's device.

    No probe queries are recorded.
    """
    cache = run_steps(model, ids, [len(ids)])
    return [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]


def probe_positions(total: int, count: int) -> list[int]:
    """Return ``count`` positions spread evenly over the second half of ``total`` tokens, including the last token."""
    first = total // 2
    count = min(count, total - first)
    return [total - 1 - (total - 1 - first) * i // max(count - 1, 1) for i in reversed(range(count))]


def _tokenize(model: Model, text: str, options: CaptureOptions) -> tuple[list[int], list[int], list[Needle]]:
    """Return the tokens of the prompt, the tokens that continue it, and the facts planted in it."""
    for name in ("queries", "generate", "continuation", "needles"):
        if getattr(options, name) < 0:
            raise UsageError(f"--{name} cannot be negative")
    if (options.chunk is not None and options.chunk < 1) or (options.max_tokens is not None and options.max_tokens < 1):
        raise UsageError("--chunk and --max-tokens are at least 1")
    ids: list[int] = model.tokenizer(text).input_ids
    if not ids:
        raise UsageError("the text has no tokens")
    prompt, needles = plant(model, ids, options.needles, options.max_tokens)
    used = len(prompt) - sum(len(needle.tokens) for needle in needles)
    following = ids[used : used + options.continuation] if not options.generate else []
    return prompt, following, needles


def _refuse_unknown_layers(model: Model, cache: Any) -> None:
    """Raise an UnsupportedError unless every layer keeps the keys and values of every token."""
    for i, layer in enumerate(cache.layers):
        name = type(layer).__name__
        if name != "DynamicLayer":
            raise UnsupportedError(f"layer {i} of {model.name} is a {name}: kvpack cannot represent it yet")
    if getattr(model.config, "kv_lora_rank", None):
        raise UnsupportedError(
            f"{model.name} caches latents (multi-head latent attention): kvpack cannot represent them yet"
        )


def _check_recorded(cache: Any, probe: Probe) -> None:
    """Raise an UnsupportedError unless attention has read exactly what the cache holds."""
    for i, layer in enumerate(cache.layers):
        if i not in probe.key_shapes:
            raise UnsupportedError(f"layer {i} does not attend through transformers' attention interface")
        held = tuple(layer.keys.shape[1:])
        if held != probe.key_shapes[i] or held[1] != probe.total:
            raise UnsupportedError(f"layer {i} caches {held}, but attention reads {probe.key_shapes[i]}")
    if not cache.layers:
        raise KvpackError("the model has no KV cache")


def _metadata(
    model: Model,
    cache: Any,
    probe: Probe,
    chunks: list[int],
    options: CaptureOptions,
    needles: Sequence[Needle],
) -> dict[str, str]:
    config = model.config
    scales = [probe.scales[i] for i in range(len(cache.layers))]
    key = cache.layers[0].keys
    document: dict[str, Any] = {
        "kvpack_capture_version": CAPTURE_VERSION,
        "model": {
            "name": model.name,
            "architecture": type(model.network).__name__,
            **{name: digest for name, digest in _hashes(model) if digest is not None},
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": key.shape[1],
            "head_dim": key.shape[3],
            "hidden_size": getattr(config, "hidden_size", None),
            "vocab_size": config.vocab_size,
            **parameters(model),
        },
        "rope": getattr(config, "rope_parameters", None) or None,
        "attention": {
            "scale": scales[0] if len(set(scales)) == 1 else scales,
            "mass_window": probe.window,
            "probes": len(probe.positions),
            "implementation": IMPLEMENTATION,
        },
        "layer_classes": [type(layer).__name__ for layer in cache.layers],
        "schedule": {"prefill": chunks, "decode": options.generate},
        "dtype": str(key.dtype).removeprefix("torch."),
        "device": device_name(model.network.device),
        "versions": {
            "kvpack": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if needles:
        document["needles"] = [needle.to_json() for needle in needles]
    return {name: json.dumps(value, sort_keys=True) for name, value in document.items()}


def _hashes(model: Model) -> list[tuple[str, str | None]]:
    identity = model.identity
    return [
        ("weights_sha256", identity.weights_sha256),
        ("config_sha256", identity.config_sha256),
        ("tokenizer_sha256", identity.tokenizer_sha256),
    ]


def parameters(model: Model) -> dict[str, int]:
    """Return the numbers of weights: all of them, and those of the token embedding and the output head.

    Weights that both share count once. The two numbers tell how much a forward pass computes (docs/replay.md).
    """
    network = model.network
    ends = [network.get_input_embeddings(), network.get_output_embeddings()]
    shared = {weight.data_ptr(): weight.numel() for end in ends if end is not None for weight in end.parameters()}
    return {"parameters": sum(p.numel() for p in network.parameters()), "embedding_parameters": sum(shared.values())}
