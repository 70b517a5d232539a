"""On what a page was made, and by which commands."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import kvpack
from kvpack.bench.html.page import Page, commands, facts, paragraph
from kvpack.numerics.processor import processor_name

PACKAGES = ("numpy", "torch", "transformers", "numba", "zstandard", "vl-convert-python")


@dataclass(frozen=True)
class Made:
    """The command line that made a page, as its words, and the machine it ran on."""

    command: Sequence[str]
    gpu: str | None = None

    def add_to(self, page: Page, *more: str, about: Mapping[str, object] | None = None) -> None:
        """Add the section that says how the page was made; ``about`` are further facts, ``more`` is further HTML."""
        page.section(
            "made",
            "How this was made",
            commands([shlex.join(self.command)]),
            facts({**machine_facts(self.gpu), **(about or {})}),
            *more,
            paragraph(
                "The figures of the heat maps and of the bytes stand in this file as JSON, in the element with the id "
                "“data”. docs/reports.md says what every picture shows.",
                "muted",
            ),
        )


def machine_facts(gpu: str | None) -> dict[str, Any]:
    """Return the processor, the GPU if one was used, the system, the versions, and the time."""
    return {
        "Processor": f"{processor_name()}, {os.cpu_count()} cores",
        "GPU": gpu,
        "System": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "Versions": ", ".join([f"kvpack {kvpack.__version__}", *_versions()]),
        "Made at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
