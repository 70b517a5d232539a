"""Files of caches by other programs, read and written."""
