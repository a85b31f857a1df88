"""JiT ("just image transformers"): a plain transformer on large pixel patches, conditioned on a class.

diffusers has no class for it, so that this one is liftkit's own, in diffusers' form. What is unusual beside other diffusion
transformers: a narrow linear layer (the bottleneck) between pixels and width, 2-D rotary positions beside a fixed table, and copies
of the class's embedding that join the sequence at a block in the middle.

The network answers the asymmetric velocity ``u_A = P_A eps - x_0`` at noise level sigma; which rank that has is a matter of its
Asym twin and of training alone. JiT itself is rank 0: ``u_A = -x_0``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from liftkit.models.jit_positions import FREQUENCIES, positions, rotated, rotations, sinusoid
from liftkit.models.spec import HOME

EPS = 1e-6
"""Of every RMSNorm."""


class JiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Images (B, C, H, W), noise levels and classes to the asymmetric velocity, shaped like the images.

    Args:
        sample_size: side of the images that it is made for, in pixels; any multiple of the patch runs.
        patch_size: side of a token's patch, in pixels.
        in_channels: of the images, and of the output.
        num_layers, num_attention_heads, attention_head_dim: of the blocks; the width is the product of the last two.
        bottleneck_dim: width between the patch and the blocks.
        mlp_ratio: hidden width of a block's MLP, relative to the width, before the factor 2 / 3 of SwiGLU.
        num_classes: c; labels are 0 to c - 1, and c is "no class".
        context_tokens: copies of the class's embedding that join the sequence; 0 for none.
        context_start: number of the block before which they do.
        dropout: behind the attention and in the MLP of the blocks in the second and third quarter.
        upcast_attention: compute attention in float32.
        predicts_data: weights of JiT's authors, who give their network 1 - sigma and have it answer x_0 = -u_A.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["JiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["JiTBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        bottleneck_dim: int = 128,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        context_tokens: int = 32,
        context_start: int = 4,
        dropout: float = 0.0,
        upcast_attention: bool = True,
        predicts_data: bool = False,
    ) -> None:
        super().__init__()
        if attention_head_dim % 4:
            raise ValueError(f"JiT: attention_head_dim {attention_head_dim}: 2-D rotation needs a multiple of 4")
        width = num_attention_heads * attention_head_dim
        self.patch_embed = PatchEmbed(in_channels, patch_size, bottleneck_dim, width)
        self.time_embed = TimestepEmbedding(FREQUENCIES, width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.context_embed = nn.Parameter(torch.empty(1, context_tokens, width)) if context_tokens else None
        middle = range(num_layers // 4, num_layers // 4 * 3)
        self.transformer_blocks = nn.ModuleList(
            JiTBlock(width, num_attention_heads, mlp_ratio, dropout if index in middle else 0.0, upcast_attention)
            for index in range(num_layers)
        )
        self.norm_out = Modulated(width)
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)
        self.gradient_checkpointing = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The weights that training from nothing begins with."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.time_embed.linear_1, self.time_embed.linear_2, self.class_embed):
            nn.init.normal_(linear.weight, std=0.02)
        if self.context_embed is not None:
            nn.init.normal_(self.context_embed, std=0.02)
        # Every block is the identity at first, and every answer 0.
        modulations = [module for module in self.modules() if isinstance(module, Modulation | Modulated)]
        for linear in (*(module.linear for module in modulations), self.proj_out):
            nn.init.zeros_(linear.weight)

    @torch.no_grad()
    def begin_with(self, basis: Tensor) -> None:
        """Let the first rows of the bottleneck read the subspace, as strongly as random rows would be.

        Args:
            basis: A, (D, r), rows in (channel, row, column) order.

        Raises:
            ValueError: if it has more columns than the bottleneck has rows.
        """
        weight = self.patch_embed.proj.weight
        rank, dim = basis.shape[1], basis.shape[0]
        if rank > len(weight):
            raise ValueError(f"JiT: a subspace of rank {rank} does not fit into a bottleneck of {len(weight)}")
        gain = (2.0 * dim / (dim + len(weight))) ** 0.5
        weight[:rank] = (gain * basis.T).reshape(rank, *weight.shape[1:]).to(weight)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The asymmetric velocity.

        Args:
            hidden_states: images (B, C, H, W) with noise.
            timestep: sigma, (B,) in [0, 1]; 1 is noise.
            class_labels: (B,), 0 to ``num_classes``.
        """
        config = self.config
        rows, columns = (side // config.patch_size for side in hidden_states.shape[-2:])
        x = self.patch_embed(hidden_states)
        time = 1.0 - timestep.float() if config.predicts_data else timestep.float()
        label = self.class_embed(class_labels)
        condition = self.time_embed(sinusoid(time).to(x.dtype)) + label
        table = rotations(rows, columns, config.attention_head_dim, 0, x.device)
        for index, block in enumerate(self.transformer_blocks):
            if self.context_embed is not None and index == config.context_start:
                x = torch.cat([label[:, None] + self.context_embed, x], dim=1)
                table = rotations(rows, columns, config.attention_head_dim, config.context_tokens, x.device)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, condition, table)
            else:
                x = block(x, condition, table)
        tokens = self.proj_out(self.norm_out(x[:, -rows * columns :], condition))
        patches = tokens.unflatten(2, (config.patch_size, config.patch_size, -1)).unflatten(1, (rows, columns))
        output = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        output = -output if config.predicts_data else output
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class PatchEmbed(nn.Module):
    """Patches to a narrow vector, this to the width of the blocks, and a fixed table of positions."""

    def __init__(self, channels: int, patch: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, bottleneck, patch, patch, bias=False)
        self.proj_out = nn.Conv2d(bottleneck, width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, width)."""
        hidden = self.proj_out(self.proj(images))
        rows, columns = hidden.shape[-2:]
        tokens = hidden.flatten(2).transpose(1, 2)
        return tokens + positions(rows, columns, tokens.shape[-1], tokens.device).to(tokens.dtype)


class Modulation(nn.Module):
    """Shifts, scales and gates of a block from its conditioning; 0 at first."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, count * width)
        self.count = count

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, width) to ``count`` tensors (B, 1, width)."""
        return self.linear(F.silu(condition))[:, None].chunk(self.count, dim=-1)


class Modulated(nn.Module):
    """The norm before the output, shifted and scaled by the conditioning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, EPS)
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, N, width) with conditioning (B, width)."""
        shift, scale = self.linear(F.silu(condition))[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1.0 + scale) + shift


class JiTBlock(nn.Module):
    """Attention and a SwiGLU, each behind an RMSNorm that the conditioning shifts and scales, each with a gate."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, upcast: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width, EPS), RMSNorm(width, EPS)
        self.attn = JiTAttention(width, heads, dropout, upcast)
        self.ff = SwiGLU(width, int(int(width * mlp_ratio) * 2 / 3), dropout)
        self.modulation = Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor, table: Tensor) -> Tensor:
        """Tokens (B, N, width) with conditioning (B, width); see :func:`rotations` for the table."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(condition)
        x = x + gate * self.attn(self.norm1(x) * (1.0 + scale) + shift, table)
        return x + gate_ff * self.ff(self.norm2(x) * (1.0 + scale_ff) + shift_ff)


class JiTAttention(nn.Module):
    """Attention with normalized and rotated queries and keys."""

    def __init__(self, width: int, heads: int, dropout: float, upcast: bool) -> None:
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = RMSNorm(width // heads, EPS), RMSNorm(width // heads, EPS)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Tokens (B, N, width) to the same."""
        query, key, value = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotated(self.norm_q(query), table), rotated(self.norm_k(key), table)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.float32 if self.upcast and x.dtype != torch.float64 else value.dtype
            found = attention(query.to(dtype), key.to(dtype), value.to(dtype))
        found = found.to(value.dtype).transpose(1, 2).flatten(2)
        for layer in self.to_out:
            found = layer(found)
        return found


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of (B, heads, N, dim), its softmax in float32."""
    if (
        query.device.type == "cpu" and query.dtype == torch.bfloat16
    ):  # torch's own kernel takes four times as long there
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
        return weights.to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value)


class SwiGLU(nn.Module):
    """``(silu(a) * b) W`` with a and b from one matrix."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear_in = nn.Linear(width, 2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.linear_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, width) to the same."""
        gate, value = self.linear_in(x).chunk(2, dim=-1)
        return self.linear_out(self.dropout(F.silu(gate) * value))


JiTTransformer2DModel.__module__ = HOME


def sized(size: str, patch: int, **more: Any) -> dict[str, Any]:
    """The config of a size of the paper's.

    Args:
        size: B, L or H.
        patch: 16 for images of 256 pixels, 32 for 512.
        more: entries that take the place of others.
    """
    layers, heads, head, bottleneck, start, dropout = SIZES[size]
    return {
        "sample_size": 16 * patch,
        "patch_size": patch,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "bottleneck_dim": bottleneck,
        "context_start": start,
        "dropout": dropout,
        **more,
    }


SIZES = {"B": (12, 12, 64, 128, 4, 0.0), "L": (24, 16, 64, 128, 8, 0.0), "H": (32, 16, 80, 256, 10, 0.2)}
"""Layers, heads, numbers of a head, bottleneck, block where the context joins, and dropout."""
