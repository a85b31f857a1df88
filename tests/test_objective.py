"""The finetuning objective against its definition, and the shared reference against the frozen converted model."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.finetune import asymflow_loss, flow_loss
from liftkit.finetune.network import Network, Reference, bind, connect, original_modules
from liftkit.finetune.objective import Asked, rows_to_ask
from liftkit.finetune.opening import opening_columns
from liftkit.finetune.perceptual import VaeFeatures, gradient_distance
from liftkit.finetune.step import Objective
from liftkit.finetune.terms import make_perceptual
from liftkit.models.flow import FlowModel, open_flow
from liftkit.models.surgery import convert_transformer
from liftkit.tokens import unpatchify
from tests import tiny

SIGMA = torch.tensor([0.97, 0.4, 0.03])


def inputs(seed: int = 42) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(3, 3, 16, 16, generator=generator)
    tokens = torch.randn(3, 16, tiny.RANK, generator=generator)
    return x0, tokens, torch.randn(x0.shape, generator=generator)


def model_of(answer: Tensor):
    """A model that takes any noised data for ``answer``."""
    return lambda x_t, sigma: (x_t - answer) / sigma.view(-1, 1, 1, 1)


def test_matches_the_equations_written_out_pixel_by_pixel() -> None:
    lift = tiny.lift(patch_size=4)
    x0, tokens, noise = inputs()
    student, frozen = torch.randn_like(x0), torch.randn_like(x0)
    loss, metrics = asymflow_loss(
        model_of(student), model_of(frozen), x0, tokens, SIGMA, noise, lift, kappa=0.3, weight=5.0, sigma_floor=0.05
    )
    lifted = unpatchify(lift.scale * tokens @ lift.basis.float().T, 4, 16, 16)
    total, shares = 0.0, []
    for b, sigma in enumerate(SIGMA.tolist()):
        w = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + (0.3 * sigma) ** 2)
        for c in range(3):
            for row in range(0, 16, 4):
                for column in range(0, 16, 4):
                    cut = (b, c, slice(row, row + 4), slice(column, column + 4))
                    d, d_reference = (x0 - student)[cut], (lifted - frozen)[cut]
                    share = (d * d_reference).mean() / d_reference.square().mean().clamp(min=1e-4)
                    share = share.clamp(0, 1).item()
                    shares.append(share)
                    total += ((d - (1 - w) * share * d_reference).square().sum() / max(sigma, 0.05) ** 2).item()
    assert loss.item() == pytest.approx(5.0 * total / x0.numel(), rel=1e-4)
    assert metrics["lambda"].item() == pytest.approx(sum(shares) / len(shares), rel=1e-4)


def test_a_student_that_errs_exactly_like_the_reference_has_no_loss_under_full_reduction() -> None:
    lift = tiny.lift(patch_size=4)
    x0, tokens, noise = inputs()
    lifted = unpatchify(lift.scale * tokens @ lift.basis.float().T, 4, 16, 16)
    error = torch.randn_like(x0)
    arguments = (model_of(x0 - error), model_of(lifted - error), x0, tokens, SIGMA, noise, lift)
    loss, metrics = asymflow_loss(*arguments, kappa=None)
    assert loss.item() < 1e-6
    assert metrics["lambda"].item() == pytest.approx(1.0, abs=1e-5)
    corrected, _ = asymflow_loss(*arguments, kappa=0.3)
    assert corrected.item() > 0.1


def test_a_perfect_student_has_no_loss_and_lambda_zero() -> None:
    x0, tokens, noise = inputs()
    loss, metrics = asymflow_loss(
        model_of(x0), model_of(torch.zeros_like(x0)), x0, tokens, SIGMA, noise, tiny.lift(patch_size=4)
    )
    assert loss.item() < 1e-7
    assert metrics["lambda"].item() < 1e-5


def test_no_gradient_reaches_the_reference_or_flows_through_lambda() -> None:
    x0, tokens, noise = inputs()
    lift = tiny.lift(patch_size=4)
    student, frozen = torch.randn_like(x0).requires_grad_(), torch.randn_like(x0).requires_grad_()
    loss, _ = asymflow_loss(model_of(student), model_of(frozen), x0, tokens, SIGMA, noise, lift, kappa=0.3)
    loss.backward()
    assert frozen.grad is None
    # With lambda held constant the loss is quadratic in the student; its gradient is that of the residual alone.
    lifted = unpatchify(lift.raise_tokens(tokens), 4, 16, 16)
    d, d_reference = x0 - student.detach(), lifted - frozen.detach()
    mean = torch.nn.functional.avg_pool2d
    share = (mean(d * d_reference, 4) / mean(d_reference.square(), 4).clamp(min=1e-4)).clamp(0, 1)
    share = share.repeat_interleave(4, -1).repeat_interleave(4, -2)
    sigma = SIGMA.view(-1, 1, 1, 1)
    w = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + (0.3 * sigma) ** 2)
    expected = -2 * 5.0 * (d - (1 - w) * share * d_reference) / sigma.clamp(min=0.05) ** 2 / x0.numel()
    torch.testing.assert_close(student.grad, expected, rtol=1e-3, atol=1e-6)


def test_flow_loss_is_the_mean_squared_error_of_the_velocity() -> None:
    x0, _, noise = inputs()
    guess = torch.randn_like(x0)
    loss, _ = flow_loss(lambda x_t, sigma: guess, x0, SIGMA[:2].repeat(2)[:3], noise)
    assert loss.item() == pytest.approx((noise - x0 - guess).square().mean().item(), rel=1e-4)


def test_the_perceptual_term_is_gated_and_reaches_the_student() -> None:
    x0, tokens, noise = inputs()
    lift = tiny.lift(patch_size=4)
    student = (0.3 * x0).requires_grad_()
    arguments = (model_of(student), model_of(torch.zeros_like(x0)), x0, tokens, SIGMA, noise, lift)
    plain, _ = asymflow_loss(*arguments)
    seen, metrics = asymflow_loss(*arguments, perceptual=gradient_distance, perceptual_weight=2.0)
    assert seen.item() == pytest.approx(plain.item() + 2.0 * metrics["perceptual"].item(), rel=1e-4)
    assert metrics["perceptual"].item() > 0
    silent, nothing = asymflow_loss(*arguments, kappa=None, perceptual=gradient_distance)
    assert "perceptual" not in nothing
    assert torch.isfinite(silent)


def test_vae_features_are_a_distance_that_can_be_learned_from() -> None:
    features = VaeFeatures(tiny.flux2_pipeline().vae)
    a, b = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1
    assert features(a, a).abs().max().item() < 1e-6
    a.requires_grad_()
    distance = features(a, b)
    assert distance.shape == (2, 1, 16, 16)
    assert distance.min().item() >= 0
    distance.mean().backward()
    assert a.grad is not None
    assert a.grad.abs().max().item() > 0


def test_lpips_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_weights(**_: Any) -> None:
        raise URLError("no route\nto host")

    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UsageError, match=r"objective.perceptual: lpips: .*pip install 'liftkit\[lpips\]'") as missing:
        make_perceptual("lpips", None, "cpu")
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=no_weights))
    with pytest.raises(UsageError, match=r"weights of VGG-16 cannot be had \(.*no route to host.*\); fetch") as weights:
        make_perceptual("lpips", None, "cpu")
    assert all("\n" not in str(caught.value) for caught in (missing, weights))


def test_lpips_sees_images_between_minus_one_and_one_and_gives_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Stub(torch.nn.Module):
        """As lpips.LPIPS, which takes images in [-1, 1] unless told otherwise; in bfloat16 as under autocast."""

        def __init__(self, **options: Any) -> None:
            super().__init__()
            assert options == {"net": "vgg", "spatial": True, "verbose": False}
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor, target: Tensor) -> Tensor:
            seen.append((images, target))
            return (self.weight * (images - target).square().sum(dim=1, keepdim=True)).bfloat16()

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Stub))
    distance = make_perceptual("lpips", None, "cpu")
    assert distance is not None
    _, tokens, noise = inputs()
    lift = tiny.lift(patch_size=4)
    images = torch.rand(noise.shape) * 2 - 1
    x0 = lift.color.encode(images)
    answer = (0.5 * x0).requires_grad_()
    _, metrics = asymflow_loss(
        model_of(answer), model_of(torch.zeros_like(x0)), x0, tokens, SIGMA, noise, lift, perceptual=distance
    )
    (guess, target), *more = seen
    assert not more
    assert torch.allclose(target, images, atol=1e-4)
    assert torch.allclose(guess, lift.color.decode(answer), atol=1e-4)
    assert metrics["perceptual"].item() > 0
    found = distance(guess, target)
    assert (found.shape, found.dtype) == ((3, 1, 16, 16), torch.float32)
    found.sum().backward()
    assert answer.grad is not None
    assert answer.grad.abs().max().item() > 0


def twin(name: str):
    """A converted transformer and the latent one that it came from, in float64."""
    stock = tiny.TRANSFORMERS[name]().double()
    lift = tiny.lift()
    return stock, convert_transformer(stock, lift), lift


def conditioning(name: str, count: int) -> dict[str, Tensor]:
    from liftkit.models.registry import architecture

    config = dict(tiny.TRANSFORMERS[name]().config)
    return architecture(name).conditioning(config, count, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", sorted(tiny.TRANSFORMERS))
def test_the_shared_reference_is_the_frozen_converted_model_whatever_the_student_learns(name: str) -> None:
    stock, pixel, lift = twin(name)
    frozen = FlowModel(copy.deepcopy(pixel))
    originals = original_modules(pixel, stock.state_dict())
    linear = [n for n, m in pixel.named_modules() if isinstance(m, torch.nn.Linear) and "attn.to_out" in n]
    pixel.add_adapter(LoraConfig(r=2, target_modules=linear, init_lora_weights=False))
    network = Network(pixel, originals)
    student, latent = connect(pixel, network)
    reference = Reference(latent, lift)
    prompts = conditioning(name, 2)
    z0 = torch.randn(2, 16, tiny.RANK, dtype=torch.float64)
    noise, sigma = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0.9, 0.2], dtype=torch.float64)
    x_t = torch.lerp(unpatchify(lift.raise_tokens(z0), tiny.PATCH, 16, 16), noise, sigma.view(-1, 1, 1, 1))
    with torch.no_grad():
        # The student learns: everything that is its own changes.
        for parameter_name, parameter in pixel.named_parameters():
            full = parameter_name.startswith(("x_embedder", "pos_embed.proj", "proj_out", "norm_out"))
            if full or "lora" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        expected = frozen.velocity(x_t, sigma, **prompts)
        found = bind(reference, prompts)(x_t, sigma)
        learned = bind(student, prompts)(x_t, sigma)
        again = open_flow(pixel).velocity(x_t, sigma, **prompts)
    # The recovered complement of the frozen model decays exactly; both denoise to s A z. The twin's basis is float32.
    level = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t - level * found, x_t - level * expected, rtol=1e-5, atol=1e-6)
    assert (learned - expected).abs().max().item() > 1e-2
    torch.testing.assert_close(again, learned)


def test_the_reference_costs_no_second_copy_of_the_network() -> None:
    stock, pixel, _ = twin("Flux2Transformer2DModel")
    own = sum(parameter.numel() for parameter in pixel.parameters())
    network = Network(pixel, original_modules(pixel, stock.state_dict()))
    more = sum(parameter.numel() for parameter in network.parameters()) - own
    originals = ("x_embedder.weight", "proj_out.weight", "norm_out.linear.weight")
    assert more == sum(stock.state_dict()[name].numel() for name in originals)


def test_student_and_reference_leave_each_other_as_they_were() -> None:
    stock, pixel, lift = twin("SD3Transformer2DModel")
    network = Network(pixel, original_modules(pixel, stock.state_dict()))
    before = dict(pixel.named_parameters())
    student, latent = connect(pixel, network)
    prompts = conditioning("SD3Transformer2DModel", 2)
    x_t, sigma = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64)
    first = bind(student, prompts)(x_t, sigma)
    bind(Reference(latent, lift), prompts)(x_t, sigma)
    torch.testing.assert_close(bind(student, prompts)(x_t, sigma), first, rtol=0, atol=0)
    assert all(parameter is before[name] for name, parameter in pixel.named_parameters())


@pytest.mark.parametrize(("hidden", "dim", "rank"), [(64, 48, 16), (40, 48, 16), (16, 48, 16), (8, 48, 16)])
def test_opening_leaves_the_subspace_alone_and_disturbs_as_little_as_there_is_room(
    hidden: int, dim: int, rank: int
) -> None:
    basis = torch.linalg.qr(torch.randn(dim, rank, dtype=torch.float64))[0]
    latent = torch.randn(hidden, rank, dtype=torch.float64)
    added = opening_columns(latent @ basis.T, basis, 0.5, seed=3)
    assert (added @ basis).abs().max().item() < 1e-12
    free = hidden - rank if hidden > rank else hidden
    assert torch.linalg.matrix_rank(added).item() == min(free, dim - rank)
    size = latent.norm().item() / rank**0.5
    outside = torch.linalg.qr(torch.cat([basis, torch.randn(dim, dim - rank, dtype=torch.float64)], dim=1))[0][:, rank:]
    norms = (added @ outside).norm().item() / (dim - rank) ** 0.5
    assert norms == pytest.approx(0.5 * size, rel=1e-6)
    if hidden > rank:
        assert (latent.T @ added).abs().max().item() < 1e-10
    torch.testing.assert_close(added, opening_columns(latent @ basis.T, basis, 0.5, seed=3))


def test_rows_whose_share_vanishes_are_not_asked_for() -> None:
    sigma = [0.97, 0.4, 0.192, 0.190, 0.03]
    assert rows_to_ask(sigma, 0.3, 0.005) == [0, 1, 2]
    assert rows_to_ask(sigma, 0.3, 0.0) == [0, 1, 2, 3, 4]
    assert rows_to_ask(sigma, None, 0.9) == [0, 1, 2, 3, 4], "full reduction at every noise level"
    assert rows_to_ask(sigma, 0.0, 0.005) == []


@pytest.mark.parametrize("seen", [[0, 1], [0, 1, 2]])
def test_the_loss_without_a_share_that_vanishes_is_the_loss_within_its_bound(seen: list[int]) -> None:
    """The rows asked for lose nothing; the others gain less than 1 / w^2 - 1, which is 1.0 % at a share of 0.005."""
    lift = tiny.lift(patch_size=4)
    x0, tokens, noise = inputs()
    sigma = torch.tensor([0.97, 0.4, 0.18])
    calls: list[int] = []
    # Errors that are alike, so that the share is as large as it gets.
    mistaken = 0.1 * (noise - x0)

    def loss(rows: slice, asked: Asked | None) -> Tensor:
        def frozen(x_t: Tensor, level: Tensor) -> Tensor:
            calls.append(len(x_t))
            return model_of((lift_of(tokens, lift) + mistaken)[rows][: len(x_t)])(x_t, level)

        student = model_of((x0 + mistaken)[rows])
        return asymflow_loss(student, frozen, x0[rows], tokens[rows], sigma[rows], noise[rows], lift, asked=asked)[0]

    whole, less = loss(slice(None), None), loss(slice(None), Asked([0, 1], seen))
    assert calls == [3, len(seen)]
    share = 1 - 0.82**2 / (0.82**2 + (0.3 * 0.18) ** 2)
    assert share < 0.005
    last = slice(2, 3)
    with_it, without = loss(last, None), loss(last, Asked([], []))
    assert with_it < without <= with_it / (1 - share) ** 2
    assert torch.allclose(less - whole, (without - with_it) / 3, atol=1e-5)
    assert 0 < less - whole < 0.011 * whole


def lift_of(tokens: Tensor, lift: Any) -> Tensor:
    return unpatchify(lift.scale * tokens @ lift.basis.float().T, 4, 16, 16)


@pytest.mark.parametrize(("compiled", "alone", "seen"), [(False, True, []), (False, False, [0]), (True, True, [0, 1])])
def test_the_rows_asked_for_are_the_same_compiled_and_on_several_processes(
    compiled: bool, alone: bool, seen: list[int]
) -> None:
    """What is computed may be more: compiled blocks have one size, and processes that share weights run them together."""
    recipe = SimpleNamespace(compile=compiled, objective=SimpleNamespace(kappa=0.3, reference_below=0.005, bands=None))
    plain: dict[str, Any] = {"student": None, "reference": None, "lift": None}
    objective = Objective(recipe, **plain, alone=alone)  # type: ignore[arg-type]
    assert objective.rows_to_ask([0.1, 0.05]) == Asked([], seen)
    assert objective.rows_to_ask([0.9, 0.5]) is None
    assert objective.rows_to_ask(None) is None
    found = objective.rows_to_ask([0.1, 0.9])
    assert found is not None
    assert found.rows == [1]
    with_distance = Objective(recipe, **plain, perceptual=lambda *_: None, alone=alone)  # type: ignore[arg-type]
    assert with_distance.rows_to_ask([0.1, 0.05]) is None
