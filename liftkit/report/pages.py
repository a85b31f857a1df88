"""Self-contained HTML: pictures first, then figures; light and dark; nothing is fetched."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from liftkit.report.pictures import Row, data_uri, grid

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1a; --faint: #6b6b66; --ground: #fcfcfa; --line: #e2e2dc; }
@media (prefers-color-scheme: dark) { :root { --ink: #ecece6; --faint: #a3a39b; --ground: #191918; --line: #383834; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
  padding: 2rem 1.2rem 4rem; max-width: 64rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { max-width: 44rem; } .lead { color: var(--faint); margin-top: 0; }
figure { margin: 1rem 0; } figcaption { color: var(--faint); font-size: .9rem; margin-bottom: .3rem; }
figcaption b { color: var(--ink); font-weight: 600; }
img { display: block; width: 100%; image-rendering: pixelated; border-radius: 3px; }
table { border-collapse: collapse; width: 100%; max-width: 46rem; }
td, th { text-align: left; padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { color: var(--faint); display: block; }
details pre { overflow: auto; font-size: .8rem; }
@media print { body { max-width: none; padding: 0; } figure { break-inside: avoid; } }
"""

FIGURES = (
    ("energy_captured", "Pixel energy captured by A", "share of the pixels' energy inside the subspace, 0 to 1"),
    ("energy_best", "... by the best subspace of that rank", "PCA, the optimum"),
    ("r2_pixels", "Pixel variance explained by the lift s A z", "1 is perfect; one rotation and one scale"),
    ("r2_pixels_linear", "... by an unconstrained linear map", "the ceiling of any lift"),
    ("r2_latents", "Latent variance explained by A^T x / s", "1 is perfect"),
    ("scale", "Scale s", "matches the energy that A captures"),
    ("scale_least_squares", "Least-squares scale", "minimises the squared error; the gap to s shows the misfit"),
)


def page(title: str, lead: str, body: str) -> str:
    """A whole page. ``title`` and ``lead`` are text, ``body`` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}</body></html>\n'
    )


def gallery(rows: list[Row]) -> str:
    """One figure per row of images."""
    return "".join(_figure(row) for row in rows)


def _figure(row: Row) -> str:
    name, _, rest = row.label.partition(": ")
    caption = f"<b>{escape(name)}</b>" + (f": {escape(rest)}" if rest else "")
    source = data_uri(grid(row.images, columns=len(row.images)))
    return f'<figure><figcaption>{caption}</figcaption><img src="{source}" alt="{escape(row.label)}"></figure>'


def figures_table(alignment: dict[str, dict[str, Any]]) -> str:
    """The alignment figures, fitted and held-out images side by side."""
    columns = [(key, title) for key, title in (("held_out", "held out"), ("fitted", "fitted")) if key in alignment]
    head = "".join(f'<th class="number">{title} ({alignment[key]["images"]} images)</th>' for key, title in columns)
    rows = "".join(
        f"<tr><td>{escape(label)}<small>{escape(meaning)}</small></td>"
        + "".join(f'<td class="number">{alignment[key][name]:.4f}</td>' for key, _ in columns)
        + "</tr>"
        for name, label, meaning in FIGURES
    )
    return f"<table><tr><th>Figure</th>{head}</tr>{rows}</table>"


def proof_table(proof: dict[str, Any]) -> str:
    """The proof of Theorem 1 as it was run."""
    rows, columns = proof["tokens"]
    return (
        "<p>Both models ran from tied noise, x = eps and z = A<sup>T</sup> eps, over "
        f"{proof['steps']} Euler steps on {rows} x {columns} tokens. The largest deviation, over all steps and the final "
        "sample, relative to the largest value:</p><table>"
        f'<tr><td>projections in full precision</td><td class="number">{proof["exact"]:.1e}</td></tr>'
        f'<tr><td>projections as stored, {escape(proof["dtype"])}</td><td class="number">{proof["stored"]:.1e}</td></tr>'
        "</table>"
    )


def alignment_page(title: str, report: dict[str, Any], rows: list[Row]) -> str:
    """The page that a conversion leaves in its folder.

    Args:
        title: names the model.
        report: what ``alignment.json`` holds.
        rows: pictures, may be empty.
    """
    lead = f"Rank {report['rank']} of {report['dim']}, scale {report['scale']:.4f}, colour space {report['color']['name']}."
    alignment = report["alignment"]
    figures = figures_table(alignment) if alignment else "<p>A saved lift was reused; it came without figures.</p>"
    provenance = {key: value for key, value in report.items() if key not in ("alignment", "proof")}
    body = (
        (f"<h2>What the lift carries over</h2>{gallery(rows)}" if rows else "")
        + f"<h2>How well latents and pixels align</h2>{figures}"
        + f"<h2>The converted model does what its source does</h2>{proof_table(report['proof'])}"
        + f"<details><summary>Provenance</summary><pre>{escape(json.dumps(provenance, indent=2))}</pre></details>"
    )
    return page(title, lead, body)
