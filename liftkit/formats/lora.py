"""Latent LoRAs on pixel models: those that touch a projection are lifted, all others apply as they are.

A LoRA adds ``B A`` to a weight. The conversion made ``W_in' = W_in A^T`` and ``W_out' = A W_out`` of the projections (here A is
the lift's basis), so that their LoRA becomes ``A_lora' = A_lora A^T`` and ``B_lora' = A B_lora``; an output's LoRA bias goes
the way of the output's bias. Products are made in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from liftkit.adapter import LIFT
from liftkit.checkpoint.files import check_file, read_safetensors, reason, write_safetensors
from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.conversion.surgery import check_finite, lift_input, lift_output, native_basis
from liftkit.errors import UsageError
from liftkit.formats.merging import tensor_shapes
from liftkit.lift import Lift
from liftkit.models.registry import architecture, is_lifted
from liftkit.models.spec import Architecture

PREFIX = "transformer."
_PREFIXES = ("base_model.model.transformer.", "base_model.model.", PREFIX, "diffusion_model.")
_NAMES = {".lora_down.": ".lora_A.", ".lora_up.": ".lora_B.", ".lora.down.": ".lora_A.", ".lora.up.": ".lora_B."}
_TEXT = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
A, B, B_BIAS, ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha"


def lift_lora(state_dict: Mapping[str, Tensor], spec: Architecture, lift: Lift) -> dict[str, Tensor]:
    """A LoRA of a latent model for its pixel twin.

    Args:
        state_dict: peft's or diffusers' keys, ``[transformer.]<module>.lora_A.weight`` (rank, in; or a convolution's) and
            ``lora_B.weight`` (out, rank).
        spec: the architecture.
        lift: of the pixel twin.

    Returns:
        The same keys; tensors that do not belong to a projection are the same objects.

    Raises:
        UsageError: if a projection's LoRA is not of latent tokens, or is of another kind than LoRA.
    """
    sides = {projection.path: (projection, side) for projection, side in spec.projections}
    result = {}
    for key, tensor in state_dict.items():
        path, part = split_key(key)
        result[key] = tensor
        if path not in sides:
            continue
        projection, side = sides[path]
        if part not in (A, B, B_BIAS, ALPHA):
            raise UsageError(f"tensor {key!r}: only plain LoRA can be lifted on a projection; leave {path} out")
        basis = native_basis(lift, projection.order)
        if side == "input" and part == A:
            _check_width(key, prod(tensor.shape[1:]), lift)
            result[key] = lift_input(tensor, basis)
        elif side == "output" and part in (B, B_BIAS):
            _check_width(key, tensor.shape[0], lift)
            result[key] = lift_output(tensor, basis)
        check_finite(key, result[key])
    return result


def split_key(key: str) -> tuple[str, str]:
    """Module and part of a LoRA's key, without prefixes, in peft's names."""
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            break
    for old, new in _NAMES.items():
        key = key.replace(old, new)
    key = key.replace(".default.", ".")
    path, dot, part = key.rpartition(".lora_")
    if dot:
        return path, f"lora_{part}"
    path, _, part = key.rpartition(".")
    return path, part


@dataclass
class ImportedLora:
    """A LoRA that was lifted.

    Args:
        output: the file.
        lifted: projections whose LoRA was.
        modules: how many modules it changes in all.
    """

    output: Path
    lifted: list[str]
    modules: int


def import_lora(path: Path, base: str, output: Path, *, overwrite: bool = False) -> ImportedLora:
    """Write a latent model's LoRA as one for its conversion, which ``load_lora_weights`` of its pipeline reads.

    Args:
        path: a .safetensors file with keys of peft or diffusers, or of another layout that diffusers itself reads.
        base: the converted folder.
        output: the file to write.
        overwrite: replace one that is there.

    Raises:
        UsageError: if it is no LoRA of the model that was converted; nothing was written.
        LiftkitError: if the disk refuses.
    """
    check_file(output, ".safetensors")
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: exists already; choose another output or pass --overwrite")
    folder = find_model(str(base))
    name = folder.class_of("transformer") or "no transformer"
    if not is_lifted(name):
        raise UsageError(
            f"--base {base}: {name} is no pixel model; LoRAs of a latent model apply to that as they are, give its conversion"
        )
    spec, lift = architecture(name), Lift.load(folder.path / LIFT)
    tensors, metadata = read_safetensors(path)
    try:
        plain = _fold_alpha(_plain_keys(tensors, folder))
        _check_shapes(plain, folder, spec)
        lifted = lift_lora(plain, spec, lift)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    write_safetensors(output, lifted, metadata)
    modules = {split_key(key)[0] for key in plain if not key.startswith(_TEXT)}
    return ImportedLora(output, sorted(modules & {p.path for p, _ in spec.projections}), len(modules))


def is_lora(names: list[str]) -> bool:
    """Whether these are names of a LoRA's tensors."""
    return any("lora_" in name or ".lora." in name or name.endswith(".dora_scale") for name in names)


def _plain_keys(tensors: dict[str, Tensor], folder: ModelFolder) -> dict[str, Tensor]:
    """Keys of diffusers; of layouts that are not peft's, diffusers' own translation."""
    modules = {name.rpartition(".")[0] for name in folder.weights("transformer").where}

    def unknown(state: Mapping[str, Tensor]) -> list[str]:
        return [key for key in state if not key.startswith(_TEXT) and split_key(key)[0] not in modules]

    if unknown(tensors):
        import diffusers

        try:
            loader = getattr(diffusers, str(folder.index["_class_name"]))
            tensors = loader.lora_state_dict(dict(tensors))
        except (AttributeError, KeyError, ValueError, IndexError) as error:
            raise UsageError(f"no LoRA that diffusers understands ({reason(error)})") from error
    wrong = unknown(tensors)
    if wrong:
        raise UsageError(
            f"tensor {wrong[0]!r}: no such module in {folder.class_of('transformer')}; is it the right base?"
        )
    return {
        key if key.startswith(_TEXT) else f"{PREFIX}{'.'.join(split_key(key))}": tensor
        for key, tensor in tensors.items()
    }


def _fold_alpha(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without ``<module>.alpha``, which diffusers does not read beside its own keys: B times alpha / rank instead."""
    result = {key: tensor for key, tensor in state.items() if not key.endswith(f".{ALPHA}")}
    for key in state.keys() - result.keys():
        module = key.removesuffix(ALPHA)
        down, up = result.get(f"{module}{A}"), result.get(f"{module}{B}")
        if down is None or up is None:
            raise UsageError(f"tensor {key!r} has no LoRA beside it; is the file complete?")
        result[f"{module}{B}"] = (up.double() * (state[key].double().item() / len(down))).to(up.dtype)
    return result


def _check_shapes(state: dict[str, Tensor], folder: ModelFolder, spec: Architecture) -> None:
    """Whether LoRA pairs are complete and fit the model; widths of projections are looked at when they are lifted."""
    shapes = tensor_shapes(folder.weights("transformer"))
    lifted = {projection.path: side for projection, side in spec.projections}
    for key, tensor in state.items():
        path, part = split_key(key)
        if key.startswith(_TEXT) or part not in (A, B):
            continue
        other = f"{PREFIX}{path}.{B if part == A else A}"
        if other not in state:
            raise UsageError(
                f"tensor {key!r} has no {other.rpartition(f'{path}.')[2]} beside it; is the file complete?"
            )
        if lifted.get(path) == ("input" if part == A else "output"):
            continue
        wanted = shapes[f"{path}.weight"]
        found, expected = (prod(tensor.shape[1:]), prod(wanted[1:])) if part == A else (tensor.shape[0], wanted[0])
        if found != expected:
            raise UsageError(f"tensor {key!r}: expected {expected} numbers, found {found}; is it the right base?")


def _check_width(key: str, found: int, lift: Lift) -> None:
    if found == lift.dim:
        raise UsageError(f"tensor {key!r} is of pixel tokens ({found} numbers) already; it needs no lifting")
    if found != lift.rank:
        raise UsageError(
            f"tensor {key!r}: expected {lift.rank} numbers per token, as the latent model has, found {found}; is it the "
            "right base?"
        )
