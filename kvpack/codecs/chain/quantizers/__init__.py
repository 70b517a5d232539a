"""Quantizers by name, one folder each."""
