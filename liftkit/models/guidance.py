"""Classifier-free guidance beyond its scale, in stock pipelines that know the scale alone.

Guidance at the noisiest steps moves a whole image away from the data, at the last ones it mostly adds grain, so it can be kept
to an interval of the steps or of the noise levels (Kynkaanniemi et al. 2024, arXiv 2404.07724). Its part along the denoised
estimate raises contrast alone and can be left out (Sadat et al. 2024, arXiv 2410.02416), as the AsymFlow authors sample.

A pipeline computes ``u + scale (c - u)`` from the conditional prediction c and the unconditional u. All of the above is another
u: ``c - d`` with the difference d that is wanted, zero at the steps without guidance.

Some pipelines then rescale the guided velocity to the norm of c, token by token. A pixel velocity has a part outside of the
subspace, so that its norm is another than the latent velocity's. The pipelines of pixel twins get both predictions as the guided
velocity rescaled by the norms inside of the subspace, which is exactly what the latent model's pipeline computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from liftkit.asymflow import calibrate
from liftkit.errors import UsageError
from liftkit.models.guiders import inside_of_guiders
from liftkit.models.latent_part import LatentPart
from liftkit.models.registry import architecture, is_lifted
from liftkit.models.scheduler import noise_level
from liftkit.options import Guidance

ROUNDING = 1e-5
"""Noise levels are compared with the ends of an interval up to this."""


def rescales(pipeline: Any) -> bool:
    """True for the pipeline of a pixel twin whose guidance rescales velocities."""
    name = type(pipeline.transformer).__name__
    return is_lifted(name) and architecture(name).rescale is not None


@contextmanager
def guided(pipeline: Any, guidance: Guidance = Guidance(), **call: Any) -> Iterator[None]:
    """For one call of a stock pipeline: its transformer answers so that the pipeline guides like this. ::

        with liftkit.guided(pipe, liftkit.Guidance(start=0.125)):
            images = pipe(prompt, guidance_scale=4.0).images

    Args:
        pipeline: of diffusers, over a supported transformer. Its own ``guidance_scale`` counts, not that of ``guidance``.
        guidance: when there is guidance, and which part of it.
        call: arguments of the coming call that are not the pipeline's defaults, such as ``true_cfg_scale``: pipelines that
            rescale the guided velocity (Qwen-Image, Lumina2, Z-Image, Nucleus, LongCat, JoyImage) then do so by the norms
            of the latent velocity inside of the pixel one, which is what they do for the latent model.

    Raises:
        UsageError: if its transformer is not supported, or, at the first step, if the pipeline does not guide: a scale of at
            most 1, a distilled model, or one that takes its guidance as an input.
    """
    if guidance == Guidance(guidance.scale) and not rescales(pipeline) and not _orthogonal_part(guidance, pipeline):
        with inside_of_guiders(pipeline):
            yield
        return
    transformer = pipeline.transformer
    before = transformer.__dict__.get("forward")  # an offloading hook's, if there is one
    transformer.forward = _Guided(guidance, pipeline, call)
    try:
        yield
    finally:
        del transformer.forward
        if before is not None:
            transformer.forward = before


def _orthogonal_part(guidance: Guidance, pipeline: Any) -> float:
    """How much of the difference's part along the denoised estimate is left out."""
    asked = guidance.orthogonal
    return float(pipeline.scheduler.config.get("guidance_orthogonal") or 0.0) if asked is None else asked


class _Guided:
    """A transformer's forward whose predictions make up the guidance that is wanted."""

    def __init__(self, guidance: Guidance, pipeline: Any, call: Mapping[str, Any]) -> None:
        self.guidance, self.pipeline = guidance, pipeline
        self.architecture = architecture(type(pipeline.transformer).__name__)
        self.forward = pipeline.transformer.forward
        self.names = list(inspect.signature(type(pipeline.transformer).forward).parameters)[1:]
        self.rescales = rescales(pipeline)
        known = inspect.signature(pipeline.__call__).parameters if self.rescales else {}
        self.call = {name: each.default for name, each in known.items()} | dict(call)
        self.conditional: tuple[int, Tensor] | None = None
        self.answered = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Pipelines with a scale of its own for this kind of guidance do not say whether they guide: if they ask once a step, no.
        silent = self.rescales or self.architecture.guidance_argument != "guidance_scale"
        alone = self.conditional is not None and self.conditional[0] != self._step and not self.answered
        arguments = {**dict(zip(self.names, args)), **kwargs}
        if alone or not getattr(self.pipeline, "do_classifier_free_guidance", silent):
            if self.guidance == Guidance(self.guidance.scale):
                return self.forward(**arguments)
            raise UsageError(
                f"{type(self.pipeline).__name__} asks for no unconditional prediction here, so that --guidance-start, -stop, "
                "-low, -high and -orthogonal would do nothing; leave them out, or give --guidance above 1 if the model is not "
                "distilled"
            )
        if arguments.get("skip_layers") is not None:  # SD3's skip-layer guidance: a term of its own
            return self.forward(**arguments)
        if self.architecture.guidance != "calls":
            return self._batch(arguments)
        if self.conditional is None or self.conditional[0] != self._step:
            output = self.forward(**arguments)
            self.conditional = (self._step, output if isinstance(output, Tensor) else output[0])
            return output
        self.answered = True
        conditional = self.conditional[1]
        answer = self._unconditional(
            arguments, conditional, lambda: self.forward(**{**arguments, "return_dict": False})[0]
        )
        if self.rescales:
            answer = self._rescaled(arguments, conditional, answer)
            # The pipeline still holds the first answer. Where both are the same, it has nothing left to rescale.
            conditional.copy_(answer)
        if arguments.get("return_dict", True):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=answer)
        return (answer,)

    def _batch(self, arguments: dict[str, Any]) -> Any:
        """Both predictions in one batch."""
        output = self.forward(**arguments)
        rows = output[0]
        listed = isinstance(rows, list)
        halves = list((torch.stack(rows) if listed else rows).chunk(2))
        first = self.architecture.guidance == "batch conditional first"
        conditional, unconditional = halves if first else halves[::-1]
        answer = self._unconditional(arguments, conditional, lambda: unconditional)
        if self.rescales:
            conditional = answer = self._rescaled(arguments, conditional, answer)
        both = torch.cat([conditional, answer] if first else [answer, conditional])
        return (list(both) if listed else both, *output[1:])

    def _rescaled(self, arguments: dict[str, Any], conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The guided velocity with the norms that it has in the latent model's."""
        spec = self.architecture
        given = self.guidance.scale
        scale = float(self.call[spec.guidance_argument] if given is None else given)
        start = conditional if spec.guidance_from == "conditional" else unconditional
        wanted = start + scale * (conditional - unconditional)
        inside = LatentPart(
            self.pipeline.transformer, _half(arguments[spec.state], len(conditional)), arguments[spec.time]
        )
        assert spec.rescale is not None
        latent = spec.rescale(inside.of(wanted), inside.of(conditional), self.call)
        return inside.exchanged(wanted, latent).to(conditional.dtype)

    @property
    def _step(self) -> int:
        """Of the scheduler's, counted from the noisiest; image-to-image begins later."""
        scheduler = self.pipeline.scheduler
        return next((index for index in (scheduler.step_index, scheduler.begin_index) if index is not None), 0)

    def _wanted(self) -> bool:
        """True where this step is within the intervals of guidance, their ends included but for the last step's."""
        guidance, scheduler = self.guidance, self.pipeline.scheduler
        count = scheduler.num_inference_steps
        step = (self._step + getattr(scheduler, "skipped", 0)) // scheduler.order
        if not int(guidance.start * count) <= step < int(guidance.stop * count):
            return False
        level = torch.tensor(noise_level(scheduler, self._step))
        told = calibrate(level, self.pipeline.transformer.config.get("lift_scale", 1.0))[1].item()
        return guidance.low - ROUNDING <= told <= guidance.high + ROUNDING

    def _unconditional(self, arguments: dict[str, Any], conditional: Tensor, predict: Callable[[], Tensor]) -> Tensor:
        """What to answer in the place of ``predict()``, which is not called where it is not needed."""
        if not self._wanted():
            return conditional
        unconditional, strength = predict(), _orthogonal_part(self.guidance, self.pipeline)
        if not strength:
            return unconditional
        level = noise_level(self.pipeline.scheduler, self._step)
        state = _half(arguments[self.architecture.state], len(conditional)).float()
        denoised = state - self.architecture.sign * level * conditional.float()
        difference = (conditional - unconditional).float()
        clean = self.architecture.clean_tokens(arguments)
        if clean is not None:  # reference images are given, not painted
            denoised, difference = (part.masked_fill(clean.unsqueeze(-1), 0.0) for part in (denoised, difference))
        return conditional - _orthogonal(difference, denoised, strength).to(conditional.dtype)


def _orthogonal(difference: Tensor, denoised: Tensor, strength: float) -> Tensor:
    """``d - strength <d, x> / |x|^2 x`` for each sample, (B, ...)."""
    d, x = difference.flatten(1), denoised.flatten(1)
    share = (d * x).sum(dim=1) / x.square().sum(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return (d - strength * share[:, None] * x).view_as(difference)


def _half(state: Any, count: int) -> Tensor:
    """The state of one of two predictions; both have the same."""
    return (torch.stack(list(state)) if isinstance(state, list | tuple) else state)[-count:]
