"""Random adapters for the tiny models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from liftkit.checkpoint.model import find_model
from liftkit.formats.merging import tensor_shapes
from liftkit.lift import Lift
from liftkit.models.adapter import LORA_A, LORA_B, Adapter
from liftkit.models.registry import architecture

RANK = 3


def random_adapter(folder: Path, alpha: float | None = float(RANK), dtype: torch.dtype = torch.float32) -> Adapter:
    """For a converted folder, or for a latent one, then without lift."""
    model, path = find_model(str(folder)), folder / "lift.safetensors"
    lift = Lift.load(path) if path.is_file() else None
    name = model.class_of("transformer") or ""
    return random_tensors(name, tensor_shapes(model.weights("transformer")), lift, alpha, dtype)


def random_tensors(
    name: str, shapes: Mapping[str, Sequence[int]], lift: Lift | None, alpha: float | None, dtype: torch.dtype
) -> Adapter:
    """Projections and output norm in full, LoRA on every fourth other matrix."""
    spec = architecture(name)
    paths = [*(projection.path for projection, _ in spec.projections), *spec.reference]
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    tensors = {key: draw(*shape) for key, shape in shapes.items() if any(key.startswith(f"{path}.") for path in paths)}
    matrices = [key for key, shape in shapes.items() if len(shape) == 2 and "blocks" in key and key.endswith(".weight")]
    for key in matrices[::4]:
        module, (rows, columns) = key.removesuffix(".weight"), shapes[key]
        tensors |= {f"{module}{LORA_A}": draw(RANK, columns), f"{module}{LORA_B}": draw(rows, RANK)}
    return Adapter(tensors, alpha, lift, name, "tiny", {"steps": 0})
