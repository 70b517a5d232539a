"""Model fidelity: what the model predicts from a cache, against plain runs of transformers; and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CONFIGS, save_model
from prose import prose

from kvpack import jobs
from kvpack.capture import CaptureOptions, Model, load_model, run, write_capture
from kvpack.capture.needles import facts, plant
from kvpack.codecs.recipes import CODECS
from kvpack.errors import FormatError, MismatchError, UsageError
from kvpack.fidelity import compare
from kvpack.fidelity.model import GENERATED, Judge, ModelReport, check_model
from kvpack.formats.safetensors import TensorFile, build_header
from kvpack.formats.source import Capture
from kvpack.jobs.reader import KvpFile

Cli = Callable[..., Any]
TOKENS, FOLLOWING = 150, 40

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def capture(model: Model, path: Path, **options: int) -> Capture:
    with path.open("wb") as sink:
        write_capture(run(model, prose(), CaptureOptions(**options)), sink)
    return Capture.open(path)


def compressed(path: Path, codec: str) -> KvpFile:
    with path.with_suffix(".kvp").open("wb") as sink:
        jobs.compress(path, sink, CODECS[codec])
    return KvpFile.open(path.with_suffix(".kvp"))


def changed(path: Path, change: Callable[[str, np.ndarray], np.ndarray | None]) -> Path:
    """A copy whose tensors are passed through ``change``; None leaves one out."""
    source = Capture.open(path)
    arrays = {name: change(name, np.array(source.read(name))) for name in source.tensors}
    kept = {name: array for name, array in arrays.items() if array is not None}
    header = build_header([(n, source.tensors[n].dtype, a.shape) for n, a in kept.items()], source.metadata)
    target = path.with_name(f"changed-{path.name}")
    data = b"".join(array.tobytes() for array in kept.values())
    target.write_bytes(len(header.raw).to_bytes(8, "little") + header.raw + data)
    return target


def without(tensor: str) -> Callable[[str, np.ndarray], np.ndarray | None]:
    return lambda name, array: None if name == tensor else array


@pytest.fixture(scope="module", params=["llama-gqa", "gpt2", "gpt-neox"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    folder = save_model(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param))
    model = load_model(str(folder), device="cpu")
    path = folder / "c.safetensors"
    capture(model, path, max_tokens=TOKENS, continuation=FOLLOWING, needles=1)
    return model, path


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Judge, Path]:
    """The embedded model on 600 tokens with needles."""
    path = tmp_path_factory.mktemp("smollm") / "c.safetensors"
    model = load_model(None, device="cpu")
    return Judge(model, capture(model, path, max_tokens=600, continuation=64, needles=4)), path


def test_lossless_is_exactly_zero(tiny: tuple[Model, Path]) -> None:
    model, path = tiny
    judge = Judge(model, Capture.open(path))
    report = judge.measure(compressed(path, "lossless"))
    for part in (report.plain, report.repeat):
        assert part is not None
        assert (part.kl_mean, part.kl_p90, part.kl_p99, part.top1, part.ppl_change) == (0, 0, 0, 1, 0)
    assert report.greedy_identical == report.greedy_length == GENERATED
    assert all(needle.found == needle.original for needle in report.needles)
    assert check_model(report, 0.0, 1.0, 0.0) == []


def test_predictions_are_those_of_a_plain_run(tiny: tuple[Model, Path]) -> None:
    """One pass of the whole text without kvpack gives the same likelihoods; so does greedy generation."""
    model, path = tiny
    source = Capture.open(path)
    tokens = source.read("tokens").view(np.int32).tolist()
    following = source.read("continuation").view(np.int32).tolist()
    assert (len(tokens), len(following)) == (TOKENS, FOLLOWING)
    report = Judge(model, source).measure(source)
    with torch.inference_mode():
        for part, labels in ((report.plain, following), (report.repeat, tokens[TOKENS // 3 :])):
            ids = torch.tensor([tokens + labels])
            logits = model.network(ids, use_cache=False).logits[0, TOKENS - 1 : -1].float()
            expected = -logits.log_softmax(-1).gather(1, torch.tensor(labels)[:, None]).mean()
            assert part is not None
            assert part.nll_original == pytest.approx(float(expected), rel=1e-3)
            assert part.nll == part.nll_original


def test_kl_is_the_definition(tiny: tuple[Model, Path]) -> None:
    model, path = tiny
    source = Capture.open(path)
    broken = Capture(TensorFile.open(changed(path, lambda n, a: a * (n != "layers.1.values"))))
    judge = Judge(model, source)
    report = judge.measure(broken)
    assert judge._plain is not None
    assert report.plain is not None
    p = judge._plain.reference.double().numpy()
    other = Judge(model, broken)
    assert other._plain is not None
    q = other._plain.reference.double().numpy()
    kl = (np.exp(p) * (p - q)).sum(1)
    assert report.plain.kl_mean == pytest.approx(kl.mean(), rel=1e-6)
    assert report.plain.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-6)
    assert kl.mean() > 0


def zeroed(path: Path, layer: int) -> Capture:
    broken = changed(path, lambda name, array: array * (not name.startswith(f"layers.{layer}.")))
    return Capture.open(broken)


def test_a_zeroed_layer_is_caught_by_every_metric(smollm: tuple[Judge, Path]) -> None:
    judge, path = smollm
    broken = zeroed(path, 18)
    report = judge.measure(broken)
    sound = judge.measure(compressed(path, "lossless"))
    assert sound.plain is not None
    assert sound.plain.kl_mean == 0
    for part in (report.plain, report.repeat):
        assert part is not None
        assert part.kl_mean > 0.02
        assert part.kl_p90 > 0.05
        assert part.kl_p99 > 0.1
        assert part.top1 < 1
        assert part.ppl_change > 0
    assert report.greedy_identical < report.greedy_length
    assert sum(needle.found for needle in report.needles) < sum(needle.original for needle in report.needles)
    figures = compare(Capture.open(path), broken)
    assert not figures.bit_exact
    assert figures.keys.nmse > 0.01
    assert figures.values.nmse > 0.01
    assert figures.attention is not None
    assert figures.attention.output_error > 0.05
    assert check_model(report, 0.01, None, None)
    assert check_model(report, None, 0.99, None)


def test_needles_and_the_repeated_passage_tell_apart_what_plain_kl_does_not(smollm: tuple[Judge, Path]) -> None:
    """Without layer 10 the text goes on no better than without layer 18, but only 18 is needed to find things."""
    judge, path = smollm
    mild, severe = (judge.measure(zeroed(path, layer)) for layer in (10, 18))
    assert mild.plain is not None
    assert severe.plain is not None
    assert mild.repeat is not None
    assert severe.repeat is not None
    assert 0.5 < severe.plain.kl_mean / mild.plain.kl_mean < 1.5
    assert severe.repeat.kl_mean > 20 * mild.repeat.kl_mean
    assert sum(needle.found for needle in mild.needles) == 4
    assert sum(needle.found for needle in severe.needles) <= 2


def test_the_embedded_model_recites_needles_and_coarse_codecs_lose_them(smollm: tuple[Judge, Path]) -> None:
    judge, path = smollm
    sound = judge.measure(compressed(path, "lossless"))
    assert [needle.original for needle in sound.needles] == [True] * 4
    assert [needle.found for needle in sound.needles] == [True] * 4
    assert [round(needle.depth, 1) for needle in sound.needles] == pytest.approx([0.1, 0.35, 0.6, 0.85], abs=0.15)
    coarse = judge.measure(compressed(path, "turboquant-1"))
    assert sum(needle.found for needle in coarse.needles) < 4
    assert coarse.plain is not None
    assert coarse.plain.kl_mean > 0.1


def test_fidelity_follows_the_rate(smollm: tuple[Judge, Path]) -> None:
    judge, path = smollm
    kls = []
    for name in ("turboquant-4", "turboquant-3", "turboquant-2"):
        report = judge.measure(compressed(path, name))
        assert report.plain is not None
        assert report.repeat is not None
        kls.append((report.plain.kl_mean, report.repeat.kl_mean))
    assert kls == sorted(set(kls))


def test_thresholds() -> None:
    def report(kl: float, top1: float, nll: float) -> ModelReport:
        from kvpack.fidelity.model import Continuation

        part = Continuation(10, kl, kl, kl, top1, 1.0, nll)
        return ModelReport(part, None, 0, 0, (), ())

    assert check_model(report(0.1, 0.9, 1.1), None, None, None) == []
    assert check_model(report(0.1, 0.9, 1.1), 0.1, 0.9, 0.2) == []
    failures = check_model(report(0.1, 0.9, 1.1), 0.09, 0.91, 0.1)
    assert [failure.split(" is ")[0] for failure in failures] == [
        "plain KL 0.1 nats",
        "plain top-1 agreement 0.9",
        "plain perplexity change 0.1052",
    ]
    assert len(check_model(report(float("nan"), float("nan"), float("nan")), 1, 0, 1)) == 3


def test_captures_without_continuation_or_tokens(tiny: tuple[Model, Path]) -> None:
    model, path = tiny
    bare = Capture(TensorFile.open(changed(path, without("continuation"))))
    report = Judge(model, bare).measure(bare)
    assert report.plain is None
    assert any("no continuation" in note for note in report.notes)
    with pytest.raises(FormatError, match="no tokens"):
        Judge(model, Capture(TensorFile.open(changed(path, without("tokens")))))
    with pytest.raises(MismatchError, match="layers"):
        Judge(model, Capture(TensorFile.open(changed(path, without("layers.1.values")))))


def test_needles_are_planted_evenly_and_within_the_limit(tiny: tuple[Model, Path]) -> None:
    model, _ = tiny
    ids = model.tokenizer(prose()).input_ids
    prompt, needles = plant(model, ids, 8, 2000)
    assert len(prompt) == 2000
    for i, needle in enumerate(needles):
        assert prompt[needle.position : needle.position + len(needle.tokens)] == list(needle.tokens)
        assert needle.position / 2000 == pytest.approx((i + 0.5) / 8, abs=0.06)
        assert needle.question + needle.answer in model.tokenizer.decode(prompt)
    used = sum(len(needle.tokens) for needle in needles)
    planted = {at for needle in needles for at in range(needle.position, needle.position + len(needle.tokens))}
    assert [token for at, token in enumerate(prompt) if at not in planted] == ids[: 2000 - used]
    assert len({answer for _, answer in facts(16)}) == 16
    for count, limit in ((17, None), (8, 100)):
        with pytest.raises(UsageError):
            plant(model, ids, count, limit)


def test_verify_with_a_model(cli: Cli, tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama-gqa"](), tmp_path / "model")
    other = save_model(CONFIGS["llama-mha"](), tmp_path / "other")
    text = tmp_path / "text.txt"
    text.write_text(prose()[:400])
    path, packed = tmp_path / "c.safetensors", tmp_path / "c.kvp"
    made = cli("capture", "-m", folder, "--text", text, "-o", path, "--max-tokens", 200, "--needles", 2)
    assert made.code == 0, made.err
    assert "to follow" in made.out
    assert cli("compress", path, "-c", "turboquant-1", "-o", packed).code == 0
    done = cli("verify", path, packed, "-m", folder, "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)["model"]
    assert figures["plain"]["kl_mean"] > 0
    assert figures["greedy_length"] == GENERATED
    assert len(figures["needles"]) == 2
    shown = cli("verify", path, packed, "-m", folder)
    assert "needles found" in shown.out
    for option in (("--max-kl", 1e-9), ("--min-top1", 1.0), ("--max-ppl-increase", -1.0)):
        failed = cli("verify", path, packed, "-m", folder, *option)
        assert (failed.code, failed.err.count("\n")) == (3, 1), failed.err
    wrong = cli("verify", path, packed, "-m", other)
    assert wrong.code == 5
    assert "weights" in wrong.err
    assert cli("verify", path, packed, "--max-kl", 1).code == 2
