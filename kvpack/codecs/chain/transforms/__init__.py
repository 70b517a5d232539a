"""Transforms, one folder for each wire name."""
