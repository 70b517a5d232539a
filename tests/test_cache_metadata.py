"""The metadata of captures: what is parsed, and that hostile metadata never raises."""

from __future__ import annotations

import json
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpack.cache.metadata import MAX_DEPTH, CaptureMetadata, NeedleEntry, parse_metadata, parse_value, parse_values

KEYS = ["model", "rope", "attention", "needles"]
HOSTILE = [
    "",
    "{",
    "null",
    "true",
    "7",
    '"text"',
    "[]",
    "[1, null]",
    "{}",
    "[" * 100_000,
    "[" * 500 + "]" * 500,
    '{"a":' * 500 + "1" + "}" * 500,
    "9" * 5000,
    "NaN",
    '"\\ud800"',
    "\ud800",
]


def texts(**documents: Any) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in documents.items()}


def test_a_capture_as_kvpack_writes_it() -> None:
    model = {"name": "tiny", "weights_sha256": "ab" * 32, "head_dim": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    needle = {"question": "The number is ", "answer": "7", "position": 3}
    found = parse_metadata(texts(model=model, rope=rope, attention={"scale": 0.125}, needles=[needle]))
    assert found == CaptureMetadata(model, rope, 0.125, {}, (NeedleEntry("The number is ", "7", 3),))
    assert (found.model_name, found.weights_sha256) == ("tiny", "ab" * 32)
    assert (found.head_dim, found.partial_rotary_factor, found.rotary_dimensions) == (64, 0.25, 16)
    assert found.attention_scale(0) == found.attention_scale(99) == 0.125


def test_nothing_is_absent_everywhere() -> None:
    found = parse_metadata({})
    assert found == CaptureMetadata()
    assert found.attention_scale(0) is None
    names = ("model_name", "weights_sha256", "head_dim", "partial_rotary_factor", "rotary_dimensions")
    assert [getattr(found, name) for name in names] == [None] * 5


def test_a_scale_for_each_layer() -> None:
    scales = [0.5, None, 2, True, "1", -1, 0, nan, inf, 10**400, 0.25]
    found = parse_metadata(texts(attention={"scale": scales}))
    assert found.layer_scales == {0: 0.5, 2: 2.0, 10: 0.25}
    assert [found.attention_scale(layer) for layer in (0, 1, 10, 11)] == [0.5, None, 0.25, None]


@pytest.mark.parametrize("head_dim", [0, -1, 1.5, True, "64", None, [], 10**400, nan])
def test_an_unusable_head_dim(head_dim: Any) -> None:
    found = parse_metadata(texts(model={"head_dim": head_dim}, rope={}))
    assert (found.head_dim, found.rotary_dimensions, found.partial_rotary_factor) == (None, None, 1.0)


@pytest.mark.parametrize("factor", [0, -1, 1.5, True, "0.5", None, [], 10**400, nan, inf])
def test_an_unusable_rotary_factor(factor: Any) -> None:
    found = parse_metadata(texts(model={"head_dim": 64}, rope={"partial_rotary_factor": factor}))
    assert (found.head_dim, found.rotary_dimensions, found.partial_rotary_factor) == (64, None, None)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("key", KEYS)
def test_hostile_documents_are_absent(key: str, text: str) -> None:
    found = parse_metadata({key: text})
    if key == "needles":
        assert found.needles == (() if text == "[]" else None)
    else:
        assert (found.common_scale, dict(found.layer_scales), found.model_name) == (None, {}, None)


@pytest.mark.parametrize("entry", [{}, {"question": "a", "answer": "b"}, {"question": 1, "answer": "b", "position": 0}])
def test_broken_needles_are_told_apart_from_none(entry: Any) -> None:
    assert parse_metadata(texts(needles=[entry])).needles is None
    for position in (-1, True, 1.0, "1", None):
        broken = {"question": "a", "answer": "b", "position": position}
        assert parse_metadata(texts(needles=[broken])).needles is None


def test_names_can_be_printed() -> None:
    found = parse_metadata({"model": '{"name": "a\\u202e\\u001b[0mb", "weights_sha256": 7}'})
    assert found.model_name == "a??[0mb"
    assert found.weights_sha256 is None
    assert parse_metadata({"model": '{"name": "a\\ud800b"}'}).model_name is None


def test_every_value_by_its_key() -> None:
    values = {"b": "[1, NaN, 1e999, -Infinity]", "a": "not JSON", "c": "null", "d": "9" * 5000, "e": "[" * 5000}
    assert parse_values(values) == {
        "a": "not JSON",
        "b": [1, None, None, None],
        "c": None,
        "d": "9" * 5000,
        **{"e": "[" * 5000},
    }
    assert list(parse_values(values)) == ["a", "b", "c", "d", "e"]
    json.dumps(parse_values(values), allow_nan=False, indent=1)


def test_the_depth_that_is_read() -> None:
    deepest = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    assert parse_value(deepest) is not None
    assert parse_value(f"[{deepest}]") is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["scale", "head_dim", "name", "weights_sha256", "partial_rotary_factor", "question"]), inner
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYS), st.one_of(st.text(), JSON.map(json.dumps), JSON)))
def test_nothing_raises(metadata: dict[str, Any]) -> None:
    found = parse_metadata(metadata)
    assert all(scale > 0 for scale in found.layer_scales.values())
    for name in ("model_name", "weights_sha256", "head_dim", "partial_rotary_factor", "rotary_dimensions"):
        getattr(found, name)
    assert found.rotary_dimensions is None or 0 <= found.rotary_dimensions <= (found.head_dim or 0)
