"""``kvpack store``, with put and get."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli import batch, common
from kvpack.cli.prompts import prompt_of, words_in
from kvpack.cli.upkeep import Directory, gc, ls, stat, verify
from kvpack.errors import UsageError
from kvpack.formats.output import restrict
from kvpack.formats.temporary import scratch

if TYPE_CHECKING:
    from kvpack.codecs.protocol import Codec
    from kvpack.store import Fetched

CodecName = Annotated[
    str,
    typer.Option(
        "-c",
        "--codec",
        help="The codec. One that looks at later tokens is replaced by its variant that does not (NAME-prefix).",
        metavar="NAME",
    ),
]


def put(
    store: Directory,
    inputs: batch.Inputs = None,
    codec: CodecName = "lossless",
    profile: common.ProfileFile = None,
    window: Annotated[
        int, typer.Option(help="Store this many tokens in a file, a multiple of 128.", metavar="N")
    ] = 256,
    files_from: batch.FilesFrom = None,
    recursive: batch.Recursive = False,
    threads: common.Threads = None,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Store captures.

    Their keys, values and token ids are stored, and nothing else. The store is made if it is not there.

    Several files may be given. A bad file does not stop the others: it is reported, and the exit code is the largest.
    --json prints one line for each file.
    """
    from kvpack.engine import CpuEngine
    from kvpack.formats.source import Capture
    from kvpack.store import Store
    from kvpack.store import put as put_one

    items = batch.gather(inputs, files_from, recursive, (".safetensors",))
    chosen, opened = _codec(codec, quiet), common.open_profile(profile)
    place, engine = Store.create(store), CpuEngine(threads)
    common.remark_leftovers(store)

    def work(item: batch.Item) -> batch.Outcome:
        path = item.path
        with common.readable(path) as source, common.progress_bar(f"storing {path.name}", quiet) as progress:
            capture = Capture.open(source, str(path))
            done = put_one(place, capture, chosen, profile=opened, window=window, engine=engine, progress=progress)
        return batch.Outcome(str(path), {"input": str(path), **vars(done)})

    show = partial(_say_stored, quiet=quiet)
    batch.report(batch.each(items, work), show, as_json=as_json, total=len(items))


def _codec(name: str, quiet: bool) -> Codec:
    from kvpack.codecs.recipes import PREFIX, codec_named, prefix_stable

    asked = codec_named(name.removesuffix(PREFIX))
    found = prefix_stable(asked)
    if found.name not in (name, asked.name):
        line = f"kvpack: {name} codes tokens by what follows them; a store takes {found.name} instead"
        common.say(line, quiet=quiet, to_stderr=True)
    return found


def _say_stored(outcome: batch.Outcome, *, quiet: bool) -> None:
    from kvpack.store import Stored

    row = dict(outcome.row or {})
    path, done = row.pop("input"), Stored(**row)
    shared = f"{done.shared} of {done.tokens} tokens were there"
    line = f"{path}: {done.codec}, {shared}, {done.written} objects written, {done.written_bytes} bytes"
    common.say(line, quiet=quiet)
    if done.differing:
        where = ", ".join(f"{start}:{stop}" for start, stop in done.differing)
        common.say(
            f"kvpack: {path}: the store has other bits for tokens {where}, of another machine or schedule; they stay",
            quiet=quiet,
            to_stderr=True,
        )
    if done.repaired:
        where = ", ".join(f"{start}:{stop}" for start, stop in done.repaired)
        common.say(f"kvpack: {path}: replaced damaged objects of tokens {where}", quiet=quiet, to_stderr=True)


def get(
    store: Directory,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Write the capture to this file. - is standard output.",
            metavar="FILE",
            rich_help_panel=common.FILES,
        ),
    ],
    prompt: Annotated[
        Path | None,
        typer.Argument(
            help="A capture or a .kvp file whose tokens are the prompt.", show_default=False, metavar="[PROMPT]"
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="The prompt as a text: a UTF-8 file. - is standard input.", show_default=False, metavar="FILE"
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="The prompt as token ids, as 1,2,3, or a file of them.", show_default=False, metavar="LIST"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="The model whose tokenizer reads --text (default: the embedded one).",
            metavar="MODEL",
        ),
    ] = None,
    codec: CodecName = "lossless",
    profile: common.ProfileFile = None,
    made: Annotated[
        str,
        typer.Option(
            help="own: take caches that were made as the prompt's own was, or by prefill. any: also those made by "
            "decode steps, whose bits may differ.",
            metavar="own|any",
        ),
    ] = "own",
    kind: Annotated[
        str | None,
        typer.Option(
            help="Look at caches of this kind alone, by its first digits. store ls shows kinds.",
            show_default=False,
            metavar="DIGITS",
        ),
    ] = None,
    force: common.Force = False,
    threads: common.Threads = None,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Write the longest stored beginning of a prompt as a capture.

    The exit code is 7 if the store has no beginning of it.
    """
    if as_json and output == common.STDIO:
        raise UsageError("--json and the file itself cannot both go to standard output")
    if made not in ("own", "any"):
        raise UsageError(f"--made is own or any, not {made!r}")
    if sum(given is not None for given in (prompt, text, tokens)) != 1:
        raise UsageError("give one prompt: a capture or .kvp file, or --text, or --tokens")
    if model is not None and prompt is not None:
        raise UsageError("--model goes with --text or --tokens: a capture names its model itself")
    given = tokens if tokens is not None and not words_in(tokens) else None
    common.check_target(output, [prompt, text, given, profile, model, store], force=force)
    from kvpack.engine import CpuEngine
    from kvpack.store import Store
    from kvpack.store import get as get_one

    place = Store(store)
    wanted = prompt_of(prompt, text, tokens, model, made == "any")
    chosen, opened = _codec(codec, quiet), common.open_profile(profile)
    with common.writable(output, force) as sink, scratch() as (spool, _):
        target = sink if output != common.STDIO else spool
        done = get_one(place, wanted, chosen, target, profile=opened, kind=kind, engine=CpuEngine(threads))
        if output == common.STDIO:
            spool.seek(0)
            shutil.copyfileobj(spool, sink, 1 << 20)
        else:
            restrict(sink, done.mode)
    _say_fetched(output, done, quiet, as_json)


def _say_fetched(output: Path, done: Fetched, quiet: bool, as_json: bool) -> None:
    for note in done.notes:
        common.say(f"kvpack: {note}", quiet=quiet, to_stderr=True)
    if as_json:
        facts = {name: value for name, value in vars(done).items() if name != "mode"}
        common.print_json({"schema_version": 1, "output": str(output), **facts})
        return
    exact = "bit-exact" if done.lossless else "lossy"
    line = f"{output}: {done.held} of the prompt's {done.tokens} tokens, {done.objects} objects, {done.codec} ({exact})"
    common.say(line, quiet=quiet, to_stderr=output == common.STDIO)


store = typer.Typer(
    name="store",
    help="Keep many caches in a directory, shared beginnings once.",
    no_args_is_help=True,
)
for command in (put, get, ls, stat, verify, gc):
    store.command()(command)
