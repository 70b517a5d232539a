"""Reads and writes ``.kvprofile`` files, which hold what calibration learnt about a model."""

from kvpack.profiles.file import Profile, write_profile

__all__ = ["Profile", "write_profile"]
