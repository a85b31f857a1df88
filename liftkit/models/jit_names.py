"""JiT's weights under the names of its authors, and of the AsymFlow authors' copy of it, read and written without loss.

Both have the same learned tensors. They differ in their tables, which follow from the sizes, and in ``proj_buffer``: A with rows in
(row, column, channel) order, which JiT itself does not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from liftkit.models.jit import SIZES
from liftkit.models.jit_positions import positions, rotations
from liftkit.tokens import token_order

NAMES = {
    "x_embedder.proj1": "patch_embed.proj",
    "x_embedder.proj2": "patch_embed.proj_out",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "class_embed",
    "in_context_posemb": "context_embed",
    "final_layer.norm_final": "norm_out.norm",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
    "blocks.*.norm1": "transformer_blocks.*.norm1",
    "blocks.*.norm2": "transformer_blocks.*.norm2",
    "blocks.*.attn.qkv": "transformer_blocks.*.attn.to_qkv",
    "blocks.*.attn.q_norm": "transformer_blocks.*.attn.norm_q",
    "blocks.*.attn.k_norm": "transformer_blocks.*.attn.norm_k",
    "blocks.*.attn.proj": "transformer_blocks.*.attn.to_out.0",
    "blocks.*.mlp.w12": "transformer_blocks.*.ff.linear_in",
    "blocks.*.mlp.w3": "transformer_blocks.*.ff.linear_out",
    "blocks.*.adaLN_modulation.1": "transformer_blocks.*.modulation.linear",
}
"""The authors' modules, and ours."""
TABLES = re.compile(r"(?:x_embedder\.)?pos_embed$|feat_rope(?:_incontext)?\.")
FIRST, BASIS, SCALE = "x_embedder.proj1.weight", "proj_buffer", "scale_buffer"
Kind = Literal["jit", "asymjit"]


@dataclass(frozen=True)
class Original:
    """What a file of the authors' holds.

    Args:
        config: of a ``JiTTransformer2DModel``.
        tensors: its state dict.
        basis: A, (D, r), rows in (channel, row, column) order; (D, 0) for JiT itself.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    basis: Tensor


def read_original(found: Mapping[str, Tensor]) -> Original:
    """Tensors by the authors' names, with or without the prefix of a wrapper, as ours.

    Raises:
        ValueError: if they are not those of one JiT, whole and alone.
    """
    prefixes = sorted(name.removesuffix(FIRST) for name in found if name.endswith(FIRST))
    if len(prefixes) != 1:
        what = f"{len(prefixes)} networks ({', '.join(prefixes)})" if prefixes else f"no {FIRST}"
        raise ValueError(f"expected one JiT, found {what}")
    inner = {name.removeprefix(prefixes[0]): value for name, value in found.items() if name.startswith(prefixes[0])}
    tensors, unknown = {}, []
    for name, value in inner.items():
        ours = _renamed(name, NAMES)
        if ours is not None:
            tensors[ours] = value
        elif not TABLES.match(name) and name not in (BASIS, SCALE):
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are not JiT's, such as {unknown[0]!r}")
    if float(inner.get(SCALE, torch.ones(()))) != 1.0:
        raise ValueError(f"{SCALE} is {float(inner[SCALE]):g}: an AsymJiT that was made from nothing has 1")
    config = _config(tensors, asymmetric=BASIS in inner)
    _check_tables(inner, config)
    dim = 3 * config["patch_size"] ** 2
    basis = torch.zeros(dim, 0)
    if BASIS in inner:
        basis = torch.empty_like(inner[BASIS])
        basis[token_order(3, config["patch_size"], "pqc")] = inner[BASIS]
    return Original(config, tensors, basis)


def write_original(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], basis: Tensor | None = None
) -> dict[str, Tensor]:
    """The inverse of :func:`read_original`: the learned tensors, A where there is one, and the tables.

    Args:
        config: of the model.
        tensors: its state dict; of an Asym twin, ``lift.basis`` is passed over.
        basis: A in (channel, row, column) order for AsymJiT's names; None for JiT's.
    """
    back = {ours: theirs for theirs, ours in NAMES.items()}
    found = {}
    for name, value in tensors.items():
        theirs = _renamed(name, back)
        if theirs is None and name != "lift.basis":
            raise ValueError(f"{name}: no tensor of a JiT")
        if theirs is not None:
            found[theirs] = value
    if basis is not None:
        found[BASIS] = basis[token_order(3, config["patch_size"], "pqc")].contiguous()
        found[SCALE] = torch.ones(())
    return found | tables(config, "jit" if basis is None else "asymjit")


def tables(config: Mapping[str, Any], kind: Kind) -> dict[str, Tensor]:
    """What the authors store and our class computes: positions and rotations, in float32."""
    side, head = config["sample_size"] // config["patch_size"], config["attention_head_dim"]
    width, cpu = config["num_attention_heads"] * head, torch.device("cpu")
    inner, place = ("", "") if kind == "jit" else ("base_rope.", "x_embedder.")
    found = {f"{place}pos_embed": positions(side, side, width, cpu)[None]}
    # The AsymFlow authors put the context's still tokens in front when they rotate; JiT's tables hold them.
    for name, still in (("feat_rope", 0), ("feat_rope_incontext", config["context_tokens"] if kind == "jit" else 0)):
        table = rotations(side, side, head, still, cpu).repeat_interleave(2, dim=1)
        found |= {f"{name}.{inner}freqs_cos": table.real.clone(), f"{name}.{inner}freqs_sin": table.imag.clone()}
    return found


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    number = re.search(r"\.(\d+)\.", name)
    plain = (
        name.replace(number[0], ".*.", 1) if number and name.startswith(("blocks.", "transformer_blocks.")) else name
    )
    module, dot, leaf = plain.rpartition(".")
    found = names.get(plain) or (
        f"{names[module]}{dot}{leaf}" if module in names and leaf in ("weight", "bias") else None
    )
    return found.replace("*", number[1]) if found is not None and number is not None else found


def _config(tensors: Mapping[str, Tensor], *, asymmetric: bool) -> dict[str, Any]:
    """The config that shapes tell; where the context joins, and the dropout, follow from the size."""
    try:
        bottleneck, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        width, head = len(tensors["norm_out.norm.weight"]), len(tensors["transformer_blocks.0.attn.norm_q.weight"])
        hidden = tensors["transformer_blocks.0.ff.linear_out.weight"].shape[1]
        classes = len(tensors["class_embed.weight"]) - 1
    except (KeyError, ValueError) as error:
        raise ValueError(f"a JiT without {error}") from error
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    context = tensors.get("context_embed")
    known = next((each for each in SIZES.values() if each[:3] == (layers, width // head, head)), None)
    ratio = next(each / 2 for each in range(1, 33) if int(int(width * each / 2) * 2 / 3) >= hidden)
    return {
        "sample_size": 16 * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": layers,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "bottleneck_dim": bottleneck,
        "mlp_ratio": ratio,
        "num_classes": classes,
        "context_tokens": 0 if context is None else context.shape[1],
        "context_start": known[4] if known else layers // 3,
        "dropout": known[5] if known else 0.0,
        "predicts_data": not asymmetric,
    }


def _check_tables(inner: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Take the number of tokens from the table of positions, and raise unless that is the one that we compute."""
    stored = next((value for name, value in inner.items() if name.endswith("pos_embed")), None)
    if stored is None:
        return
    side = round(stored.shape[1] ** 0.5)
    config["sample_size"] = side * config["patch_size"]
    ours = positions(side, side, stored.shape[2], torch.device("cpu"))
    if side * side != stored.shape[1] or not torch.allclose(stored[0].float(), ours, atol=1e-2):
        raise ValueError("pos_embed is not JiT's table of sines and cosines")
