"""LoRA files of all kinds, imported by the command line."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Cli = Callable[..., tuple[int, str, str]]
IMAGE, QUERY = "double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape)))


A, B, ALPHA = (f"transformer.{QUERY}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha"))
