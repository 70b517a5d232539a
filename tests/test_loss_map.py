"""The errors by ranges of tokens, against whole rows and whole tensors, computed here at once."""

from __future__ import annotations

import json
from math import inf
from typing import Any

import numpy as np
import pytest
from test_fidelity import Source, cache, noisy

from kvpack.fidelity import compare
from kvpack.fidelity.map import Bins, LossMap

TOKENS = 45


def mapped(original: Any, other: Any, bins: int = 8) -> LossMap:
    loss = compare(Source(original), Source(other), bins=bins).loss
    assert loss is not None
    return loss


def softmax(scores: Any) -> Any:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("tokens", "most", "width", "count"), [(45, 8, 6, 8), (7, 64, 1, 7), (64, 64, 1, 64), (0, 4, 1, 0)]
)
def test_bins_hold_every_token_once(tokens: int, most: int, width: int, count: int) -> None:
    bins = Bins.of(tokens, most)
    assert (bins.width, bins.count) == (width, count)
    sums = np.zeros(count)
    for first in range(0, tokens, 5):
        bins.add(sums, first, np.arange(first, min(first + 5, tokens), dtype=float))
    assert sums.tolist() == [sum(range(i * width, min((i + 1) * width, tokens))) for i in range(count)]


def test_tensor_errors_are_those_of_slices() -> None:
    original = cache(layers=2, tokens=TOKENS)
    other = noisy(original)
    loss = mapped(original, other)
    for layer in loss.layers:
        for what, found in (("keys", layer.keys), ("values", layer.values)):
            x, y = (one[f"layers.{layer.index}.{what}"].astype(float) for one in (original, other))
            cuts = [slice(6 * i, 6 * i + 6) for i in range(8)]
            expected = [((x[:, cut] - y[:, cut]) ** 2).sum() / (x[:, cut] ** 2).sum() for cut in cuts]
            assert found == pytest.approx(expected)


def test_attention_is_that_of_whole_rows() -> None:
    original = cache(layers=1, tokens=TOKENS)
    other = noisy(original)
    found = mapped(original, other).layers[0].attention
    assert found is not None
    queries, positions = original["queries.0"].astype(float), original["query_positions"]
    group = len(queries) // len(original["layers.0.keys"])
    moved, seen = np.zeros(8), np.zeros(8)
    error, energy = {}, {}
    for head, probes in enumerate(queries):
        for query, position in zip(probes, positions.tolist(), strict=True):
            outputs, weights = [], []
            for one in (original, other):
                keys, values = (
                    one[f"layers.0.{what}"][head // group, : position + 1].astype(float) for what in ("keys", "values")
                )
                weights.append(softmax(0.125 * keys @ query))
                outputs.append(weights[-1] @ values)
            for i in range(8):
                if position >= 6 * i:
                    cut = slice(6 * i, 6 * i + 6)
                    moved[i] += abs(weights[0][cut].sum() - weights[1][cut].sum())
                    seen[i] += 1
            energy[position] = energy.get(position, 0) + (outputs[0] ** 2).sum()
            error[position] = error.get(position, 0) + ((outputs[0] - outputs[1]) ** 2).sum()
    assert seen[0]
    assert found.moved[seen > 0] == pytest.approx(moved[seen > 0] / seen[seen > 0])
    assert np.isnan(found.moved[seen == 0]).all()
    groups = [g.tolist() for g in np.array_split(np.unique(positions), 8) if g.size]
    assert found.last.tolist() == [g[-1] for g in groups]
    expected = [(sum(error[p] for p in g) / sum(energy[p] for p in g)) ** 0.5 for g in groups]
    assert found.output == pytest.approx(expected)


def test_the_map_does_not_change_the_figures_and_agrees_with_them() -> None:
    original = cache(layers=3, tokens=TOKENS)
    other = noisy(original)
    plain, with_map = (compare(Source(original), Source(other), bins=bins) for bins in (0, 8))
    assert plain.loss is None
    assert plain.layers == with_map.layers
    assert plain.to_json()["map"] is None
    document = json.loads(json.dumps(with_map.to_json()["map"], allow_nan=False))
    assert (document["tokens"], document["bin_tokens"], len(document["layers"])) == (TOKENS, 6, 3)
    one = compare(Source(original), Source(other), bins=1)  # a single range is the whole
    assert one.loss is not None
    for layer, loss in zip(one.layers, one.loss.layers, strict=True):
        assert loss.keys == pytest.approx([layer.keys.nmse])
        assert loss.values == pytest.approx([layer.values.nmse])
        assert layer.attention is not None
        assert loss.attention is not None
        assert loss.attention.output == pytest.approx([layer.attention.output_error])


def test_an_exact_cache_has_no_error_anywhere() -> None:
    original = cache(layers=1, tokens=TOKENS)
    layer = mapped(original, original).layers[0]
    assert layer.attention is not None
    assert not layer.keys.any()
    assert not layer.values.any()
    assert not np.nan_to_num(layer.attention.moved).any()
    assert not layer.attention.output.any()


def test_a_change_of_one_token_shows_where_it_is() -> None:
    original = cache(layers=1, tokens=TOKENS)
    other = {name: array.copy() for name, array in original.items()}
    other["layers.0.keys"][:, 20] += 3
    layer = mapped(original, other).layers[0]
    assert np.flatnonzero(layer.keys).tolist() == [20 // 6]
    assert not layer.values.any()
    assert layer.attention is not None
    assert int(np.nanargmax(layer.attention.moved)) == 20 // 6


def test_what_is_not_finite_is_infinite_only_where_it_is() -> None:
    original = cache(layers=1, tokens=TOKENS)
    other = {name: array.copy() for name, array in original.items()}
    other["layers.0.values"][0, 30, 0] = np.nan
    original["layers.0.keys"][0, 2, 0] = other["layers.0.keys"][0, 2, 0] = inf  # the same on both sides is no error
    report = compare(Source(original), Source(other), bins=8)
    assert report.loss is not None
    layer = report.loss.layers[0]
    assert np.flatnonzero(np.isinf(layer.values)).tolist() == [30 // 6]
    assert not layer.keys.any()
    document = report.to_json()
    assert document["map"]["layers"][0]["values_nmse"][5] is None
    assert "map.layers[0].values_nmse[5]" in document["infinite"]


def test_layers_without_probes_or_tokens_have_empty_maps() -> None:
    original = cache(layers=2, tokens=TOKENS)
    del original["queries.1"]
    loss = mapped(original, original)
    assert loss.layers[0].attention is not None
    assert loss.layers[1].attention is None
    assert loss.to_json()["layers"][1]["attention_moved"] is None
    assert mapped({}, {}).layers == ()
