"""``python cli.py ...`` is ``liftkit ...``."""

from liftkit.cli.app import run

run()
