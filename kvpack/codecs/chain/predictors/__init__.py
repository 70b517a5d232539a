"""Predictors, one folder for each wire name."""
