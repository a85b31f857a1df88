"""Qwen-Image, with Edit, Edit-Plus and Layered: tokens packed by the pipeline, rotations from shapes instead of ids, references
behind the noise, guidance that rescales the velocity to the norm of the conditional one, token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import padded, random
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Grid, Projection

LENGTH = 512
"""Tokens of a prompt where the model's folder names no other number."""
SEEN = 1024 * 1024
"""Pixels at which Edit's text encoder is shown the picture."""
SEVERAL = "QwenImageEditPlusPipeline"


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """Layered is also given the kind of its pictures: 0, with opacity."""
    layered = grid.config.get("use_additional_t_cond")
    kind = {"additional_t_cond": torch.zeros(grid.batch, dtype=torch.long, device=grid.device)} if layered else {}
    return {"img_shapes": [[(1, grid.rows, grid.columns)]] * grid.batch, **kind, **given}


def _references(arguments: Mapping[str, Any]) -> Tensor | None:
    """The tokens behind the first shape's; of Layered, which names no color in ``additional_t_cond``, those of the last shape."""
    state, noisy = arguments["hidden_states"], _noisy(arguments)
    if len(noisy) == len(arguments["img_shapes"][0]):
        return None
    return torch.arange(state.shape[1], device=state.device) >= sum(prod(shape) for shape in noisy)


def _noisy(arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    shapes = list(arguments["img_shapes"][0])
    return shapes[:-1] if arguments.get("additional_t_cond") is not None and len(shapes) > 1 else shapes[:1]


def _token_grid(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    frames, rows, columns = _noisy(arguments)[0]
    return frames * len(_noisy(arguments)), rows, columns


def _beside(state: Tensor, references: list[Tensor], arguments: dict[str, Any]) -> Tensor:
    """References are tokens behind the state's, with shapes of their own."""
    arguments["img_shapes"] = [shapes * (1 + len(references)) for shapes in arguments["img_shapes"]]
    return torch.cat([state, *references], 1)


def _rescale(guided: Tensor, conditional: Tensor, call: Mapping[str, Any]) -> Tensor:
    """To the norm of the conditional velocity, token by token; Layered does so where ``cfg_normalize`` asks for it."""
    if not call.get("cfg_normalize", True):
        return guided
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    length = length or LENGTH
    embeds, mask = pipeline.encode_prompt(prompts, device=pipeline._execution_device, max_sequence_length=length)
    rows = list(embeds) if mask is None else [row[on] for row, on in zip(embeds, mask.bool())]
    text, mask = padded(rows, length)
    return {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}


def _shown_beside(pipeline: str, height: int, width: int) -> tuple[int, int]:
    """Edit's encoder is shown its one picture at about a megapixel, as its VAE is; Edit-Plus' sees each one small."""
    several = pipeline == SEVERAL
    stock = import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_edit{'_plus' if several else ''}")
    width, height = stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE if several else SEEN, width / height)[:2]
    return height, width


def _prompts_beside(pipeline: Any, prompt: str, pictures: list[Any]) -> dict[str, Tensor]:
    name = type(pipeline).__name__
    seen = [pipeline.image_processor.resize(each, *_shown_beside(name, each.height, each.width)) for each in pictures]
    shown = seen if name == SEVERAL else seen[0]
    text, _ = pipeline.encode_prompt([prompt], image=shown, device=pipeline._execution_device)
    return {
        "encoder_hidden_states": text[0],
        "encoder_hidden_states_mask": torch.ones(text.shape[1], dtype=torch.bool),
    }


QWEN_IMAGE = Architecture(
    name="QwenImageTransformer2DModel",
    inputs=(Projection("img_in", "cpq"),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.TOKENS,
    conditioning=random(encoder_hidden_states=(7, "joint_attention_dim"), encoder_hidden_states_mask=(7,)),
    arguments=_arguments,
    clean_tokens=_references,
    beside=_beside,
    token_grid=_token_grid,
    references={"QwenImageEditPipeline": range(1, 2), SEVERAL: range(1, 4)},
    several=frozenset({"QwenImageLayeredPipeline"}),
    reference=("norm_out",),
    adapters=(
        "transformer_blocks.*.img_mlp.net.0.proj",
        "transformer_blocks.*.img_mlp.net.2",
        "transformer_blocks.*.attn.to_out.0",
    ),
    guidance_argument="true_cfg_scale",
    rescale=_rescale,
    prompts=_prompts,
    prompts_beside=_prompts_beside,
    shown_beside=_shown_beside,
)
