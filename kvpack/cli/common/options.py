"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Force = Annotated[bool, typer.Option("-f", "--force", help="Overwrite existing files.")]
Keep = Annotated[bool, typer.Option("-k", "--keep", help="Keep input files (the default).")]
Remove = Annotated[bool, typer.Option("--rm", help="Delete each input after its output is written and verified.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress and no summary.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show more details.")]
Json = Annotated[bool, typer.Option("--json", help="Print results as JSON, with schema_version.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Number of threads (default: all processors).", show_default=False),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memlimit",
        help="Most memory that decoding may take, e.g. 512M or 2G (default: half of the machine's).",
        show_default=False,
        metavar="SIZE",
    ),
]
Dtype = Annotated[str, typer.Option(help="bf16, fp16, fp32, or auto: the checkpoint's own dtype (bf16 for GGUF).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Gpu = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu; cuda, cuda:1, ... (lossless, fisher, kivi, turboquant); auto: GPU for large lossless files.",
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option("-D", "--profile", help="The .kvprofile file, which calibrated codecs need.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="Hub id, directory or .gguf file (default: the embedded SmolLM2-135M).",
        show_default=False,
    ),
]
ReplayedBy = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="The model that made the cache, for the codec replay: hub id, directory or .gguf file "
        "(default: the embedded SmolLM2-135M).",
        show_default=False,
    ),
]
