"""Transforms by name, one folder each."""
