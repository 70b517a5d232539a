"""Model fidelity: what the model itself predicts from a compressed cache, compared with the original.

Every test crops the cache by its last token and feeds that token again, so that its prediction counts too; the
other cached tokens are read as they are. Logits are compared position by position in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from kvpack.cache.metadata import parse_metadata
from kvpack.capture.model import Model
from kvpack.capture.needles import encode
from kvpack.errors import FormatError, MismatchError
from kvpack.fidelity.source import CacheReader, walk
from kvpack.formats.records import layer_tensors
from kvpack.formats.safetensors import TensorSpec
from kvpack.numerics.floats import to_torch

JUDGED = 256
"""The number of positions of the repeated passage, and the most of the plain continuation."""

GENERATED = 128
"""The number of tokens that are generated greedily."""

Progress = Callable[[int, int], None]
"""Called with the number of tests done and the number of tests in all."""


@dataclass(frozen=True)
class Continuation:
    """Next-token predictions over a continuation, from the compressed cache, compared with those from the original.

    Attributes:
        positions: The number of positions predicted.
        kl_mean: The mean over positions of KL(p || p^) in nats, where p is the prediction from the original.
        kl_p90: The 90th percentile over positions of the same.
        kl_p99: The 99th percentile over positions of the same.
        top1: The share of positions whose most likely token is the same.
        nll_original: The mean negative log-likelihood of the continuation's own tokens from the original, in nats.
        nll: The same from the compressed cache.

    """

    positions: int
    kl_mean: float
    kl_p90: float
    kl_p99: float
    top1: float
    nll_original: float
    nll: float

    @property
    def ppl_change(self) -> float:
        """The relative change of the perplexity; 0.01 is one percent worse."""
        return float(np.expm1(self.nll - self.nll_original))

    def to_json(self) -> dict[str, float]:
        """All attributes and ``ppl_change``, by name."""
        return {**asdict(self), "ppl_change": self.ppl_change}


@dataclass(frozen=True)
class NeedleResult:
    """Whether the exact answer to a planted fact was the most likely one.

    Attributes:
        depth: Where in the text the fact was planted, from 0 (its start) to 1 (its end).
        original: Whether it was so with the original cache.
        found: Whether it was so with the compressed cache.

    """

    depth: float
    original: bool
    found: bool


@dataclass(frozen=True)
class ModelReport:
    """The results of all tests that the capture allows.

    Attributes:
        plain: The continuation of the text; None where the capture has none.
        repeat: A passage of the context that comes again.
        greedy_identical: The number of tokens that greedy generation has in common, up to the first that differs.
        greedy_length: The number of tokens generated.
        needles: The results for each planted fact.
        notes: What the reader of the figures must know.

    """

    plain: Continuation | None
    repeat: Continuation | None
    greedy_identical: int
    greedy_length: int
    needles: tuple[NeedleResult, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report in JSON types only."""
        return {
            "plain": self.plain.to_json() if self.plain else None,
            "repeat": self.repeat.to_json() if self.repeat else None,
            "greedy_identical": self.greedy_identical,
            "greedy_length": self.greedy_length,
            "needles": [asdict(needle) for needle in self.needles],
            "needles_found": sum(needle.found for needle in self.needles),
            "needles_found_original": sum(needle.original for needle in self.needles),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Test:
    """Tokens to feed behind the cropped cache, and what the model predicts there from the original.

    Attributes:
        fed: The N tokens that are fed.
        labels: The token that really follows each of them.
        reference: The log-probabilities ``[N, V]`` from the original cache.

    """

    fed: list[int]
    labels: list[int]
    reference: torch.Tensor


class Judge:
    """Holds what the model predicts from the original, and measures other caches of the same tokens against it."""

    def __init__(self, model: Model, original: CacheReader, progress: Progress | None = None) -> None:
        """Run every test on the original cache.

        Raises:
            MismatchError: The capture names other weights, or its shapes are not the model's.
            FormatError: The capture has no tokens, or its needles are not as the format says.

        """
        require_weights(model, original)
        self._model = model
        self._tokens = _ints(original, "tokens")
        if len(self._tokens) < 2:
            raise FormatError("the capture has no tokens: the model cannot be run on it")
        self._layers = _load(model, original, len(self._tokens))
        notes = []
        steps = _Steps(3 + 1, progress)
        self._plain = self._repeat = None
        following = _ints(original, "continuation")[:JUDGED]
        if following:
            self._plain = self._test(following, self._layers)
        else:
            notes.append("no continuation in the capture: only the repeated passage was judged")
        steps.advance()
        start = len(self._tokens) // 3
        self._repeat = self._test(self._tokens[start : start + JUDGED], self._layers)
        steps.advance()
        self._greedy = self._test(self._generate(), self._layers)
        steps.advance()
        self._needles = _needles(model, original, len(self._tokens))
        self._needles_original = [self._recites(needle, self._layers) for needle in self._needles]
        steps.advance()
        if self._needles and not all(self._needles_original):
            missed = self._needles_original.count(False)
            notes.append(f"the model itself misses {missed} of {len(self._needles)} needles with the original cache")
        self._notes = tuple(notes)

    def measure(self, other: CacheReader) -> ModelReport:
        """Run every test on ``other``, which is read once.

        Raises:
            MismatchError: Its layers or shapes are not the original's.
            FormatError: The file is damaged.

        """
        layers = _load(self._model, other, len(self._tokens))
        found = [self._recites(needle, layers) for needle in self._needles]
        greedy = self._logits(self._greedy.fed, layers).argmax(-1)
        same = (greedy == self._greedy.reference.argmax(-1)).long()
        return ModelReport(
            plain=self._compare(self._plain, layers) if self._plain else None,
            repeat=self._compare(self._repeat, layers) if self._repeat else None,
            greedy_identical=int(same.cumprod(0).sum()),
            greedy_length=len(same),
            needles=tuple(
                NeedleResult(needle.depth, original, ok)
                for needle, original, ok in zip(self._needles, self._needles_original, found, strict=True)
            ),
            notes=self._notes,
        )

    def _test(self, labels: list[int], layers: _Layers) -> _Test:
        fed = [self._tokens[-1], *labels[:-1]]
        return _Test(fed, labels, self._logits(fed, layers).log_softmax(-1))

    def _compare(self, test: _Test, layers: _Layers) -> Continuation:
        other = self._logits(test.fed, layers).log_softmax(-1)
        kl, nll_original, nll = (np.empty(len(test.labels)) for _ in range(3))
        for i, label in enumerate(test.labels):
            p, q = test.reference[i].double(), other[i].double()
            kl[i] = max(float((p.exp() * (p - q)).sum()), 0.0)
            nll_original[i], nll[i] = -float(p[label]), -float(q[label])
        same = test.reference.argmax(-1) == other.argmax(-1)
        return Continuation(
            positions=len(kl),
            kl_mean=float(kl.mean()),
            kl_p90=float(np.percentile(kl, 90)),
            kl_p99=float(np.percentile(kl, 99)),
            top1=float(same.double().mean()),
            nll_original=float(nll_original.mean()),
            nll=float(nll.mean()),
        )

    def _logits(self, fed: list[int], layers: _Layers) -> torch.Tensor:
        """The float32 logits ``[N, V]`` at the tokens ``fed`` behind the cropped cache."""
        network = self._model.network
        with torch.inference_mode():
            ids = torch.tensor([fed], device=network.device)
            return self._model.logits(ids, _cache(network, layers))[0].float()

    def _generate(self) -> list[int]:
        """The :data:`GENERATED` tokens that the model generates greedily from the original cache."""
        network = self._model.network
        cache, token, tokens = _cache(network, self._layers), self._tokens[-1], []
        with torch.inference_mode():
            for _ in range(GENERATED):
                ids = torch.tensor([[token]], device=network.device)
                token = int(self._model.logits(ids, cache)[0, -1].argmax())
                tokens.append(token)
        return tokens

    def _recites(self, needle: _Question, layers: _Layers) -> bool:
        """Whether greedy decoding behind the question gives the exact answer."""
        fed = [self._tokens[-1], *needle.question, *needle.answer[:-1]]
        chosen = self._logits(fed, layers).argmax(-1)[-len(needle.answer) :]
        return chosen.tolist() == needle.answer


_Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""The keys and values of every layer, each ``[1, H, T - 1, D]``."""


@dataclass(frozen=True)
class _Question:
    """A planted fact as token ids, and its place in the text from 0 to 1."""

    depth: float
    question: list[int]
    answer: list[int]


class _Steps:
    """Reports progress by the number of tests done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def advance(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)


def require_weights(model: Model, source: CacheReader) -> None:
    """Refuse a capture that names other weights than the model's.

    Raises:
        MismatchError: It does.

    """
    metadata = parse_metadata(source.metadata)
    theirs = metadata.weights_sha256
    if theirs and theirs != model.weights_sha256:
        raise MismatchError(
            f"the capture is of {metadata.model_name} (weights {theirs[:12]}), "
            f"the model is {model.name} (weights {model.weights_sha256[:12]})"
        )


def _ints(source: CacheReader, name: str) -> list[int]:
    """The token ids of a tensor ``[N]``, or an empty list where the cache has no such tensor of 32-bit integers."""
    spec = source.tensors.get(name)
    if spec is None or len(spec.shape) != 1 or spec.dtype not in ("I32", "U32"):
        return []
    bits: NDArray[Any] = source.read(name)
    tokens: list[int] = bits.view(np.int32).tolist()
    return tokens


def _needles(model: Model, source: CacheReader, tokens: int) -> list[_Question]:
    """The planted facts as token ids; ``tokens`` is the number of tokens in the capture."""
    entries = parse_metadata(source.metadata).needles
    if entries is None:
        raise FormatError("the capture's needles are not as docs/capture-format.md says")
    return [
        _Question(entry.position / tokens, encode(model, "\n" + entry.question), encode(model, entry.answer))
        for entry in entries
    ]


def _load(model: Model, source: CacheReader, tokens: int) -> _Layers:
    """Keys and values ``[1, H, T - 1, D]`` of every layer, in the model's dtype, on its device.

    The cache is read window by window, so that a file whose layers are coded together is decoded once.
    """
    layers = layer_tensors(source)
    count = model.config.num_hidden_layers
    if list(layers) != list(range(count)) or any(len(names) != 2 for names in layers.values()):
        raise MismatchError(f"the model has {count} layers, the cache keys and values of {len(layers)}")
    names = [name for found in layers.values() for name in found.values()]
    loaded = {name: _allocate(model, source.tensors[name], tokens) for name in names}
    for first, window in walk(source, names):
        for name, bits in window.items():
            part = to_torch(bits[:, : max(tokens - 1 - first, 0)], source.tensors[name].dtype)
            loaded[name][0, :, first : first + part.shape[1]] = part
    return [(loaded[found["keys"]], loaded[found["values"]]) for found in layers.values()]


def _allocate(model: Model, spec: TensorSpec, tokens: int) -> torch.Tensor:
    """Room for a tensor of the cache without its last token, ``[1, H, T - 1, D]``."""
    heads, held, dims = spec.shape
    if held != tokens:
        raise MismatchError(f"{spec.name}: {held} tokens, but the capture lists {tokens}")
    return torch.empty((1, heads, held - 1, dims), dtype=model.network.dtype, device=model.network.device)


def _cache(network: Any, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A transformers cache of the layers; what the model appends to it does not touch ``layers``."""
    cache = DynamicCache(config=network.config)
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    return cache


def check_model(
    report: ModelReport, max_kl: float | None, min_top1: float | None, max_ppl_increase: float | None
) -> list[str]:
    """Say in words where the report does not meet the thresholds, which hold for each continuation by itself."""
    failures = []
    for name, part in (("plain", report.plain), ("repeat", report.repeat)):
        if part is None:
            continue
        if max_kl is not None and not part.kl_mean <= max_kl:
            failures.append(f"{name} KL {part.kl_mean:.4g} nats is above {max_kl:g}")
        if min_top1 is not None and not part.top1 >= min_top1:
            failures.append(f"{name} top-1 agreement {part.top1:.4g} is below {min_top1:g}")
        if max_ppl_increase is not None and not part.ppl_change <= max_ppl_increase:
            failures.append(f"{name} perplexity change {part.ppl_change:.4g} is above {max_ppl_increase:g}")
    return failures
