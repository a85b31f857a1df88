"""The command line. Only typer, rich and the standard library are imported before a command runs."""
