"""Predictors: what a row is expected to be."""
