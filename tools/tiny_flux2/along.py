"""Where a grid comes from: the borders of patches in what a model takes the image for, at each step of the sampler."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from liftkit.color import to_signed
from liftkit.evaluate.entries import open_entry
from liftkit.evaluate.real import open_real
from liftkit.evaluate.tied import pixel_noise
from liftkit.fit.gallery import border_energies
from liftkit.models.sampling import sample
from liftkit.options import Guidance, SampleOptions
from tools.tiny_flux2.judged import GUIDANCE

PATCH = 16


def along(model: str, count: int, scale: float = GUIDANCE) -> None:
    """Print, by noise level, energies across borders and inside patches of the guided estimate, relative to real images.

    Args:
        model: a pixel model's folder, or an adapter of tiny-flux2.
        count: samples.
        scale: of guidance.
    """
    real, entry = open_real("demo", count, 64, 0, None), open_entry(model, "tiny-flux2")
    assert entry.lift is not None
    color, loaded = entry.lift.color, entry.load("cpu")
    fold = loaded.flow.fold
    wanted = border_energies(to_signed(real.shown).float(), PATCH)
    states = [pixel_noise(range(count), 64, 64, 0)]

    def keep(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
        folded = loaded.flow.state_of_pipeline(values["latents"], 64 // fold, 64 // fold)
        states.append(F.pixel_shuffle(folded.float(), fold))
        return {}

    options = SampleOptions(steps=16, guidance=Guidance(scale=scale), height=64, width=64, batch_size=count)
    with torch.autocast("cpu", torch.bfloat16):
        sample(loaded, list(real.prompts), options, noise=states[0], callback_on_step_end=keep)
    sigmas = loaded.pipeline.scheduler.sigmas.float()
    for now, after, here, there in zip(states, states[1:], sigmas, sigmas[1:]):
        shown = color.decode(now - here * (after - now) / (there - here)).clamp(-1.0, 1.0)
        border, inside = (border_energies(shown, PATCH) / wanted).tolist()
        print(f"sigma {here:.3f}: borders {border:.2f}, inside {inside:.2f}, grid {border / inside:.2f}", flush=True)
