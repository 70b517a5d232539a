"""``python -m kvpack``."""

from kvpack.cli.main import main

main()
