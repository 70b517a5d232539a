"""The version of kvpack."""

__version__ = "0.1.0"
