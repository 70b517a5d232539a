"""Tiny sound files that fuzzing begins with: one of every codec, with the profile or the model that it needs."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from made_model import MadeModel, write_made
from profiles import arrays_for

from kvpack import jobs
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.protocol import Codec, Need
from kvpack.codecs.recipes import CODECS
from kvpack.codecs.replay import ReplayCodec
from kvpack.engine import CpuEngine
from kvpack.formats.safetensors import TensorFile
from kvpack.formats.source import Capture
from kvpack.kvp import Container
from kvpack.profiles import Profile, write_profile

LAYERS, HEADS, DIMS, VOCABULARY = 2, 1, 8, 64
REPLAYS = ("replay-fast", "replay-model")
NAMES = (*CODECS, *REPLAYS)
"""The name of every codec. That of ``replay`` stands once for each way to code tokens."""


@dataclass(frozen=True)
class Sample:
    """A sound ``.kvp`` file, with what decoding it needs."""

    name: str
    data: bytes
    profile: Profile | None
    model: MadeModel | None

    def open(self, data: bytes | bytearray | None = None, profile: Profile | None = None) -> jobs.KvpFile:
        """Open the file, or one that was made from it."""
        container = Container(memoryview(self.data if data is None else data))
        return jobs.KvpFile(container, profile or self.profile, model=self.model)


def metadata(tokens: int) -> dict[str, str]:
    """Metadata as a capture has them."""
    documents: dict[str, Any] = {
        "model": {
            "name": "made-up", "weights_sha256": "5" * 64, "head_dim": DIMS, "num_hidden_layers": LAYERS,
            "num_attention_heads": 2, "hidden_size": 16, "vocab_size": VOCABULARY, "parameters": 9000,
            "embedding_parameters": 1024,
        },
        "rope": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0},
        "attention": {"scale": [0.35, 0.35], "implementation": "sdpa"},
        "schedule": {"prefill": [tokens - 2], "decode": 2},
        "needles": [{"question": "who", "answer": "me", "position": 3}],
        "dtype": "bfloat16",
    }  # fmt: skip
    return {name: json.dumps(document) for name, document in documents.items()}


def capture(tokens: int, *, probes: bool = False) -> Capture:
    """A capture of two layers with one head of eight dimensions, with all that captures may record if ``probes``."""
    rng = np.random.default_rng(tokens)

    def halves(*shape: int) -> tuple[str, np.ndarray]:
        return "BF16", (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    names = [f"layers.{layer}.{kind}" for layer in range(LAYERS) for kind in ("keys", "values")]
    tensors = {name: halves(HEADS, tokens, DIMS) for name in names}
    tensors["tokens"] = ("I32", rng.integers(0, VOCABULARY, tokens).astype(np.uint32))
    if probes:
        tensors |= {f"queries.{layer}": halves(2, 3, DIMS) for layer in range(LAYERS)}
        tensors["query_positions"] = ("I64", np.array([1, 4, tokens - 1], np.uint64))
        tensors["attention_mass"] = ("F32", rng.random((LAYERS, 2, tokens), np.float32).view(np.uint32))
    return Capture.of("sample", tensors, metadata(tokens))


def capture_bytes(found: Capture) -> bytes:
    """The capture as a file."""
    return bytes(found.file.source.read(0, found.file.source.size))


@cache
def profile_arrays() -> dict[str, np.ndarray]:
    """Arrays of every calibrated codec for the captures above, of few tokens so that the file stays small."""
    arrays = dict(arrays_for(LAYERS, HEADS, DIMS))
    arrays["fisher.order"] = arrays["fisher.order"][:VOCABULARY]
    return arrays


@cache
def sound_profile() -> Profile:
    """The profile of these arrays."""
    sink = io.BytesIO()
    write_profile(profile_arrays(), {"model": {"name": "made-up"}}, sink)
    return Profile(TensorFile.of("sample.kvprofile", memoryview(sink.getvalue())), Path("sample.kvprofile"), "0" * 64)


def _tokens_for(codec: Codec) -> int:
    """As few tokens as leave some that are coded, beside those that the codec keeps whole."""
    keeps = [chain.keep for chain in (codec.keys, codec.values)] if isinstance(codec, ChainCodec) else []
    return max([12, *(keep.first + keep.last + max(keep.group, 8) for keep in keeps if keep is not None)])


@cache
def sample(name: str) -> Sample:
    """The file of a codec of :data:`NAMES`."""
    sink = io.BytesIO()
    if name in REPLAYS:
        model = MadeModel()
        with tempfile.TemporaryDirectory() as folder:
            made = write_made(Path(folder) / "made.safetensors", 112)
            codec = ReplayCodec().with_token_coder(name.removeprefix("replay-"))
            jobs.compress(made, sink, codec, model=model, engine=CpuEngine(1))
        return Sample(name, sink.getvalue(), None, model)
    profile = sound_profile() if Need.PROFILE in CODECS[name].traits.needs else None
    jobs.compress(capture(_tokens_for(CODECS[name])), sink, CODECS[name], profile=profile, engine=CpuEngine(1))
    return Sample(name, sink.getvalue(), profile, None)


def samples() -> Iterator[Sample]:
    """Yield the files of all codecs."""
    return map(sample, NAMES)
