"""The fit as a whole: options, one pass over the data, a lift with its figures, pictures and verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from liftkit.color import SPACES, ColorSpace, Oklab
from liftkit.errors import UsageError
from liftkit.figures import check_figures
from liftkit.fit.alignment import Fit, alignment, alignment_kept, linear_map, mean, spread
from liftkit.fit.folds import FoldedMoments
from liftkit.fit.gallery import PER_FOLD, Gallery, HeldOut, make_gallery
from liftkit.fit.jacobian import fit_jacobian, mean_jacobian
from liftkit.fit.moments import TokenMoments
from liftkit.fit.pairs import PairSource
from liftkit.fit.pca import fit_pca
from liftkit.fit.procrustes import fit_procrustes
from liftkit.fit.stream import Collection, Pass, collect, fitted_color, normalized
from liftkit.fit.verdict import KEPT, verdict
from liftkit.lift import Lift
from liftkit.options import FitOptions
from liftkit.progress import Observer, Silent

PUBLISHED: dict[str, ColorSpace] = {"oklab-paper": Oklab()}
"""Choices of ``--color`` that have a published normalization; all others are spaces that are fitted to the images."""
DEFAULT_COLOR = "oklab"

FIRST_CHECK = 64
JACOBIAN_IMAGES = 16


def color_names(color: str | None) -> tuple[str, ...]:
    """The color spaces whose moments a choice of ``--color`` needs.

    Raises:
        UsageError: if there is no such choice.
    """
    color = color or DEFAULT_COLOR
    if color == "auto":
        return ("oklab", "srgb")
    if color in PUBLISHED:
        return (PUBLISHED[color].name,)
    if color not in SPACES:
        raise UsageError(f"--color {color}: unknown; choose auto, {', '.join([*SPACES, *PUBLISHED])}")
    return (color,)


def fit_pass(
    source: PairSource,
    options: FitOptions,
    latent_patch: int,
    *,
    part: tuple[int, int] = (0, 1),
    checkpoint: Path | None = None,
    observer: Observer | None = None,
) -> Collection:
    """Gather moments for a fit, and stop early where that was asked for and the folds agree."""
    observer = observer or Silent()
    convergence = Convergence(latent_patch, observer) if options.num_images == "auto" else None
    work = Pass(source, color_names(options.color), latent_patch, part, checkpoint)
    if convergence is not None:
        work = replace(work, stop=convergence, together=work.together // 4)
    collection = collect(work, observer)
    if convergence is not None and not convergence.reached:
        observer.note(
            f"not converged after {collection.any.total.images} images: more, or more varied ones, would tell more"
        )
    return collection


class Convergence:
    """Ends a pass when fits on two halves of the images agree; asked whenever the number of images has doubled.

    They agree when the alignment that a half keeps under the other's fit, less its spread over halvings, is good by the
    verdict's own bound.
    """

    def __init__(self, latent_patch: int, observer: Observer, bound: float = KEPT.good) -> None:
        self.latent_patch, self.observer, self.bound = latent_patch, observer, bound
        self.next, self.reached = FIRST_CHECK, False

    def __call__(self, collection: Collection) -> bool:
        """True when the fit has converged."""
        total = collection.any.total
        fewest = min((half.count for half, _ in collection.any.halvings()), default=0)
        if total.images < self.next or fewest < total.latent_dim:
            return False
        while self.next <= total.images:
            self.next *= 2
        color = fitted_color(Oklab, total)
        kept = alignment_kept(
            collection.any.map(lambda moments: normalized(moments, color)),
            partial(fit_procrustes, latent_patch=self.latent_patch),
        )
        self.reached = mean(kept) - spread(kept) >= self.bound
        self.observer.note(
            f"after {total.images} images two halves keep {mean(kept):.4f} ± {spread(kept):.4f} of each other's "
            f"alignment ({'converged' if self.reached else 'stops'}: at least {self.bound})"
        )
        return self.reached


def fit_collected(
    collection: Collection,
    options: FitOptions,
    latent_patch: int,
    source: PairSource | None = None,
    observer: Observer | None = None,
) -> Lift:
    """The lift of gathered moments; its ``figures["alignment"]`` hold the report of docs/report.md.

    Args:
        collection: see :func:`fit_pass`, or merged from several.
        source: for pictures, and for the Jacobian, which needs the decoder; None leaves pictures out.

    Raises:
        UsageError: if the moments do not determine a lift, or the Jacobian is asked for without a source.
    """
    if collection.any.total.images == 0:
        left_out = source.tally.reasons() if source is not None else ""
        raise UsageError(f"no usable image: {left_out or 'the source is empty'}")
    try:
        name, reason = _choose_color(collection, options)
        (space,) = color_names(name)
        folds = collection.folds[space]
        color = PUBLISHED.get(name) or fitted_color(SPACES[space], folds.total)
        folds = folds.map(lambda moments: normalized(moments, color))
        fit = _fit_function(options, latent_patch, color, source, observer or Silent())
        lift = fit(folds.total)
        if options.rank is not None:
            return lift
        report = alignment(folds, fit)
    except (ValueError, torch.linalg.LinAlgError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot fit: {error}") from error
    gallery = _gallery(source, fit, folds, collection.done) if source is not None else None
    report |= {"pictures": gallery.figures if gallery else None, "color_reason": reason}
    report["source"] = source.describe() if source is not None else None
    # One Jacobian serves every fold: that its halves agree says nothing.
    without = ("alignment_kept",) if options.kind == "jacobian" else ()
    report["verdict"] = verdict(report, without)
    figures = {**lift.figures, "alignment": report}
    try:
        check_figures(figures)
    except ValueError as error:
        raise UsageError(
            f"cannot fit: {error}; the images, or the model's VAE, give numbers that say nothing"
        ) from error
    return replace(lift, figures=figures, pictures=gallery.pictures if gallery else {})


def _fit_function(
    options: FitOptions, latent_patch: int, color: ColorSpace, source: PairSource | None, observer: Observer
) -> Fit:
    """Moments to lift, by the chosen kind."""
    if options.kind == "pca":
        return partial(
            fit_pca,
            rank=options.rank,
            latent_patch=latent_patch,
            color=color,
            scale=options.scale,
            space=options.space,
        )
    if options.kind == "procrustes":
        return partial(fit_procrustes, latent_patch=latent_patch, color=color, scale=options.scale)
    if source is None:
        raise UsageError("--kind jacobian needs the model's decoder; moments alone do not have it")
    jacobian = source_jacobian(source, latent_patch, color, options.seed, observer)

    def fit(moments: TokenMoments) -> Lift:
        return fit_jacobian(jacobian, moments, latent_patch=latent_patch, color=color, scale=options.scale)

    return fit


def source_jacobian(
    source: PairSource,
    latent_patch: int,
    color: ColorSpace,
    seed: int,
    observer: Observer,
) -> torch.Tensor:
    """The mean Jacobian of decoder and color transform at the latents of a source's first images, (D, r)."""
    count = min(JACOBIAN_IMAGES, len(source))
    generator = torch.Generator().manual_seed(seed)
    total: torch.Tensor | None = None
    done = 0
    with observer.stage("fit: differentiating the decoder", count, "images") as advance:
        for _, latents, _ in source.pairs(range(count)):
            mean = mean_jacobian(
                decoder(source, color), latents, latent_patch, generator=generator, advance=advance
            ) * len(latents)
            total = mean if total is None else total + mean
            done += len(latents)
    if total is None:
        raise UsageError(f"no usable image among the first {count}: {source.tally.reasons()}")
    return total / done


def decoder(source: PairSource, color: ColorSpace) -> Callable[[torch.Tensor], torch.Tensor]:
    """Normalized latents to colors, differentiable."""
    return lambda latents: color.encode(source.space.decode_raw(latents))


def _choose_color(collection: Collection, options: FitOptions) -> tuple[str, str]:
    """The color space of a fit, and why."""
    if options.color != "auto":
        return options.color or DEFAULT_COLOR, "as asked"
    ceilings = {}
    for name, folds in collection.folds.items():
        color = fitted_color(SPACES[name], folds.total)
        moments = normalized(folds.total, color)
        lift = fit_procrustes(moments)
        energy = moments.pixel_gram.trace() - moments.pixel_sum.square().sum() / moments.count
        aligned = (moments.cross * lift.basis.T).sum() ** 2 / moments.latent_gram.trace()
        residual = moments.pixel_gram.trace() - aligned
        ceilings[name] = (
            (1 - residual / energy).item(),
            (1 - linear_map(moments).residual(moments).sum() / energy).item(),
        )
    found = ", ".join(
        f"{name}: {lift:.3f} by the lift, {linear:.3f} at most" for name, (lift, linear) in ceilings.items()
    )
    # Oklab's distances are closer to what is seen, and it finetunes better than its R^2 suggests; so sRGB has to be
    # clearly better to be taken.
    better = ceilings["srgb"][0] > ceilings["oklab"][0] + SRGB_MARGIN
    chosen = "srgb" if better else "oklab"
    why = "clearly better" if better else f"sRGB is not better by more than {SRGB_MARGIN}"
    return chosen, f"R^2 of pixels in {found}; {why}"


SRGB_MARGIN = 0.15


def _gallery(source: PairSource, fit: Fit, folds: FoldedMoments, done: int) -> Gallery | None:
    """Pictures of some images of every fold, by a lift that was fitted without it."""
    end, count = min(len(source), done or len(source)), len(folds.folds)
    used = (index for index, fold in enumerate(folds.folds) if fold.count)
    return make_gallery(
        source,
        (
            HeldOut(fit(rest), linear_map(rest), range(index, end, count)[:PER_FOLD])
            for index, (rest, _) in zip(used, folds.splits())
        ),
    )
