"""Z-Image: the state is a list of (C, F, H, W), one for each sample; captions are lists of rows; time runs from 0 to 1.

The output is x_0 - eps, and pipelines put the conditional half of a guided batch first. Captions travel through caches as
padded tensors with a mask and become lists again for each call. Pipelines may rescale the guided velocity of a sample to the
norm of the conditional one (``cfg_normalization``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from liftkit.models.conditioning import padded, random
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Config, Grid, Projection


def _lists(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(given)
    mask = arguments.pop("cap_mask", None)
    if isinstance(feats := arguments["cap_feats"], Tensor):
        arguments["cap_feats"] = [
            row if keep is None else row[keep.bool()] for row, keep in zip(feats, _rows(mask, feats))
        ]
    return arguments


def _rows(mask: Tensor | None, feats: Tensor) -> list[Tensor | None]:
    return [None] * len(feats) if mask is None else list(mask)


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    length = length or 512
    # A list of its own: the stock method writes its chat template into the one that it is given.
    rows, _ = pipeline.encode_prompt(
        list(prompts), device=pipeline._execution_device, do_classifier_free_guidance=False, max_sequence_length=length
    )
    feats, mask = padded(rows, length)
    return {"cap_feats": feats, "cap_mask": mask}


def _refuse(config: Config) -> str | None:
    if list(config["all_patch_size"]) != [2] or list(config["all_f_patch_size"]) != [1]:
        return f"patch sizes {config['all_patch_size']} and {config['all_f_patch_size']}; expected one of each, 2 and 1"
    if config.get("siglip_feat_dim") is not None:
        return (
            "an omni model: where a sample has no reference image, the stock forward puts tokens of 64 zeros in its place, a "
            "number that it does not take from its config and that is another in pixel space"
        )
    return None


def _rescale(guided: Tensor, conditional: Tensor, call: Mapping[str, Any]) -> Tensor:
    """At most ``cfg_normalization`` times the norm of the conditional velocity, sample by sample."""
    limit = float(call.get("cfg_normalization") or 0.0)
    if limit <= 0.0:
        return guided
    most, found = (each.flatten(1).norm(dim=1).view(-1, *(1,) * (each.ndim - 1)) for each in (conditional, guided))
    return guided * (limit * most / found).clamp(max=1.0)


def _original() -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {"x_embedder": ("all_x_embedder.2-1",)}
    names |= {f"final_layer.{each}": (f"all_final_layer.2-1.{each}",) for each in ("linear", "adaLN_modulation.1")}
    for blocks in ("layers", "noise_refiner", "context_refiner"):
        attention = f"{blocks}.*.attention"
        names[f"{attention}.qkv"] = tuple(f"{attention}.to_{part}" for part in "qkv")
        names[f"{attention}.out"] = (f"{attention}.to_out.0",)
    return names


ZIMAGE = Architecture(
    name="ZImageTransformer2DModel",
    inputs=(Projection("all_x_embedder.2-1", "pqc"),),
    outputs=(Projection("all_final_layer.2-1.linear", "pqc"),),
    layout=Layout.LIST,
    latent_patch=lambda config: config["all_patch_size"][0],
    state="x",
    time="t",
    clock=Clock.ONE_MINUS_SIGMA,
    sign=-1,
    channel_keys=("in_channels",),
    conditioning=random(cap_feats=(7, "cap_feat_dim"), cap_mask=(7,)),
    arguments=_lists,
    refuse=_refuse,
    reference=("all_final_layer.2-1.adaLN_modulation.1",),
    adapters=(
        "layers.*.feed_forward.w1",
        "layers.*.feed_forward.w2",
        "layers.*.feed_forward.w3",
        "layers.*.attention.to_out.0",
    ),
    guidance="batch conditional first",
    guidance_from="conditional",
    rescale=_rescale,
    original=_original(),
    prompts=_prompts,
)
