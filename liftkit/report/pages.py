"""Self-contained HTML: pictures first, then figures; light and dark; nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from liftkit.report.charts import Axis, Line, bar_chart, line_chart
from liftkit.report.data import Report, compare, picture_rows
from liftkit.report.glossary import GLOSSARY
from liftkit.report.pictures import PATCHES, Row, basis_patches, data_uri, gallery_rows, grid
from liftkit.report.templating import render

FIGURES = (
    ("energy_captured", "Pixel energy captured by `A`", "share of the pixels' energy inside the subspace, 0 to 1"),
    ("energy_best", "... by the best subspace of that rank", "PCA, the optimum"),
    ("r2_pixels", "Pixel variance explained by the lift `s A z`", "1 is perfect; one rotation and one scale"),
    ("r2_pixels_lsq", "... with the least-squares scale", "1 is perfect"),
    ("r2_pixels_linear", "... by an unconstrained linear map", "the ceiling of any lift"),
    ("r2_latents", "Latent variance explained by the projected pixels", "linear regression on `A^T x`; 1 is perfect"),
    ("cosine", "Alignment of `A^T x` and `z`", "mean cosine, -1 to 1"),
    ("cosine_chance", "... by chance", "if `A` is turned at random inside its subspace"),
    ("alignment_kept", "Alignment kept", "share that one half of the images keeps under the fit of the other, up to 1"),
    ("pixel_detail", "Detail of the images", "share of pixel variance inside patches, 0 to 1"),
    ("latent_rms", "Size of the latents", "root mean square; 1 is what flow models expect"),
    ("scale", "Scale `s`", "as used"),
    ("scale_lsq", "Least-squares scale", "minimizes the squared error"),
    ("scale_gap", "Gap between the scales", "0 is perfect; 1 minus the alignment"),
)
PICTURE_NAMES = {
    "image": "image",
    "vae": "VAE",
    "projection": "projection `A A^T x`",
    "lift": "lift `s A z`",
    "linear": "unconstrained linear map",
}


@dataclass(frozen=True)
class Shown:
    """A row of images, each of which a tap enlarges."""

    label: str
    sources: list[str]

    @property
    def name(self) -> str:
        """What stands before the colon of the label."""
        return self.label.partition(": ")[0]

    @property
    def rest(self) -> str:
        """What stands behind it."""
        return self.label.partition(": ")[2]


def shown(row: Row) -> Shown:
    """A row of images for a page."""
    return Shown(row.label, [data_uri(grid(row.images[index : index + 1], 1)) for index in range(len(row.images))])


def calibration_chart(scale: float) -> Markup:
    """The input gain k and the network's time tau over the pixel noise level."""
    sigmas = [index / 100 for index in range(101)]
    gains = [1.0 / (scale + (1.0 - scale) * sigma) for sigma in sigmas]
    taus = [gain * sigma for gain, sigma in zip(gains, sigmas)]
    lines = [Line("gain k", sigmas, gains), Line("network time tau", sigmas, taus, dashed=True)]
    what = "the same" if scale == 1 else "an earlier, cleaner" if scale > 1 else "a later, noisier"
    return line_chart(
        f"The network gets {what} time {'as' if scale == 1 else 'than'} sigma",
        lines,
        Axis("sigma", low=0.0, high=1.0),
        Axis("k, tau", low=0.0),
    )


def alignment_charts(report: Report) -> list[Markup]:
    """Spectrum, principal angles, channels and calibration."""
    alignment, rank = report.alignment, report.lift.rank
    assert alignment is not None
    spectrum = alignment["spectrum"]
    floor = max(spectrum) * 1e-7
    captured = alignment["figures"]["energy_captured"]["fitted"]
    angles = alignment["angles"]
    latents = alignment["channels"]["latents"]
    # Lifts of earlier versions have no spread per channel.
    spread = alignment["channels"].get("spread")
    colors = (
        ("lightness", "green-red", "blue-yellow") if report.lift.color.name == "oklab" else ("red", "green", "blue")
    )
    by_lift = alignment["channels"]["colors_lift"]
    shown_by_lift = [max(value, -0.5) for value in by_lift]
    return [
        line_chart(
            f"A holds {captured:.1%} of the pixels' energy",
            [Line("energy per direction", list(range(1, len(spectrum) + 1)), [max(v, floor) for v in spectrum])],
            Axis("principal direction of pixel tokens"),
            Axis("energy per token", log=True),
            [(rank, f"rank {rank}")],
        ),
        line_chart(
            f"Where there is energy, halves of the images agree to {angles['halves_energy']:.1f}°",
            [
                Line("to the PCA subspace", range(1, len(angles["pca"]) + 1), angles["pca"]),
                Line("between halves", range(1, len(angles["halves"]) + 1), angles["halves"], dashed=True),
            ],
            Axis("principal angle, smallest first"),
            Axis("degrees", low=0.0, high=90.0),
        ),
        bar_chart(
            f"Latent channels readable from pixels: {min(latents):.2f} to {max(latents):.2f}",
            [str(index) for index in range(len(latents))],
            [("R² from Aᵀ x", [max(value, 0.0) for value in latents])],
            Axis("R²", low=0.0, high=1.0),
            "latent channel",
            _spread(spread, "latents"),
        ),
        bar_chart(
            carried(colors, by_lift),
            colors,
            [
                ("lift", shown_by_lift),
                ("unconstrained", alignment["channels"]["colors_linear"]),
            ],
            Axis("R²", low=min(0.0, *shown_by_lift), high=1.0),
            "color channel",
            _spread(spread, "colors_lift", "colors_linear"),
        ),
        calibration_chart(report.lift.scale),
    ]


def carried(names: Sequence[str], r2: Sequence[float]) -> str:
    """In words, which color channels a lift carries, by their R²: one of 0 or less is carried no better than its mean."""
    best, least = (names[r2.index(value)] for value in (max(r2), min(r2)))
    if max(r2) <= 0:
        return "The lift carries no color channel"
    return f"The lift carries {best} best, {least} {'worst' if min(r2) > 0 else 'not at all'}"


def _spread(spread: dict[str, list[float]] | None, *names: str) -> list[list[float]] | None:
    """The spread of several series, if all of them have one."""
    return [spread[name] for name in names] if spread and set(names) <= spread.keys() else None


def alignment_page(report: Report, other: Report | None = None) -> str:
    """The whole report of a lift.

    Args:
        report: of a converted folder or a saved lift.
        other: to compare with, side by side.
    """
    lift, alignment = report.lift, report.alignment
    lead = f"Rank {lift.rank} of {lift.dim}, scale {lift.scale:.4f}, {lift.figures.get('kind', 'given')} fit in {lift.color.name}."
    rows = gallery_rows(lift)
    patches = Row(
        f"Basis vectors: the {min(lift.rank, PATCHES)} smoothest, each as a patch of pixels", basis_patches(lift)
    )
    known = {key: value for key, value in report.to_dict().items() if key not in ("alignment", "proof")}
    if alignment:
        known["data"] = alignment.get("source")
    compared = compare(report, other) if other is not None else {"rows": [], "angles": None}
    pictures = alignment.get("pictures") if alignment else None
    return render(
        "alignment.html",
        title=report.name,
        lead=lead,
        report=report,
        alignment=alignment,
        gallery=[shown(row) for row in rows],
        patches=shown(patches),
        figures=FIGURES,
        picture_rows=picture_rows(pictures) if pictures else [],
        picture_names=PICTURE_NAMES,
        charts=alignment_charts(report) if alignment else [calibration_chart(lift.scale)],
        other=other,
        compared=compared,
        compared_chart=_angles_chart(compared["angles"]) if compared["angles"] else "",
        proof=report.proof,
        glossary=GLOSSARY,
        provenance=json.dumps(known, indent=2),
    )


def _angles_chart(angles: list[float]) -> Markup:
    """Principal angles between two subspaces, rising, in degrees."""
    lines = [Line("between the two", range(1, len(angles) + 1), angles)]
    title = f"The subspaces are {angles[0]:.0f}° to {angles[-1]:.0f}° apart"
    return line_chart(title, lines, Axis("principal angle, smallest first"), Axis("degrees", low=0.0, high=90.0))
