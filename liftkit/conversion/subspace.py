"""The subspace in which a model from nothing has its noise, and the shape of its network.

Sec. 4: the leading directions of uncentered second moments, of patches of pixels or of a VAE's normalized latents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftkit.checkpoint.components import Component
from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.text import read_json
from liftkit.color import SRGB, ColorSpace, Oklab, to_signed
from liftkit.conversion.networks import Shape
from liftkit.data.captioned import CaptionedFolder, DemoCaptioned
from liftkit.data.images import check_folder
from liftkit.data.picture_errors import PictureError
from liftkit.data.source import CaptionedSource
from liftkit.embedded import DEMO
from liftkit.errors import UsageError
from liftkit.fit.moments import TokenMoments
from liftkit.fit.pca import fit_pca
from liftkit.fit.rank import AutoRank, auto_rank
from liftkit.lift import Lift
from liftkit.models.vaes import vae_geometry
from liftkit.options import InitOptions
from liftkit.progress import Observer
from liftkit.tally import Tally
from liftkit.tokens import patchify

COLORS: dict[str, ColorSpace] = {"srgb": SRGB(), "oklab": Oklab()}
"""By the word of ``--color``: sRGB in [-1, 1], and Oklab with the paper's constants."""
LATENT_PATCH = 2
"""Side of a token in latents, unless a subspace says otherwise: that of FLUX and its kin."""


def shape_of(options: InitOptions, classes: int, given: Lift | None, vae: Component | None) -> Shape:
    """What a network is for.

    Args:
        options: the choices.
        classes: how many.
        given: the lift of ``--subspace``.
        vae: of whose latents the model is made; None for pixels.

    Raises:
        UsageError: if choices do not go together.
    """
    tokens, factor, channels = (8 if options.size == "tiny" else 16), 1, 3
    patch = options.patch or (8 if options.size == "tiny" else 16)
    if vae is not None:
        factor, channels = vae_geometry({**read_json(vae.path / "config.json"), "_class_name": vae.class_name})
        patch = options.patch or (given.patch_size if given is not None else LATENT_PATCH)
    resolution = options.resolution or tokens * patch * factor
    if resolution % (patch * factor):
        raise UsageError(f"--resolution {resolution}: not a multiple of the {patch * factor} pixels of one token")
    shape = Shape(options.size, patch, resolution, classes, channels, factor, vae)
    if options.architecture == "flux2" and (patch < 2 or patch & (patch - 1) or (vae is not None and patch != 2)):
        raise UsageError(
            f"--patch {patch}: flux2 folds a state by half a token, which has to be a power of two (in latents, 2)"
        )
    if options.rank != "auto" and options.rank > shape.dim:
        raise UsageError(f"--rank {options.rank}: a token of {patch} x {patch} {shape.units} has {shape.dim} numbers")
    return shape


def subspace(
    options: InitOptions, shape: Shape, given: Lift | None, observer: Observer
) -> tuple[Lift, AutoRank | None]:
    """The free lift of a model, and how its rank was found: given, fitted, or one that no images decide.

    Raises:
        UsageError: if the given one does not fit, or there is neither one nor an image that could be used.
    """
    rank = options.rank
    if given is not None:
        _check_given(given, options, shape)
    if rank in (0, shape.dim):
        basis = torch.eye(shape.dim, int(rank), dtype=torch.float64)
        figures = {"kind": "none" if rank == 0 else "identity"}
        return Lift(basis, 1.0, shape.patch, 1, COLORS[options.color], figures, space=shape.space), None
    if given is not None:
        return replace(given, basis=given.basis[:, : int(rank)]), None
    if options.images is None:
        raise UsageError(
            f"--rank {rank}: needs the leading directions of images: give a folder by --images ('demo' for the embedded "
            "ones), or a lift by --subspace; ranks 0 and all do without"
        )
    moments = token_moments(options, shape, observer)
    chosen = None
    if rank == "auto":
        chosen = auto_rank(moments.pixel_gram, moments.count)
        rank = chosen.rank
        if rank == 0:
            return subspace(replace(options, rank=0), shape, None, observer)[0], chosen
    try:
        color, patch = COLORS[options.color], shape.patch
        return fit_pca(moments, rank=rank, color=color, latent_patch=patch, space=shape.space), chosen
    except ValueError as error:
        raise UsageError(f"--images {options.images}: {error}") from error


def _check_given(lift: Lift, options: InitOptions, shape: Shape) -> None:
    """Raise unless a given lift is of the network's space and patches, and holds the directions that are asked for."""
    name = f"--subspace {options.subspace}"
    if lift.space != shape.space:
        raise UsageError(
            f"{name}: a subspace of latents; name their VAE by --vae, or give one of pixels"
            if lift.space == "latent"
            else f"{name}: a subspace of pixels, and --vae {options.vae} makes a model of latents; leave --vae out, or fit one of "
            "latents: liftkit fit MODEL --kind pca --rank R --space latent"
        )
    if (lift.patch_size, lift.channels) != (shape.patch, shape.channels):
        channels = f" of {lift.channels} channels" if shape.vae is not None else ""
        raise UsageError(
            f"{name}: of patches of {lift.patch_size} {shape.units}{channels}, the network's tokens have {shape.patch}"
            + (f" of {shape.channels}" if channels else "")
        )
    if shape.vae is None and lift.color.to_dict() != COLORS[options.color].to_dict():
        raise UsageError(
            f"{name}: fitted in other colors ({lift.color.to_dict()}) than --color {options.color} has; fit it by --images "
            "here, or give its colors"
        )
    if options.rank == "auto":
        raise UsageError("--rank auto: looks at images; give them by --images in the place of --subspace")
    if lift.rank < options.rank < lift.dim:
        raise UsageError(f"--rank {options.rank}: {options.subspace} holds {lift.rank} directions")


def token_moments(options: InitOptions, shape: Shape, observer: Observer) -> TokenMoments:
    """Second moments of the tokens of images and of their mirror images, in the place of both latents and pixels.

    Raises:
        UsageError: if there is no usable image.
    """
    source, size = _source(options), (shape.resolution, shape.resolution)
    order = np.random.Generator(np.random.PCG64(options.seed)).permutation(len(source))[: options.num_images].tolist()
    encode, tally = _encoder(options, shape), Tally("images")
    # Mirrored pixels are the same numbers in other places; mirrored latents have to be encoded.
    places = torch.arange(shape.dim).reshape(shape.channels, shape.patch, shape.patch).flip(2).flatten()
    mirror = places if shape.vae is None else None
    count, total, gram = 0, torch.zeros(shape.dim).double(), torch.zeros(shape.dim, shape.dim).double()
    with observer.stage("init: reading images", len(order), "images") as advance:
        for place in order:
            try:
                image = to_signed(source.image(place, size)[None])
                tally.use()
            except PictureError as error:
                tally.leave_out(error.name, error.reason)
            else:
                both = image if mirror is not None else torch.cat([image, image.flip(3)])
                tokens = patchify(encode(both).double(), shape.patch).flatten(0, 1)
                count, total = count + len(tokens), total + tokens.sum(0)
                gram.addmm_(tokens.T, tokens)
            advance(1)
    if tally.lost:
        observer.note(tally.summary())
    if not count:
        raise UsageError(f"--images {options.images}: no usable image: {tally.reasons()}")
    if mirror is not None:
        count, total, gram = 2 * count, total + total[mirror], gram + gram[mirror][:, mirror]
    moments = TokenMoments(shape.dim, shape.dim)
    moments.count, moments.images = count, tally.used
    moments.latent_sum = moments.pixel_sum = total
    moments.latent_gram = moments.pixel_gram = moments.cross = gram
    return moments


def _encoder(options: InitOptions, shape: Shape) -> Any:
    """Images (B, 3, H, W) in [-1, 1] to states."""
    if shape.vae is None:
        return COLORS[options.color].encode
    from liftkit.models.latents import LatentSpace
    from liftkit.models.load import load_vae

    encode: Any = LatentSpace(load_vae(shape.vae.path)).encode

    def checked(images: Tensor) -> Tensor:
        latents: Tensor = encode(images)
        if not latents.isfinite().all():
            raise UsageError(
                f"--vae {options.vae}: latents of a picture are not finite; use another VAE, or leave the picture out"
            )
        return latents

    return checked


def _source(options: InitOptions) -> CaptionedSource:
    """The images, brought to a size as training does it."""
    assert options.images is not None
    if options.images == DEMO:
        return DemoCaptioned(options.num_images, seed=options.seed)
    check_folder(expanded(options.images), f"--images {options.images}", "give a folder of images, or 'demo'")
    return CaptionedFolder(options.images)
