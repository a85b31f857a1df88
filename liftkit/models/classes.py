"""A pipeline for flow models that are conditioned on a class: names of classes in, images out.

It is called as stock pipelines are: what stands in the place of a prompt names a class. Any architecture that has ``labels`` in its
entry runs in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from liftkit.checkpoint.classes import CLASS_PIPELINE
from liftkit.errors import UsageError
from liftkit.models.flow import FlowModel
from liftkit.models.latents import LatentSpace
from liftkit.models.scheduler import noise_level
from liftkit.models.spec import HOME, Architecture, Config
from liftkit.models.vaes import vae_geometry

STEPS, GUIDANCE, INTERVAL = 50, 2.3, (0.0, 0.88)
"""How the paper samples ImageNet at 256 x 256 pixels, at rank 8."""
_NAMED = 12
ROUNDING = 1e-5
"""Noise levels are compared with the ends of an interval up to this."""


def labels_of(texts: Sequence[str], names: Mapping[int, str]) -> list[int]:
    """The class that each text means; an empty text means none, which is the number behind the last class.

    A text means the class of that name (a name may have several forms, divided by commas), or of that number, or else the one class
    whose name stands in it as words of their own: "a red seven" is "seven".

    Raises:
        UsageError: naming a text that means no class, or more than one.
    """
    forms = {
        form.strip().casefold(): label for label, name in names.items() for form in name.split(",") if form.strip()
    }
    forms |= {name.strip().casefold(): label for label, name in names.items()}
    return [_label(text, forms, names) for text in texts]


def _label(text: str, forms: Mapping[str, int], names: Mapping[int, str]) -> int:
    plain = text.strip().casefold()
    if not plain:
        return len(names)
    if plain in forms:
        return forms[plain]
    if plain.isdecimal() and int(plain) in names:
        return int(plain)
    words = _words(plain)
    found = {label for form, label in forms.items() if _words(form) in words}
    if len(found) == 1:
        return found.pop()
    some = ", ".join(list(names.values())[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    what = f"means {len(found)} classes" if found else "means none of the model's classes"
    raise UsageError(f"{text[:60]!r}: {what}; it has {len(names)}: {some}")


def _words(text: str) -> str:
    """A text as its words, with a space around each."""
    return " ".join(["", *re.findall(r"[^\W_]+", text), ""])


def class_conditioning(
    spec: Architecture, config: Config, names: Mapping[int, str], texts: Sequence[str]
) -> dict[str, Tensor]:
    """What the transformer's forward is given for texts that name classes (:func:`labels_of`), (B, ...) each.

    Args:
        spec: an architecture whose entry has ``labels``.
        config: of the transformer.
        names: of the classes, by number.

    Raises:
        UsageError: naming a text that means no class.
    """
    if spec.labels is None:
        raise UsageError(f"{spec.name}: not made for class labels")
    return spec.labels(config, torch.tensor(labels_of(texts, names)))


class AsymFlowClassPipeline(DiffusionPipeline):
    """Images of classes by a flow model, of pixels or of latents.

    Args:
        transformer: of an architecture whose entry has ``labels``, stock or Asym.
        vae: :class:`~liftkit.models.autoencoder.PixelAutoencoder`, or for latents a stock one.
        scheduler: of flow matching.
        id2label: names of the classes by number, from 0.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        id2label: Mapping[Any, str] | None = None,
        sample_size: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        names = {int(label): str(name) for label, name in (id2label or {}).items()}
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"id2label: {len(names)} classes, expected to be numbered from 0")
        self.register_to_config(id2label={str(label): names[label] for label in sorted(names)}, sample_size=sample_size)
        self.names, self._guides = names, False
        self.vae_scale_factor = _factor(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def _of(self, labels: Tensor) -> dict[str, Tensor]:
        flow = FlowModel(self.transformer)
        assert flow.architecture.labels is not None
        return flow.architecture.labels(flow.config, labels)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        guidance_interval: tuple[float, float] = INTERVAL,
        generator: Any = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            prompt: names of classes; or else
            class_labels: their numbers.
            height, width: in pixels; the autoencoder's own size if left out.
            num_inference_steps: of the scheduler.
            guidance_scale: ``u + scale (c - u)``; no guidance at 1 and below.
            guidance_interval: noise levels of guidance, both ends included.
            generator: one, or one for each image.
            latents: the noise, (B, 3, height, width) for pixels.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: or a tuple.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": ...})``.
            callback_on_step_end_tensor_inputs: names of what it is given.

        Raises:
            UsageError: if a name means no class.
            ValueError: if neither or both of prompt and labels are given, or a label is out of range.
        """
        flow, spec = FlowModel(self.transformer), FlowModel(self.transformer).architecture
        device = self._execution_device
        labels = self._labels(prompt, class_labels)
        size = self.config.sample_size or self.vae.config.get("sample_size") or 256
        x = self._noise(flow, len(labels), height or size, width or size, generator, latents).to(device)
        given = {name: value.to(device) for name, value in self._of(labels).items()}
        free = {name: value.to(device) for name, value in self._of(torch.full_like(labels, len(self.names))).items()}
        low, high = guidance_interval
        self._guides = guidance_scale > 1.0
        # Even from 1, as the paper's; a scheduler's own grid would end with a step of nearly nothing.
        even = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        self.scheduler.set_timesteps(sigmas=even, device=device)
        self.scheduler.set_begin_index(0)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, time in enumerate(self.scheduler.timesteps):
                level = noise_level(self.scheduler, step)
                within = low - ROUNDING <= level <= high + ROUNDING
                sigma = torch.full((len(x),), level, device=device)
                # Both predictions are asked for at every level: who watches the calls knows by this whether there is guidance.
                scale = (guidance_scale if within else 1.0) if self._guides else None
                u = _velocity(flow, spec.guidance, x, sigma, given, free, scale)
                x = self.scheduler.step(u.float(), time, x.float(), return_dict=False)[0]
                if callback_on_step_end is not None:
                    x = callback_on_step_end(self, step, time, {"latents": x}).get("latents", x)
                if (step + 1) % self.scheduler.order == 0:
                    bar.update()
        if output_type == "latent":
            images: Any = x
        else:
            images = self.image_processor.postprocess(self._decoded(flow, x), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call that runs, or ran last, asks for the unconditional prediction too."""
        return self._guides

    def _labels(self, prompt: Any, class_labels: Any) -> Tensor:
        if (prompt is None) == (class_labels is None):
            raise ValueError("give either names of classes (prompt) or their numbers (class_labels)")
        if prompt is not None:
            return torch.tensor(labels_of([prompt] if isinstance(prompt, str) else prompt, self.names))
        labels = torch.as_tensor(class_labels, dtype=torch.long).reshape(-1)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= len(self.names):
            raise ValueError(f"class_labels: expected 0 to {len(self.names)}, found {labels.tolist()}")
        return labels

    def _noise(
        self, flow: FlowModel, count: int, height: int, width: int, generator: Any, latents: Tensor | None
    ) -> Tensor:
        """The first state: (B, 3, H, W), or (B, C, h, w) of latents."""
        factor = 1 if flow.is_pixel else self.vae_scale_factor
        shape = (count, flow.channels, height // factor, width // factor)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=torch.float32)
        for side in (flow.latent_patch, flow.fold):  # as other pipelines pack them
            if side > 1 and latents.shape[-2] * side <= shape[-2] and latents.shape[1] % side**2 == 0:
                latents = F.pixel_shuffle(latents, side)
        if latents.shape != shape:
            raise ValueError(f"latents: expected {shape}, found {tuple(latents.shape)}")
        return latents.float()

    def _decoded(self, flow: FlowModel, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of the last state."""
        if flow.is_pixel:
            images: Tensor = self.vae.decode(F.pixel_unshuffle(x, self.vae.config.fold), return_dict=False)[0]
            return images.float()
        return LatentSpace(self.vae, flow.architecture.latent_statistics).decode(x)


def _factor(vae: Any) -> int:
    """Pixels along one element of what an autoencoder encodes to."""
    if vae is None or hasattr(vae, "spatial_compression_ratio"):
        return 1 if vae is None else int(vae.spatial_compression_ratio)
    return vae_geometry({**vae.config, "_class_name": type(vae).__name__})[0]


def _velocity(
    flow: FlowModel,
    way: str,
    x: Tensor,
    sigma: Tensor,
    given: Mapping[str, Tensor],
    free: Mapping[str, Tensor],
    scale: float | None,
) -> Tensor:
    """The velocity with guidance, asked for in the way that the architecture's own pipelines do; without where scale is None."""
    if scale is None:
        return flow.velocity(x, sigma, **given)
    if way == "calls":
        conditional, other = flow.velocity(x, sigma, **given), flow.velocity(x, sigma, **free)
    else:
        first, second = (given, free) if way == "batch conditional first" else (free, given)
        both = {name: torch.cat([value, second[name]]) for name, value in first.items()}
        parts = flow.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), **both).chunk(2)
        conditional, other = parts if way == "batch conditional first" else parts[::-1]
    return other + scale * (conditional - other)


AsymFlowClassPipeline.__module__ = HOME
assert AsymFlowClassPipeline.__name__ == CLASS_PIPELINE
