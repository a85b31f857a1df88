"""Adapters: what a finetune learned, alone. Projections, output norm, the lift and LoRA; megabytes beside gigabytes.

A folder of ``adapter.safetensors`` (modules trained in full under their own names, ``<module>.lora_A.weight`` and
``<module>.lora_B.weight`` for the rest), ``lift.safetensors``, ``liftkit.json`` and a card. It applies to the latent model
that it came from, which becomes a pixel model in memory, or to any conversion of that with the same lift.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.files import read_safetensors, write_safetensors, write_text
from liftkit.checkpoint.folder import RECORD, atomic_folder, manifest
from liftkit.errors import UsageError
from liftkit.lift import Lift

FORMAT, VERSION = "liftkit.adapter", 1
TENSORS = "adapter.safetensors"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, eq=False)
class Adapter:
    """What was learned.

    Args:
        tensors: full tensors by their names in the transformer, and LoRA pairs.
        alpha: of the LoRA: a pair adds ``alpha / rank * B A`` to its module's weight.
        lift: A and s; None where a latent model was continued.
        transformer: class name of the transformer that it applies to, the stock one for a latent model.
        base: name of the latent model that it came from.
        provenance: plain data: recipe, versions, steps.
    """

    tensors: dict[str, Tensor]
    alpha: float
    lift: Lift | None
    transformer: str
    base: str
    provenance: dict[str, Any]

    def save(self, folder: Path, card: str, *, overwrite: bool = False) -> None:
        """Write the folder; it appears whole or not at all."""
        with atomic_folder(folder, overwrite=overwrite) as building:
            write_safetensors(building / TENSORS, self.tensors, {"format": "pt", "alpha": str(self.alpha)})
            if self.lift is not None:
                self.lift.save(building / "lift.safetensors")
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
        lift = Lift.load(place / "lift.safetensors") if (place / "lift.safetensors").is_file() else None
        tensors, _ = read_safetensors(place / TENSORS)
        known = ("transformer", "base", "alpha", "format", "version", "sha256")
        provenance = {key: value for key, value in record.items() if key not in known}
        return cls(tensors, float(record["alpha"]), lift, record["transformer"], record["base"], provenance)

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the transformer that change, computed in float32 and rounded once to the dtype they had.

        Args:
            weights: the transformer's tensors by name, of which a LoRA's weights are read.

        Raises:
            UsageError: if a module is not there, or has another shape.
        """
        result = {}
        for name, tensor in self.tensors.items():
            if name.endswith(LORA_B):
                continue
            if not name.endswith(LORA_A):
                result[name] = tensor
                continue
            module = name.removesuffix(LORA_A)
            base, down, up = weights.get(f"{module}.weight"), tensor, self.tensors.get(f"{module}{LORA_B}")
            if base is None or up is None or base.shape != (up.shape[0], down.shape[1]):
                found = "missing" if base is None else str(tuple(base.shape))
                wanted = (_rows(up), down.shape[1])
                raise UsageError(
                    f"adapter: {module}.weight of the base: expected {wanted}, found {found}; is it the right base?"
                )
            change = self.alpha / down.shape[0] * (up.float() @ down.float())
            result[f"{module}.weight"] = (base.float() + change.to(base.device)).to(base.dtype)
        return result


def is_adapter(folder: str | Path) -> bool:
    """Whether this is a folder of ours that holds an adapter."""
    return _record(Path(folder).expanduser()) is not None


def load_pixel_pipeline(base: Any, adapter: Adapter) -> Any:
    """Apply an adapter to a stock pipeline in memory, in one call.

    Args:
        base: a loaded pipeline: latent, or converted with the adapter's own lift. It is changed.
        adapter: to apply; one without a lift continues the latent model as such.

    Returns:
        The same pipeline.

    Raises:
        UsageError: if base and adapter do not belong together.
    """
    from liftkit.conversion.surgery import convert_transformer
    from liftkit.models.registry import is_lifted

    found = type(base.transformer).__name__
    if adapter.lift is not None and not is_lifted(found):
        base.transformer = convert_transformer(base.transformer, adapter.lift)
        lift_surroundings(base, adapter.lift)
    if type(base.transformer).__name__ != adapter.transformer:
        raise UsageError(f"adapter: made for {adapter.transformer}, the base is {found}")
    apply(base.transformer, adapter)
    return base


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
    """Merge an adapter into a transformer in memory."""
    state = transformer.state_dict()
    for name, value in adapter.merged(state).items():
        if name not in state or state[name].shape != value.shape:
            raise UsageError(f"adapter: {name}: not of this transformer")
        state[name].copy_(value)


def _record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError:
        return None
    return (
        record
        if isinstance(record, dict) and record.get("format") == FORMAT and record.get("version") == VERSION
        else None
    )


def _rows(tensor: Tensor | None) -> int | str:
    return "rank rows" if tensor is None else tensor.shape[0]
