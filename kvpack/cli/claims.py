"""The command ``kvpack claims``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli import common
from kvpack.cli.capture import read_text
from kvpack.errors import UsageError


def claims(
    config: Annotated[Path, typer.Option("--config", help="A model's config.json.", show_default=False)],
    bits: Annotated[float, typer.Option(min=0.1, help="TurboQuant's bits per element.")] = 3.0,
    norm_bits: Annotated[float, typer.Option(min=0, help="Bits of a norm in TurboQuant; 0 in the paper.")] = 0,
    token_bits: Annotated[float, typer.Option(min=0.001, help="Assumed entropy of a token in bits.")] = 4.3,
    text: Annotated[
        Path | None, typer.Option(help="Measure the entropy on this text instead of assuming it.", show_default=False)
    ] = None,
    model: common.Model = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Use at most this many tokens of the text.")] = 2048,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Compute what arXiv 2604.15356 claims for a model: bits per token raw, with TurboQuant, and a token's entropy.

    With --text, the entropy is measured under --model (default: the embedded model). The bound is the information in a
    cache and not a codec: to reach it is to store the tokens and compute the cache again.
    """
    from kvpack.bench.claims import Shape, claim

    if model is not None and text is None:
        raise UsageError("--model measures the entropy of a text: give --text too")
    shape = Shape.from_config(config)
    source = "assumed"
    if text is not None:
        from kvpack.capture import load_model
        from kvpack.capture.entropy import token_bits as measure

        content = read_text(text)
        loaded = load_model(model)
        with common.progress_bar(f"running {loaded.name}", quiet) as progress:
            token_bits, count = measure(loaded, loaded.tokenizer(content).input_ids[:max_tokens], progress)
        source = f"measured under {loaded.name} on {count} tokens of {text.name}"
    found = {
        "query heads, as the paper counts": claim(
            shape, shape.query_heads, token_bits=token_bits, bits=bits, norm_bits=norm_bits
        ),
        "KV heads, as the model caches": claim(
            shape, shape.kv_heads, token_bits=token_bits, bits=bits, norm_bits=norm_bits
        ),
    }
    if as_json:
        rows = [{"counting": name, **row.to_json()} for name, row in found.items()]
        common.print_json({"schema_version": 1, "config": str(config), "token_bits_source": source, "claims": rows})
        return
    common.say(f"{shape.layers} layers, head dimension {shape.head_dim}; a token: {token_bits:.3f} bits ({source})")
    for name, row in found.items():
        common.say(
            f"{row.heads} {name}: raw {row.raw_bits:,} bits a token, TurboQuant {row.turboquant_bits:,.0f}; "
            f"TurboQuant / token {row.over_turboquant:,.0f}x, raw / token {row.over_raw:,.0f}x"
        )
