"""What single families of image models refuse."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

import liftkit
from liftkit.errors import UsageError
from tests.zoo import ZOO


def test_glm_image_refuses_reference_images() -> None:
    specimen = ZOO["GlmImageTransformer2DModel"]
    flow = liftkit.open_flow(liftkit.convert_transformer(specimen.transformer(), specimen.lift()))
    given = specimen.spec.conditioning(flow.config, 1, torch.Generator().manual_seed(0))
    state, sigma = torch.randn(1, 3, 64, 64), torch.zeros(1)
    caches = GlmImageKVCache(num_layers=2)
    with torch.no_grad():
        assert torch.isfinite(flow.velocity(state, sigma + 0.5, **given, kv_caches=caches)).all()
        caches.set_mode("write")
        with pytest.raises(UsageError, match="takes no reference images"):
            flow.velocity(state, sigma, **given, kv_caches=caches)
