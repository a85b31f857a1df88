"""Encoders of a model's own: its VAE and text side, what they make kept in caches, and out of memory before training."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.classes import CLASS_PIPELINE
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.text import check_prompts
from liftkit.data.cache import held_cache
from liftkit.data.training import TrainingData
from liftkit.errors import UsageError
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.trainee import Trainee
from liftkit.models import load
from liftkit.models.absent import check_text_side
from liftkit.models.broken import broken
from liftkit.models.latents import LatentSpace
from liftkit.models.registry import architecture
from liftkit.progress import Observer


def load_vae(folder: ModelFolder) -> Any:
    """The VAE of the latent model, in float32 and frozen."""
    return load.load_latent_vae(folder).requires_grad_(False)


def fill_caches(recipe: Recipe, trainee: Trainee, parts: list[TrainingData], observer: Observer, device: str) -> None:
    """Encode what is not cached yet: latents where the loss needs them, and prompts. Encoders leave the memory after."""
    folder = trainee.folder
    needs_latents = recipe.space == "latent" or recipe.objective.loss == "asymflow"

    def image_encoder() -> Callable[[Tensor], Tensor]:
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

    def prompt_encoder() -> Callable[[list[str]], dict[str, Tensor]]:
        if folder.index["_class_name"] == CLASS_PIPELINE:
            from liftkit.models.classes import class_conditioning

            names, config = class_names(folder), folder.config("transformer")
            return lambda prompts: class_conditioning(trainee.spec, config, names, prompts)
        pipeline, length = load_text_side(folder, device), folder.text_length()

        @torch.no_grad()
        def encode(prompts: list[str]) -> dict[str, Tensor]:
            check_prompts(prompts)
            found = {name: each.cpu() for name, each in trainee.spec.prompts(pipeline, prompts, length).items()}
            for name, each in found.items():
                if each.is_floating_point() and not each.isfinite().all():
                    raise UsageError(f"{folder.source}: {broken(pipeline, 'text_encoder', f'{name} of a caption')}")
            return found

        return encode

    image_print = LatentSpace(load_vae(folder), trainee.spec.latent_statistics).fingerprint() if needs_latents else ""
    text_print, extra = text_fingerprint(folder, device), list(recipe.previews.prompts or ())
    with held_cache(parts[0].cache, observer.note):
        for data in parts:
            data.prepare(
                image_encoder if needs_latents else None,
                image_print,
                prompt_encoder,
                text_print,
                observer,
                extra,
            )
            gc.collect()


def class_names(folder: ModelFolder) -> dict[int, str]:
    """The classes of a model that is conditioned on them, by number."""
    return {int(number): str(name) for number, name in dict(folder.index.get("id2label") or {}).items()}


def load_text_side(folder: ModelFolder, device: str) -> Any:
    """The stock pipeline without its transformers. Its VAE stays, small as it is: some pipelines cannot be made without (Bria).

    Raises:
        UsageError: if it has no text encoders.
    """
    check_text_side(folder)
    heavy = ("transformer", *architecture(str(folder.class_of("transformer"))).companions)
    return load.load_pipeline(folder, text_dtype(device), without=heavy).to(device)


def text_dtype(device: str) -> torch.dtype:
    """The precision that captions are encoded in; processes of a group call their processor ``cpu:0``."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def text_fingerprint(folder: ModelFolder, device: str) -> str:
    """Tells the text side of a model from others: the contents of its files, its precision and how many tokens are asked for."""
    if folder.index["_class_name"] == CLASS_PIPELINE:
        shown = repr((class_names(folder), folder.class_of("transformer")))
        return hashlib.sha256(shown.encode()).hexdigest()
    parts = [f"tokens {folder.text_length()}", f"precision {text_dtype(device)}"]
    for name in sorted(folder.index):
        if name.startswith(("text_encoder", "tokenizer")) and (folder.path / name).is_dir():
            for path in sorted(each for each in (folder.path / name).rglob("*") if each.is_file()):
                with path.open("rb") as file:
                    parts.append(f"{name}/{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
