"""A finetune in two stages: first what reads and paints pixels, then the network between.

A fresh conversion's projections and detail head have much to learn, and all that the network means is in its other weights, the
trunk, which early gradients of untrained projections disturb. While it is held, gradients of the trunk are dropped before they are
clipped: neither weights nor moments of its optimizer move.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from liftkit.models.detail_head import HEAD
from liftkit.models.spec import Architecture


def default_modules(spec: Architecture) -> list[str]:
    """What is trained in full where a recipe says nothing: the projections and the output norm."""
    return [projection.path for projection, _ in spec.projections] + list(spec.reference)


def trunk_of(spec: Architecture, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What learns beside the modules of the first stage: the weights between them, or their LoRA.

    Args:
        spec: the architecture.
        parameters: what learns, by name in the transformer.
    """
    lead = tuple(f"{path}." for path in (*default_modules(spec), HEAD))
    return {name: parameter for name, parameter in parameters.items() if not name.startswith(lead)}


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let the next step leave these parameters, and the state of their optimizer, as they are."""
    for parameter in parameters:
        parameter.grad = None
