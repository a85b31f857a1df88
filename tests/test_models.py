"""Asym classes: Theorem 1 on the bare models, and everything the ecosystem expects of a transformer."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.utils.checkpoint

import liftkit
from liftkit.conversion.tied import TiedRun
from liftkit.models.registry import architectures, lifted_class
from liftkit.models.surgery import native_basis
from tests import tiny

NAMES = sorted(tiny.TRANSFORMERS)
CHANGES: dict[str, list[dict[str, Any]]] = {
    "Flux2Transformer2DModel": [{}, {"guidance_embeds": True}],
    "SD3Transformer2DModel": [{}, {"qk_norm": "rms_norm"}],
}


def twins(name: str, dtype: torch.dtype = torch.float32, scale: float = 1.7, **changes: Any) -> tuple[Any, Any]:
    latent = tiny.TRANSFORMERS[name](**changes).to(dtype)
    return latent, liftkit.convert_transformer(latent, tiny.lift(scale))


def call(model: Any, batch: int = 1, **changes: Any) -> torch.Tensor:
    """One forward through FlowModel on a 2 x 3 grid of tokens."""
    flow = liftkit.open_flow(model)
    generator = torch.Generator().manual_seed(3)
    side = flow.token_side
    x = torch.randn(batch, flow.channels, 2 * side, 3 * side, generator=generator)
    conditioning = flow.architecture.conditioning(model.config, batch, generator)
    return flow.velocity(x, torch.linspace(0.2, 0.9, batch), **conditioning, **changes)


@pytest.mark.parametrize(("name", "changes"), [(name, change) for name in NAMES for change in CHANGES[name]])
@pytest.mark.parametrize("scale", [0.4, 1.0, 2.4])
def test_theorem_1_in_float64(name: str, changes: dict, scale: float) -> None:
    latent, twin = twins(name, torch.float64, scale, **changes)
    run = TiedRun(twin.architecture, dict(latent.config), tiny.lift(scale), 6, 0, dtype=torch.float64)
    assert run.deviation(liftkit.open_flow(twin), run.sample_latent(liftkit.open_flow(latent))) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_theorem_1_fails_for_a_wrong_token_order(name: str) -> None:
    """The orders of the table matter: a twin whose basis is permuted is not one."""
    latent, twin = twins(name, torch.float64)
    twin.lift.basis = native_basis(tiny.lift(), "pqc")
    run = TiedRun(twin.architecture, dict(latent.config), tiny.lift(), 4, 0, dtype=torch.float64)
    assert run.deviation(liftkit.open_flow(twin), run.sample_latent(liftkit.open_flow(latent))) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_only_the_projections_change(name: str) -> None:
    latent, twin = twins(name)
    before, after = latent.state_dict(), twin.state_dict()
    assert after.keys() - before.keys() == {"lift.basis"}
    changed = {key for key in before if before[key].shape != after[key].shape}
    assert changed == {
        f"{p.path}.{kind}"
        for p, side in twin.architecture.projections
        for kind in (("weight", "bias") if side == "output" else ("weight",))
        if f"{p.path}.{kind}" in before
    }
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before.keys() - changed)
    assert isinstance(twin, type(latent))


@pytest.mark.parametrize("name", NAMES)
def test_saves_loads_and_copies(name: str, tmp_path: Path) -> None:
    _, twin = twins(name)
    twin.save_pretrained(tmp_path)
    again = type(twin).from_pretrained(tmp_path)
    loaded, kept = (json.loads(model.to_json_string()) for model in (again, twin))
    assert {key: loaded[key] for key in kept if not key.startswith("_")} == {
        key: value for key, value in kept.items() if not key.startswith("_")
    }
    assert again.config.in_channels == twin.config.in_channels
    fresh = type(twin).from_config(twin.config)
    fresh.load_state_dict(twin.state_dict())
    weights, expected = twin.state_dict(), call(twin)
    for other in (again, copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), fresh):
        found = other.state_dict()
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        # Not to the last bit: a file's mapping puts weights elsewhere, where matrix products may be added in another order.
        torch.testing.assert_close(call(other), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_config_in_memory_is_the_pixel_model_s_and_on_disk_the_latent_one_s(name: str, tmp_path: Path) -> None:
    latent, twin = twins(name)
    assert twin.config.in_channels == latent.config.in_channels * tiny.DIM // tiny.RANK
    twin.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["in_channels"] == latent.config.in_channels
    assert twin.config.in_channels == latent.config.in_channels * tiny.DIM // tiny.RANK


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_class_refuses_a_lifted_folder(name: str, tmp_path: Path) -> None:
    latent, twin = twins(name)
    twin.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        type(latent).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*dtype.*")
def test_bf16_keeps_the_basis_in_float32(name: str, tmp_path: Path) -> None:
    _, twin = twins(name)
    exact = call(twin)
    twin.save_pretrained(tmp_path)
    loaded = type(twin).from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = copy.deepcopy(twin).to(torch.bfloat16)
    for model in (loaded, cast):
        assert model.dtype == torch.bfloat16
        assert model.lift.basis.dtype == torch.float32
        out = call(model)
        assert out.dtype == torch.float32
        assert (out - exact).abs().max() / exact.abs().max() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_output_depends_on_the_complement_only_through_the_recovery(name: str) -> None:
    """What A does not see never reaches the network, and comes out as (I - P) x / sigma."""
    _, twin = twins(name, torch.float64)
    flow = liftkit.open_flow(twin)
    conditioning = flow.architecture.conditioning(twin.config, 1, torch.Generator().manual_seed(0))
    x = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    tokens = torch.randn(1, 6, tiny.DIM, dtype=torch.float64)
    basis = tiny.lift().basis
    outside = liftkit.unpatchify(tokens - tokens @ basis @ basis.T, tiny.PATCH, 8, 12)
    sigma = torch.tensor([0.5], dtype=torch.float64)
    difference = flow.velocity(x + outside, sigma, **conditioning) - flow.velocity(x, sigma, **conditioning)
    torch.testing.assert_close(difference, outside / 0.5, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    _, twin = twins(name)
    twin = copy.deepcopy(twin).train().requires_grad_(True)

    def gradients() -> list[torch.Tensor]:
        twin.zero_grad()
        call(twin, batch=2).square().mean().backward()
        return [p.grad.clone() for p in twin.parameters() if p.grad is not None]

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return torch.utils.checkpoint.checkpoint(*arguments, use_reentrant=False)

    calls: list[Any] = []
    plain = gradients()
    assert not twin.is_gradient_checkpointing
    twin.enable_gradient_checkpointing(counted)
    again = gradients()
    assert twin.is_gradient_checkpointing
    assert len(calls) == 2, "one call a block"
    assert len(plain) == len(again) > 10
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_lora_attaches_trains_saves_and_loads(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    _, twin = twins(name)
    twin = copy.deepcopy(twin)
    before = call(twin)
    other = copy.deepcopy(twin)
    twin.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    changed = call(twin)
    assert not torch.allclose(before, changed)
    twin.save_lora_adapter(tmp_path)
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(call(other), changed)
    twin.disable_adapters()
    torch.testing.assert_close(call(twin), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_latent_lora_applies_unchanged(name: str, tmp_path: Path) -> None:
    """Attention adapters of the latent model keep Theorem 1: both models change in the same way."""
    from peft import LoraConfig

    latent, twin = twins(name)
    latent, twin = copy.deepcopy(latent), copy.deepcopy(twin)
    latent.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    latent.save_lora_adapter(tmp_path)
    twin.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    run = TiedRun(twin.architecture, dict(latent.config), tiny.lift(), 4, 0)
    assert run.deviation(liftkit.open_flow(twin), run.sample_latent(liftkit.open_flow(latent))) < 1e-4


def test_signature_is_the_stock_one() -> None:
    import inspect

    for name in NAMES:
        stock, lifted = getattr(diffusers, name), lifted_class(architectures()[name])
        assert inspect.signature(lifted.forward) == inspect.signature(stock.forward)
        own = inspect.signature(lifted.__init__).parameters
        assert [
            *inspect.signature(stock.__init__).parameters,
            "lift_rank",
            "lift_dim",
            "lift_scale",
            "lift_head",
            "lift_space",
        ] == list(own)


def test_return_types_and_positional_arguments() -> None:
    _, twin = twins("SD3Transformer2DModel")
    x, text, pooled = torch.randn(1, 12, 4, 4), torch.randn(1, 7, 24), torch.randn(1, 16)
    named = twin(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.tensor([500.0]))
    placed = twin(x, text, pooled, torch.tensor([500.0]), return_dict=False)
    assert isinstance(placed, tuple)
    assert torch.equal(named.sample, placed[0])


def test_reference_tokens_enter_as_x_over_s() -> None:
    """FLUX.2 editing: clean tokens carry x / s whatever the time, so that the twin agrees with its source."""
    latent, twin = twins("Flux2Transformer2DModel", torch.float64)
    lift, sigma = tiny.lift(), torch.tensor([0.6], dtype=torch.float64)
    basis = native_basis(lift, "cpq")  # tokens as the pipeline packs them, pixels folded
    gain, tau = liftkit.calibrate(sigma, lift.scale)
    text = torch.randn(1, 7, 24, dtype=torch.float64)
    grid = torch.cartesian_prod(torch.tensor([0]), torch.arange(2), torch.arange(2), torch.tensor([0]))
    ids = torch.cat([grid, grid + torch.tensor([10, 0, 0, 0])])[None]
    common = {"encoder_hidden_states": text, "img_ids": ids, "txt_ids": torch.zeros(1, 7, 4, dtype=torch.long)}
    noisy = torch.randn(1, 4, tiny.DIM, dtype=torch.float64)
    reference = torch.randn(1, 4, tiny.RANK, dtype=torch.float64)
    state = torch.cat([noisy, lift.scale * reference @ basis.T], dim=1)
    u = twin(hidden_states=state, timestep=sigma, **common, return_dict=False)[0][:, :4]
    latent_state = torch.cat([gain * noisy @ basis, reference], dim=1)
    v = latent(hidden_states=latent_state, timestep=tau, **common, return_dict=False)[0][:, :4]
    expected = liftkit.recover_velocity(v @ basis.T, noisy, sigma, basis, lift.scale)
    torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-9)


def test_unknown_classes_and_lifts_that_do_not_fit() -> None:
    with pytest.raises(liftkit.UsageError, match=r"not supported; did you mean Flux2Transformer2DModel"):
        liftkit.models.registry.architecture("Flux2Transformer3DModel")
    wrong = liftkit.Lift(torch.linalg.qr(torch.randn(48, 12))[0], 1.0, patch_size=4, latent_patch=2)
    with pytest.raises(liftkit.UsageError, match="rank 12, the model needs 16"):
        liftkit.convert_transformer(tiny.flux2_transformer(), wrong)
