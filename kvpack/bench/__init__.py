"""Rate-distortion runs: every codec over held-out captures, judged by the model; tables, plots, comparisons."""
