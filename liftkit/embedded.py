"""What comes with the package: the embedded models, and what was learned on them.

``demo`` and ``tiny-flux2`` name them wherever a model is expected; :func:`liftkit.checkpoint.model.find_model` resolves them.
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
TINY_FLUX2 = ASSETS / "tiny-flux2"
"""A trained model of FLUX.2's shape on FLUX.2's own latents, by TAEF2: 8.7 million parameters."""
MODELS = {DEMO: TINY_KLEIN, "tiny-flux2": TINY_FLUX2}
"""The embedded models by name."""
TINY_FLUX2_PIXEL = ASSETS / "tiny-flux2-pixel"
"""The adapter that a finetune of its conversion left."""
VAES = {"taef2": TINY_FLUX2 / "vae"}
"""The embedded VAEs by name: TAEF2, a small stand-in for FLUX.2's."""
STEPS, GUIDANCE = 16, 4.0
"""How tiny-klein is sampled: where its figures were measured."""
