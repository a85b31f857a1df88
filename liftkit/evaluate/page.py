"""The page of ``liftkit compare``: what the models paint from the same noise, what may be claimed, and the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from liftkit.color import to_signed
from liftkit.evaluate.comparison import Comparison, Row
from liftkit.evaluate.figures import FIGURES
from liftkit.evaluate.metrics import words
from liftkit.report.charts import FAINT, INK, SERIES, chart, plain_label
from liftkit.report.glossary import GLOSSARY
from liftkit.report.pictures import data_uri, grid
from liftkit.report.templating import render

SIDE = 256
"""Pixels of a shown image at most."""
WORDS = ("tied noise", "A", "lift", "token, patch", "guidance")
"""Explained below the figures."""
DASHES = ["--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 1)), (0, (8, 3))]
COLUMNS = {
    "real": "the real images whose captions are painted: what a perfect model would score",
    "vae": "control: the same images through the base's VAE, what a latent model could show at best",
    "base": "control: the latent model that the pixel models were made from",
    "unsharp": "control: the base's images, sharpened as much as helps them most",
    "noise": "control: the base's images with as much white noise as helps them most",
    "continued": "control: the base, trained on for as long on the same images",
    "scratch": "control: the pixel network, trained from random weights by the same recipe",
}
"""What stands in each column that is no pixel model's."""
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
        f"{found.real['reference']} real images that no setting was tuned on."
    )
    # Pixel models go first: on a narrow screen the other columns are a swipe away.
    rows = sorted((row for row in found.rows if row.score is not None), key=lambda row: row.role != "pixel")
    tied = [row for row in found.rows if row.key in ("real", "base") or row.role == "pixel"]
    return render(
        "compare.html",
        title="Pixels beside latents",
        lead=lead,
        prompts=found.prompts,
        tied=[_tied_row(row, found.prompts) for row in tied if row.images is not None],
        notes=found.notes,
        verdicts=found.verdicts,
        controls=_given_controls(found),
        rows=rows,
        figures=FIGURES,
        lines=[line for name in FIGURES if (line := _figure_row(found, rows, name))],
        columns=COLUMNS,
        metrics=[(FIGURES[name].label, about.get("left_out") or words(about)) for name, about in found.metrics.items()],
        missing=[row for row in found.rows if row.score is None],
        how_to=HOW_TO,
        glossary={word: GLOSSARY[word] for word in WORDS},
        charts=charts(found),
        provenance=json.dumps(_provenance(found), indent=2),
    )


def _tied_row(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """The images of a model, each with its prompt."""
    assert row.images is not None
    return {"label": row.label, "images": [(prompt, _picture(image)) for image, prompt in zip(row.images, prompts)]}


def _figure_row(found: Comparison, rows: Sequence[Row], name: str) -> dict[str, Any]:
    """One figure of these rows, and which of them are the best of what models painted; empty if none of them has it."""
    figure, best = FIGURES[name], found.best(name)
    values = [(row.key in best, row.score.figures[name] if row.score is not None else None) for row in rows]
    if all(value is None for _, value in values):
        return {}
    return {"figure": figure, "cells": [(leads, figure.show(value)) for leads, value in values]}


def charts(found: Comparison) -> list[Markup]:
    """Radial spectra of all rows over the reference's, and bars of the figures that claims rest on."""
    rows = [row for row in found.rows if row.score is not None]
    drawn = [spectra(rows)]
    for name in ("patch_frechet", "two_sample"):
        if any(row.score.figures[name] is not None for row in rows if row.score is not None):
            drawn.append(bars(found, name))
    return drawn


def spectra(rows: Sequence[Row]) -> Markup:
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
            plot.plot(range(1, len(row.score.spectrum) + 1), row.score.spectrum, label=plain_label(row.label), **style)
        plot.set_xlabel("cycles per image")
        plot.set_ylabel("dB")
        plot.figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return result[0]


def bars(found: Comparison, name: str) -> Markup:
    """One figure of all rows; what real images score is a dotted line."""
    figure, best = FIGURES[name], found.best(name)
    values = [(row, row.score.figures[name]) for row in reversed(found.rows) if row.score is not None]
    shown = [(row, value) for row, value in values if value is not None and row.role != "real"]
    leaders = ", ".join(row.label for row, _ in reversed(shown) if row.key in best)
    with chart(f"{figure.label[0].upper()}{figure.label[1:]}: best is {leaders}") as (plot, result):
        colors = [SERIES[0] if row.role == "pixel" else SERIES[1] if row.key == "base" else FAINT for row, _ in shown]
        drawn = plot.barh(range(len(shown)), [value for _, value in shown], 0.7, color=colors)
        plot.bar_label(drawn, [figure.show(value) for _, value in shown], padding=3, fontsize=8, color=INK)
        plot.set_yticks(range(len(shown)), [plain_label(row.label) for row, _ in shown])
        plot.grid(False, axis="y")
        if figure.kind == "distance":
            plot.set_xscale("log")
        plot.margins(x=0.18)
        if figure.kind == "chance":
            plot.set_xlim(left=0.45)
        for _, value in (pair for pair in values if pair[0].role == "real"):
            plot.axvline(value, color=INK, linewidth=1, linestyle=":")
        plot.set_xlabel(
            f"better: {figure.better}; dotted: real images" + (", log scale" if figure.kind == "distance" else "")
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
