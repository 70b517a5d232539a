"""``kvpack store``: put, get, ls, stat, verify and gc."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli import batch, common
from kvpack.errors import CorruptError, UsageError, naming
from kvpack.formats.input import read_file
from kvpack.formats.output import restrict
from kvpack.formats.temporary import scratch

if TYPE_CHECKING:
    from kvpack.capture import Model
    from kvpack.codecs.protocol import Codec
    from kvpack.store import Fetched, Prompt, StoreReport

store = typer.Typer(
    name="store",
    help="Keep caches of many texts in a directory, and beginnings that texts share once.",
    no_args_is_help=True,
)

Directory = Annotated[Path, typer.Option("--store", help="The store's directory.", show_default=False)]
CodecName = Annotated[
    str, typer.Option("-c", "--codec", help="Codec; one that looks at later tokens is replaced by its -prefix variant.")
]


@store.command()
def put(
    store: Directory,
    inputs: batch.Inputs = None,
    codec: CodecName = "lossless",
    profile: common.ProfileFile = None,
    window: Annotated[int, typer.Option(help="Tokens in an object; a multiple of 128.")] = 256,
    files_from: batch.FilesFrom = None,
    recursive: batch.Recursive = False,
    threads: common.Threads = None,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Store captures: their keys, values and token ids. The store is made if it is not there.

    A bad file does not stop the others: each is reported, and the exit code is the largest. --json prints one line for
    each file.
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


@store.command()
def get(
    store: Directory,
    output: Annotated[Path, typer.Option("-o", "--output", help="The capture to write; - is standard output.")],
    prompt: Annotated[
        Path | None,
        typer.Argument(help="A capture or .kvp file whose tokens are the prompt.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file that is the prompt; - is standard input.", show_default=False)
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="The prompt's token ids, e.g. 1,2,3, or a file of them.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="The model whose tokenizer --text takes (default: the embedded one)."),
    ] = None,
    codec: CodecName = "lossless",
    profile: common.ProfileFile = None,
    made: Annotated[
        str,
        typer.Option(help="'own': made as the prompt's own cache, or by prefill; 'any': also by decode steps."),
    ] = "own",
    kind: Annotated[
        str | None, typer.Option(help="First digits of the kind to look at; see ls.", show_default=False)
    ] = None,
    force: common.Force = False,
    threads: common.Threads = None,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Write the longest stored prefix of a prompt as a capture.

    The exit code is 7 if the store has no prefix of it.
    """
    if as_json and output == common.STDIO:
        raise UsageError("--json and the file itself cannot both go to standard output")
    if made not in ("own", "any"):
        raise UsageError(f"--made is own or any, not {made!r}")
    if sum(given is not None for given in (prompt, text, tokens)) != 1:
        raise UsageError("give one prompt: a capture or .kvp file, or --text, or --tokens")
    if model is not None and prompt is not None:
        raise UsageError("--model goes with --text or --tokens: a capture names its model itself")
    given = tokens if tokens is not None and not _words(tokens) else None
    common.check_target(output, [prompt, text, given, profile, model, store], force=force)
    from kvpack.engine import CpuEngine
    from kvpack.store import Store
    from kvpack.store import get as get_one

    place = Store(store)
    wanted = _prompt(prompt, text, tokens, model, made == "any")
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


def _prompt(path: Path | None, text: Path | None, tokens: str | None, model: str | None, any_way: bool) -> Prompt:
    from kvpack.jobs import KvpFile, open_cache
    from kvpack.store import Prompt

    if path is not None:
        with common.readable(path) as source, naming(str(path)):
            opened = open_cache(source)
            if isinstance(opened, KvpFile):
                opened.require_whole()
            return Prompt.of_cache(opened, opened.metadata, any_way=any_way)
    if text is not None:
        from kvpack.cli.capture import read_text

        content, loaded = read_text(text), _model(model or "embedded")
        ids: list[int] = loaded.tokenizer(content).input_ids
        return Prompt.of_tokens(ids, weights=loaded.weights_sha256, any_way=any_way)
    weights = _model(model).weights_sha256 if model else None
    return Prompt.of_tokens(parse_ids(tokens or ""), weights=weights, any_way=any_way)


def _model(name: str) -> Model:
    from kvpack.capture import load_model

    return load_model(None if name == "embedded" else name)


def parse_ids(given: str) -> list[int]:
    """Return the token ids in a list or in a file of such a list: whole numbers between commas or spaces.

    Raises:
        UsageError: It is neither.

    """
    listed = given
    if not _words(given) and _is_file(given):
        listed = read_file(Path(given)).decode(errors="replace").strip().strip("[]")
    words = _words(listed)
    if not words or max(map(int, words)) >= 1 << 31:
        raise UsageError(f"--tokens takes token ids like 1,2,3, or a file of them, not {given!r}")
    return [int(word) for word in words]


def _is_file(given: str) -> bool:
    try:
        return Path(given).is_file()
    except OSError:  # It is too long for a name.
        return False


def _words(text: str) -> list[str]:
    """Return the numbers in a list, or nothing if there is anything else in it."""
    words = text.replace(",", " ").split()
    return words if all(word.isascii() and word.isdecimal() and len(word) < 11 for word in words) else []


@store.command()
def ls(
    store: Directory,
    as_json: common.Json = False,
) -> None:
    """List every stored text: the end of each chain of objects."""
    from kvpack.store import Store, report, to_json

    found = report(Store(store))
    if as_json:
        common.print_json({"schema_version": 1, "texts": to_json(found)["leaves"]})
        return
    for leaf in found.leaves:
        used = datetime.fromtimestamp(leaf.used, UTC).strftime("%Y-%m-%d %H:%M:%S")
        sizes = f"{leaf.tokens} tokens, {leaf.objects} objects, {leaf.bytes} bytes"
        common.say(f"{leaf.name[:12]}  kind {leaf.kind[:12]}  {leaf.codec}  {sizes}  {leaf.made}  used {used}")
    _warn(found)


@store.command()
def stat(
    store: Directory,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="Also give the bits of every shared prefix under this model: a hub id, a path, or 'embedded'.",
            show_default=False,
        ),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Show the trie in numbers: objects, branches, depth, and the bytes that sharing saves."""
    from kvpack.store import Store, report, to_json

    place = Store(store)
    if model is None:
        found = report(place)
    else:
        from kvpack.capture.entropy import token_bits

        loaded = _model(model)

        def bits(ids: Any) -> float:
            mean, count = token_bits(loaded, ids)
            return mean * count

        found = report(place, bits, loaded.weights_sha256)
    if as_json:
        common.print_json({"schema_version": 1, **to_json(found)})
        return
    common.say(f"objects      {found.objects}, of {found.kinds} kinds; {found.tokens} tokens, {found.bytes} bytes")
    common.say(
        f"texts        {len(found.leaves)}, the longest {found.longest} tokens, the deepest {found.depth} objects"
    )
    common.say(f"branches     {len(found.branches)}")
    common.say(f"saved        {found.saved} bytes, because shared prefixes are stored once")
    for branch in found.branches:
        measured = "" if branch.bits is None else f", {branch.bits:.1f} bits under the model"
        common.say(f"  {branch.name[:12]}  {branch.tokens} tokens shared by {branch.followers} branches{measured}")
    _warn(found)


def _warn(found: StoreReport) -> None:
    if found.unreadable:
        line = f"kvpack: {found.unreadable} objects are damaged or cannot be reached: kvpack store verify names them"
        common.say(line, to_stderr=True)


@store.command()
def verify(
    store: Directory,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Prove that every bit of the store is as it was written. The exit code is 4 if not."""
    from kvpack.store import verify as verify_all

    found = verify_all(store)
    if as_json:
        damage = [vars(one) for one in found.damage]
        common.print_json({"schema_version": 1, "objects": found.objects, "kinds": found.kinds, "damage": damage})
    else:
        for one in found.damage:
            common.say(f"kvpack: {one.path}: {one.reason}", to_stderr=True)
    if found.damage:
        raise CorruptError(f"{store}: {len(found.damage)} files are damaged or do not belong there")
    if not as_json:
        common.say(f"{store}: {found.objects} objects ok", quiet=quiet)


@store.command()
def gc(
    store: Directory,
    max_bytes: Annotated[
        str | None, typer.Option(help="Remove until this many bytes are left: 500M, 20G.", show_default=False)
    ] = None,
    max_age: Annotated[
        str | None, typer.Option(help="Remove what was not used for this long: 12h, 30d.", show_default=False)
    ] = None,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Remove the least recently used ends of chains, and what killed writers left behind."""
    from kvpack.store import Store, collect

    size = None if max_bytes is None else int(amount(max_bytes, SIZES, "--max-bytes takes a size like 500M or 20G"))
    age = None if max_age is None else amount(max_age, TIMES, "--max-age takes a time like 12h or 30d")
    done = collect(Store(store), max_bytes=size, max_age=age)
    if as_json:
        common.print_json({"schema_version": 1, **vars(done)})
        return
    removed = f"{done.removed} objects removed, {done.removed_bytes} bytes"
    common.say(f"{store}: {removed}; {done.kept} kept, {done.kept_bytes} bytes", quiet=quiet)


SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def amount(text: str, units: dict[str, int], problem: str) -> float:
    """Return a number with a unit in the smallest unit.

    Raises:
        UsageError: The text is not such a number.

    """
    unit = text[-1:] if text[-1:] in units else ""
    digits = text.removesuffix(unit)
    if unit not in units or not digits.isascii() or not digits.isdecimal() or len(digits) > 15:
        raise UsageError(f"{problem}, not {text!r}")
    return int(digits) * units[unit]
