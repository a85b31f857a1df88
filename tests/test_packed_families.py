"""What is special about families of packed tokens: pictures to edit as clean latents, two transformers, models that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import liftkit
from liftkit.checkpoint.files import write_safetensors
from liftkit.conversion.audit import audit
from liftkit.conversion.tied import relative
from tests.zoo import ZOO

ROWS, COLUMNS = 4, 6


def velocities(name: str, clean: dict[str, Tensor], ids: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The pixel model's velocity with pictures to edit, what the latent model's says it must be, and without the pictures.

    Args:
        name: of a specimen.
        clean: arguments that hold pictures as images (1, 3, h, w) in the color space.
        ids: further arguments.
    """
    specimen = ZOO[name]
    lift = specimen.lift()
    latent = specimen.transformer().double()
    flow, twin = liftkit.open_flow(latent), liftkit.open_flow(liftkit.convert_transformer(latent, lift))
    given = specimen.spec.conditioning(latent.config, 1, torch.Generator().manual_seed(0))
    x = torch.randn(1, 3, ROWS * lift.patch_size, COLUMNS * lift.patch_size, dtype=torch.float64)
    sigma = torch.tensor([0.6], dtype=torch.float64)
    gain, tau = liftkit.calibrate(sigma, lift.scale)

    def shaped(flow: Any, image: Tensor) -> Any:
        state = flow.pipeline_state(image)
        return [state] if name.startswith("BriaFibo2") else state

    low = {key: shaped(flow, lift.lower(image) / lift.scale) for key, image in clean.items()}
    u = flow.velocity(gain * lift.lower(x), tau, **given, **low, **ids)
    tokens = [liftkit.patchify(each, size) for each, size in ((u, specimen.patch), (x, lift.patch_size))]
    basis = lift.basis.double()
    wanted = liftkit.recover_velocity(tokens[0] @ basis.T, tokens[1], sigma, basis, lift.scale)
    wanted = liftkit.unpatchify(wanted, lift.patch_size, *x.shape[-2:])
    high = {key: shaped(twin, image) for key, image in clean.items()}
    return twin.velocity(x, sigma, **given, **high, **ids), wanted, twin.velocity(x, sigma, **given)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(
    ("name", "argument", "ids"),
    [
        ("Flux3Transformer2DModel", "image_cond_hidden_states", {"image_cond_ids": torch.arange(32.0).view(8, 4)}),
        ("BriaFibo2Transformer2DModel", "context_latents", {}),
    ],
)
def test_pictures_to_edit_are_clean_latents(name: str, argument: str, ids: dict[str, Any]) -> None:
    side = ZOO[name].lift().patch_size
    picture = torch.randn(1, 3, 2 * side, 4 * side, dtype=torch.float64)
    with torch.no_grad():
        found, wanted, without = velocities(name, {argument: picture}, ids)
    assert relative(found, wanted) < 1e-9
    assert relative(without, wanted) > 1e-3


def test_a_distilled_flux3_is_refused_with_the_reason() -> None:
    spec = ZOO["Flux3Transformer2DModel"].spec
    assert spec.refuse({"flow_map": False}) is None
    assert "mean velocity" in str(spec.refuse({"flow_map": True}))


@pytest.mark.slow
def test_both_transformers_of_ideogram_get_the_lift_and_are_verified(tmp_path: Path) -> None:
    specimen = ZOO["Ideogram4Transformer2DModel"]
    specimen.build().save_pretrained(tmp_path / "latent")
    liftkit.convert(
        str(tmp_path / "latent"), tmp_path / "pixel", images="demo", num_images=32, resolution=64, device="cpu"
    )
    assert audit(tmp_path / "pixel", str(tmp_path / "latent")).ok
    from diffusers import AutoModel

    first, second = (
        AutoModel.from_pretrained(str(tmp_path / "pixel"), subfolder=each)
        for each in ("transformer", "unconditional_transformer")
    )
    assert torch.equal(first.lift.basis, second.lift.basis)
    assert not torch.equal(first.input_proj.weight, second.input_proj.weight)
    second.final_layer.linear.weight.data[0, 0] += 1.0
    file = next((tmp_path / "pixel" / "unconditional_transformer").glob("*.safetensors"))
    write_safetensors(file, dict(second.state_dict()), {"format": "pt"})
    problems = [problem for check in audit(tmp_path / "pixel").checks for problem in check.problems]
    assert any("final_layer.linear.weight" in problem for problem in problems)


def test_a_second_transformer_of_another_class_is_named(tmp_path: Path) -> None:
    ZOO["Ideogram4Transformer2DModel"].build().save_pretrained(tmp_path / "latent")
    index = tmp_path / "latent" / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps({**parts, "unconditional_transformer": [None, None]}))
    with pytest.raises(liftkit.UsageError, match="unconditional_transformer"):
        liftkit.convert(str(tmp_path / "latent"), tmp_path / "pixel", images="demo", num_images=32, resolution=64)
    assert not (tmp_path / "pixel").exists()
