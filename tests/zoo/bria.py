"""Bria 3.x and FIBO."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests import vaes
from tests.zoo.specimen import MMDIT, Specimen, draw, prompts


def read(prompt: list[str], **more: Any) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """What FIBO's text encoder gives: embeddings, three hidden states, a mask; padded to the longest."""
    longest = max(len(each) for each in prompt) + 1
    mask = torch.stack([torch.arange(longest) <= len(each) for each in prompt])
    states = [
        torch.cat([draw(1, 64, 12, seed=len(each) + layer)[:, :longest] for each in prompt]) * mask[..., None]
        for layer in range(3)
    ]
    return torch.cat(states[:2], dim=-1), tuple(states), mask.long()


class Encoder(torch.nn.Module):
    """In the place of FIBO's text encoder, of which its pipeline asks the dtype."""

    dtype, device = torch.float32, torch.device("cpu")


def prepare(pipeline: Any, height: int, width: int) -> None:
    """FIBO's pipeline takes no ready embeddings."""
    pipeline.get_prompt_embeds = read
    pipeline.text_encoder = Encoder()


def fibo_vae() -> Any:
    """Wan's autoencoder of factor 16: convolutions by 8, patches of 2."""
    return vaes.wan(is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16)


SPECIMENS = (
    Specimen(
        "BriaTransformer2DModel",
        {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, **MMDIT},
        pipeline="BriaPipeline",
        vae=vaes.kl,
        call=lambda count: {**prompts("prompt_embeds", 7, 24, count=count), "guidance_scale": 3.0},
        stubs={
            "_get_t5_prompt_embeds": lambda prompt, max_sequence_length, **more: torch.cat(
                [draw(1, max_sequence_length, 24, seed=len(each)) for each in prompt]
            )
        },
    ),
    Specimen(
        "BriaFiboTransformer2DModel",
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "text_encoder_dim": 12, **MMDIT},
        pipeline="BriaFiboPipeline",
        vae=fibo_vae,
        call=lambda count: {"prompt": ["a cat", "two dogs"][:count], "guidance_scale": 3.0},
        factor=16,
        patch=1,
        grid=(4, 2),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        prepare=prepare,
        stubs={"get_prompt_embeds": read},
    ),
)
