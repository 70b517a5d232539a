"""``kvpack demo``."""
def demo() -> None:
    """x"""
