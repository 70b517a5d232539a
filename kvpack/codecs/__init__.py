"""Codecs: from the tensors of a window to streams and back."""
