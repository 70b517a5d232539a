"""Reads and writes ``.kvprofile`` files, which hold what calibration learnt about a model, and finds installed ones."""

from kvpack.profiles.file import SECTIONS, Profile, write_profile
from kvpack.profiles.installed import (
    install_profile,
    installed_folder,
    profile_for,
    profile_with,
    section_of,
    sections_of,
)

__all__ = [
    "SECTIONS",
    "Profile",
    "install_profile",
    "installed_folder",
    "profile_for",
    "profile_with",
    "section_of",
    "sections_of",
    "write_profile",
]
