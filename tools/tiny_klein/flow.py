"""The latent flow model of tiny-klein."""

from __future__ import annotations

import torch

from liftkit.checkpoint.folder import sha256
from tools import flow
from tools.tiny_klein import autoencoder, common, text

CONFIG = {
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 1,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 96,
    "timestep_guidance_channels": 128,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": False,
}
POOL = 24576


def train(steps: int = 4600) -> None:
    """Train it behind the first VAE; see :func:`tools.flow.train`."""
    images, scenes = common.demo_images(POOL)
    latents = autoencoder.normalized_latents(autoencoder.build("vae.safetensors"), images)
    vae = torch.tensor(list(bytes.fromhex(sha256(common.work_file("vae.safetensors")))), dtype=torch.uint8)
    captions, embeds = text.captions(scenes)
    tokens = flow.Tokens(latents.flatten(2).transpose(1, 2).contiguous(), captions, embeds, vae)
    flow.train(CONFIG, tokens, common.WORK, steps=steps)
