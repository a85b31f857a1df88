"""The latent flow model of tiny-flux2, on the CPU or a GPU: FLUX.2's shape at a width of 320, on TAEF2's latents."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from liftkit.checkpoint.folder import sha256
from liftkit.color import to_signed
from liftkit.data import demo
from liftkit.models.load import load_vae
from tools import flow
from tools.tiny_flux2.taef2 import VAE
from tools.tiny_klein import common, text

CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 1,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 10,
    "joint_attention_dim": 96,
    "timestep_guidance_channels": 128,
    "mlp_ratio": 2.4,
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": False,
}
WORK = Path(os.environ.get("TINY_FLUX2_WORK", "build/tiny-flux2"))


def train(
    steps: int, batch_size: int, pool: int, device: str = "cpu", seconds: float | None = None, workers: int = 1
) -> None:
    """Draw the images, encode them and train; see :func:`tools.flow.train`.

    Args:
        steps, batch_size, device, seconds: of the training.
        pool: images to draw, each of which is seen many times.
        workers: processes that draw them.
    """
    began = time.monotonic()
    images, scenes = draw(pool, workers)
    print(f"drawn {pool} images in {time.monotonic() - began:.0f} s", flush=True)
    captions, embeds = text.captions(scenes)
    origin = torch.tensor(list(bytes.fromhex(sha256(VAE / "diffusion_pytorch_model.safetensors"))), dtype=torch.uint8)
    tokens = flow.Tokens(_latents(images, device), captions, embeds, origin)
    print(f"encoded after {time.monotonic() - began:.0f} s", flush=True)
    flow.train(CONFIG, tokens, WORK, steps=steps, batch_size=batch_size, device=device, seconds=seconds)


def draw(count: int, workers: int, part: int = 2048) -> tuple[Tensor, list[demo.Scene]]:
    """The first images of the training split, uint8 (count, 3, 64, 64), and their scenes."""
    starts = range(0, count, part)
    jobs = [(min(part, count - start), start) for start in starts]
    if workers == 1:
        parts = [_draw(job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_draw, jobs))
    return torch.cat([images for images, _ in parts]), [scene for _, scenes in parts for scene in scenes]


def _draw(job: tuple[int, int]) -> tuple[Tensor, list[demo.Scene]]:
    count, start = job
    return common.demo_images(count, start=start)


def _latents(images: Tensor, device: str) -> Tensor:
    """Of an earlier run, where it had as many."""
    kept = WORK / "latents.safetensors"
    if kept.is_file() and len(found := load_file(kept)["latents"]) == len(images):
        return found
    found = encode(images, device)
    WORK.mkdir(parents=True, exist_ok=True)
    common.save(kept, {"latents": found.cpu()})
    return found


@torch.no_grad()
def encode(images: Tensor, device: str, part: int = 256) -> Tensor:
    """Images to tokens (n, 16, 128) in half precision, as FLUX.2's pipeline packs latents.

    A CPU encodes in bfloat16, in a third of the time; latents change by 1 % of their deviation.
    """
    vae = load_vae(VAE).to(device, memory_format=torch.channels_last)
    latents = []
    with torch.autocast(device, torch.bfloat16, enabled=device == "cpu"):
        for batch in images.split(part):
            found = vae.encode(to_signed(batch.to(device)).contiguous(memory_format=torch.channels_last)).latents
            latents.append(F.pixel_unshuffle(found.half(), 2))
    return torch.cat(latents).flatten(2).transpose(1, 2).contiguous()
