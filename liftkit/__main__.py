"""``python -m liftkit`` is ``liftkit``; what ``accelerate launch -m liftkit`` starts."""

from liftkit.cli.app import run

run()
