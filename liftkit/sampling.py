"""Sample images from a pipeline folder, latent or converted, through its stock diffusers pipeline."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.model import ModelFolder
from liftkit.errors import UsageError
from liftkit.models.flow import FlowModel, open_flow


def load_pipeline(folder: ModelFolder, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The stock pipeline of a folder.

    Args:
        folder: latent or converted.
        device: where it goes.
        dtype: of the weights; None takes float32 on the CPU and bfloat16 elsewhere.

    Raises:
        UsageError: if diffusers cannot load it.
    """
    from diffusers import DiffusionPipeline

    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder.path, dtype=dtype)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise UsageError(f"{folder.source}: diffusers cannot load it ({str(error).splitlines()[0]})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def native_size(pipeline: Any) -> int:
    """The image side that a pipeline's autoencoder was made for, in pixels."""
    size = pipeline.vae.config.get("sample_size", 1024)
    return size[0] if isinstance(size, (list, tuple)) else size


def state_noise(flow: FlowModel, count: int, height: int, width: int, factor: int, seed: int) -> Tensor:
    """Standard normal states, image i from its own stream so that batches do not change it.

    Args:
        flow: decides the state's shape: (count, 3, H, W) for pixels, (count, C, H / factor, W / factor) for latents.
        height, width: of the images.
        factor: the VAE's.
        seed: of image 0; image i has ``seed + i``.
    """
    shape = (3, height, width) if flow.is_pixel else (flow.channels, height // factor, width // factor)
    streams = (torch.Generator().manual_seed(seed + index) for index in range(count))
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])


@torch.no_grad()
def sample(
    pipeline: Any,
    prompts: list[str],
    *,
    noise: Tensor | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 8,
    advance: Any = lambda amount: None,
) -> Tensor:
    """Images for prompts.

    Args:
        pipeline: a stock pipeline over a latent or a lifted transformer.
        prompts: one image each.
        noise: starting states, image-shaped (see :func:`state_noise`); drawn from ``seed`` if left out.
        height, width: in pixels; the autoencoder's own size if left out.
        steps, guidance: the pipeline's own defaults if left out.
        advance: told the images done.

    Returns:
        (n, 3, H, W) in [-1, 1], on the CPU.
    """
    flow = open_flow(pipeline.transformer)
    height, width = height or native_size(pipeline), width or native_size(pipeline)
    if noise is None:
        noise = state_noise(flow, len(prompts), height, width, pipeline.vae_scale_factor, seed)
    known = inspect.signature(pipeline.__call__).parameters
    choices = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": text_length(pipeline)}
    arguments = {key: value for key, value in choices.items() if value is not None and key in known}
    images = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        output = pipeline(
            prompt=prompts[part],
            height=height,
            width=width,
            latents=flow.pipeline_state(noise[part].to(pipeline.device)),
            output_type="pt",
            **arguments,
        )
        images.append(output.images.float().cpu() * 2.0 - 1.0)
        advance(len(images[-1]))
    return torch.cat(images)


def text_length(pipeline: Any) -> int | None:
    """Text tokens to ask for: fewer than the pipeline's default where the tokenizer says that it knows fewer."""
    default = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    limit = getattr(getattr(pipeline, "tokenizer", None), "model_max_length", None)
    if default is None or not isinstance(default.default, int) or limit is None or limit >= default.default:
        return None
    return int(limit)


PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_picture(path: Path) -> None:
    """Whether a picture can be written there.

    Raises:
        UsageError: if the ending is unknown or the folder is missing.
    """
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"{path}: unknown picture format {path.suffix!r}; use {', '.join(sorted(PICTURES))}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.absolute().parent}: no such folder; make it first")


def check_size(pipeline: Any, height: int | None, width: int | None) -> None:
    """Whether an image size is made of whole tokens.

    Raises:
        UsageError: naming the flag.
    """
    flow = open_flow(pipeline.transformer)
    side = flow.token_side if flow.is_pixel else flow.token_side * pipeline.vae_scale_factor
    for flag, value in (("--height", height), ("--width", width)):
        if value is not None and value % side:
            raise UsageError(f"{flag} {value}: not a multiple of the {side} pixels of one token")


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write images as one picture, atomically; see :func:`check_picture`."""
    import io

    from liftkit.checkpoint.files import atomic_file
    from liftkit.report.pictures import grid

    check_picture(path)
    buffer = io.BytesIO()
    picture = grid(images, columns or min(len(images), 4 if len(images) <= 16 else 8))
    picture.save(buffer, PICTURES[path.suffix.lower()])
    with atomic_file(path) as file:
        file.write(buffer.getvalue())
