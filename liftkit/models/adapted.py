"""Adapters applied: a stock pipeline and an adapter become a pixel pipeline in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.hashing import named_digests
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.record import like, transformer_digests
from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.models import scheduler
from liftkit.models.adapter import LIFT, Adapter
from liftkit.models.autoencoder import PixelAutoencoder
from liftkit.models.detail_head import add_head
from liftkit.models.registry import architecture
from liftkit.models.surgery import check_lift, convert_transformer, native_basis
from liftkit.models.vaes import vae_geometry


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
        config = scheduler.authors_config(sampling, lift.scale, lift.patch_size, lift.color)
        base.register_modules(scheduler=getattr(scheduler, config["_class_name"]).from_config(config))
    return base


def check_class(adapter: Adapter, found: str) -> bool:
    """Raise unless an adapter is for a transformer class; say whether that has to be lifted first.

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
    if adapter.added(state) and adapter.head is not None:
        add_head(transformer, **adapter.head)
        state = transformer.state_dict()
    for name in adapter.shapes:
        state[name].copy_(adapter.apply_to(name, state[name]))


def _lifted(pipeline: Any, lift: Lift) -> Any:
    """The pixel twin of a latent pipeline's transformer; unchanged weights are shared.

    Raises:
        UsageError: if the lift does not fit.
    """

    transformer = pipeline.transformer
    factor, _ = vae_geometry({**pipeline.vae.config, "_class_name": type(pipeline.vae).__name__})
    check_lift(architecture(type(transformer).__name__), transformer.config, factor, lift)
    return convert_transformer(transformer, lift)


def _check_same_lift(transformer: Any, lift: Lift) -> None:
    """Raise unless a converted transformer in memory has this very lift."""

    spec, there = transformer.architecture, transformer.lift.basis
    own = native_basis(lift, spec.state_order)
    check_same_lift(lift, own.to(there), there, transformer.config.lift_scale)


def check_same_lift(lift: Lift, own: Tensor, there: Tensor, scale: float) -> None:
    """Raise unless a model was converted with an adapter's own lift.

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


def check_needs(adapter: Adapter, folder: ModelFolder) -> None:
    """Raise if an adapter was learned upon a finetuned folder, and this is another.

    Raises:
        UsageError: naming the folder that it needs.
    """
    needs = adapter.provenance.get("needs")
    if not isinstance(needs, dict):
        return
    wanted = named_digests(needs)
    if like(wanted, transformer_digests(folder.path), folder.path) == wanted:
        return
    raise UsageError(
        f"{folder.source}: the adapter was learned upon {needs.get('name')}, which had been finetuned before; give that very "
        "folder, for on another model it would paint something else"
    )
