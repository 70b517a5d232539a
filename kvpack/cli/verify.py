"""``kvpack verify``."""
def verify() -> None:
    """x"""
