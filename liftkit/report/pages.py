"""Self-contained HTML: pictures first, then figures; light and dark; nothing is fetched."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from liftkit.report.charts import Axis, Line, bar_chart, line_chart
from liftkit.report.data import Report, picture_rows
from liftkit.report.pictures import Row, basis_patches, data_uri, gallery_rows, grid

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1a; --faint: #66665f; --ground: #fcfcfa; --line: #e2e2dc;
  --first: #2763b8; --second: #c2571a; --third: #3c8a4d; }
@media (prefers-color-scheme: dark) { :root { --ink: #ecece6; --faint: #a3a39b; --ground: #191918; --line: #383834;
  --first: #7fb0ff; --second: #f0945a; --third: #7fcf93; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
  padding: 2rem 1.2rem 4rem; max-width: 64rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { max-width: 44rem; } .lead { color: var(--faint); margin-top: 0; }
.verdict { border-left: 4px solid var(--first); padding: .1rem 0 .1rem 1rem; max-width: 46rem; }
.verdict.usable { border-color: var(--second); } .verdict.poor { border-color: #c22; }
figure { margin: 1.1rem 0; } figcaption { color: var(--faint); font-size: .9rem; margin-bottom: .3rem; }
figcaption b { color: var(--ink); font-weight: 600; }
img { display: block; width: 100%; image-rendering: pixelated; border-radius: 3px; }
.zoom { display: none; } .zoom + label { display: block; cursor: zoom-in; overflow-x: auto; }
.zoom:checked + label { cursor: zoom-out; } .zoom:checked + label img { width: 300%; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: .4rem 2rem; }
.chart { margin: .6rem 0; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; max-width: 50rem; margin-bottom: 1.6rem; }
td, th { text-align: left; padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { white-space: normal; vertical-align: bottom; }
td small { color: var(--faint); display: block; } details pre { overflow: auto; font-size: .8rem; }
@media (max-width: 40rem) { td, th { padding-right: .5rem; font-size: .82rem; } }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""

FIGURES = (
    ("energy_captured", "Pixel energy captured by A", "share of the pixels' energy inside the subspace, 0 to 1"),
    ("energy_best", "... by the best subspace of that rank", "PCA, the optimum"),
    ("r2_pixels", "Pixel variance explained by the lift s A z", "1 is perfect; one rotation and one scale"),
    ("r2_pixels_lsq", "... with the least-squares scale", "1 is perfect"),
    ("r2_pixels_linear", "... by an unconstrained linear map", "the ceiling of any lift"),
    ("r2_latents", "Latent variance explained by the projected pixels", "linear regression on A^T x; 1 is perfect"),
    ("cosine", "Alignment of A^T x and z", "mean cosine, -1 to 1"),
    ("cosine_chance", "... by chance", "if A is turned at random inside its subspace"),
    ("alignment_kept", "Alignment kept", "share that one half of the images keeps under the fit of the other, up to 1"),
    ("pixel_detail", "Detail of the images", "share of pixel variance inside patches, 0 to 1"),
    ("latent_rms", "Size of the latents", "root mean square; 1 is what flow models expect"),
    ("scale", "Scale s", "as used"),
    ("scale_lsq", "Least-squares scale", "minimises the squared error"),
    ("scale_gap", "Gap between the scales", "0 is perfect; 1 minus the alignment"),
)
PICTURE_NAMES = {
    "image": "image",
    "vae": "VAE",
    "projection": "projection A A^T x",
    "lift": "lift s A z",
    "linear": "unconstrained linear map",
}


def page(title: str, lead: str, body: str) -> str:
    """A whole page. ``title`` and ``lead`` are text, ``body`` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}</body></html>\n'
    )


def gallery(rows: list[Row]) -> str:
    """One figure per row of images; a tap enlarges it."""
    return "".join(_figure(index, row) for index, row in enumerate(rows))


def _figure(index: int, row: Row) -> str:
    name, _, rest = row.label.partition(": ")
    caption = f"<b>{escape(name)}</b>" + (f": {escape(rest)}" if rest else "")
    source = data_uri(grid(row.images, columns=min(len(row.images), 16)))
    picture = f'<img src="{source}" alt="{escape(row.label)}">'
    return (
        f'<figure><figcaption>{caption}</figcaption><input class="zoom" type="checkbox" id="zoom-{index}">'
        f'<label for="zoom-{index}">{picture}</label></figure>'
    )


def verdict_block(verdict: dict[str, Any]) -> str:
    """The verdict in words, and what to try."""
    advice = "".join(f"<li>{escape(text)}</li>" for text in verdict["advice"])
    rows = "".join(
        f'<tr><td>{escape(reason["meaning"])}</td><td class="number">{_number(reason["value"])}</td>'
        f'<td>{reason["level"]}</td><td class="number">{reason["good"]:g}</td><td class="number">{reason["poor"]:g}</td></tr>'
        for reason in verdict["reasons"]
    )
    return (
        f'<div class="verdict {verdict["level"]}"><p><b>{escape(verdict["text"])}</b></p>'
        + (f"<p>To try:</p><ul>{advice}</ul>" if advice else "")
        + '<details><summary>What it rests on</summary><div class="scroll"><table><tr><th></th><th class="number">value</th>'
        + f'<th></th><th class="number">good from</th><th class="number">poor beyond</th></tr>{rows}</table></div></details></div>'
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def figures_table(alignment: dict[str, Any]) -> str:
    """The figures, held out with their spread over folds, and as the fit sees its own images."""
    rows = "".join(
        f"<tr><td>{escape(label)}<small>{escape(meaning)}</small></td>"
        f'<td class="number">{alignment["figures"][name]["value"]:.4f}</td>'
        f'<td class="number">± {alignment["figures"][name]["spread"]:.4f}</td>'
        f'<td class="number">{alignment["figures"][name]["fitted"]:.4f}</td></tr>'
        for name, label, meaning in FIGURES
        # Lifts of earlier versions lack some.
        if name in alignment["figures"]
    )
    return (
        f'<div class="scroll"><table><tr><th>{alignment["images"]} images, {alignment["tokens"]} tokens, '
        f'{alignment["folds"]} folds</th><th class="number">held out</th><th class="number">spread</th>'
        f'<th class="number">fitted</th></tr>{rows}</table></div>'
    )


def pictures_table(pictures: dict[str, Any]) -> str:
    """PSNR and patch-grid ratio of each way to see the images, held out."""
    rows = "".join(
        f'<tr><td>{escape(PICTURE_NAMES[row.name])}</td><td class="number">{row.psnr}</td>'
        f'<td class="number">{row.psnr_vae}</td><td class="number">{row.patch_grid}</td></tr>'
        for row in picture_rows(pictures)
    )
    return (
        f'<div class="scroll"><table><tr><th>{pictures["count"]} images, held out</th><th class="number">PSNR</th>'
        f'<th class="number">PSNR against the VAE</th><th class="number">patch-grid ratio</th></tr>{rows}</table></div>'
        "<p><small>PSNR in dB against the image, and against the VAE's own reconstruction: the more, the closer. "
        "The patch-grid ratio is the energy of differences across patch borders over "
        "that inside patches: 1 where patches do not show.</small></p>"
    )


def proof_table(proof: dict[str, Any]) -> str:
    """The proof of Theorem 1 as it was run."""
    rows, columns = proof["tokens"]
    alone = "The projections of both models, every other tensor being the source's bit for bit,"
    who = alone if proof.get("kind") == "projections" else "Both models"
    return (
        f"<p>{who} ran from tied noise, x = eps and z = A<sup>T</sup> eps, over "
        f"{proof['steps']} Euler steps on {rows} x {columns} tokens. The largest deviation, over all steps and the final "
        "sample, relative to the largest value:</p><table>"
        f'<tr><td>projections in full precision</td><td class="number">{proof["exact"]:.1e}</td></tr>'
        f'<tr><td>projections as stored, {escape(proof["dtype"])}</td><td class="number">{proof["stored"]:.1e}</td></tr>'
        "</table>"
    )


def calibration_chart(scale: float) -> str:
    """The input gain k and the network's time tau over the pixel noise level."""
    sigmas = [index / 100 for index in range(101)]
    gains = [1.0 / (scale + (1.0 - scale) * sigma) for sigma in sigmas]
    taus = [gain * sigma for gain, sigma in zip(gains, sigmas)]
    lines = [Line("gain k", sigmas, gains), Line("network time tau", sigmas, taus, dashed=True)]
    what = "the same" if scale == 1 else "an earlier, cleaner" if scale > 1 else "a later, noisier"
    return line_chart(
        f"The network is told {what} time {'as' if scale == 1 else 'than'} sigma",
        lines,
        Axis("sigma", low=0.0, high=1.0),
        Axis("k, tau", low=0.0),
    )


def alignment_charts(report: Report) -> str:
    """Spectrum, principal angles, channels and calibration."""
    alignment, rank = report.alignment, report.lift.rank
    assert alignment is not None
    spectrum = alignment["spectrum"]
    floor = max(spectrum) * 1e-7
    captured = alignment["figures"]["energy_captured"]["fitted"]
    numbers = list(range(1, rank + 1))
    angles = alignment["angles"]
    latents = alignment["channels"]["latents"]
    # Lifts of earlier versions have no spread per channel.
    spread = alignment["channels"].get("spread")
    colors = (
        ("lightness", "green-red", "blue-yellow") if report.lift.color.name == "oklab" else ("red", "green", "blue")
    )
    by_lift = [max(value, -0.5) for value in alignment["channels"]["colors_lift"]]
    charts = (
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
                Line("to the PCA subspace", numbers, angles["pca"]),
                Line("between halves", numbers, angles["halves"], dashed=True),
            ],
            Axis("principal angle, smallest first"),
            Axis("degrees", low=0.0, high=90.0),
        ),
        bar_chart(
            f"Latent channels readable from pixels: {min(latents):.2f} to {max(latents):.2f}",
            [str(index) for index in range(len(latents))],
            [("R^2 from A^T x", [max(value, 0.0) for value in latents])],
            Axis("R^2", low=0.0, high=1.0),
            "latent channel",
            spread and [spread["latents"]],
        ),
        bar_chart(
            f"The lift carries {colors[by_lift.index(max(by_lift))]} best, {colors[by_lift.index(min(by_lift))]} worst",
            colors,
            [
                ("lift", by_lift),
                ("unconstrained", alignment["channels"]["colors_linear"]),
            ],
            Axis("R^2", low=min(0.0, *by_lift), high=1.0),
            "colour channel",
            spread and [spread["colors_lift"], spread["colors_linear"]],
        ),
        calibration_chart(report.lift.scale),
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def alignment_page(report: Report, other: Report | None = None) -> str:
    """The whole report of a lift.

    Args:
        report: of a converted folder or a saved lift.
        other: to compare with, side by side.
    """
    lift, alignment = report.lift, report.alignment
    lead = f"Rank {lift.rank} of {lift.dim}, scale {lift.scale:.4f}, {lift.figures.get('kind', 'given')} fit in {lift.color.name}."
    parts = [verdict_block(alignment["verdict"])] if alignment else []
    rows = gallery_rows(lift)
    if rows:
        parts.append(f"<h2>What the lift carries over</h2>{gallery(rows)}")
    patches = Row(f"Basis vectors: the {min(lift.rank, 32)} smoothest, each as a patch of pixels", basis_patches(lift))
    parts.append(f"<h2>What A is made of</h2>{_figure(len(rows), patches)}")
    if alignment:
        parts.append(f"<h2>How well latents and pixels align</h2>{figures_table(alignment)}")
        parts.append(pictures_table(alignment["pictures"]) if alignment["pictures"] else "")
        parts.append(alignment_charts(report))
    else:
        parts.append(f'<div class="charts">{calibration_chart(lift.scale)}</div>')
    if other is not None:
        parts.append(comparison(report, other))
    if report.proof:
        parts.append(f"<h2>The converted model does what its source does</h2>{proof_table(report.proof)}")
    known = {key: value for key, value in report.to_dict().items() if key not in ("alignment", "proof")}
    if alignment:
        known["data"] = alignment["source"]
    parts.append(f"<details><summary>Provenance</summary><pre>{escape(json.dumps(known, indent=2))}</pre></details>")
    return page(report.name, lead, "".join(parts))


def comparison(report: Report, other: Report) -> str:
    """Two lifts side by side: their figures, and the angles between them where their spaces allow."""
    from liftkit.report.data import compare

    found = compare(report, other)
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{a}</td><td class="number">{b}</td></tr>'
        for name, a, b in found["rows"]
    )
    chart = ""
    if found["angles"]:
        numbers = list(range(1, len(found["angles"]) + 1))
        lines = [Line("between the two", numbers, found["angles"])]
        title = f"The subspaces are {found['angles'][0]:.0f}° to {found['angles'][-1]:.0f}° apart"
        chart = line_chart(title, lines, Axis("principal angle, smallest first"), Axis("degrees", low=0.0, high=90.0))
    return (
        f'<h2>Compared</h2><div class="scroll"><table><tr><th></th><th class="number">{escape(report.name)}</th>'
        f'<th class="number">{escape(other.name)}</th></tr>{rows}</table></div><div class="charts">{chart}</div>'
    )
