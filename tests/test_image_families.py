"""What is special about single families of image models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

import liftkit
from liftkit.errors import UsageError
from tests.test_conformance import tied_pipelines
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


def test_the_guider_of_hunyuan_image_sees_latent_velocities() -> None:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    bounds = {"adaptive_projected_guidance_rescale": 1.0, "adaptive_projected_guidance_start_step": 0}
    specimen = replace(
        ZOO["HunyuanImageTransformer2DModel"],
        components=lambda: {
            name: AdaptiveProjectedMixGuidance(3.0, adaptive_projected_guidance_scale=5.0, **bounds)
            for name in ("guider", "ocr_guider")
        },
    )
    assert tied_pipelines(specimen, exactly=True) < 1e-3 < tied_pipelines(specimen)
