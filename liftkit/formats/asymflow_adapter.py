"""The adapter format of the paper's authors, in which AsymFLUX.2 is released.

A folder of ``config.json`` (``_class_name``, ``patch_size`` P, ``base_rank`` r) and ``diffusion_pytorch_model.safetensors``:

    x_embedder.weight (hidden, 3 P^2)    proj_out.weight (3 P^2, hidden)    norm_out.*
    proj_buffer (3 P^2, r) = A           scale_buffer = s
    <module>.lora_A.weight (R, in)       <module>.lora_B.weight (out, R)    alpha = R: W + B A

Pixels of a patch are in (channel, row, column) order, in Oklab normalised by the paper's constants. Ours are folded
(:func:`liftkit.tokens.token_order`), so that two tensors change the order of their columns or rows, and none its numbers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.adapter import LORA_A, LORA_B, Adapter, check_numbers
from liftkit.checkpoint.files import write_safetensors, write_text
from liftkit.checkpoint.folder import RECORD, atomic_folder, manifest
from liftkit.checkpoint.model import STEM, read_json, read_weights
from liftkit.color import Oklab
from liftkit.errors import UsageError
from liftkit.formats.merging import read_known
from liftkit.lift import Lift
from liftkit.models.flux2 import FLUX2
from liftkit.tokens import token_order

NAME = "asymflow-adapter"
CLASS = FLUX2.lifted_name
INPUT, OUTPUT = (f"{projection.path}.weight" for projection, _ in FLUX2.projections)
NORM = "norm_out.linear.weight"
BASIS, SCALE = "proj_buffer", "scale_buffer"
FULL = (INPUT, OUTPUT, NORM)
PREFIX = "transformer."
# A basis that was rounded to half precision is off by this much; it is put right again.
ORTHONORMAL, ROUNDED = 1e-4, 1e-2


def is_asymflow_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in the authors' format."""
    try:
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    except UsageError:
        return False
    return config.get("_class_name") == CLASS and "base_rank" in config


def read_asymflow_adapter(folder: Path, base: str = "") -> Adapter:
    """An adapter in the authors' format as one of ours.

    Args:
        folder: of ``config.json`` and weights.
        base: name of the latent model that it is for.

    Returns:
        Its numbers, in the dtypes they have; full precision for the basis.

    Raises:
        UsageError: if a key is missing, unknown or of another shape, or the basis is not orthonormal.
    """
    config = read_json(folder / "config.json")
    patch, rank = (_number(folder, config, key) for key in ("patch_size", "base_rank"))
    weights = read_weights(folder)
    tensors = {name.removeprefix(PREFIX): read_known(weights, name) for name in weights.where}
    _check_names(folder, tensors)
    check_numbers(folder, tensors)
    _check_shapes(folder, tensors, patch, rank)
    lift = _lift(folder, tensors.pop(BASIS), tensors.pop(SCALE), patch)
    order = _order(lift)
    tensors[INPUT] = tensors[INPUT][:, order].contiguous()
    tensors[OUTPUT] = tensors[OUTPUT][order].contiguous()
    try:
        return _same_alpha(Adapter(tensors, None, lift, CLASS, base, {"imported": {"format": NAME, "config": config}}))
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from error


def write_asymflow_adapter(adapter: Adapter, folder: Path, card: str, *, overwrite: bool = False) -> None:
    """Write an adapter of ours in the authors' format; the folder appears whole or not at all.

    Args:
        adapter: see :func:`check_exportable`.
        folder: to make.
        card: its README.md.
        overwrite: replace an adapter that was exported there before.

    Raises:
        UsageError: if the format cannot hold it.
        LiftkitError: if the disk refuses.
    """
    lift = check_exportable(adapter)
    back = torch.argsort(_order(lift))
    tensors = dict(adapter.full)
    tensors[INPUT], tensors[OUTPUT] = tensors[INPUT][:, back], tensors[OUTPUT][back]
    tensors[BASIS], tensors[SCALE] = lift.basis.float(), torch.tensor(lift.scale, dtype=torch.float32)
    for module, (down, up) in adapter.pairs.items():
        factor = adapter.factor(len(down))
        tensors[f"{module}{LORA_A}"] = down
        tensors[f"{module}{LORA_B}"] = up if factor == 1.0 else (factor * up.double()).to(up.dtype)
    config = {
        "_class_name": CLASS,
        "_diffusers_version": version("diffusers"),
        "patch_size": lift.patch_size,
        "base_rank": lift.rank,
    }
    with atomic_folder(folder, overwrite=overwrite) as building:
        write_text(building / "config.json", json.dumps(config, indent=2) + "\n")
        write_safetensors(building / f"{STEM}.safetensors", tensors, {"format": "pt"})
        write_text(building / "README.md", card)
        record = {"format": "liftkit.export", "version": 1, "base": adapter.base, **adapter.provenance}
        write_text(building / RECORD, json.dumps({**record, "sha256": manifest(building)}, indent=2) + "\n")


def check_exportable(adapter: Adapter) -> Lift:
    """Whether the format has a place for everything in an adapter; its lift.

    Raises:
        UsageError: naming what does not fit.
    """
    lift = adapter.lift
    if lift is None or adapter.transformer != CLASS:
        raise UsageError(f"--format {NAME}: it holds pixel adapters for {CLASS}, this one is for {adapter.transformer}")
    if lift.color != Oklab():
        raise UsageError(
            f"--format {NAME}: it means {Oklab()}, this lift {lift.color}; their pipeline would paint wrong colours; "
            "convert with --color oklab-paper"
        )
    missing = [name for name in FULL if name not in adapter.full]
    if missing:
        raise UsageError(f"--format {NAME}: it holds {missing[0]}, the adapter does not: give --base, the latent model")
    norm = NORM.removesuffix("linear.weight")
    other = [name for name in adapter.full if name not in FULL and not name.startswith(norm)]
    if other:
        raise UsageError(
            f"--format {NAME}: it has no place for {len(other)} tensors trained in full, such as {other[0]!r}; train them "
            "with LoRA"
        )
    return lift


def _number(folder: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{folder / 'config.json'}: {key}: expected a positive number, found {value!r}")
    return value


def _check_names(folder: Path, tensors: dict[str, Tensor]) -> None:
    missing = [name for name in (*FULL, BASIS, SCALE) if name not in tensors]
    if missing:
        raise UsageError(f"{folder}: tensor {missing[0]!r} is missing; is the adapter complete?")
    known = (*FULL, BASIS, SCALE)
    unknown = [
        name
        for name in tensors
        if name not in known and not name.startswith("norm_out.") and not name.endswith((LORA_A, LORA_B))
    ]
    if unknown:
        raise UsageError(
            f"{folder}: {len(unknown)} tensors are neither LoRA nor projections nor output norm, such as {unknown[0]!r}; "
            "refused, for it would be lost"
        )


def _check_shapes(folder: Path, tensors: dict[str, Tensor], patch: int, rank: int) -> None:
    dim, hidden = 3 * patch**2, len(tensors[INPUT])
    wanted = {INPUT: (hidden, dim), OUTPUT: (dim, hidden), NORM: (2 * hidden, hidden), BASIS: (dim, rank)}
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise UsageError(f"{folder}: tensor {name!r}: expected {shape}, found {tuple(tensors[name].shape)}")
    if tensors[SCALE].numel() != 1:
        raise UsageError(f"{folder}: tensor {SCALE!r}: expected one number, found {tuple(tensors[SCALE].shape)}")


def _lift(folder: Path, buffer: Tensor, scale: Tensor, patch: int) -> Lift:
    basis = buffer if buffer.dtype == torch.float64 else buffer.float()
    wide = basis.double()
    error = (wide.T @ wide - torch.eye(wide.shape[1], dtype=torch.float64)).abs().max().item()
    if buffer.dtype in (torch.bfloat16, torch.float16) and ORTHONORMAL < error < ROUNDED:
        # The nearest orthonormal basis: the polar factor.
        left, _, right = torch.linalg.svd(wide, full_matrices=False)
        basis = (left @ right).float()
    elif not error < ORTHONORMAL:
        raise UsageError(
            f"{folder}: tensor {BASIS!r} is not orthonormal: max |A^T A - I| = {error:.1e}, allowed {ORTHONORMAL:.0e}"
        )
    try:
        return Lift(basis, scale.double().item(), patch, FLUX2.latent_patch({}), Oklab())
    except ValueError as error_:
        raise UsageError(f"{folder}: {error_}") from error_


def _order(lift: Lift) -> Tensor:
    """From (channel, row, column) to the order in which the folded model flattens its pixels."""
    return token_order(3, lift.latent_patch, FLUX2.inputs[0].order, fold=lift.fold)


def _same_alpha(adapter: Adapter) -> Adapter:
    """One number for alpha where all pairs have the same rank, which every reader of LoRA understands."""
    ranks = {len(down) for down, _ in adapter.pairs.values()}
    return replace(adapter, alpha=float(ranks.pop())) if len(ranks) == 1 else adapter
