"""Adapters: what a finetune learned, alone. Projections, output norm, the lift and LoRA; megabytes beside gigabytes.

A folder of ``adapter.safetensors`` (modules trained in full under their own names, ``<module>.lora_A.weight`` and
``<module>.lora_B.weight`` for the rest), ``lift.safetensors``, ``liftkit.json`` and a card. It applies to the latent model
that it came from, which becomes a pixel model in memory, or to any conversion of that with the same lift.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.files import read_safetensors, write_safetensors, write_text
from liftkit.checkpoint.folder import RECORD, atomic_folder, manifest
from liftkit.checkpoint.record import read_record
from liftkit.errors import UsageError
from liftkit.lift import Lift

FORMAT, VERSION = "liftkit.adapter", 1
TENSORS, LIFT = "adapter.safetensors", "lift.safetensors"
MOST_ALPHA = 1e6
LORA_A, LORA_B, WEIGHT = ".lora_A.weight", ".lora_B.weight", ".weight"


@dataclass(frozen=True, eq=False)
class Adapter:
    """What was learned.

    Args:
        tensors: full tensors by their names in the transformer, and LoRA pairs.
        alpha: of the LoRA: a pair adds ``alpha / rank * B A`` to its module's weight; None is every pair's own rank.
        lift: A and s; None where a latent model was continued.
        transformer: class name of the transformer that it applies to, the stock one for a latent model.
        base: name of the latent model that it came from.
        provenance: plain data: recipe, versions, steps.

    Raises:
        UsageError: if half of a LoRA pair is missing, or its halves disagree.
    """

    tensors: dict[str, Tensor]
    alpha: float | None
    lift: Lift | None
    transformer: str
    base: str
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if not name.endswith((LORA_A, LORA_B)):
                continue
            here, there = (LORA_A, LORA_B) if name.endswith(LORA_A) else (LORA_B, LORA_A)
            other = self.tensors.get(f"{name.removesuffix(here)}{there}")
            if other is None:
                raise UsageError(f"adapter: tensor {name!r} has no {there[1:]} beside it; is the file complete?")
            if tensor.ndim != 2 or other.ndim != 2 or tensor.shape[here == LORA_B] != other.shape[there == LORA_B]:
                raise UsageError(
                    f"adapter: tensor {name!r} of shape {tuple(tensor.shape)} does not go with its {there[1:]}, "
                    f"{tuple(other.shape)}"
                )

    @property
    def full(self) -> dict[str, Tensor]:
        """Tensors that were trained in full, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.endswith((LORA_A, LORA_B))}

    @property
    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """LoRA pairs A (rank, in) and B (out, rank), by module."""
        modules = [name.removesuffix(LORA_A) for name in self.tensors if name.endswith(LORA_A)]
        return {module: (self.tensors[f"{module}{LORA_A}"], self.tensors[f"{module}{LORA_B}"]) for module in modules}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names of the transformer's tensors that it changes, with the shapes that they have to have."""
        products = {f"{module}{WEIGHT}": (up.shape[0], down.shape[1]) for module, (down, up) in self.pairs.items()}
        return products | {name: tuple(tensor.shape) for name, tensor in self.full.items()}

    def factor(self, rank: int) -> float:
        """What a LoRA product of a rank is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Whether it fits a transformer.

        Args:
            shapes: of the transformer's tensors, by name.

        Raises:
            UsageError: naming the tensor that does not.
        """
        for name in self.shapes:
            self._check_one(name, shapes.get(name))

    def _check_one(self, name: str, found: tuple[int, ...] | None) -> None:
        wanted = self.shapes[name]
        if found is None or tuple(found) != wanted:
            what = "has none of that name" if found is None else f"has {tuple(found)}"
            raise UsageError(f"adapter: tensor {name!r} is for {wanted}, the base {what}; is it the right base?")

    def apply_to(self, name: str, base: Tensor) -> Tensor:
        """One tensor of the transformer with what was learned, computed in float32 at least and rounded once to the
        base's dtype, on its device."""
        value, module = self.tensors.get(name, base), name.removesuffix(WEIGHT)
        if f"{module}{LORA_A}" in self.tensors:
            wide = torch.promote_types(base.dtype, torch.float32)
            down, up = (self.tensors[f"{module}{half}"].to(base.device, wide) for half in (LORA_A, LORA_B))
            value = value.to(base.device, wide) + self.factor(len(down)) * (up @ down)
        return value.to(base)

    def save(self, folder: Path, card: str, *, overwrite: bool = False) -> None:
        """Write the folder; it appears whole or not at all."""
        with atomic_folder(folder, overwrite=overwrite) as building:
            write_safetensors(building / TENSORS, self.tensors, {"format": "pt", "alpha": str(self.alpha)})
            if self.lift is not None:
                self.lift.save(building / LIFT)
            write_text(building / "README.md", card)
            record = {
                "format": FORMAT,
                "version": VERSION,
                "transformer": self.transformer,
                "base": self.base,
                "alpha": self.alpha,
                **self.provenance,
                "sha256": manifest(building),
            }
            write_text(building / RECORD, json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: if it is no adapter folder of ours.
        """
        place = Path(folder).expanduser()
        record = _record(place)
        if record is None:
            raise UsageError(
                f"{folder}: no adapter ({RECORD} with format {FORMAT}); liftkit finetune with save: adapter makes one"
            )
        lift = Lift.load(place / LIFT) if (place / LIFT).is_file() else None
        tensors, _ = read_safetensors(place / TENSORS)
        known = ("transformer", "base", "alpha", "format", "version", "sha256")
        provenance = {key: value for key, value in record.items() if key not in known}
        alpha, names = record.get("alpha"), [record.get("transformer"), record.get("base")]
        if alpha is not None and not (type(alpha) in (int, float) and 0 < alpha < MOST_ALPHA):
            raise UsageError(f"{place / RECORD}: alpha is {alpha}, expected a number above 0, or null")
        if not all(isinstance(name, str) for name in names):
            raise UsageError(f"{place / RECORD}: transformer and base are {names}, expected two names")
        check_numbers(place / TENSORS, tensors)
        try:
            return cls(tensors, None if alpha is None else float(alpha), lift, str(names[0]), str(names[1]), provenance)
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error


def check_numbers(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless tensors are floating-point numbers, all of them finite.

    Raises:
        UsageError: naming the file and the tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UsageError(f"{where}: tensor {name!r} is of {tensor.dtype}, expected floating-point numbers")
        if not tensor.float().isfinite().all():
            raise UsageError(f"{where}: tensor {name!r} holds NaN or infinite numbers; fetch the file again")


def compact(value: Tensor, stored: torch.dtype) -> Tensor:
    """A learned tensor as an adapter holds it, for a base that is stored in a dtype.

    Beside half precision it is float16 where its numbers allow that: eleven bits where bfloat16 has eight, for the same bytes.
    Where they do not (too large, or so small that more than a part in a thousand of the norm would be lost) it is float32.
    """
    if stored not in (torch.bfloat16, torch.float16):
        return value.to(stored)
    half = value.to(torch.float16)
    lost = (half.double() - value.double()).norm()
    return half if bool(half.isfinite().all()) and bool(lost <= 1e-3 * value.double().norm()) else value.float()


def is_adapter(folder: str | Path) -> bool:
    """Whether this is a folder of ours that holds an adapter."""
    return _record(Path(folder).expanduser()) is not None


def load_pixel_pipeline(base: Any, adapter: Adapter) -> Any:
    """Apply an adapter to a stock pipeline in memory, in one call.

    Args:
        base: a loaded pipeline: latent, or converted with the adapter's own lift. It is changed, once all is checked.
        adapter: to apply; one without a lift continues the latent model as such.

    Returns:
        The same pipeline.

    Raises:
        UsageError: if base and adapter do not belong together.
    """
    transformer, lift = base.transformer, adapter.lift
    needs_lift = check_class(adapter, type(transformer).__name__)
    if lift is not None and not needs_lift:
        _check_same_lift(transformer, lift)
    elif lift is not None:
        transformer = _lifted(base, lift)
    apply(transformer, adapter)
    if lift is not None and needs_lift:
        base.register_modules(transformer=transformer)
        lift_surroundings(base, lift)
    sampling = adapter.provenance.get("sampling")
    if lift is not None and isinstance(sampling, dict):
        from liftkit.models import scheduler

        config = scheduler.authors_config(sampling, lift.scale, lift.patch_size, lift.color)
        base.register_modules(scheduler=getattr(scheduler, config["_class_name"]).from_config(config))
    return base


def check_class(adapter: Adapter, found: str) -> bool:
    """Whether an adapter is for a transformer class; if so, whether that has to be lifted first.

    Raises:
        UsageError: if it is not.
    """
    if found == adapter.transformer:
        return False
    if adapter.lift is not None and f"Asym{found}" == adapter.transformer:
        return True
    raise UsageError(f"adapter: made for {adapter.transformer}, the base has {found}; give the model it was made from")


def lift_surroundings(pipeline: Any, lift: Lift) -> None:
    """The pixel autoencoder and the lifted scheduler in the places of a pipeline's own."""
    import diffusers

    from liftkit.models.autoencoder import PixelAutoencoder

    size = getattr(pipeline.vae.config, "sample_size", None) or 1024
    device = pipeline.vae.device
    pipeline.register_modules(
        vae=PixelAutoencoder.from_lift(lift, size if isinstance(size, int) else size[0]).to(device)
    )
    scheduler = getattr(diffusers, f"Asym{type(pipeline.scheduler).__name__}")
    pipeline.register_modules(scheduler=scheduler.from_config(pipeline.scheduler.config, lift_scale=lift.scale))


@torch.no_grad()
def apply(transformer: Any, adapter: Adapter) -> None:
    """Merge an adapter into a transformer in memory, which is changed once all is checked.

    Raises:
        UsageError: if it does not fit.
    """
    state = transformer.state_dict()
    adapter.check({name: tuple(tensor.shape) for name, tensor in state.items()})
    for name in adapter.shapes:
        state[name].copy_(adapter.apply_to(name, state[name]))


def _lifted(pipeline: Any, lift: Lift) -> Any:
    """The pixel twin of a latent pipeline's transformer; unchanged weights are shared.

    Raises:
        UsageError: if the lift does not fit.
    """
    from liftkit.conversion.surgery import check_lift, convert_transformer
    from liftkit.models.registry import architecture
    from liftkit.models.vaes import vae_geometry

    transformer = pipeline.transformer
    factor, _ = vae_geometry({**pipeline.vae.config, "_class_name": type(pipeline.vae).__name__})
    check_lift(architecture(type(transformer).__name__), transformer.config, factor, lift)
    return convert_transformer(transformer, lift)


def _check_same_lift(transformer: Any, lift: Lift) -> None:
    """Whether a converted transformer in memory has this very lift."""
    from liftkit.conversion.surgery import native_basis

    spec, there = transformer.architecture, transformer.lift.basis
    own = native_basis(lift, spec.state_order)
    check_same_lift(lift, own.to(there), there, transformer.config.lift_scale)


def check_same_lift(lift: Lift, own: Tensor, there: Tensor, scale: float) -> None:
    """Whether a model was converted with an adapter's own lift.

    Args:
        lift: the adapter's.
        own, there: bases to compare, the adapter's and the model's.
        scale: the model's.

    Raises:
        UsageError: if it was not.
    """
    if scale != lift.scale or not torch.equal(own, there):
        raise UsageError(
            "adapter: the base was converted with another lift than the adapter's; give the latent model, or convert it "
            f"with --lift {LIFT} of the adapter"
        )


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = read_record(folder)
    except UsageError:
        return None
    return record if record.get("format") == FORMAT and record.get("version") == VERSION else None
