"""What an architecture is: the few facts that tell its pixel twin from all others.

A transformer of diffusers is described by where its two raw-token projections are and in which order they
flatten a patch, by whether its state comes packed in tokens or as an image, by its clock and by its sign.
Everything else is the stock class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor

from liftkit.tokens import TokenOrder

Config = Mapping[str, Any]

HOME = "diffusers"
"""The module that our classes name as theirs: it answers for them (:mod:`liftkit._diffusers`), and pipelines that
diffusers saves again then refer to them as to its own."""


class Clock(Enum):
    """How a transformer is told the noise level."""

    SIGMA = "sigma"
    THOUSAND_SIGMA = "1000 sigma"
    ONE_MINUS_SIGMA = "1 - sigma"

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level in [0, 1] of what the caller passes."""
        if self is Clock.THOUSAND_SIGMA:
            return time / 1000.0
        return 1.0 - time if self is Clock.ONE_MINUS_SIGMA else time

    def time(self, sigma: Tensor) -> Tensor:
        """What a caller passes for a noise level."""
        if self is Clock.THOUSAND_SIGMA:
            return sigma * 1000.0
        return 1.0 - sigma if self is Clock.ONE_MINUS_SIGMA else sigma


@dataclass(frozen=True)
class Projection:
    """A Linear or convolution between raw tokens and the hidden dimension.

    Args:
        path: module path in the transformer, for example ``pos_embed.proj``.
        order: how a patch is flattened where it meets the weight.
    """

    path: str
    order: TokenOrder


@dataclass(frozen=True)
class Grid:
    """The token grid of one call: rows x columns of tokens, for ``batch`` samples on ``device``."""

    batch: int
    rows: int
    columns: int
    device: torch.device


def _no_arguments(grid: Grid, conditioning: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _no_prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    raise NotImplementedError("this architecture says nothing about prompts")


def _no_clean_tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    return None


def _same(state: Tensor) -> Tensor:
    return state


@dataclass(frozen=True)
class Architecture:
    """One flow transformer of diffusers.

    Args:
        name: the stock class, an attribute of diffusers.
        inputs: projections from raw tokens.
        outputs: projections to raw tokens.
        layout: whether ``forward`` sees packed ``tokens`` (B, N, r) or an ``image`` (B, C, H, W).
        latent_patch: side of a token's patch on the VAE's grid, from the config.
        conditioning: random conditioning of the right shapes, ``(config, batch, generator) -> arguments``; for
            proofs, which hold whatever the network is told.
        state: name of the argument that holds the state.
        time: name of the argument that tells the time.
        clock: how the time is told.
        sign: +1 if the output is eps - x_0, -1 if it is x_0 - eps.
        channel_keys: config entries counted in raw channels; the lift multiplies them by D / r.
        token_patch: side of the patch that the transformer itself cuts from its state, from the config.
        positions: arguments that follow from the token grid, where the caller gives none.
        clean_tokens: a mask (B, N) or (N,) of the noise-free reference tokens among the state's, from the
            arguments of a call; they carry ``x_0 / s`` whatever the time.
        pipeline_latents: from a state (B, C, h, w) to what the stock pipeline takes as ``latents``.
        reference: modules beside the projections that finetuning trains in full, kept for the frozen reference.
        adapters: patterns of the modules that get a LoRA where a recipe names none.
        guidance: how its stock pipelines ask for the conditional and the unconditional prediction: ``calls``, in this
            order, or one ``batch``, whose second half is conditional.
        original: matrices by their names in the authors' own code, with the modules here that hold their rows, in order;
            ``*`` is the number of a block.
        color: the ``--color`` of its conversions where none is asked for.
        encoders: components without which its stock pipelines cannot read a prompt.
        prompts: ``(pipeline, prompts, text length or None) -> arguments`` of the transformer's forward, by the stock
            pipeline's own text encoders.
    """

    name: str
    inputs: tuple[Projection, ...]
    outputs: tuple[Projection, ...]
    layout: Literal["tokens", "image"]
    latent_patch: Callable[[Config], int]
    conditioning: Callable[[Config, int, torch.Generator], dict[str, Any]]
    state: str = "hidden_states"
    time: str = "timestep"
    clock: Clock = Clock.SIGMA
    sign: int = 1
    channel_keys: tuple[str, ...] = ("in_channels", "out_channels")
    token_patch: Callable[[Config], int] = field(default=lambda config: config["patch_size"])
    positions: Callable[[Grid, Mapping[str, Any]], dict[str, Any]] = _no_arguments
    clean_tokens: Callable[[Mapping[str, Any]], Tensor | None] = _no_clean_tokens
    pipeline_latents: Callable[[Tensor], Tensor] = _same
    reference: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    guidance: Literal["calls", "batch"] = "calls"
    original: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    color: Literal["oklab", "oklab-paper"] = "oklab"
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")
    prompts: Callable[[Any, list[str], int | None], dict[str, Tensor]] = _no_prompts

    @property
    def lifted_name(self) -> str:
        """Name of the pixel twin's class."""
        return f"Asym{self.name}"

    def token_size(self, config: Config) -> int:
        """Numbers in one raw token: r for a latent model, D for a pixel model."""
        return config["in_channels"] * self.token_patch(config) ** 2

    @property
    def projections(self) -> tuple[tuple[Projection, Literal["input", "output"]], ...]:
        """All projections with their side."""
        return tuple((p, "input") for p in self.inputs) + tuple((p, "output") for p in self.outputs)


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers on the CPU, for random conditioning."""
    return torch.randn(shape, generator=generator)
