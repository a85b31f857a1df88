"""From a basis to a lift: the scale, by either rule, and the checks that every fit shares."""

from __future__ import annotations

from math import isqrt

from torch import Tensor

from liftkit.color import ColorSpace, Oklab
from liftkit.fit.moments import TokenMoments
from liftkit.lift import Lift
from liftkit.options import ScaleRule

FLAT = 1e-9
"""Share of the pixels' energy that has to vary; what is below is rounding."""


def check_moments(moments: TokenMoments, rank: int) -> None:
    """Raise unless moments determine a basis of a rank.

    Raises:
        ValueError: if there are fewer tokens than the rank, or no energy.
    """
    if moments.count < rank:
        raise ValueError(f"{moments.count} tokens cannot determine a basis of rank {rank}; give more images")
    if not moments.latent_gram.trace() > 0 or not moments.pixel_gram.trace() > 0:
        raise ValueError("latents or pixels have no energy; are all images of one color?")
    # Colors with fixed constants have energy where nothing varies.
    mean = moments.pixel_sum / moments.count
    if not moments.pixel_gram.trace() / moments.count - mean @ mean > FLAT * moments.pixel_gram.trace() / moments.count:
        raise ValueError("pixels do not vary; are all images of one color?")


def scales(basis: Tensor, moments: TokenMoments) -> dict[ScaleRule, float]:
    """Both scales of a basis (D, r).

    ::

        norm = sqrt(tr(A^T G_x A) / sum |z|^2)      as the paper: the energy that A captures is matched
        lsq  = tr(A C) / sum |z|^2                  E|x - s A z|^2 is smallest

    Returns:
        ``norm`` > 0 and ``lsq``, which alignment makes positive.
    """
    energy = moments.latent_gram.trace()
    captured = (basis * (moments.pixel_gram @ basis)).sum()
    return {"norm": (captured / energy).sqrt().item(), "lsq": ((moments.cross * basis.T).sum() / energy).item()}


def scaled_lift(
    basis: Tensor,
    moments: TokenMoments,
    *,
    kind: str,
    latent_patch: int,
    color: ColorSpace | None,
    rule: ScaleRule,
) -> Lift:
    """A lift of a basis (D, r), scaled by moments; its ``figures`` say how it came about.

    Raises:
        ValueError: if the least-squares scale is asked for and latents and pixels do not align at all.
    """
    both = scales(basis, moments)
    if not both[rule] > 0:
        raise ValueError(
            f"the {rule} scale is {both[rule]:.3g}: latents and pixels do not align; are they of the same images?"
        )
    captured = (basis * (moments.pixel_gram @ basis)).sum() / moments.pixel_gram.trace()
    return Lift(
        basis=basis,
        scale=both[rule],
        patch_size=isqrt(moments.pixel_dim // 3),
        latent_patch=latent_patch,
        color=color if color is not None else Oklab(),
        figures={
            "kind": kind,
            "images": moments.images,
            "tokens": moments.count,
            "scale_rule": rule,
            "scale_norm": both["norm"],
            "scale_least_squares": both["lsq"],
            "energy_captured": captured.item(),
        },
    )
