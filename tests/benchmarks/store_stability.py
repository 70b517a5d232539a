"""What it costs that frames do not depend on what follows: bytes, and next-token KL under the model. Run by hand.

    python tests/benchmarks/store_stability.py CAPTURE.safetensors [-D PROFILE] [--codecs fisher-5,local-4,kivi-2]

For each codec three rows: the codec as compress uses it, with the capture's hints in chunks of 2,048 tokens; its
variant for stores in one file; and that variant in a store, in windows of 256 tokens. Bytes are whole files without
probes; KL is judged by the embedded model as verify --model does. CAPTURE has tokens, a continuation and probes.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvpack import jobs
from kvpack.capture import load_model
from kvpack.codecs.protocol import Codec
from kvpack.codecs.recipes import codec_named, prefix_stable
from kvpack.fidelity.model import Judge
from kvpack.formats.source import Capture
from kvpack.profiles import Profile
from kvpack.store import Prompt, Store, get, put, report


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what prefix-stable codecs cost.")
    parser.add_argument("capture", type=Path)
    parser.add_argument("-D", "--profile", type=Path)
    parser.add_argument("--codecs", default="fisher-5,fisher-4,local-4,kivi-2,kvtc-1,aquakv-2,lossless")
    given = parser.parse_args()
    capture = Capture.open(given.capture)
    profile = Profile.open(given.profile) if given.profile else None
    judge = Judge(load_model(None), capture)
    print("| codec | where | bytes | KL plain | KL repeat |\n| --- | --- | --- | --- | --- |")
    for name in given.codecs.split(","):
        with tempfile.TemporaryDirectory() as folder:
            for codec, where, size, path in ways(capture, codec_named(name), profile, Path(folder)):
                found = judge.measure(jobs.open_cache(path, profile))
                kl = [f"{test.kl_mean:.4f}" if test else "" for test in (found.plain, found.repeat)]
                print(f"| `{codec.name}` | {where} | {size:,} | {kl[0]} | {kl[1]} |", flush=True)


def ways(
    capture: Capture, codec: Codec, profile: Profile | None, folder: Path
) -> Iterator[tuple[Codec, str, int, Path]]:
    stable = prefix_stable(codec)
    for one in {codec.name: codec, stable.name: stable}.values():
        path = folder / f"{one.name}.kvp"
        with path.open("wb") as sink:
            done = jobs.compress(capture, sink, one, profile=profile, drop=jobs.PROBES)
        yield one, "one file", done.size, path
    store = Store.create(folder / "store")
    put(store, capture, stable, profile=profile)
    path, sink = folder / "got.safetensors", io.BytesIO()
    get(store, Prompt.of_cache(capture, capture.metadata), stable, sink, profile=profile)
    path.write_bytes(sink.getvalue())
    yield stable, "store", report(store).bytes, path


if __name__ == "__main__":
    main()
