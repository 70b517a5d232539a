"""Chains that a file puts together as no writer does: each stage is given what it takes, or the file is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from forge import codec, entry, kvp, stage
from hypothesis import event, given
from hypothesis import strategies as st
from profiles import TINY

from kvpack import jobs
from kvpack.codecs.chain.base import UnrepresentableError
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.chain.entropy.bitpack import packed_size
from kvpack.codecs.chain.pipeline import route_of
from kvpack.codecs.context import DecodeContext
from kvpack.errors import KvpackError
from kvpack.kvp import Container
from kvpack.profiles import Profile

Cli = Callable[..., Any]
ITEM = {"F32": 4, "BF16": 2, "F16": 2, "U64": 8, "U8": 1, "I32": 4, "BOOL": 1, "F64": 8, "C64": 8}
IDENTITY = Profile.open(TINY).identity()
DEAD_ZONE = stage("dead_zone", 2, section="fisher", log_step=0, importance=0)
QUANTIZERS = [
    stage("float_split"), stage("byte_planes"), stage("affine", bits=2, axis="token", group=32),
    stage("affine", bits=8, axis="channel", group=5), stage("lloyd_max", bits=2, prod=True, seed=1),
    stage("lloyd_max", bits=1, prod=True, seed=0), stage("anchor_delta", leading_bins=9, bins=5, leading=7, group=10),
    stage("component_groups", section="kvtc.keys", plan="2"), stage("higgs", bits=3, seed=0), DEAD_ZONE,
    stage("low_rank", log_step=0, importance=0),
]  # fmt: skip
BEFORE = [
    stage("keep", first=4, last=3, group=1), stage("rotation", seed=3), stage("unrope"), stage("merge_heads"),
    stage("klt", section="kvtc.keys"), stage("token_klt", 2, section="fisher"),
    stage("cross_layer", section="aquakv-3.keys"),
]  # fmt: skip
ENTROPY = [stage("bitpack"), stage("rans", 2), stage("scaled_rans"), stage("zstd", level=1), stage("deflate", level=1)]


def opened(data: bytes) -> jobs.KvpFile:
    return jobs.KvpFile(Container(memoryview(data)), Profile.open(TINY))


def test_a_quantizer_of_one_row_that_is_given_eight(cli: Cli, tmp_path: Path) -> None:
    """Seven eighths of the output used to be whatever the process had in memory."""
    source = {f"layers.{i}.keys": entry("F32", [8, 16, 48], i * 24576, (i + 1) * 24576) for i in range(2)}
    planes = [("levels", 5, 8 * 16), ("shifts", 4, 8 * 16), ("coefficients", 16, 8 * 16 * 48)]
    streams = [(name, bytes(packed_size(count, width))) for name, width, count in planes]
    path = tmp_path / "x.kvp"
    path.write_bytes(kvp(source, [codec(DEAD_ZONE, stage("bitpack"))], [(0, 0, streams)] * 2, profile=IDENTITY))
    found = cli("decompress", path, "-D", TINY, "-o", tmp_path / "out")
    assert (found.code, found.err.count("\n")) == (4, 1), found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["U64", "I32", "U8", "BOOL", "F64", "C64"])
@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if q["name"] != "byte_planes"], ids=lambda q: q["name"])
def test_a_dtype_that_no_chain_of_floats_takes(cli: Cli, tmp_path: Path, quantizer: Any, dtype: str) -> None:
    """The output used to have fewer bytes than its header says."""
    path = tmp_path / "x.kvp"
    streams = [("codes", bytes(8))]
    stacked = quantizer["name"] in ("anchor_delta", "low_rank")
    used = codec(quantizer, stage("bitpack"), stacked=stacked)
    path.write_bytes(kvp({"x": entry(dtype, [32], 0, 32 * ITEM[dtype])}, [used], [(0, 0, streams)], profile=IDENTITY))
    found = cli("decompress", path, "-D", TINY, "-o", tmp_path / "out")
    assert (found.code, found.err.count("\n")) == (4, 1), found.err
    assert not (tmp_path / "out").exists()


def poisoned(value: int) -> Callable[..., Any]:
    """``np.empty``, but filled with a byte, as memory that was used before."""

    def empty(shape: Any, dtype: Any = float, *rest: Any, **named: Any) -> Any:
        made = np.zeros(shape, dtype, *rest, **named)
        if made.size and made.flags.c_contiguous:
            made.reshape(-1).view(np.uint8)[:] = value
        return made

    return empty


def decoded(data: bytes, value: int) -> bytes | type[Exception]:
    sink = io.BytesIO()
    with patch.object(np, "empty", poisoned(value)):
        try:
            jobs.decompress(opened(data), sink)
        except KvpackError as error:
            return type(error)
    return sink.getvalue()


def random_streams(file: jobs.KvpFile, rng: np.random.Generator) -> list[list[tuple[str, bytes]]]:
    """For each part of the first window, sound streams of random codes, as its chain would write them."""
    codec, block = file.codecs[0], file.container.windows[0]
    assert isinstance(codec, ChainCodec)
    found: list[list[tuple[str, bytes]]] = [[] for _ in block.parts]
    for run in codec.blocks(block):
        for stack in codec.stacks(block.take(run)):
            parts = block.take(run).take(stack).parts
            chain, array = codec.chain_for(parts[0]), codec.array_of(parts, DecodeContext(file.profile))
            route, before = route_of(chain, array), {}
            for plane in (*route.whole, *route.planes):
                plane = chain.quantizer.scaled(plane, before, route.parts[-1])  # noqa: PLW2901
                codes = rng.integers(0, 1 << min(plane.width, 14), plane.shape).astype(plane.code_dtype)
                before[plane.name] = codes
                if plane.size and plane.width:
                    found[run.start + min(stack)].append((plane.name, chain.entropy.encode(codes, plane)))
    return found


@given(
    st.lists(st.sampled_from(BEFORE), max_size=3),
    st.sampled_from(QUANTIZERS),
    st.sampled_from(ENTROPY),
    st.booleans(),
    st.sampled_from(sorted(ITEM)),
    st.tuples(st.integers(1, 4), st.integers(1, 40), st.sampled_from([1, 2, 48, 64])),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_any_chain_on_any_part_decodes_wholly_or_is_refused(
    before: list[Any], quantizer: Any, entropy: Any, stacked: bool, dtype: str, shape: tuple[int, int, int],
    layers: int, seed: int,
) -> None:  # fmt: skip
    """Whatever the streams hold, nothing but errors of kvpack is raised, and no memory of the process gets out."""
    size = int(np.prod(shape)) * ITEM[dtype]
    names = [f"layers.{i}.{kind}" for i in range(layers) for kind in ("keys", "values")]
    source = {name: entry(dtype, shape, i * size, (i + 1) * size) for i, name in enumerate(names)}
    used = codec(*before, quantizer, entropy, stacked=stacked)
    nothing: list[list[tuple[str, bytes]]] = [[] for _ in names]

    def file(streams: list[list[tuple[str, bytes]]]) -> bytes:
        return kvp(source, [used], [(0, 0, own) for own in streams], profile=IDENTITY)

    try:
        data = file(random_streams(opened(file(nothing)), np.random.default_rng(seed)))
    except (KvpackError, UnrepresentableError):  # such a chain cannot be given such parts
        event("refused")
        data = file(nothing)
    first = decoded(data, 0xA5)
    event(f"{quantizer['name']}: {first if isinstance(first, type) else 'decoded'}")
    assert decoded(data, 0x5A) == first
    if isinstance(first, bytes):
        assert len(first) == opened(data).container.source.file_size
