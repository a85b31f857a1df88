"""What comes with the package: the embedded model, and what was learned on it."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TINY_KLEIN = ASSETS / "tiny-klein"
"""A trained FLUX.2-klein of 3 million parameters: a real diffusers folder."""
TINY_PIXEL = ASSETS / "tiny-klein-pixel"
"""The adapter that a long finetune of its conversion left."""
STEPS, GUIDANCE = 16, 4.0
"""How tiny-klein is sampled: where its figures were measured."""
