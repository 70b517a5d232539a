"""Reads and writes ``.kvprofile`` files, which hold what calibration learnt about a model, and finds installed ones."""

from kvpack.profiles.file import Profile, write_profile
from kvpack.profiles.installed import families, install_profile, installed_folder, profile_for, profile_with

__all__ = ["Profile", "families", "install_profile", "installed_folder", "profile_for", "profile_with", "write_profile"]
