"""The adapter format of the paper's authors, in which AsymFLUX.2 is released.

A folder of ``config.json`` and ``diffusion_pytorch_model.safetensors``, or the latter alone, as ComfyUI's users have it:

    x_embedder.weight (hidden, 3 P^2)    proj_out.weight (3 P^2, hidden)    norm_out.*
    proj_buffer (3 P^2, r) = A           scale_buffer = s
    <module>.lora_A.weight (R, in)       <module>.lora_B.weight (out, R)    alpha = R: W + B A

Pixels of a patch are in (channel, row, column) order, in Oklab normalized by the paper's constants. Ours are folded
(:func:`liftkit.tokens.token_order`), so that two tensors change the order of their columns or rows, and none its numbers.

The tensors say all that is needed: P and r are in their shapes. What was not trained is the base's own and need not be
there, but for the projections, which no base has. The config is for the authors' loader, which builds the network from it:
it holds the base transformer's own numbers (for those that it lacks, the loader takes FLUX.2 dev's), and the rank under the
two names that it has had, ``base_rank`` until version 0.2.1 and ``basis_rank`` since.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.files import write_safetensors, write_text
from liftkit.checkpoint.folder import RECORD, atomic_folder
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.model import STEM, read_json
from liftkit.checkpoint.record import write_record
from liftkit.checkpoint.rewrite import read_tensor
from liftkit.color import Oklab
from liftkit.errors import UsageError
from liftkit.formats.asymflow_limits import CLASS, FULL, INPUT, NAME, NORM, OUTPUT, check_exportable
from liftkit.lift import Lift
from liftkit.models.adapter import LORA_A, LORA_B, Adapter, check_numbers
from liftkit.models.families.flux2 import FLUX2
from liftkit.tokens import token_order

BASIS, SCALE = "proj_buffer", "scale_buffer"
NUMBERS = (
    "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim",
    "timestep_guidance_channels", "guidance_embeds", "mlp_ratio", "axes_dims_rope", "rope_theta", "eps",
)  # fmt: skip
"""What the config holds of the base's transformer."""
SAMPLING = {"solver": "UniPCMultistepScheduler", "shift": 17.0, "shift_side": 1024, "clamp": True, "orthogonal": 1.0}
"""How the authors sample: UniPC, the shift 17 for 1024 x 1024 pixels and in proportion to the square root of their number, the
denoised estimate clamped to the gamut at every step, guidance without its part along that estimate."""


def is_asymflow_adapter(path: Path) -> bool:
    """Whether a folder or a file holds an adapter in the authors' format: its two buffers tell."""
    try:
        return _weight_file(path) is not None
    except UsageError:
        return False


def read_asymflow_adapter(path: Path) -> Adapter:
    """An adapter in the authors' format as one of ours.

    Args:
        path: a folder with its weights, or the file of the weights.

    Returns:
        Its numbers as they are stored, A too: the network was trained with that very A.

    Raises:
        UsageError: if a key is missing, unknown or of another shape, or the basis is not orthonormal.
    """
    file = _weight_file(path)
    if file is None:
        raise UsageError(f"{path}: no tensor {BASIS!r} or {SCALE!r}; is it an adapter of AsymFlow?")
    header = read_header(file)
    prefix = next(
        name.removesuffix(buffer) for name in header.tensors for buffer in (BASIS, SCALE) if _is(name, buffer)
    )
    tensors = {name.removeprefix(prefix): read_tensor(header, name) for name in header.tensors}
    config = file.parent / "config.json"
    stated = read_json(config) if path.is_dir() and config.is_file() else {}
    _check_names(path, tensors)
    check_numbers(path, tensors)
    _check_shapes(path, tensors, stated)
    lift = _lift(path, tensors.pop(BASIS), tensors.pop(SCALE))
    order = _order(lift)
    tensors[INPUT] = tensors[INPUT][:, order].contiguous()
    tensors[OUTPUT] = tensors[OUTPUT][order].contiguous()
    provenance = {"imported": {"format": NAME, "config": stated}, **_sampling(path)}
    try:
        return _same_alpha(Adapter(tensors, None, lift, CLASS, "", provenance))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _sampling(path: Path) -> dict[str, Any]:
    """The authors' way to sample; of what liftkit exported, that of the model it was exported from, if it had one of its own."""
    record = path / RECORD
    if record.is_file():
        found = read_json(record)
        if found.get("format") == "liftkit.export":
            return {"sampling": found["sampling"]} if isinstance(found.get("sampling"), dict) else {}
    return {"sampling": SAMPLING}


def _weight_file(path: Path) -> Path | None:
    """The file with the two buffers: the one that is given, or the only one of a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found = [
        file for file in files if any(_is(name, each) for name in read_header(file).tensors for each in (BASIS, SCALE))
    ]
    plain = [file for file in found if file.name == f"{STEM}.safetensors"]
    if len(found) > 1 and not plain:
        raise UsageError(f"{path}: several adapters ({', '.join(file.name for file in found)}); give the file of one")
    return next(iter(plain or found), None)


def _is(name: str, buffer: str) -> bool:
    return name == buffer or name.endswith(f".{buffer}")


def write_asymflow_adapter(
    adapter: Adapter, folder: Path, card: str, base_config: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write an adapter of ours in the authors' format; the folder appears whole or not at all.

    Args:
        adapter: see :func:`check_exportable`.
        folder: to make.
        card: its README.md.
        base_config: of the base's transformer, latent or converted.
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
    config = their_config(lift, base_config)
    with atomic_folder(folder, overwrite=overwrite) as building:
        write_text(building / "config.json", json.dumps(config, indent=2) + "\n")
        write_safetensors(building / f"{STEM}.safetensors", tensors, {"format": "pt"})
        write_text(building / "README.md", card)
        record = {"format": "liftkit.export", "version": 1, "base": adapter.base, **adapter.provenance}
        write_record(building, record)


def their_config(lift: Lift, base_config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` from which the authors' loader builds the network of an adapter.

    Args:
        lift: the adapter's.
        base_config: of the base's transformer; what it leaves out is the stock class's default.

    Raises:
        UsageError: if it is not the config of a FLUX.2 transformer.
    """
    import diffusers

    defaults = inspect.signature(diffusers.Flux2Transformer2DModel.__init__).parameters
    numbers = {key: base_config.get(key, defaults[key].default) for key in NUMBERS}
    return {
        "_class_name": CLASS,
        "_diffusers_version": version("diffusers"),
        **numbers,
        "patch_size": lift.patch_size,
        "in_channels": 3,
        "base_rank": lift.rank,
        "basis_rank": lift.rank,
        "num_timesteps": 1,
        "sigma_min": 1e-4,
    }


def _check_names(folder: Path, tensors: dict[str, Tensor]) -> None:
    missing = [name for name in (INPUT, OUTPUT, BASIS, SCALE) if name not in tensors]
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


def _check_shapes(folder: Path, tensors: dict[str, Tensor], stated: Mapping[str, Any]) -> None:
    """Raise unless all shapes follow from P, r and the hidden size, and the config says the same, where it says anything."""
    hidden = len(tensors[INPUT])
    dim, rank = tensors[BASIS].shape if tensors[BASIS].ndim == 2 else (0, 0)
    patch = math.isqrt(dim // 3)
    if dim < 3 or 3 * patch**2 != dim:
        raise UsageError(
            f"{folder}: tensor {BASIS!r}: expected (3 P^2, rank) for a patch of P x P pixels, found {tuple(tensors[BASIS].shape)}"
        )
    wanted = {INPUT: (hidden, dim), OUTPUT: (dim, hidden), NORM: (2 * hidden, hidden)}
    for name, shape in wanted.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise UsageError(f"{folder}: tensor {name!r}: expected {shape}, found {tuple(tensors[name].shape)}")
    if tensors[SCALE].numel() != 1:
        raise UsageError(f"{folder}: tensor {SCALE!r}: expected one number, found {tuple(tensors[SCALE].shape)}")
    for key, value in {"patch_size": patch, "base_rank": rank, "basis_rank": rank}.items():
        if stated.get(key, value) != value:
            raise UsageError(
                f"{folder / 'config.json'}: {key}: expected {value} by the tensors' shapes, found {stated[key]!r}"
            )


def _lift(folder: Path, buffer: Tensor, scale: Tensor) -> Lift:
    basis = buffer if buffer.dtype == torch.float64 else buffer.float()
    try:
        return Lift(basis, scale.double().item(), math.isqrt(len(basis) // 3), FLUX2.latent_patch({}), Oklab())
    except ValueError as error:
        raise UsageError(f"{folder}: tensors {BASIS!r} and {SCALE!r}: {error}") from error


def _order(lift: Lift) -> Tensor:
    """From (channel, row, column) to the order in which the folded model flattens its pixels."""
    return token_order(3, lift.latent_patch, FLUX2.inputs[0].order, fold=lift.fold)


def _same_alpha(adapter: Adapter) -> Adapter:
    """One number for alpha where all pairs have the same rank, which every reader of LoRA understands."""
    ranks = {len(down) for down, _ in adapter.pairs.values()}
    return replace(adapter, alpha=float(ranks.pop())) if len(ranks) == 1 else adapter
