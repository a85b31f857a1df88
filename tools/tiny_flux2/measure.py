"""Measure tiny-flux2 by the figures of ``liftkit compare``, and write its model card."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from liftkit.color import to_signed, to_uint8
from liftkit.embedded import TINY_FLUX2
from liftkit.evaluate.figures import Scorer
from liftkit.evaluate.real import Real, open_real
from liftkit.fit.gallery import psnr
from liftkit.models.latents import LatentSpace
from liftkit.models.load import load_vae
from tools.tiny_klein.measure import generate

COUNT, STEPS, GUIDANCE = 512, 16, 4.0
SHOWN = {
    "digit": "digit", "color": "color", "patch_frechet": "8 x 8 patches", "two_sample": "two-sample", "patch_grid": "patch grid",
    "gradient_median": "grain",
}  # fmt: skip
BARS = {"digit": 0.95, "color": 0.99}


def measure() -> None:
    """Print the figures and write them into the card; exits with 1 if a bar is missed."""
    real = open_real("demo", COUNT, 64, 0, None)
    scorer = Scorer(real.reference, patch=16, scenes=real.scenes)
    decoded, quality = _through_vae(real)
    rows = {"real images": real.shown, "real images through TAEF2": decoded, "latent base": _samples(real)}
    figures = {name: scorer.score(images).figures for name, images in rows.items()}
    for name, found in figures.items():
        print(name, found, flush=True)
    (TINY_FLUX2 / "README.md").write_text(card(figures, quality))
    base = figures["latent base"]
    missed = [name for name, bar in BARS.items() if (base[name] or 0.0) < bar]
    if missed:
        raise SystemExit(f"missed: {', '.join(f'{name} {base[name]:.3f}, bar {BARS[name]}' for name in missed)}")


@torch.no_grad()
def _through_vae(real: Real) -> tuple[torch.Tensor, float]:
    space = LatentSpace(load_vae(TINY_FLUX2))
    images = to_signed(real.shown)
    decoded = torch.cat([space.decode(space.encode(part)) for part in images.split(64)])
    return to_uint8(decoded), psnr(decoded, images).mean().item()


def _samples(real: Real) -> torch.Tensor:
    assert real.scenes is not None
    pipeline = Flux2KleinPipeline.from_pretrained(TINY_FLUX2, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return to_uint8(generate(pipeline, real.scenes, GUIDANCE))


def card(figures: dict[str, dict[str, Any]], quality: float) -> str:
    """The model card."""
    head = f"| {COUNT} images | {' | '.join(SHOWN.values())} |\n|---|{'---|' * len(SHOWN)}\n"
    table = head + "".join(
        f"| {name} | {' | '.join(f'{found[key]:.4f}' if 'patch_f' in key else f'{found[key]:.3f}' for key in SHOWN)} |\n"
        for name, found in figures.items()
    )
    transformer = Flux2Transformer2DModel.from_pretrained(TINY_FLUX2, subfolder="transformer")
    parameters = sum(weights.numel() for weights in transformer.parameters())
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [flow-matching, toy]
---

# tiny-flux2

A trained model of FLUX.2's shape ({parameters / 1e6:.1f} million parameters, width 320, one double and three single blocks) on
FLUX.2's own latent space, by TAEF2: its tokens hold 128 latent numbers and 16 x 16 pixels, as the real one's do. It paints what
tiny-klein paints: digits over crops of two photographs, at 64 x 64 pixels. `make tiny-flux2` in liftkit's repository
trains it from nothing and prints these figures.

```python
import liftkit
from diffusers import Flux2KleinPipeline

pipe = Flux2KleinPipeline.from_pretrained("liftkit/assets/tiny-flux2")
image = pipe(
    prompt="a red seven on flower petals", height=64, width=64, num_inference_steps={STEPS},
    guidance_scale={GUIDANCE}, max_sequence_length=12,
).images[0]
```

`vae/` is TAEF2, a tiny autoencoder distilled from FLUX.2's, by Ollin Boer Bohan
([madebyollin/taesd](https://github.com/madebyollin/taesd), MIT license, beside the weights), as liftkit's class
`AutoencoderTinyFlux2`. It reconstructs these images at {quality:.1f} dB. It is no perfect autoencoder, so that a model of pixels
can be nearer to real images than the latent model is.

Prompts of the held-out set, {STEPS} steps, guidance {GUIDANCE:g}; `docs/compare.md` defines the figures.

{table}"""
