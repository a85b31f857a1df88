"""Classifier-free guidance beyond its scale, in stock pipelines that know the scale alone.

Guidance at the noisiest steps moves a whole image away from the data, at the last ones it mostly adds grain, so it can be
kept to an interval of the steps (Kynkaanniemi et al. 2024, arXiv 2404.07724). Its part along the denoised estimate raises
contrast alone and can be left out (Sadat et al. 2024, arXiv 2410.02416), as the AsymFlow authors sample.

A pipeline computes ``u + scale (c - u)`` from the conditional prediction c and the unconditional u. All of the above is another
u: ``c - d`` with the difference d that is wanted, zero at the steps without guidance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.registry import architecture


@dataclass(frozen=True)
class Guidance:
    """How samples are guided.

    Args:
        scale: the pipeline's own if None; 1 and below is no guidance.
        start, stop: the part of the steps that is guided, in [0, 1]; of n steps, those from int(start n) to before int(stop n).
        orthogonal: whether the part along the denoised estimate is left out.

    Raises:
        UsageError: if start and stop are no interval in [0, 1].
    """

    scale: float | None = None
    start: float = 0.0
    stop: float = 1.0
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise UsageError(
                f"guidance from {self.start:g} to {self.stop:g} of the steps: no interval in 0 to 1; "
                "give --guidance-start below --guidance-stop"
            )

    @property
    def record(self) -> Any:
        """As plain data; the scale alone where nothing else was chosen."""
        return self.scale if self == Guidance(self.scale) else asdict(self)

    @contextmanager
    def applied(self, pipeline: Any) -> Iterator[None]:
        """For one call of a stock pipeline: its transformer answers so that the pipeline guides like this. ::

            with liftkit.Guidance(start=0.125).applied(pipe):
                images = pipe(prompt, guidance_scale=4.0).images

        Args:
            pipeline: of diffusers, over a supported transformer. Its own ``guidance_scale`` counts, not ``scale``.

        Raises:
            UsageError: if its transformer is not supported.
        """
        if self == Guidance(self.scale):
            yield
            return
        transformer = pipeline.transformer
        before = transformer.__dict__.get("forward")  # an offloading hook's, if there is one
        transformer.forward = _Guided(self, pipeline)
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
        if not self.pipeline.do_classifier_free_guidance:
            return self.forward(*args, **kwargs)
        step = self.pipeline.scheduler.step_index or 0
        state = kwargs[self.architecture.state]
        if self.architecture.guidance == "batch":
            output = self.forward(*args, **kwargs)
            unconditional, conditional = output[0].chunk(2)
            wanted = self._unconditional(step, state.chunk(2)[1], conditional, lambda: unconditional)
            return (torch.cat([wanted, conditional]), *output[1:])
        if self.conditional is None or self.conditional[0] != step:
            output = self.forward(*args, **kwargs)
            self.conditional = (step, output[0])
            return output
        return (self._unconditional(step, state, self.conditional[1], lambda: self.forward(*args, **kwargs)[0]),)

    def _unconditional(self, step: int, state: Tensor, conditional: Tensor, predict: Any) -> Tensor:
        """What to answer in the place of ``predict()``, which is not called where it is not needed."""
        guidance, scheduler = self.guidance, self.pipeline.scheduler
        count = scheduler.num_inference_steps
        if not int(guidance.start * count) <= step < int(guidance.stop * count):
            return conditional
        unconditional = predict()
        if not guidance.orthogonal:
            return unconditional
        sigma = float(scheduler.sigmas[step])
        return conditional - _orthogonal(
            (conditional - unconditional).float(), state.float() - self.architecture.sign * sigma * conditional.float()
        ).to(conditional.dtype)


def _orthogonal(difference: Tensor, denoised: Tensor) -> Tensor:
    """``d - <d, x> / |x|^2 x`` for each sample, (B, ...)."""
    d, x = difference.flatten(1), denoised.flatten(1)
    share = (d * x).sum(dim=1) / x.square().sum(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return (d - share[:, None] * x).view_as(difference)
