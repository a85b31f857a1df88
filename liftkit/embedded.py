"""What comes with the package: the embedded model, and what was learned on it.

``demo`` names the embedded model wherever a model is expected; :func:`liftkit.checkpoint.model.find_model` resolves it.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
DEMO = "demo"
"""The name of the embedded model and of the embedded data on the command line, in recipes and in Python."""
TINY_KLEIN = ASSETS / "tiny-klein"
"""A trained FLUX.2-klein of 3 million parameters: a real diffusers folder."""
TINY_PIXEL = ASSETS / "tiny-klein-pixel"
"""The adapter that a long finetune of its conversion left."""
STEPS, GUIDANCE = 16, 4.0
"""How tiny-klein is sampled: where its figures were measured."""
