"""Guiders: components of a pipeline that combine its predictions (HunyuanImage), by norms and projections of their own.

Those of the released model bound the norm of the difference and take out its part along the conditional prediction, with a memory
of earlier steps. Of a pixel velocity all of these are other numbers. A guider is therefore given the latent velocities inside of
the pixel ones, and what it makes of them is put in their place; what is outside of the subspace stays the conditional prediction's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from liftkit.models.latent_part import LatentPart
from liftkit.models.registry import architecture, is_lifted

GUIDERS = ("guider", "ocr_guider")


@contextmanager
def inside_of_guiders(pipeline: Any) -> Iterator[None]:
    """Within it the guiders of a pixel twin's pipeline see latent velocities; nothing changes for other pipelines."""
    guiders = [found for name in GUIDERS if (found := getattr(pipeline, name, None)) is not None]
    transformer = pipeline.transformer
    if not guiders or not is_lifted(type(transformer).__name__):
        yield
        return
    spec, last = architecture(type(transformer).__name__), dict[str, Any]()
    with ExitStack() as restored:
        forward = transformer.forward

        @functools.wraps(forward)
        def recording(*args: Any, **arguments: Any) -> Any:
            last.update(arguments)
            return forward(*args, **arguments)

        restored.enter_context(_replaced(transformer, recording))
        for guider in guiders:
            restored.enter_context(_replaced(guider, _inside(guider.forward, transformer, spec, last)))
        yield


def _inside(combine: Callable[..., Any], transformer: Any, spec: Any, last: dict[str, Any]) -> Callable[..., Any]:
    def combined(pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        if pred_uncond is None:
            return combine(pred_cond)
        part = LatentPart(transformer, last[spec.state], last[spec.time])
        found = combine(part.of(pred_cond), part.of(pred_uncond))
        found.pred = part.exchanged(pred_cond, found.pred).to(pred_cond.dtype)
        return found

    return combined


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it an object has another ``forward``."""
    before = module.__dict__.get("forward")  # an offloading hook's, if there is one
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
