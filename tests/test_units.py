"""How a file's parts fall into units, and where a stack's streams lie."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvpack.codecs.chain.units import Unit, units
from kvpack.codecs.recipes import CODECS
from kvpack.formats.safetensors import build_header
from kvpack.kvp.layout import plan_parts

SHAPES = st.lists(st.integers(0, 300), min_size=0, max_size=6)


@given(SHAPES, st.booleans(), st.sampled_from([128, 256]))
def test_units_are_the_parts_in_order(tokens: list[int], stacked: bool, chunk: int) -> None:
    entries = [(f"layers.{i}.keys", "BF16", [1, count, 2]) for i, count in enumerate(tokens)]
    plans = plan_parts(build_header([*entries, ("tokens", "I32", [7]), ("x", "F32", [2, 2])], {}), chunk)
    groups = list(units(plans, stacked))
    assert [plan for group in groups for plan in group] == list(plans)
    for group in groups:
        assert len({plan.first for plan in group}) == 1
        assert len(group) == 1 or (stacked and all(plan.layer is not None for plan in group))
    if stacked:
        chunks = {plan.first for plan in plans if plan.layer is not None}
        assert len(groups) == len(chunks) + 2


def test_a_stacks_streams_lie_with_the_first_part_of_each_kind() -> None:
    """In file order, whatever the order of layers."""
    import numpy as np

    names = ["layers.10.values", "layers.2.keys", "layers.2.values", "layers.10.keys"]
    plans = plan_parts(build_header([(name, "BF16", [1, 30, 4]) for name in names], {}), 128)
    (group,) = units(plans, True)
    unit = Unit(group, CODECS["cachegen-4"])
    bits = [np.full((1, 30, 4), 0x3F80 + i, np.uint16) for i in range(4)]
    streams = unit.encode(bits)
    assert [bool(some) for some in streams] == [True, True, False, False]
    assert {name for some in streams for name, _ in some} == unit.stream_names()
    back = unit.decode([[(name, memoryview(data)) for name, data in some] for some in streams])
    for ours, theirs in zip(back, bits, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1
