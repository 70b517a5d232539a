"""What a saved cache says of itself; this package loads neither numpy nor torch."""
