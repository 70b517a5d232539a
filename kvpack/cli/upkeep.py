"""``kvpack store``: ls, stat, verify and gc."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli import common
from kvpack.cli.prompts import named_model
from kvpack.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from kvpack.store import StoreReport

Directory = Annotated[
    Path, typer.Option("--store", help="The directory of the store.", show_default=False, metavar="DIR")
]


def ls(
    store: Directory,
    as_json: common.Json = False,
) -> None:
    """List the stored texts."""
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


def stat(
    store: Directory,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="Also measure how many bits each shared beginning has under this model: a hub id, a directory, a "
            ".gguf file, or 'embedded'.",
            show_default=False,
            metavar="MODEL",
        ),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Show what the store holds in numbers, and how many bytes sharing saves."""
    from kvpack.store import Store, report, to_json

    place = Store(store)
    if model is None:
        found = report(place)
    else:
        from kvpack.capture.entropy import token_bits

        loaded = named_model(model)

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


def verify(
    store: Directory,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Check that every bit of the store is as it was written.

    The exit code is 4 if something is damaged, and each damaged file is named.
    """
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


def gc(
    store: Directory,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Remove until no more than this is left: 500M, 20G.", show_default=False, metavar="SIZE"),
    ] = None,
    max_age: Annotated[
        str | None,
        typer.Option(help="Remove what was not used for this long: 12h, 30d.", show_default=False, metavar="TIME"),
    ] = None,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Remove what was not used for longest, and what killed commands left behind.

    Texts lose their ends first, and shared beginnings stay while a text needs them.
    """
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
