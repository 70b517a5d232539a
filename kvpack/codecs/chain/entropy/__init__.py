"""Entropy by name, one folder each."""
