"""``kvpack compress --list-codecs``: what each codec is."""

from __future__ import annotations

from typing import Any

from kvpack.cli import common
from kvpack.codecs.catalogue import MEASURED, Family, families
from kvpack.codecs.protocol import Need

GROUPS = (
    "Without loss:",
    "Lossy:",
    "Lossy, with a profile of the model (-D FILE, made by kvpack calibrate):",
)


def show_codecs(*, quiet: bool, as_json: bool) -> None:
    """Print all codecs by family. With ``quiet`` only their names, one a line, and with ``as_json`` JSON."""
    every = families()
    if as_json:
        common.print_json({"schema_version": 1, "measured_on": MEASURED, "codecs": [*_to_json(every)]})
        return
    if quiet:
        for family in every:
            for codec in family.codecs:
                common.say(codec.name)
        return
    groups = [[family for family in every if _group(family) == number] for number in range(len(GROUPS))]
    width = max(len(_names(family)) for family in every)
    for title, members in zip(GROUPS, groups, strict=True):
        common.say(title)
        for family in members:
            common.say(f"  {_names(family):<{width}}  {_bits(family):<15}  {family.about}")
    common.say("")
    common.say("The figures are bits an element, of 16 uncompressed, measured on")
    common.say(f"{MEASURED}.")
    common.say("Other models and texts differ. docs/benchmarks.md has what each codec loses.")
    common.say("-q lists the names alone, one on each line.")


def _group(family: Family) -> int:
    if family.codecs[0].lossless:
        return 0
    return 2 if Need.PROFILE in family.codecs[0].traits.needs else 1


def _names(family: Family) -> str:
    first, last = family.codecs[0].name, family.codecs[-1].name
    return first if first == last else f"{first} to {last.removeprefix(family.name)}"


def _bits(family: Family) -> str:
    most, least = f"{family.most:.3g}", f"{family.least:.3g}"
    return most if most == least else f"{most} to {least}"


def _to_json(every: list[Family]) -> list[dict[str, Any]]:
    return [
        {
            "name": codec.name,
            "family": family.name,
            "lossless": codec.lossless,
            "needs_profile": Need.PROFILE in codec.traits.needs,
            "needs_model": Need.MODEL in codec.traits.needs,
            "family_bits_per_element": [family.most, family.least],
            "about": family.about,
        }
        for family in every
        for codec in family.codecs
    ]
