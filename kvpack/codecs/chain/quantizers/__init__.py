"""Quantizers, one folder for each wire name."""
