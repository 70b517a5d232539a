"""The stages of the pipeline: transforms, predictors, quantizers and entropy coders, each in its own folder."""
