"""Transformers as BFL's or Stability's own code lays them out, for tests: the inverse of diffusers' mapping."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# By pattern, diffusers' name and the original's; BFL fuses query, key and value, and has shift before scale.
FLUX2 = (
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"^(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation)\.linear", r"\1.lin"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_(q|k|v)\.", r"double_blocks.\1.img_attn.qkv|\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.add_(q|k|v)_proj\.", r"double_blocks.\1.txt_attn.qkv|\2."),
)
SD3 = (
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0", r"joint_blocks.\1.x_block.attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_(q|k|v)\.", r"joint_blocks.\1.x_block.attn.qkv|\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.add_(q|k|v)_proj\.", r"joint_blocks.\1.context_block.attn.qkv|\2."),
)
# Modulations of the last layers, whose halves the original has the other way round.
SWAPPED = {"flux2": r"^norm_out\.", "sd3": r"^norm_out\.|^transformer_blocks\.1\.norm1_context\."}


def original(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's tensors as BFL's or Stability's own code lays them out."""
    result: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if re.match(SWAPPED[name], key):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        new = key
        for pattern, replacement in {"flux2": FLUX2, "sd3": SD3}[name]:
            if re.match(pattern, key):
                new = re.sub(pattern, replacement, key)
        if "|" in new:
            module, part = new.split("|")
            fused.setdefault(f"{module}{part[1:]}", {})[part[0]] = tensor
        else:
            result[new] = tensor
    result |= {key: torch.cat([parts[part] for part in "qkv"]) for key, parts in fused.items()}
    assert not result.keys() & (state.keys() - {"context_embedder.weight", "context_embedder.bias"})
    prefix = "model.diffusion_model." if name == "sd3" else ""
    return {f"{prefix}{key}": tensor for key, tensor in result.items()}
