"""Measures rate and distortion of codecs on held-out captures with the model as judge; tables, plots, comparisons."""
