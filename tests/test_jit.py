"""JiT's class against the facts about it: sizes, network, first weights, the authors' names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from liftkit.asymflow import recover_velocity
from liftkit.conversion.networks import NETWORKS, Shape
from liftkit.conversion.scratch import network
from liftkit.lift import Lift
from liftkit.models.flow import FlowModel
from liftkit.models.jit import JiTTransformer2DModel, attention, sized
from liftkit.models.jit_names import read_original, write_original
from liftkit.models.jit_positions import sinusoid
from liftkit.models.registry import architecture
from liftkit.tokens import patchify, unpatchify

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 4,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "bottleneck_dim": 12,
    "num_classes": 10,
    "context_tokens": 3,
    "context_start": 1,
}
DIM, RANK = 48, 5


def jit(**changes: Any) -> JiTTransformer2DModel:
    """A tiny JiT whose every weight says something."""
    torch.manual_seed(0)
    model = JiTTransformer2DModel(**{**CONFIG, **changes}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """An image, noise levels and classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x, torch.linspace(0.2, 0.9, batch).double(), torch.arange(batch) + 3


def basis() -> Tensor:
    """An orthonormal one, (48, 5) float64."""
    return torch.linalg.qr(torch.randn(DIM, RANK, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]


@pytest.mark.parametrize(("size", "millions"), [("B", 131.1), ("L", 458.9), ("H", 952.5)])
def test_sizes_have_the_papers_parameters(size: str, millions: float) -> None:
    with init_empty_weights():
        model = JiTTransformer2DModel(**sized(size, 16))
    assert sum(each.numel() for each in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.config == {**model.config, **NETWORKS["jit"][1](Shape(size, 16, 256, 1000))}  # type: ignore[arg-type]
    assert model.class_embed.num_embeddings == 1001
    assert model.context_embed.shape == (1, 32, model.class_embed.embedding_dim)


@pytest.mark.parametrize(
    ("size", "shape"),
    [("B", (12, 768, 12, 128, 4)), ("L", (24, 1024, 16, 128, 8)), ("H", (32, 1280, 16, 256, 10))],
)
def test_depth_width_heads_bottleneck_and_first_block_with_context(size: str, shape: tuple[int, ...]) -> None:
    config = sized(size, 16)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    heads, bottleneck, start = (config[key] for key in ("num_attention_heads", "bottleneck_dim", "context_start"))
    assert (config["num_layers"], width, heads, bottleneck, start) == shape
    with init_empty_weights():
        model = JiTTransformer2DModel(**{**config, "num_layers": 1})
    assert (model.config.context_tokens, model.config.mlp_ratio, model.config.upcast_attention) == (32, 4.0, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_a_softmax_of_scaled_products(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 16, generator=generator).to(dtype) for _ in range(3))
    expected = torch.softmax(query.double() @ key.double().mT / 4.0, -1) @ value.double()
    found = attention(query, key, value)
    assert found.dtype is dtype
    assert (found - expected).abs().max() < (1e-6 if dtype is torch.float32 else 0.03)


def test_both_patches_cut_a_picture_into_256_tokens() -> None:
    for patch, side in ((16, 256), (32, 512)):
        config = sized("B", patch)
        assert config["sample_size"] == side
        assert (side // patch) ** 2 == 256


@pytest.mark.parametrize(("size", "hidden"), [("B", 2048), ("L", 2730), ("H", 3413)])
def test_the_mlp_is_two_thirds_of_four_times_the_width(size: str, hidden: int) -> None:
    with init_empty_weights():
        block = JiTTransformer2DModel(**{**sized(size, 16), "num_layers": 1}).transformer_blocks[0]
    assert block.ff.linear_in.weight.shape[0] == 2 * hidden
    assert block.ff.linear_out.weight.shape[1] == hidden


def test_dropout_is_in_the_second_and_third_quarter() -> None:
    with init_empty_weights():
        blocks = JiTTransformer2DModel(**sized("H", 16)).transformer_blocks
    rates = [{each.p for each in block.modules() if isinstance(each, nn.Dropout)} for block in blocks]
    assert rates == [{0.2} if 8 <= index < 24 else {0.0} for index in range(32)]


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def _turned(x: Tensor, first: int) -> Tensor:
    """2-D rotation of (B, h, N, 16), by complex numbers; the first tokens stand still."""
    place = torch.arange(16)
    rates = 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    angles = torch.cat([(place // 4)[:, None] * rates, (place % 4)[:, None] * rates], 1)
    angles = torch.cat([torch.zeros(first, 8, dtype=torch.float64), angles])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def by_the_facts(model: JiTTransformer2DModel, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
    """The network written down once more, from its description."""
    w = {name: value.detach() for name, value in model.state_dict().items()}

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    angles = time[:, None] * 10000.0 ** (-torch.arange(128).double() / 128)
    hidden = F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1).float().double(), "time_embed.linear_1"))
    named = w["class_embed.weight"][label]
    condition = F.silu(linear(hidden, "time_embed.linear_2") + named)
    patches = patchify(x, 4) @ w["patch_embed.proj.weight"].flatten(1).T
    h = linear(patches, "patch_embed.proj_out") + get_2d_sincos_pos_embed(32, 4, base_size=4, output_type="pt").float()
    for number in range(4):
        block = f"transformer_blocks.{number}"
        if number == 1:
            h = torch.cat([named[:, None] + w["context_embed"], h], 1)
        parts = linear(condition, f"{block}.modulation.linear")[:, None].split(32, -1)
        y = _rms(h, w[f"{block}.norm1.weight"]) * (1 + parts[1]) + parts[0]
        heads = [each.unflatten(2, (2, 16)).transpose(1, 2) for each in linear(y, f"{block}.attn.to_qkv").split(32, -1)]
        q, k = (
            _turned(_rms(each, w[f"{block}.attn.norm_{name}.weight"]), 0 if number < 1 else 3)
            for name, each in zip("qk", heads)
        )
        mixed = (torch.softmax(q @ k.mT / 4.0, -1) @ heads[2]).transpose(1, 2).flatten(2)
        h = h + parts[2] * linear(mixed, f"{block}.attn.to_out.0")
        y = _rms(h, w[f"{block}.norm2.weight"]) * (1 + parts[4]) + parts[3]
        gate, value = linear(y, f"{block}.ff.linear_in").chunk(2, -1)
        h = h + parts[5] * linear(F.silu(gate) * value, f"{block}.ff.linear_out")
    shift, scale = linear(condition, "norm_out.linear")[:, None].chunk(2, -1)
    y = linear(_rms(h[:, 3:], w["norm_out.norm.weight"]) * (1 + scale) + shift, "proj_out")
    return unpatchify(y, 4, 16, 16, "pqc")


def test_the_network_is_the_one_of_the_facts() -> None:
    model, (x, sigma, label) = jit(), inputs()
    with torch.no_grad():
        ours, theirs = model(x, sigma, label).sample, by_the_facts(model, x, sigma, label)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_weights_of_the_authors_are_given_one_minus_sigma_and_answer_the_data() -> None:
    model, (x, sigma, label) = jit(predicts_data=True), inputs()
    with torch.no_grad():
        answer, data = model(x, sigma, label).sample, by_the_facts(model, x, 1.0 - sigma, label)
    assert (answer + data).abs().max() < 1e-5 * data.abs().max()


def test_time_is_not_scaled_up() -> None:
    found = sinusoid(torch.tensor([0.5]))[0]
    assert found[0] == pytest.approx(torch.tensor(0.5).cos().item())
    assert found[128] == pytest.approx(torch.tensor(0.5).sin().item())


def test_first_weights() -> None:
    torch.manual_seed(0)
    model = JiTTransformer2DModel(**{**CONFIG, "num_classes": 1000})
    zero = [*(block.modulation.linear for block in model.transformer_blocks), model.norm_out.linear, model.proj_out]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias is None or not module.bias.any(), name
            small = module in (model.time_embed.linear_1, model.time_embed.linear_2)
            bound = (6.0 / sum(module.weight.flatten(1).shape)) ** 0.5
            if module in zero:
                assert not module.weight.any(), name
            elif small:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            else:
                assert 0.9 * bound < module.weight.abs().max() <= bound, name
    assert model.class_embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.patch_embed.proj.bias is None
    assert not model(*(each.float() if each.is_floating_point() else each for each in inputs())).sample.any()


def test_the_bottleneck_begins_with_the_subspace() -> None:
    torch.manual_seed(0)
    model = JiTTransformer2DModel(**CONFIG).double()
    before = model.patch_embed.proj.weight.detach().clone()
    model.begin_with(basis())
    weight = model.patch_embed.proj.weight
    gain = (2 * DIM / (DIM + 12)) ** 0.5
    assert torch.allclose(weight[:RANK].flatten(1), gain * basis().T)
    assert torch.equal(weight[RANK:], before[RANK:])
    x = inputs()[0]
    assert torch.allclose(F.conv2d(x, weight, stride=4)[:, :RANK].flatten(2).mT, gain * patchify(x, 4) @ basis())
    with pytest.raises(ValueError, match="does not fit into a bottleneck of 12"):
        model.begin_with(torch.eye(DIM, 13).double())


def test_the_gain_of_h_is_the_papers() -> None:
    assert (2 * 768 / (768 + sized("H", 16)["bottleneck_dim"])) ** 0.5 == pytest.approx(1.2247, abs=1e-4)


@pytest.mark.parametrize("rank", [0, 1, RANK, DIM])
def test_a_twin_of_any_rank_recovers_the_velocity(rank: int) -> None:
    full = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    lift = Lift(full[:, :rank], 1.0, 4, 1)
    twin = network(architecture("JiTTransformer2DModel"), CONFIG | {"in_channels": 3}, lift, 0).double()
    twin.load_state_dict({**jit().state_dict(), "lift.basis": lift.basis})
    x, sigma, label = inputs()
    with torch.no_grad():
        answer = jit()(x, sigma, label).sample
        found = FlowModel(twin).velocity(x, sigma, class_labels=label)
    expected = unpatchify(recover_velocity(patchify(answer, 4), patchify(x, 4), sigma, lift.basis, 1.0), 4, 16, 16)
    assert torch.allclose(found, expected, atol=1e-9)
    level = sigma.view(-1, 1, 1, 1)
    if rank == 0:  # u_A = -x_0: JiT
        assert torch.allclose(found, (x + answer) / level, atol=1e-9)
    if rank == DIM:
        assert torch.allclose(found, answer, atol=1e-9)


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for on in (False, True):
        model = jit().train()
        if on:
            model.enable_gradient_checkpointing()
        model(*inputs()).sample.square().mean().backward()
        found.append([each.grad.clone() for each in model.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_authors_names_and_back(asymmetric: bool) -> None:
    model = jit(predicts_data=not asymmetric).float()
    given = basis().float() if asymmetric else None
    theirs = write_original(model.config, model.state_dict(), given)
    assert theirs["blocks.3.mlp.w12.weight"].shape == (2 * 85, 32)
    place = "x_embedder.pos_embed" if asymmetric else "pos_embed"
    assert theirs[place].shape == (1, 16, 32)
    found = read_original({f"net.{name}": value for name, value in theirs.items()})
    assert found.config.items() <= {**model.config, "upcast_attention": True}.items()
    assert found.tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(value, found.tensors[name]) for name, value in model.state_dict().items())
    again = write_original(found.config, found.tensors, found.basis if asymmetric else None)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(value, again[name]) for name, value in theirs.items())
    if asymmetric:
        # Their rows are (row, column, channel).
        assert torch.equal(theirs["proj_buffer"].unflatten(0, (4, 4, 3))[1, 2, 0], basis().float()[1 * 4 + 2])
        assert torch.equal(found.basis, basis().float())


def test_what_is_no_jit_is_named() -> None:
    theirs = write_original(jit().config, jit().state_dict())
    with pytest.raises(ValueError, match=r"no x_embedder\.proj1\.weight"):
        read_original({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="2 networks"):
        read_original({f"{name}{key}": value for name in ("model.", "ema.") for key, value in theirs.items()})
    with pytest.raises(ValueError, match="strange"):
        read_original({**theirs, "strange": torch.zeros(1)})
    with pytest.raises(ValueError, match="pos_embed"):
        read_original({**theirs, "pos_embed": theirs["pos_embed"].flip(1)})
