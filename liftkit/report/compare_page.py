"""The page of ``liftkit compare``: what the models paint from the same noise, what may be claimed, and the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from liftkit.data.images import to_signed
from liftkit.evaluate.comparison import Comparison, Row
from liftkit.evaluate.figures import BEST, FIGURES, Figure
from liftkit.evaluate.verdict import Standing, Verdict
from liftkit.report.charts import FAINT, INK, SERIES, chart
from liftkit.report.pages import page
from liftkit.report.pictures import data_uri, grid

SIDE = 256
"""Pixels of a shown image at most."""
DASHES = ["--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 1)), (0, (8, 3))]
STYLE = """<style>
.tied td, .tied th { padding: 2px; border: 0; font-weight: 400; } .tied td { width: 10%; }
.tied thead th { font-size: .75rem; line-height: 1.25; color: var(--faint); vertical-align: bottom; }
.tied tbody th { font-size: .85rem; vertical-align: middle; padding-right: .6rem; }
.wide table { max-width: none; } .wide th.number { white-space: normal; font-size: .8rem; font-weight: 400; }
.wide th.pixel { font-weight: 600; } .faint { color: var(--faint); }
</style>"""
HOW_TO = {
    "continued": "what more training alone adds. Train the latent base on, on the same images and for as long as the pixel "
    "model was finetuned (liftkit finetune RECIPE space=latent -o RUN), and give RUN/model by --continued",
    "scratch": "what the latent model brought along. Train the same pixel network from random weights by the same recipe "
    "(liftkit finetune RECIPE init=random -o RUN), and give RUN/model by --scratch",
}


def compare_page(found: Comparison) -> str:
    """The whole page of a comparison, self-contained."""
    models = [row for row in found.rows if row.role == "pixel"]
    names = ", ".join(row.label for row in models)
    lead = (
        f"{names} beside the latent base: {found.count} samples of each from the same noise, scored against "
        f"{found.real['reference']} real images that nothing was chosen by."
    )
    parts = [
        STYLE,
        "<h2>The same noise, the same prompts</h2>",
        tied_grid([row for row in found.rows if row.key in ("real", "base") or row.role == "pixel"], found.prompts),
        "".join(f"<p>{escape(note)}</p>" for note in found.notes),
        "<h2>What may be claimed</h2>",
        *(verdict_part(verdict, _given_controls(found)) for verdict in found.verdicts),
        "<h2>Figures</h2>",
        figures_part(found),
        missing_part(found.rows),
        charts(found),
        f"<details><summary>Provenance</summary><pre>{escape(json.dumps(_provenance(found), indent=2))}</pre></details>",
    ]
    return page("Pixels beside latents", lead, "".join(parts))


def tied_grid(rows: Sequence[Row], prompts: Sequence[str]) -> str:
    """A table of images: one row per model, one column per prompt, the prompts above."""
    head = "".join(f'<th scope="col">{escape(prompt)}</th>' for prompt in prompts)
    body = "".join(
        f'<tr><th scope="row">{escape(row.label)}</th>'
        + "".join(
            f'<td><img src="{_picture(image)}" alt="{escape(f"{row.label}: {prompt}")}"></td>'
            for image, prompt in zip(row.images, prompts)
        )
        + "</tr>"
        for row in rows
        if row.images is not None
    )
    table = f'<table class="tied"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll wide">{table}</div>'


def verdict_part(verdict: Verdict, labels: dict[str, str]) -> str:
    """A verdict in words, and in each figure how the model stands to each control.

    Args:
        verdict: of one model.
        labels: of the controls that were given, by key.
    """
    level = "good" if verdict.claims else "usable" if verdict.partial else "poor"
    head = "".join(f'<th class="number">{escape(label)}</th>' for label in labels.values())
    rows = "".join(
        f"<tr><td>{FIGURES[name].label}</td>{''.join(_standing_cell(found, key) for key in labels)}</tr>"
        for name, found in verdict.standings.items()
    )
    return (
        f'<div class="verdict {level}"><p><b>{escape(verdict.text)}</b></p></div><div class="scroll wide"><table>'
        f"<tr><th>{escape(verdict.label)}, compared with</th>{head}</tr>{rows}</table></div>"
    )


def _standing_cell(found: Standing, key: str) -> str:
    if key in found.beats:
        return '<td class="number"><b>better</b></td>'
    return f'<td class="number faint">{"worse" if key in found.behind else "level"}</td>'


def figures_part(found: Comparison) -> str:
    """All figures of all rows; the best of what models painted is bold."""
    head = "".join(
        f'<th class="number{" pixel" if row.role == "pixel" else ""}">{escape(row.label)}{"" if row.score else " (not given)"}</th>'
        for row in found.rows
    )
    body = "".join(_figure_row(found, name, figure) for name, figure in FIGURES.items())
    return (
        f'<div class="scroll wide"><table><tr><th></th>{head}</tr>{body}</table></div>'
        "<p><small>Bold: the best of what models painted, and what seeds alone cannot tell from it. "
        "docs/compare.md defines the figures and their tolerances.</small></p>"
    )


def _figure_row(found: Comparison, name: str, figure: Figure) -> str:
    best = found.best(name)
    cells = ""
    for row in found.rows:
        value = figure.show(row.score.figures[name] if row.score is not None else None)
        cells += f'<td class="number">{f"<b>{value}</b>" if row.key in best else value}</td>'
    return f"<tr><td>{figure.label}<small>{figure.meaning}; {BEST[figure.kind]}</small></td>{cells}</tr>"


def missing_part(rows: Sequence[Row]) -> str:
    """How to make the controls that were not given."""
    items = "".join(f"<li><b>{escape(row.label)}</b>: {HOW_TO[row.key]}.</li>" for row in rows if row.score is None)
    return f"<p>Not given, and without them nothing is claimed:</p><ul>{items}</ul>" if items else ""


def charts(found: Comparison) -> str:
    """Radial spectra of all rows over the reference's, and bars of the figures that claims rest on."""
    rows = [row for row in found.rows if row.score is not None]
    drawn = [spectra(rows)]
    for name in ("patch_frechet", "two_sample"):
        if any(row.score.figures[name] is not None for row in rows if row.score is not None):
            drawn.append(bars(found, name))
    return f'<div class="charts">{"".join(drawn)}</div>'


def spectra(rows: Sequence[Row]) -> str:
    """The difference of every row's radial spectrum to the reference's."""
    dashes, colors = iter(DASHES * len(rows)), iter([SERIES[0], SERIES[2]] * len(rows))
    with chart("Spectra over those of real images: above 0 is too rough, below too smooth") as (plot, result):
        plot.axhline(0.0, color=FAINT, linewidth=1)
        for row in rows:
            if row.score is None or row.role == "real":
                continue
            style: dict[str, Any] = {"color": next(colors)} if row.role == "pixel" else {"color": SERIES[1]}
            if row.role == "control" and row.key != "base":
                style = {"color": FAINT, "linestyle": next(dashes), "linewidth": 1.3}
            plot.plot(range(1, len(row.score.spectrum) + 1), row.score.spectrum, label=row.label, **style)
        plot.set_xlabel("cycles per image")
        plot.set_ylabel("dB")
        plot.figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return result[0]


def bars(found: Comparison, name: str) -> str:
    """One figure of all rows; what real images score is a dotted line."""
    figure, best = FIGURES[name], found.best(name)
    values = [(row, row.score.figures[name]) for row in reversed(found.rows) if row.score is not None]
    shown = [(row, value) for row, value in values if value is not None and row.role != "real"]
    leaders = ", ".join(row.label for row, _ in reversed(shown) if row.key in best)
    with chart(f"{figure.label[0].upper()}{figure.label[1:]}: best is {leaders}") as (plot, result):
        colors = [SERIES[0] if row.role == "pixel" else SERIES[1] if row.key == "base" else FAINT for row, _ in shown]
        drawn = plot.barh(range(len(shown)), [value for _, value in shown], 0.7, color=colors)
        plot.bar_label(drawn, [figure.show(value) for _, value in shown], padding=3, fontsize=8, color=INK)
        plot.set_yticks(range(len(shown)), [row.label for row, _ in shown])
        plot.grid(False, axis="y")
        if figure.kind == "distance":
            plot.set_xscale("log")
        plot.margins(x=0.18)
        if figure.kind == "chance":
            plot.set_xlim(left=0.45)
        for _, value in (pair for pair in values if pair[0].role == "real"):
            plot.axvline(value, color=INK, linewidth=1, linestyle=":")
        plot.set_xlabel(
            f"{BEST[figure.kind]}; dotted: real images" + (", log scale" if figure.kind == "distance" else "")
        )
    return result[0]


def _given_controls(found: Comparison) -> dict[str, str]:
    return {row.key: row.label for row in found.rows if row.role == "control" and row.score is not None}


def _picture(image: Tensor) -> str:
    """One image, uint8 (3, S, S), as data, at most SIDE wide."""
    shown = to_signed(image)[None]
    if image.shape[-1] > SIDE:
        shown = torch.nn.functional.interpolate(shown, size=(SIDE, SIDE), mode="area")
    return data_uri(grid(shown, columns=1))


def _provenance(found: Comparison) -> dict[str, Any]:
    plain = found.to_dict()
    kept = {key: plain[key] for key in ("schema", "count", "real", "settings", "versions")}
    return {**kept, "rows": {row.label: row.detail for row in found.rows if row.detail}}
