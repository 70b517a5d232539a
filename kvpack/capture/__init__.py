"""Runs a model over a text and saves its KV cache. ``docs/capture-format.md`` specifies the file.

Importing this takes the packages that every model needs. What only GGUF files need is asked for when one is loaded.
"""

import os

from kvpack.errors import KvpackError

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # huggingface_hub reads it when it is imported

try:
    import accelerate as _accelerate
    import transformers as _transformers
except ImportError as error:
    raise KvpackError(f"capture needs {error.name}: pip install 'kvpack[capture]'") from None
del _accelerate, _transformers

from kvpack.capture.model import Identity, Model, identify, load_model  # noqa: E402
from kvpack.capture.replay import ReplayModel  # noqa: E402
from kvpack.capture.run import CapturedCache, CaptureOptions, prefill, run, run_tokens  # noqa: E402
from kvpack.capture.write import write_capture  # noqa: E402

__all__ = [
    "CaptureOptions",
    "CapturedCache",
    "Identity",
    "Model",
    "ReplayModel",
    "identify",
    "load_model",
    "prefill",
    "run",
    "run_tokens",
    "write_capture",
]
