"""The command line, one file per command: the only code that prints.

It may import everything, and nothing imports it; torch and other heavy packages are imported inside of commands.
Read ``app.py`` first.
"""
