"""Options that several commands share, and the panels of ``--help`` that they stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FILES = "Files"
"""The panel of options that say which files are read, written, kept and removed."""

RUN = "Speed and memory"
"""The panel of options that say where and how the work is done."""

SHOWN = "Messages"
"""The panel of options that say what is printed."""

Force = Annotated[
    bool, typer.Option("-f", "--force", help="Overwrite files that exist already.", rich_help_panel=FILES)
]
Keep = Annotated[bool, typer.Option("-k", "--keep", help="Keep the input files (the default).", rich_help_panel=FILES)]
Remove = Annotated[
    bool,
    typer.Option("--rm", help="Delete each input once its output is written and was verified.", rich_help_panel=FILES),
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="Show errors only: no progress, no summary.", rich_help_panel=SHOWN)
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Show all details, where only some are shown.", rich_help_panel=SHOWN)
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the results as JSON, for programs. schema_version is in it.", rich_help_panel=SHOWN
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Use at most this many threads (default: one for each processor).",
        show_default=False,
        metavar="N",
        rich_help_panel=RUN,
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memlimit",
        help="Refuse a file that takes more memory than this to decode: 512M, 2G (default: half of the machine's).",
        show_default=False,
        metavar="SIZE",
        rich_help_panel=RUN,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="The numbers that the model computes with: bf16, fp16, fp32, or auto. auto takes the checkpoint's own "
        "dtype, and bf16 for GGUF files.",
        metavar="DTYPE",
        rich_help_panel=RUN,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where the model runs: cpu, cuda, cuda:1, ..., or auto. auto takes a GPU if there is one.",
        metavar="DEVICE",
        rich_help_panel=RUN,
    ),
]
Gpu = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where the codec runs: cpu, cuda, cuda:1, ..., or auto. auto takes a GPU for large lossless files. "
        "lossless, fisher, kivi and turboquant run on a GPU.",
        metavar="DEVICE",
        rich_help_panel=RUN,
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "-D",
        "--profile",
        help="The .kvprofile of calibrated codecs. An installed one that fits is found without this option.",
        show_default=False,
        metavar="FILE",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="The model: a hub id, a directory or a .gguf file (default: the embedded SmolLM2-135M).",
        show_default=False,
        metavar="MODEL",
    ),
]
ReplayedBy = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="For the codec replay: the model that made the cache. It is a hub id, a directory or a .gguf file "
        "(default: the embedded SmolLM2-135M).",
        show_default=False,
        metavar="MODEL",
    ),
]
