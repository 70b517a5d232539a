"""What everything computes with: bit patterns of floats, the checksum, the compiler of loops."""
