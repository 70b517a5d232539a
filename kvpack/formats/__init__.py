"""Read and write files of caches that other programs made or will use."""
