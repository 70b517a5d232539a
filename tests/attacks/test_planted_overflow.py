"""With ``NUMBA_BOUNDSCHECK=1`` an index of compiled code outside its array is an error, as the long run needs.

Code that numba has in its cache is not checked, so that run has a cache folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forge import ROOT

PLANTED = """
import numpy as np
from kvpack.numerics.jit import njit

@njit
def beyond(values, at):
    values[at] = 1
    return values[at]

values = np.zeros(8, np.uint8)
print(beyond(values, np.uint64(7)))
beyond(values, np.uint64(8))
"""


@pytest.mark.parametrize("checked", [True, False])
def test_a_planted_overflow_is_caught(tmp_path: Path, checked: bool) -> None:
    script = tmp_path / "planted.py"
    text = PLANTED if checked else PLANTED.rsplit("\n", 2)[0]  # where it is not checked, nothing is written beyond
    script.write_text(text)
    settings = {"KVPACK_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_BOUNDSCHECK": str(int(checked))}
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1\n"
    assert (done.returncode, "IndexError" in done.stderr) == ((1, True) if checked else (0, False)), done.stderr
