"""TAEF2's two files as one VAE folder of diffusers' layout: where ``liftkit/assets/tiny-flux2/vae`` is from."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tools.tiny_klein import common

VAE = Path("liftkit/assets/tiny-flux2/vae")
CONFIG = {"_class_name": "AutoencoderTinyFlux2", "latent_channels": 32, "sample_size": 64}
"""Its images may have any size; 64 is that of the model that it comes with."""


def merge(source: Path) -> None:
    """Write the VAE from ``taef2_encoder.safetensors`` and ``taef2_decoder.safetensors`` of madebyollin/taesd, in their own
    half precision."""
    VAE.mkdir(parents=True, exist_ok=True)
    tensors = {f"encoder.layers.{key}": value for key, value in load_file(source / "taef2_encoder.safetensors").items()}
    for key, value in load_file(source / "taef2_decoder.safetensors").items():
        tensors[f"decoder.layers.{_without_clamp(key)}"] = value
    common.save(VAE / "diffusion_pytorch_model.safetensors", _half(tensors))
    (VAE / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def _without_clamp(key: str) -> str:
    """Layer 0 of the decoder's file is the clamp, which diffusers has outside of its layers."""
    number, rest = key.split(".", 1)
    return f"{int(number) - 1}.{rest}"


def _half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.half() for key, value in tensors.items()}
