"""The command line: one file a command, no work of its own. typer and rich live here alone."""
