"""Entropy coders, one folder for each wire name."""
