"""The stages of the pipeline: transforms, quantizers and entropy coders, each a folder of its own."""
