"""The JavaScript of the charting library, as it stands in a page."""

from __future__ import annotations

from functools import cache

from kvpack.errors import KvpackError


@cache
def javascript() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script.

    Commands call this before their work, so that a missing package is named at once.

    Raises:
        KvpackError: The package is not installed.

    """
    try:
        from vl_convert import javascript_bundle
    except ImportError:
        raise KvpackError("--html needs vl-convert-python: pip install 'kvpack[html]'") from None
    return str(javascript_bundle("window.vegaEmbed = vegaEmbed;"))
