"""The command line, with one file per command; other packages do the work. Only this package imports typer and rich."""
