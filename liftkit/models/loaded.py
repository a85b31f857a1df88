"""A pipeline folder, latent or converted, loaded as its stock diffusers pipeline; its weights may wait in host memory."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from liftkit import __version__
from liftkit.checkpoint.model import ModelFolder
from liftkit.errors import UsageError
from liftkit.models import load
from liftkit.models.absent import check_text_side
from liftkit.models.adapted import check_needs, load_pixel_pipeline
from liftkit.models.adapter import Adapter
from liftkit.models.flow import FlowModel, open_flow
from liftkit.options import Offload, SampleOptions


@dataclass
class Loaded:
    """A stock pipeline, and what its folder says about calling it.

    Args:
        pipeline: of diffusers.
        size: the image side that its autoencoder was made for, in pixels.
        text_length: text tokens to ask for, where its tokenizer knows fewer than the pipeline's default.
    """

    pipeline: Any
    size: int
    text_length: int | None = None

    @property
    def flow(self) -> FlowModel:
        """The transformer as a :class:`FlowModel`."""
        return open_flow(self.pipeline.transformer)

    @property
    def multiple(self) -> int:
        """Pixels of which the sides of an image are made: those of one token."""
        flow = self.flow
        return flow.token_side if flow.is_pixel else flow.token_side * int(self.pipeline.vae_scale_factor)

    def default(self, argument: str) -> Any:
        """The value that the pipeline gives an argument by itself; None where it has none of that name."""
        known = inspect.signature(self.pipeline.__call__).parameters
        return known[argument].default if argument in known else None

    def settings(self, options: SampleOptions, height: int, width: int) -> dict[str, Any]:
        """What decides how an image looks beside model, prompt and seed, for its metadata: choices that were left to the
        pipeline by their value."""
        return {
            "width": width,
            "height": height,
            "steps": options.steps or self.default("num_inference_steps"),
            "guidance": self.default("guidance_scale"),
            **options.record,
            "liftkit": __version__,
        }


def load_pipeline(
    folder: ModelFolder,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
    offload: Offload = "none",
) -> Loaded:
    """The stock pipeline of a folder.

    Args:
        folder: latent or converted.
        device: where it goes.
        dtype: of the weights; None takes float32 on the CPU and bfloat16 elsewhere.
        adapter: to apply to it; a latent model becomes a pixel model where the adapter has a lift.
        offload: what comes to the device when it runs, and waits in host memory otherwise.

    Raises:
        UsageError: if diffusers cannot load it, the adapter is not for it, or there is nowhere to offload to.
    """
    if offload != "none" and torch.device(device).type == "cpu":
        raise UsageError(
            f"--offload {offload}: the model runs on the CPU, in host memory already: there is nothing to offload; leave it out"
        )
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    check_text_side(folder)
    pipeline = load.load_pipeline(folder, dtype)
    pipeline.set_progress_bar_config(disable=True)
    if offload == "none":
        pipeline = pipeline.to(device)
    if adapter is not None:
        check_needs(adapter, folder)
        pipeline = load_pixel_pipeline(pipeline, adapter)
    if offload != "none":
        keep_on_host(pipeline, torch.device(device), offload)
    return Loaded(pipeline, folder.image_size(), folder.text_length())


def keep_on_host(pipeline: Any, device: torch.device, offload: Offload) -> None:
    """Let a pipeline's weights wait in host memory until they run: whole components in their turn, or layers."""
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
        return
    # On a GPU the next layer is copied while one runs; pinned layer by layer, or all weights would be held twice.
    ahead = device.type == "cuda"
    pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=ahead, low_cpu_mem_usage=ahead)
