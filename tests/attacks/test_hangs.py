"""Small files that make a command loop, over axes, pairs of tensors or windows; and what never ends."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from forge import entry, run, safetensors
from test_engine import tasks

from kvpack.engine import CpuEngine

MOST_SECONDS = 20


@pytest.mark.parametrize(
    "shape", [(1 << 31, 130, 0), (1 << 31, 1 << 20, 0), (130, 1 << 40, 0), (1 << 40, 0, 3)], ids=str
)
def test_a_long_axis_of_an_empty_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    """``verify`` used to walk along it."""
    path = tmp_path / "x.safetensors"
    names = ("layers.0.keys", "layers.0.values", "queries.0", "attention_mass", "other")
    path.write_bytes(safetensors({name: entry("BF16", shape, 0, 0) for name in names}))
    for command in (["verify", path, path], ["inspect", path], ["compress", "-f", path]):
        found = run(*command, folder=tmp_path, limit=60)
        assert found.code == 0, found
        assert found.seconds < MOST_SECONDS, found
        assert found.megabytes < 300, found


def test_many_tensors_are_dropped_in_one_pass(tmp_path: Path) -> None:
    """``--drop`` used to make a set of all names once for each tensor."""
    count = 20_000
    path = tmp_path / "x.safetensors"
    header = {f"queries.{i}": entry("U8", [0], 0, 0) for i in range(count)}
    path.write_bytes(safetensors({**header, "kept": entry("U8", [1], 0, 1)}, b"\1"))
    found = run("compress", path, "--drop", "queries.*", folder=tmp_path)
    assert found.code == 0, found
    assert found.seconds < MOST_SECONDS, found
    shown = run("inspect", "--json", f"{path}.kvp", folder=tmp_path)
    assert len(json.loads(shown.out)["dropped"]) == count


def test_many_tensors_are_verified_one_after_another(tmp_path: Path) -> None:
    """Each used to be looked for among all parts of the file."""
    count = 3_000
    path = tmp_path / "x.safetensors"
    header = {f"x{i}": entry("U8", [1], i, i + 1) for i in range(count)}
    path.write_bytes(safetensors(header, bytes(count)))
    assert run("compress", path, folder=tmp_path).code == 0
    found = run("verify", path, f"{path}.kvp", folder=tmp_path)
    assert (found.code, found.seconds < 3 * MOST_SECONDS) == (0, True), found


@pytest.mark.parametrize("axes", [33, 65, 5000])
def test_more_axes_than_an_array_can_have(cli: Any, axes: int, tmp_path: Path) -> None:
    """They are bytes to compress and to restore. Only what needs an array of that shape is refused."""
    path = tmp_path / "x.safetensors"
    data = safetensors({"x": entry("U8", [1] * axes, 0, 1), "y": entry("F32", [0] * axes, 1, 1)}, b"\7")
    path.write_bytes(data)
    assert cli("compress", "--rm", path).code == 0
    assert cli("decompress", f"{path}.kvp").code == 0
    assert path.read_bytes() == data
    found = cli("verify", path, f"{path}.kvp")
    assert (found.code, found.err.count("\n")) in ((0, 0), (6, 1)), found


def test_an_engine_that_is_given_up_waits_for_nothing() -> None:
    """A process that opened damaged files, one after another, used to stop for ever at some time.

    The collector closed an engine that an error held, in a thread that had just been started and held a lock, which the
    engine's own threads needed to end. Found by fuzzing.
    """

    def close_it_there() -> None:
        results = CpuEngine(2).run(tasks(30))
        next(results)
        held: list[Any] = [results]
        held.append(held)
        del results, held
        with threading._active_limbo_lock:  # type: ignore[attr-defined]
            gc.collect()

    thread = threading.Thread(target=close_it_there, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
