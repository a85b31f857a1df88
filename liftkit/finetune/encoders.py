"""Encoders of a model's own: its VAE and text side, what they make kept in caches, and out of memory before training."""

from __future__ import annotations

import gc
import hashlib
from functools import partial
from typing import Any

import torch
from PIL.Image import fromarray
from torch import Tensor

from liftkit.checkpoint.classes import CLASS_PIPELINE
from liftkit.checkpoint.folder import digests
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.text import check_prompts
from liftkit.data.cache import held_cache
from liftkit.data.embeddings import PairEncoder, PromptEncoder
from liftkit.data.filling import ImageEncoder
from liftkit.data.training import TrainingData
from liftkit.errors import UsageError
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.trainee import Trainee
from liftkit.models import load
from liftkit.models.absent import check_text_side
from liftkit.models.broken import broken
from liftkit.models.latents import LatentSpace
from liftkit.models.registry import architecture
from liftkit.models.spec import Architecture
from liftkit.progress import Observer


def load_vae(folder: ModelFolder) -> Any:
    """The VAE of the latent model, in float32 and frozen."""
    return load.load_latent_vae(folder).requires_grad_(False)


def read_together(folder: ModelFolder, spec: Architecture) -> bool:
    """Whether the model's text encoder reads each prompt together with the reference images."""
    return spec.prompts_beside is not None and folder.index["_class_name"] in spec.references


def fill_caches(recipe: Recipe, trainee: Trainee, parts: list[TrainingData], observer: Observer, device: str) -> None:
    """Encode what is not cached yet: latents where the loss needs them, and prompts. Encoders leave the memory after."""
    folder, spec, choice = trainee.folder, trainee.spec, recipe.previews
    needs_latents = recipe.space == "latent" or recipe.objective.loss == "asymflow"
    together = read_together(folder, spec)
    image_print = LatentSpace(load_vae(folder), spec.latent_statistics).fingerprint() if needs_latents else ""
    text_print = text_fingerprint(folder, device)
    extra = [choice.prompts[index % len(choice.prompts)] for index in range(choice.count)] if choice.prompts else []
    with held_cache(parts[0].cache, observer.note):
        for data in parts:
            data.prepare(
                partial(_image_encoder, trainee, device) if needs_latents else None,
                image_print,
                partial(_prompt_encoder, trainee, device),
                text_print,
                observer,
                extra,
                partial(_pair_encoder, trainee, device) if together else None,
            )
            gc.collect()


def _image_encoder(trainee: Trainee, device: str) -> ImageEncoder:
    folder = trainee.folder
    space = LatentSpace(load_vae(folder).to(device), trainee.spec.latent_statistics)

    def encode(images: Tensor) -> Tensor:
        latents = space.encode(images.to(device)).cpu()
        if not latents.isfinite().all():
            raise UsageError(
                f"{folder.source}: vae: latents of a picture are not finite, though all its weights are; leave the picture "
                "out, or use another VAE"
            )
        return latents

    return encode


def _prompt_encoder(trainee: Trainee, device: str) -> PromptEncoder:
    folder, spec = trainee.folder, trainee.spec
    if folder.index["_class_name"] == CLASS_PIPELINE:
        from liftkit.models.classes import class_conditioning

        names, config = class_names(folder), folder.config("transformer")
        return lambda prompts: class_conditioning(spec, config, names, prompts)
    pipeline, length = load_text_side(folder, device), folder.text_length()

    @torch.no_grad()
    def encode(prompts: list[str]) -> dict[str, Tensor]:
        check_prompts(prompts)
        return _checked(folder, pipeline, spec.prompts(pipeline, prompts, length))

    return encode


def _pair_encoder(trainee: Trainee, device: str) -> PairEncoder:
    """Of prompts that the text encoder reads together with the reference images."""
    folder, read = trainee.folder, trainee.spec.prompts_beside
    assert read is not None
    pipeline = load_text_side(folder, device, pictures=True)

    @torch.no_grad()
    def encode(prompt: str, images: list[Tensor]) -> dict[str, Tensor]:
        check_prompts([prompt])
        pictures = [fromarray(each.movedim(0, 2).numpy()) for each in images]
        return _checked(folder, pipeline, read(pipeline, prompt, pictures))

    return encode


def _checked(folder: ModelFolder, pipeline: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings on the CPU.

    Raises:
        UsageError: if some are not finite.
    """
    for name, each in found.items():
        if each.is_floating_point() and not each.isfinite().all():
            raise UsageError(f"{folder.source}: {broken(pipeline, 'text_encoder', f'{name} of a caption')}")
    return {name: each.cpu() for name, each in found.items()}


def class_names(folder: ModelFolder) -> dict[int, str]:
    """The classes of a model that is conditioned on them, by number."""
    return {int(number): str(name) for number, name in dict(folder.index.get("id2label") or {}).items()}


def load_text_side(folder: ModelFolder, device: str, pictures: bool = False) -> Any:
    """The stock pipeline without its transformers. Its VAE stays, small as it is: some pipelines cannot be made without (Bria).

    Args:
        folder: of the pipeline.
        device: where it goes.
        pictures: whether its text encoder is to read pictures too.

    Raises:
        UsageError: if it has no text encoders.
    """
    check_text_side(folder, pictures)
    heavy = ("transformer", *architecture(str(folder.class_of("transformer"))).companions)
    return load.load_pipeline(folder, text_dtype(device), without=heavy).to(device)


def text_dtype(device: str) -> torch.dtype:
    """The precision that captions are encoded in; processes of a group call their processor ``cpu:0``."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def text_fingerprint(folder: ModelFolder, device: str) -> str:
    """Tells the text side of a model from others: its pipeline, the contents of its files, its precision and how many tokens are
    asked for. Pipelines may write other words around a prompt for the same encoder, as those of Qwen-Image and its Edit do."""
    if folder.index["_class_name"] == CLASS_PIPELINE:
        shown = repr((class_names(folder), folder.class_of("transformer")))
        return hashlib.sha256(shown.encode()).hexdigest()
    parts = [
        f"pipeline {folder.index['_class_name']}",
        f"tokens {folder.text_length()}",
        f"precision {text_dtype(device)}",
    ]
    for name in sorted(folder.index):
        if name.startswith(("text_encoder", "tokenizer", "processor")) and (folder.path / name).is_dir():
            parts += [f"{name}/{file} {found.value}" for file, found in digests(folder.path / name).items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
