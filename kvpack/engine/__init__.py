"""Runs the work of codecs: on the threads of a CPU here, on a GPU in ``kvpack.gpu``."""
