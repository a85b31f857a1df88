"""What an architecture is: the few facts that tell its pixel twin from all others.

A transformer of diffusers is described by where its two raw-token projections are and in which order they
flatten a patch, by the layout of its state, by its clock and by its sign. Everything else is the stock class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.conditioning import encoded as encoded
from liftkit.models.conditioning import random as random
from liftkit.models.layout import Layout
from liftkit.tokens import TokenOrder

Config = Mapping[str, Any]

HOME = "diffusers"
"""The module that our classes name as theirs: it answers for them (:mod:`liftkit.models._diffusers`), and pipelines that
diffusers saves again then refer to them as to its own."""


class Clock(Enum):
    """What the caller passes for the noise level sigma."""

    SIGMA = "sigma"
    THOUSAND_SIGMA = "1000 sigma"
    ONE_MINUS_SIGMA = "1 - sigma"
    THOUSAND_SIGMA_LESS_ONE = "1000 sigma - 1"

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level in [0, 1] of what the caller passes."""
        if self is Clock.THOUSAND_SIGMA:
            return time / 1000.0
        if self is Clock.THOUSAND_SIGMA_LESS_ONE:
            return (time + 1.0) / 1000.0
        return 1.0 - time if self is Clock.ONE_MINUS_SIGMA else time

    def time(self, sigma: Tensor) -> Tensor:
        """What a caller passes for a noise level."""
        if self is Clock.THOUSAND_SIGMA:
            return sigma * 1000.0
        if self is Clock.THOUSAND_SIGMA_LESS_ONE:
            return sigma * 1000.0 - 1.0
        return 1.0 - sigma if self is Clock.ONE_MINUS_SIGMA else sigma


LIFTED = -1
"""A block of channels that the lift replaces, in a tuple of blocks; other entries count channels that stay, such as a mask's."""
Blocks = tuple[int, ...]


def counts(blocks: Blocks, lifted: int) -> list[int]:
    """How many channels each block has, where a lifted one has ``lifted``."""
    return [lifted if each == LIFTED else each for each in blocks]


def _one_block(channels: int, lifted: int) -> Blocks:
    return (LIFTED,)


@dataclass(frozen=True)
class Projection:
    """A Linear or convolution between raw tokens and the hidden dimension.

    Args:
        path: module path in the transformer, for example ``pos_embed.proj``.
        order: how a patch is flattened where it meets the weight.
        blocks: what its raw channels consist of, ``(channels, channels of one lifted block) -> blocks``, for the latent and for
            the pixel model: ``(LIFTED, LIFTED, 256)`` for a noisy latent, a clean one and a mask. The first is the one that is
            denoised, further lifted ones are clean. A second lifted block of an output is a learned variance, which nobody reads.
    """

    path: str
    order: TokenOrder
    blocks: Callable[[int, int], Blocks] = _one_block


@dataclass(frozen=True)
class Grid:
    """The token grid of one call: rows x columns of tokens, for ``batch`` samples on ``device``, and the transformer's config."""

    batch: int
    rows: int
    columns: int
    device: torch.device
    config: Config


def patch_size(config: Config) -> int:
    """The spatial side of ``patch_size``, which may be (frames, rows, columns)."""
    side = config["patch_size"]
    return int(side if isinstance(side, int) else side[-1])


def _as_given(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    return dict(given)


def _no_prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    raise NotImplementedError("this architecture has no text side that liftkit can run")


def _no_clean_tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    return None


def grid_of_ids(ids: Tensor) -> tuple[int, int, int]:
    """Pictures, rows and columns of tokens whose ids (N, axes) count rows and then columns behind the first axis: row by row.

    Raises:
        UsageError: if the ids were rounded, so that rows cannot be told apart.
    """
    first = ids[:, 1] == ids[0, 1]
    columns = int(first.sum())
    # A second row of the same number would begin at the first column again.
    if bool(ids[first][:, 2].diff().lt(0).any()) or len(ids) % columns:
        raise UsageError(
            f"position ids in {ids.dtype} do not tell the rows of {len(ids)} tokens, and a detail head needs them; paint fewer "
            "pixels, or let the pipeline compute in float32"
        )
    return 1, len(ids) // columns, columns


def _grid_of_image_ids(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    return grid_of_ids(ids[ids[:, 0] == ids[0, 0]])


def _same_time(tau: Tensor, tokens: int) -> Tensor:
    return tau


def _state_alone(tokens: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    return tokens


def _welcome(config: Config) -> str | None:
    return None


@dataclass(frozen=True)
class Architecture:
    """One flow transformer of diffusers.

    Only ``name``, ``inputs``, ``outputs``, ``layout`` and ``conditioning`` are needed; the rest tells what is unusual.

    Args:
        name: the stock class, an attribute of diffusers.
        inputs: projections from raw tokens. The first one takes the state.
        outputs: projections to raw tokens.
        layout: how ``forward`` sees its state.
        conditioning: random conditioning of the right shapes, ``(config, batch, generator) -> tensors (B, ...)``; for
            proofs, which hold whatever the conditioning is.
        proof_grid: rows and columns of tokens in proofs; a rectangle, unless the class takes squares alone.
        latent_patch: side of a token's patch on the VAE's grid, from the config.
        token_patch: side of the patch that the transformer itself cuts from its state, from the config; None for 1 where
            tokens come packed, else ``latent_patch``.
        state: name of the argument that holds the state.
        time: name of the argument that holds the time.
        clock: what the time counts.
        network_time: the noise level that the stock pipeline passes to its network where it steps at another, ``(tau, tokens
            of one sample) -> noise level``: some shift their sigmas and not their timesteps.
        sign: +1 if the output is eps - x_0, -1 if it is x_0 - eps.
        channel_keys: config entries counted in raw channels; the lift multiplies their lifted blocks by D / r. The first that is
            not None counts one lifted block of the state; the others may count several, as the first input's ``blocks`` has them.
        state_channels: channels of the state, from the config, where no entry of ``channel_keys`` counts them.
        arguments: what ``forward`` is given beside state and time, ``(grid, conditioning) -> arguments``. Adds position ids
            that follow from the grid, appends an image part to masks, cuts padded prompts into lists.
        sequence: places packed tokens (B, N, r) in the sequence that ``forward`` takes, ``(tokens, arguments) -> state``; they
            have to come last. Rows of the output beyond the state's are left alone, at the front.
        clean_tokens: a mask (B, N) or (N,) of the noise-free reference tokens among the state's, from the
            arguments of a call; they carry ``x_0 / s`` whatever the time.
        token_grid: pictures, rows and columns of the packed tokens that are denoised, from the arguments of a call. They are the
            state's last ones, but for those of ``clean_tokens``. By default ``img_ids`` tell.
        beside: places references of the state's size beside it, ``(state, references, arguments) -> state``, all packed as
            ``forward`` takes them; what tells them apart, such as position ids, it writes into the arguments.
        references: stock pipelines that take reference images as their ``image``, with the numbers of images that they take.
        several: stock pipelines whose state holds several pictures of one prompt.
        clean_inputs: names of further arguments that hold clean latents, as tensors or lists of them; scaled by ``1 / s``.
        config: entries that a conversion changes beside the channels, from the config.
        refuse: the reason why a model of this config cannot be lifted, one line; None if it can.
        pipelines: stock pipelines that are known to run the pixel twin.
        call: arguments that the stock pipeline has to be given for images of any size.
        pipeline_latents: from a state (B, C, h, w) on the VAE's grid to what the stock pipeline takes as ``latents``, where
            this is another than ``forward`` sees.
        latent_statistics: mean and deviation of the latents, ``(vae, latents (B, C, h, w)) -> (mean, deviation)``, where
            they are not what the VAE's class says.
        companions: further transformers of the pipeline, by component, that get the same lift.
        reference: modules beside the projections that finetuning trains in full, kept for the frozen reference.
        adapters: patterns of the modules that get a LoRA where a recipe names none.
        guidance: how its stock pipelines ask for the conditional and the unconditional prediction: two ``calls``, in this
            order, or one ``batch``, whose second half is conditional, or whose first is.
        guidance_from: the prediction from which the stock pipelines step along the difference: ``u + scale (c - u)``, or
            ``c + scale (c - u)``.
        guidance_argument: of the stock pipeline's call: the scale of classifier-free guidance.
        rescale: what its stock pipelines do to the guided latent velocity, ``(guided, conditional, arguments of the pipeline's
            call) -> guided``, in the layout of ``forward``, stacked where that takes lists.
        original: matrices by their names in the authors' own code, with the modules here that hold their rows, in order;
            ``*`` is the number of a block.
        color: the ``--color`` of its conversions where none is asked for.
        encoders: components without which its stock pipelines cannot read a prompt.
        prompts: ``(pipeline, prompts, text length or None) -> conditioning`` by the stock pipeline's own text encoders:
            tensors (B, ...) whose shapes do not depend on the texts, with masks.
        prompts_beside: ``(pipeline, prompt, PIL pictures) -> conditioning`` (L, ...) of one prompt, where stock pipelines of
            ``references`` read it together with the reference images.
        shown_beside: ``(pipeline's class, height, width of a reference) -> height, width`` at which these show it to their text
            encoder, one of Qwen's that see.
        labels: what ``forward`` is given for class labels (B,), ``(config, labels) -> conditioning``, in models that are made from
            nothing (``liftkit init``); None where none are made.
    """

    name: str
    inputs: tuple[Projection, ...]
    outputs: tuple[Projection, ...]
    layout: Layout
    conditioning: Callable[[Config, int, torch.Generator], dict[str, Any]]
    proof_grid: tuple[int, int] = (4, 6)
    latent_patch: Callable[[Config], int] = patch_size
    token_patch: Callable[[Config], int] | None = None
    state: str = "hidden_states"
    time: str = "timestep"
    clock: Clock = Clock.SIGMA
    network_time: Callable[[Tensor, int], Tensor] = _same_time
    sign: int = 1
    channel_keys: tuple[str, ...] = ("in_channels", "out_channels")
    state_channels: Callable[[Config], int] | None = None
    arguments: Callable[[Grid, Mapping[str, Any]], dict[str, Any]] = _as_given
    sequence: Callable[[Tensor, Mapping[str, Any]], Tensor] = _state_alone
    clean_tokens: Callable[[Mapping[str, Any]], Tensor | None] = _no_clean_tokens
    token_grid: Callable[[Mapping[str, Any]], tuple[int, int, int]] = _grid_of_image_ids
    beside: Callable[[Any, list[Any], dict[str, Any]], Any] | None = None
    references: Mapping[str, range] = field(default_factory=dict)
    several: frozenset[str] = frozenset()
    clean_inputs: tuple[str, ...] = ()
    config: Callable[[Config], dict[str, Any]] = field(default=lambda config: {})
    refuse: Callable[[Config], str | None] = _welcome
    pipelines: tuple[str, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    pipeline_latents: Callable[[Tensor], Tensor] | None = None
    latent_statistics: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None
    companions: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    guidance: Literal["calls", "batch", "batch conditional first"] = "calls"
    guidance_from: Literal["unconditional", "conditional"] = "unconditional"
    guidance_argument: str = "guidance_scale"
    rescale: Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor] | None = None
    original: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    color: Literal["oklab", "oklab-paper"] = "oklab"
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")
    prompts: Callable[[Any, list[str], int | None], dict[str, Tensor]] = _no_prompts
    prompts_beside: Callable[[Any, str, list[Any]], dict[str, Tensor]] | None = None
    shown_beside: Callable[[str, int, int], tuple[int, int]] | None = None
    labels: Callable[[Config, Tensor], dict[str, Tensor]] | None = None

    @property
    def lifted_name(self) -> str:
        """Name of the pixel twin's class."""
        return f"Asym{self.name}"

    @property
    def state_order(self) -> TokenOrder:
        """The order in which the velocity is recovered, and the basis stored: packed tokens keep the model's own, images are
        patchified channel first."""
        return self.inputs[0].order if self.layout is Layout.TOKENS else "cpq"

    def cell(self, config: Config) -> int:
        """Side of the patch that the transformer itself cuts from its state."""
        if self.token_patch is not None:
            return self.token_patch(config)
        return 1 if self.layout is Layout.TOKENS else self.latent_patch(config)

    def block_size(self, config: Config) -> int:
        """Channels of one lifted block of the state, the one that is denoised."""
        return int(next(config[key] for key in self.channel_keys if config.get(key) is not None))

    def token_size(self, config: Config) -> int:
        """Numbers in one raw token: r for a latent model, D for a pixel model."""
        return self.block_size(config) * self.cell(config) ** 2

    def scaled(self, count: int, size: int, wanted: int) -> int:
        """A count of raw channels after its lifted blocks of ``size`` have become blocks of ``wanted``."""
        blocks = self.inputs[0].blocks(count, size)
        return count * wanted // size if len(blocks) == 1 else sum(counts(blocks, wanted))

    @property
    def projections(self) -> tuple[tuple[Projection, Literal["input", "output"]], ...]:
        """All projections with their side."""
        return tuple((p, "input") for p in self.inputs) + tuple((p, "output") for p in self.outputs)
