"""Latent LoRAs on pixel models: those that touch a projection are lifted, all others apply as they are.

A LoRA adds ``B A`` to a weight. The conversion made ``W_in' = W_in A^T`` and ``W_out' = A W_out`` of the projections (here A is
the lift's basis), so that their LoRA becomes ``A_lora' = A_lora A^T`` and ``B_lora' = A B_lora``; an output's LoRA bias goes
the way of the output's bias. Products are made in float64 and rounded once. The magnitudes of a DoRA are norms of rows: those of
an input stay, because A^T keeps them, and those of an output cannot be lifted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from liftkit.checkpoint.contents import ALPHA, B_BIAS, MAGNITUDE, A, B, part_of
from liftkit.checkpoint.files import check_file, write_safetensors
from liftkit.checkpoint.header import shown
from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.errors import UsageError
from liftkit.formats.lora_read import read_lora
from liftkit.formats.merging import tensor_shapes
from liftkit.lift import Lift
from liftkit.models.adapter import LIFT
from liftkit.models.registry import architecture, is_lifted
from liftkit.models.spec import Architecture
from liftkit.models.surgery import RawChannels, check_finite
from liftkit.tally import Tally

PREFIX = "transformer."
_PREFIXES = ("base_model.model.transformer.", "base_model.model.", PREFIX, "diffusion_model.")


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
        _check_liftable(key, part, side)
        raw = RawChannels(spec, projection, side, lift.latent_patch)
        if part == A if side == "input" else part in (B, B_BIAS):
            _check_width(key, raw, raw.width(tensor.shape), lift)
            result[key] = raw.lift(tensor, lift)
        check_finite(key, result[key])
    return result


def split_key(key: str) -> tuple[str, str]:
    """Module and part of a LoRA's key, without prefixes, in peft's names."""
    prefix = next((each for each in _PREFIXES if key.startswith(each)), "")
    key = key.removeprefix(prefix)
    part = part_of(key)
    if part is not None:
        return part.stem, part.name
    path, _, end = key.rpartition(".")
    return path, end


@dataclass
class ImportedLora:
    """A LoRA that was lifted.

    Args:
        output: the file.
        lifted: projections whose LoRA was.
        modules: how many modules of the transformer it changes in all.
        kinds: of change that the file was made of, such as ``LoRA`` or ``LoKr``.
        tally: of the file's keys.
        notes: what else its owner should know.
    """

    output: Path
    lifted: list[str]
    modules: int
    kinds: list[str]
    tally: Tally
    notes: list[str] = field(default_factory=list)


def import_lora(path: Path, base: str, output: Path, *, overwrite: bool = False) -> ImportedLora:
    """Write a latent model's LoRA as one for its conversion, which ``load_lora_weights`` of its pipeline reads.

    Args:
        path: a .safetensors file of any trainer that docs/formats.md lists, or a folder of peft's or diffusers' with one.
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
    lora = read_lora(path, spec, _latent_shapes(folder, spec, lift), folder)
    try:
        lifted = lift_lora(lora.state, spec, lift)
    except UsageError as error:
        raise UsageError(f"{lora.path}: {error}") from error
    write_safetensors(output, lifted, lora.metadata)
    touched = sorted(lora.modules & {projection.path for projection, _ in spec.projections})
    return ImportedLora(output, touched, len(lora.modules), lora.kinds, lora.tally, lora.notes)


def _latent_shapes(folder: ModelFolder, spec: Architecture, lift: Lift) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the transformer had before it was lifted."""
    shapes = tensor_shapes(folder.weights("transformer"))
    for projection, side in spec.projections:
        for name in (f"{projection.path}.weight", f"{projection.path}.bias"):
            if name in shapes and not (side == "input" and name.endswith("bias")):
                raw = RawChannels(spec, projection, side, lift.latent_patch)
                shapes[name] = raw.reshaped(shapes[name], lift.dim, lift.rank)
    return shapes


def _check_liftable(key: str, part: str, side: str) -> None:
    """Raise unless a part of a projection's change can be lifted."""
    if part == MAGNITUDE and side == "output":
        raise UsageError(
            f"tensor {shown(key)}: a DoRA on an output projection cannot be lifted, because the lift mixes the rows that its "
            "magnitudes belong to; only plain LoRA can be lifted there"
        )
    if part not in (A, B, B_BIAS, ALPHA, MAGNITUDE):
        raise UsageError(f"tensor {shown(key)}: only plain LoRA can be lifted on a projection")


def _check_width(key: str, raw: RawChannels, found: int, lift: Lift) -> None:
    expected = raw.expected(found, lift.rank)
    if found != expected and found == raw.expected(found, lift.dim):
        raise UsageError(f"tensor {shown(key)} is of pixel tokens ({found} numbers) already; it needs no lifting")
    if found != expected:
        raise UsageError(
            f"tensor {shown(key)}: expected {expected} numbers per token, as the latent model has, found {found}; is it the "
            "right base?"
        )
