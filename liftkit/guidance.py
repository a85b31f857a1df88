"""Classifier-free guidance beyond its scale, in stock pipelines that know the scale alone.

Guidance at the noisiest steps moves a whole image away from the data, at the last ones it mostly adds grain, so it can be
kept to an interval of the steps (Kynkaanniemi et al. 2024, arXiv 2404.07724). Its part along the denoised estimate raises
contrast alone and can be left out (Sadat et al. 2024, arXiv 2410.02416), as the AsymFlow authors sample.

A pipeline computes ``u + scale (c - u)`` from the conditional prediction c and the unconditional u. All of the above is another
u: ``c - d`` with the difference d that is wanted, zero at the steps without guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.registry import architecture
from liftkit.models.scheduler import noise_level
from liftkit.options import Guidance


@contextmanager
def guided(guidance: Guidance, pipeline: Any) -> Iterator[None]:
    """Within it the pipeline's transformer answers so that the pipeline guides as ``guidance`` says."""
    transformer = pipeline.transformer
    before = transformer.__dict__.get("forward")  # an offloading hook's, if there is one
    transformer.forward = _Guided(guidance, pipeline)
    try:
        yield
    finally:
        del transformer.forward
        if before is not None:
            transformer.forward = before


class _Guided:
    """A transformer's forward whose unconditional predictions make up the guidance that is wanted."""

    def __init__(self, guidance: Guidance, pipeline: Any) -> None:
        self.guidance, self.pipeline = guidance, pipeline
        self.architecture = architecture(type(pipeline.transformer).__name__)
        self.forward = pipeline.transformer.forward
        self.conditional: tuple[int, Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self.pipeline, "do_classifier_free_guidance", False):
            raise UsageError(
                f"{type(self.pipeline).__name__} asks for no unconditional prediction here, so that --guidance-start, "
                "--guidance-stop and --guidance-orthogonal would do nothing; leave them out, or give --guidance above 1 if "
                "the model is not distilled"
            )
        if kwargs.get("skip_layers") is not None:  # SD3's skip-layer guidance: a term of its own
            return self.forward(*args, **kwargs)
        if self.architecture.guidance == "batch":
            output = self.forward(*args, **kwargs)
            unconditional, conditional = output[0].chunk(2)
            return (
                torch.cat([self._unconditional(kwargs, conditional, lambda: unconditional), conditional]),
                *output[1:],
            )
        if self.conditional is None or self.conditional[0] != self._step:
            output = self.forward(*args, **kwargs)
            self.conditional = (self._step, output[0])
            return output
        return (self._unconditional(kwargs, self.conditional[1], lambda: self.forward(*args, **kwargs)[0]),)

    @property
    def _step(self) -> int:
        """Of the scheduler's, counted from the noisiest; image-to-image begins later."""
        scheduler = self.pipeline.scheduler
        return next((index for index in (scheduler.step_index, scheduler.begin_index) if index is not None), 0)

    def _unconditional(self, arguments: dict[str, Any], conditional: Tensor, predict: Callable[[], Tensor]) -> Tensor:
        """What to answer in the place of ``predict()``, which is not called where it is not needed."""
        guidance, scheduler, step = self.guidance, self.pipeline.scheduler, self._step
        count = scheduler.num_inference_steps
        if not int(guidance.start * count) <= step < int(guidance.stop * count):
            return conditional
        unconditional = predict()
        if not guidance.orthogonal:
            return unconditional
        state = arguments[self.architecture.state][-len(conditional) :].float()
        denoised = state - self.architecture.sign * noise_level(scheduler, step) * conditional.float()
        difference = (conditional - unconditional).float()
        clean = self.architecture.clean_tokens(arguments)
        if clean is not None:  # reference images are given, not painted
            denoised, difference = (part.masked_fill(clean.unsqueeze(-1), 0.0) for part in (denoised, difference))
        return conditional - _orthogonal(difference, denoised).to(conditional.dtype)


def _orthogonal(difference: Tensor, denoised: Tensor) -> Tensor:
    """``d - <d, x> / |x|^2 x`` for each sample, (B, ...)."""
    d, x = difference.flatten(1), denoised.flatten(1)
    share = (d * x).sum(dim=1) / x.square().sum(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return (d - share[:, None] * x).view_as(difference)
