"""Reduced precision: whatever the network is cast to, A, sigma and the state stay in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import liftkit
from liftkit.models.mixin import LiftHead
from liftkit.models.registry import architecture as spec_of
from tests.test_pipelines import load

# Relative, of a random network's velocity; a trained one's is in docs/formats.md.
LIMITS = {"bfloat16": 0.03, "float16": 0.005, "float8": 0.2, "int8": 0.1}


def transformer(precision: str, folder: Path) -> Any:
    if precision in ("bfloat16", "float16"):
        return load(folder, dtype=getattr(torch, precision)).transformer
    if precision == "float8":
        model = load(folder, dtype=torch.bfloat16).transformer
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        return model
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    made = type(load(folder).transformer)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return made.from_pretrained(folder, subfolder="transformer", dtype=torch.bfloat16, quantization_config=config)


@pytest.mark.parametrize("precision", LIMITS)
def test_a_sigma_and_the_state_stay_float32(
    precision: str, architecture: str, converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, model = load(converted[architecture]).transformer, transformer(precision, converted[architecture])
    generator = torch.Generator().manual_seed(0)
    x_t, sigma = torch.randn(2, 3, 12, 20, generator=generator), torch.tensor([0.731234, 0.031234])
    conditioning = model.architecture.conditioning(model.config, 2, generator)
    seen: dict[str, Tensor] = {}
    original = LiftHead.forward

    def spy(self: LiftHead, u_cal: Tensor, state: Tensor, level: Tensor, scale: float) -> Tensor:
        seen.update(basis=self.basis, state=state, sigma=level)
        return original(self, u_cal, state, level, scale)

    monkeypatch.setattr(LiftHead, "forward", spy)
    with torch.no_grad():
        expected = liftkit.open_flow(exact).velocity(x_t, sigma, **conditioning)
        basis = seen["basis"].clone()
        found = liftkit.open_flow(model).velocity(x_t, sigma, **conditioning)
    assert torch.equal(seen["basis"], basis)
    assert seen["state"].dtype == seen["sigma"].dtype == found.dtype == torch.float32
    assert torch.equal(seen["state"].flatten(1).sort().values, x_t.flatten(1).sort().values)
    assert torch.allclose(seen["sigma"], sigma, rtol=1e-6)
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-5 < error < LIMITS[precision], error


def test_float8_is_for_the_blocks_and_not_for_the_projections(architecture: str, converted: dict[str, Path]) -> None:
    model = transformer("float8", converted[architecture])
    for projection, _ in spec_of(type(model).__name__).projections:
        assert model.get_submodule(projection.path).weight.dtype != torch.float8_e4m3fn
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.lift.basis.dtype == torch.float32
