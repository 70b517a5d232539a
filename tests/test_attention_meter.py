"""Attention measured window by window against the same figures computed from whole rows."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvpack.errors import FormatError
from kvpack.fidelity import Attention, AttentionMeter, measure_attention
from kvpack.fidelity import meter as meter_module
from kvpack.fidelity.attention import RowFigures
from kvpack.fidelity.softmax import TOP_K, OnlineAttention

Floats = NDArray[Any]
Pair = tuple[Floats, Floats]


def log_softmax(row: Floats, keys: Floats) -> Floats:
    logits = keys.astype(np.float64) @ row
    logits -= logits.max()
    return logits - np.log(np.exp(logits).sum())


def best(log_p: Floats) -> set[int]:
    """The most-attended tokens; of equal ones the earlier."""
    return set(np.argsort(-log_p, kind="stable")[:TOP_K].tolist())


def whole_row(row: Floats, original: Pair, other: Pair) -> tuple[float, float, float, float] | None:
    """KL, overlap, energy and error energy of one scaled query over the tokens it sees; None if it is left out."""
    log_p, log_q = (log_softmax(row, keys) for keys, _ in (original, other))
    p = np.exp(log_p)
    output, output_hat = p @ original[1].astype(np.float64), np.exp(log_q) @ other[1].astype(np.float64)
    kl = max(float(p @ np.subtract(log_p, log_q, out=np.zeros_like(p), where=p > 0)), 0.0)
    energy, error = float((output**2).sum()), float(((output - output_hat) ** 2).sum())
    if not np.isfinite(energy) or not np.isfinite(p.sum()):
        return None
    if not np.isfinite(error) or not np.isfinite(log_q.max()):
        return inf, 0.0, energy, inf
    overlap = len(best(log_p) & best(log_q)) / TOP_K if len(p) > TOP_K else 1.0
    return kl, overlap, energy, error


def whole_rows(queries: Floats, positions: Floats, original: Pair, other: Pair, scale: float) -> Attention:
    """What the meter measures, by whole rows of attention."""
    rows, group = [], len(queries) // len(original[0])
    with np.errstate(all="ignore"):
        for head, probes in enumerate(queries.astype(np.float64) * scale):
            for probe, position in zip(probes, positions, strict=True):
                seen = [tuple(a[head // group, : position + 1] for a in pair) for pair in (original, other)]
                rows.append(whole_row(probe, *seen))
    columns = np.array([row for row in rows if row is not None], np.float64).reshape(-1, 4).T
    return RowFigures(*columns).summarise(len(rows))


def streamed(
    lengths: list[int], queries: Floats, positions: Floats, original: Pair, other: Pair, scale: float
) -> Attention:
    """The meter's figures over windows of these lengths in turn."""
    meter = AttentionMeter(queries, positions, scale, original[0].shape, original[1].shape)
    first, step = 0, 0
    while first < original[0].shape[1]:
        cut = slice(first, first + lengths[step % len(lengths)])
        ours = [a[:, cut] for a in original]
        theirs = [mine if np.array_equal(mine, a[:, cut]) else a[:, cut] for mine, a in zip(ours, other, strict=True)]
        meter.add(first, *ours, *theirs)
        first, step = cut.stop, step + 1
    return meter.result()


def assert_close(got: Attention, expected: Attention, size: float = 1.0) -> None:
    """The same up to rounding, where scores are of about ``size``."""
    assert (got.rows, got.skipped) == (expected.rows, expected.skipped)
    noise = 1e-13 * (1 + size)
    assert got.kl == pytest.approx(expected.kl, rel=1e-12, abs=noise)
    assert got.kl_p99 == pytest.approx(expected.kl_p99, rel=1e-12, abs=noise)
    assert got.topk_overlap == pytest.approx(expected.topk_overlap, rel=1e-12)
    assert got.energy == pytest.approx(expected.energy, rel=1e-12 * (1 + size))
    assert got.error_energy == pytest.approx(expected.error_energy, rel=1e-12, abs=noise * expected.energy)


def case(seed: int, tokens: int, heads: tuple[int, int], probes: int, dims: tuple[int, int] = (6, 5)) -> Any:
    """Random queries, positions, and keys and values of a layer."""
    rng = np.random.default_rng(seed)
    keys, values = (rng.normal(size=(heads[0], tokens, d)).astype(np.float32) for d in dims)
    queries = rng.normal(size=(heads[1], probes, dims[0])).astype(np.float32)
    return queries, rng.integers(0, tokens, probes), (keys, values)


def spoil(pair: Pair, spots: list[tuple[int, int, float]]) -> Pair:
    """The pair with some elements replaced: which of the two, a place in it, and the new element."""
    copies = tuple(part.copy() for part in pair)
    for which, place, element in spots:
        copies[which].reshape(-1)[place % copies[which].size] = element
    return copies[0], copies[1]


SPOTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2000), st.sampled_from([nan, inf, -inf])), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 70),
    heads=st.sampled_from([(1, 1), (2, 6), (3, 3), (1, 4)]),
    probes=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    noise=st.sampled_from([0.0, 1e-6, 0.1, 3.0]),
    from_token=st.integers(0, 70),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    ours=SPOTS,
    theirs=SPOTS,
    block=st.sampled_from([1, 64, 1 << 20]),
)
def test_windows_give_the_figures_of_whole_rows(
    seed: int,
    tokens: int,
    heads: tuple[int, int],
    probes: int,
    lengths: list[int],
    noise: float,
    from_token: int,
    scale: float,
    ours: list[tuple[int, int, float]],
    theirs: list[tuple[int, int, float]],
    block: int,
) -> None:
    """The copies are exact up to a token, so that the two begin to differ within or between windows."""
    queries, positions, original = case(seed, tokens, heads, probes)
    rng = np.random.default_rng(seed + 1)
    other = tuple(part.copy() for part in original)
    for part in other:
        part[:, from_token:] += noise * rng.normal(size=part[:, from_token:].shape).astype(np.float32)
    original = spoil(original, ours)
    pair = spoil((other[0], other[1]), ours + theirs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meter_module, "BLOCK", block)
        got = streamed(lengths, queries, positions, original, pair, scale)
    assert_close(got, whole_rows(queries, positions, original, pair, scale), 60 * scale)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_of_equal_scores_the_earlier_tokens_count(seed: int, tokens: int, lengths: list[int]) -> None:
    """Small whole numbers give exact scores with many ties."""
    rng = np.random.default_rng(seed)
    queries, positions, _ = case(seed, tokens, (2, 4), 4)
    queries = rng.integers(-2, 3, queries.shape).astype(np.float32)
    original, other = ([rng.integers(-1, 2, (2, tokens, 6)).astype(np.float32) for _ in range(2)] for _ in range(2))
    given_ = (queries, positions, (original[0], original[1]), (other[0], other[1]), 1.0)
    assert_close(streamed(lengths, *given_), whole_rows(*given_), 10)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_an_exact_copy_has_no_error_at_all(seed: int, tokens: int, lengths: list[int]) -> None:
    queries, positions, original = case(seed, tokens, (2, 6), 3)
    figures = streamed(lengths, queries, positions, original, original, 2.0)
    assert (figures.kl, figures.kl_p99, figures.error_energy, figures.topk_overlap) == (0, 0, 0, 1)
    values = original[1] + np.float32(0.5)
    figures = streamed(lengths, queries, positions, original, (original[0], values), 2.0)
    assert (figures.kl, figures.kl_p99, figures.topk_overlap) == (0, 0, 1)
    assert figures.error_energy > 0


@pytest.mark.parametrize("lengths", [[8], [1], [20], [5, 3]])
def test_positions_at_the_borders_of_windows(lengths: list[int]) -> None:
    """Tokens behind every position are not looked at, and may be anything."""
    queries, _, original = case(3, 40, (2, 4), 6)
    positions = np.array([0, 7, 8, 15, 16, 23])
    other = original[0] + np.float32(0.1), original[1] * np.float32(0.9)
    for part in other:
        part[:, 24:] = nan
    assert_close(
        streamed(lengths, queries, positions, original, other, 1.0),
        whole_rows(queries, positions, original, other, 1.0),
    )


@pytest.mark.parametrize("lengths", [[2], [9], [40]])
def test_a_hidden_token_spoils_no_row_whatever_the_windows(lengths: list[int]) -> None:
    queries, _, original = case(4, 30, (1, 1), 2)
    for which in (0, 1):
        spoilt = spoil(original, [])
        spoilt[which][:, 20] = nan
        figures = streamed(lengths, queries, np.array([10, 25]), original, spoilt, 1.0)
        assert (figures.rows, figures.skipped, figures.topk_overlap) == (2, 0, 0.5)
        figures = streamed(lengths, queries, np.array([10, 25]), spoilt, original, 1.0)
        assert (figures.rows, figures.skipped, figures.kl) == (1, 1, pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize("lengths", [[1], [2], [3]])
@pytest.mark.parametrize("greater", [1.0, 2000.0])
def test_a_token_that_is_lost_altogether(lengths: list[int], greater: float) -> None:
    """Its KL is infinite if it has a weight in the end, and is nothing where a later score makes that 0."""
    query = np.ones((1, 1, 1), np.float32)
    keys = np.array([[[1.0], [0.0], [greater]]], np.float32)
    other = keys.copy()
    other[0, 0] = -inf
    values = np.ones((1, 3, 1), np.float32)
    figures = streamed(lengths, query, np.array([2]), (keys, values), (other, values), 1.0)
    assert figures.kl == (inf if greater == 1.0 else 0.0)
    assert_close(figures, whole_rows(query, np.array([2]), (keys, values), (other, values), 1.0))


def test_scores_far_from_zero() -> None:
    """Neither large scores nor a peak that rises from window to window spoils the sums."""
    queries, positions, (keys, values) = case(5, 60, (1, 2), 4)
    steep = keys + np.linspace(-300, 300, 60, dtype=np.float32)[None, :, None]
    for original in (steep, -steep):
        pair = (original, values), (original + np.float32(0.01) * keys, values)
        got = streamed([7, 2], queries, positions, *pair, 1.0)
        assert_close(got, whole_rows(queries, positions, *pair, 1.0), 2000)


def test_windows_come_in_order_and_whole() -> None:
    queries, _, original = case(6, 20, (1, 1), 1)
    meter = AttentionMeter(queries, np.array([9]), 1.0, *(part.shape for part in original))
    first, later = ([part[:, cut] for part in original] for cut in (slice(0, 8), slice(9, 20)))
    meter.add(0, *first, *first)
    with pytest.raises(ValueError, match="token 8 is next, not 9"):
        meter.add(9, *later, *later)
    with pytest.raises(FormatError, match="only 8 of the 10 tokens"):
        meter.result()


def test_memory_does_not_grow_with_tokens() -> None:
    queries, positions, original = case(7, 3000, (2, 4), 3)
    state = AttentionMeter(queries, positions, 1.0, *(part.shape for part in original))
    state.add(0, *original, *(part + np.float32(0.1) for part in original))
    for part in (state._ours, state._theirs):
        assert isinstance(part, OnlineAttention)
        assert sum(array.nbytes for array in vars(part).values()) == 8 * (4 * 3) * (1 + 1 + 5 + TOP_K + TOP_K)


def test_all_tokens_at_once_are_one_window() -> None:
    queries, positions, original = case(8, 50, (2, 4), 3)
    other = (original[0] * np.float32(1.1), original[1])
    whole = measure_attention(queries, positions, original, other, 0.5)
    assert_close(whole, streamed([9], queries, positions, original, other, 0.5))
