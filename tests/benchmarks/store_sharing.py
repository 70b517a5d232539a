"""What chats that share a system prompt take in a store, beside one prompt and all tails. Run by hand.

    python tests/benchmarks/store_sharing.py FOLDER [--chats 20] [--prompt 1100] [--longest TAIL] [--window 256]
        [-c CODEC] [-D PROFILE]

Chats are made of the text of ``kvpack demo`` by the embedded model: its first tokens are the system prompt, and each
chat goes on elsewhere in it, for 40 to 500 tokens. Captures are kept in FOLDER for the next run. The prompt and the
tails that the store is compared with are .kvp files of the same codec in chunks of 2,048 tokens: the prompt's own file,
and for each tail the difference of the chat's file and the prompt's, which leaves the tail's own header out.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
from pathlib import Path

from installed import topics

from kvpack import jobs
from kvpack.codecs.protocol import Codec
from kvpack.codecs.recipes import codec_named, prefix_stable
from kvpack.formats.source import Capture
from kvpack.profiles import Profile
from kvpack.store import Store, put, report, verify
from kvpack.store.objects import cut


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what chats that share a system prompt take in a store.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=1100)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--longest", type=int, help="cut tails that are longer")
    parser.add_argument("-c", "--codec", default="lossless")
    parser.add_argument("-D", "--profile", type=Path)
    given = parser.parse_args()
    captures = [Capture.open(path) for path in chats(given.folder, given.chats, given.prompt)]
    if given.longest:
        captures = [shortened(capture, given.prompt + given.longest) for capture in captures]
    codec = prefix_stable(codec_named(given.codec))
    profile = Profile.open(given.profile) if given.profile else None
    shutil.rmtree(given.folder / "store", ignore_errors=True)
    store = Store.create(given.folder / "store")
    for i, capture in enumerate(captures):
        done = put(store, capture, codec, profile=profile, window=given.window)
        print(f"chat {i}: {done.tokens} tokens, {done.shared} were there, {done.written_bytes} bytes, {done.differing}")
    assert not verify(store.path).damage
    prompt = packed(captures[0], given.prompt, codec, profile)
    tails = [packed(capture, None, codec, profile) - prompt for capture in captures]
    found = report(store)
    apart = sum(tails) + len(tails) * prompt
    print(f"{codec.name}: store {found.bytes} bytes in {found.objects} objects, of which {found.tokens} tokens")
    print(f"one prompt {prompt} bytes, {len(tails)} tails {sum(tails)} bytes; each chat for itself {apart} bytes")
    print(f"store / (prompt + tails) = {found.bytes / (prompt + sum(tails)):.4f}")
    print(f"each chat for itself / store = {apart / found.bytes:.3f}; the store says that it saves {found.saved} bytes")


def shortened(capture: Capture, most: int) -> Capture:
    """The capture's first tokens, if it has more than so many."""
    length = min(most, len(capture.read("tokens")))
    short = cut(capture, 0, length, {})
    metadata = {name: value for name, value in short.metadata.items() if name != "store"}
    metadata["schedule"] = json.dumps({"prefill": [length], "decode": 0})
    return Capture.of(capture.file.name, {n: (e.dtype, short.read(n)) for n, e in short.tensors.items()}, metadata)


def packed(capture: Capture, tokens: int | None, codec: Codec, profile: Profile | None) -> int:
    """The size of a .kvp file of the first tokens, without probes."""
    sink = io.BytesIO()
    length = len(capture.read("tokens"))
    jobs.compress(cut(capture, 0, tokens or length, {}), sink, codec, profile=profile)
    return len(sink.getvalue())


def chats(folder: Path, count: int, prompt: int) -> list[Path]:
    """Captures of chats, made unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"chat-{prompt}-{i}.safetensors" for i in range(count)]
    if all(path.exists() for path in paths):
        return paths
    from kvpack.capture import CaptureOptions, load_model, run_tokens, write_capture

    model = load_model(None)
    ids: list[int] = model.tokenizer("\n".join(topics().values())).input_ids
    source = random.Random(0)
    for path in paths:
        length = source.randint(40, 500)
        start = source.randrange(prompt, len(ids) - length)
        if not path.exists():
            text = ids[:prompt] + ids[start : start + length]
            with path.open("wb") as sink:
                write_capture(run_tokens(model, text, CaptureOptions(queries=0)), sink)
    return paths


if __name__ == "__main__":
    main()
