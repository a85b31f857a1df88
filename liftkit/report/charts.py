"""Charts as inline SVG by matplotlib: sharp in print, and in the page's own colors, light or dark."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from liftkit.checkpoint.text import printable

SIZE = (5.4, 2.9)
INK, FAINT, GRID = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505", "#060606")
# matplotlib draws in these stand-ins; the page's style sheet says what they look like.
VARIABLES = {INK: "ink", FAINT: "faint", GRID: "line", SERIES[0]: "first", SERIES[1]: "second", SERIES[2]: "third"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": FAINT,
    "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "grid.color": GRID, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.grid.axis": "y", "axes.grid": True,
    "axes.axisbelow": True, "ytick.left": False, "legend.frameon": False, "legend.fontsize": 9,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "lines.linewidth": 1.8,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name: for the legend.
        x, y: its points.
        dashed: how it is drawn.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Args:
        label: with its unit.
        log: whether it is logarithmic.
        low, high: its ends; from the data if left out.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[tuple[float, str]] = ()) -> Markup:
    """Curves over a common axis, as HTML.

    Args:
        title: what to conclude.
        lines: at most three.
        x, y: the axes.
        marks: vertical lines at x, with a label.
    """
    with chart(title) as (plot, result):
        for line, color in zip(lines, SERIES):
            plot.plot(line.x, line.y, "--" if line.dashed else "-", color=color, label=line.name)
        _scale(plot, x, y)
        for place, label in marks:
            plot.axvline(place, color=FAINT, linewidth=1, linestyle=":")
            plot.annotate(
                f" {label}", (place, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9, color=FAINT
            )
        if len(lines) > 1:
            plot.legend(loc="best")
    return result[0]


def bar_chart(
    title: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    y: Axis,
    x_label: str,
    spread: Sequence[Sequence[float]] | None = None,
) -> Markup:
    """Bars side by side, as HTML.

    Args:
        title: what to conclude.
        groups: names along the axis.
        series: name and one value per group each; at most three.
        y: the vertical axis.
        x_label: what the groups are.
        spread: a standard deviation for each value, drawn as a whisker.
    """
    with chart(title) as (plot, result):
        width = 0.8 / len(series)
        for which, (name, values) in enumerate(series):
            places = [index + (which - (len(series) - 1) / 2) * width for index in range(len(groups))]
            whiskers = None if spread is None else spread[which]
            plot.bar(places, values, width, color=SERIES[which], label=name, yerr=whiskers, ecolor="#888")
        every = max(1, -(-len(groups) // 16))
        plot.set_xticks(range(0, len(groups), every), groups[::every])
        _scale(plot, Axis(x_label), y)
        if len(series) > 1:
            plot.legend(loc="upper right", ncols=len(series), bbox_to_anchor=(1, 1.14))
    return result[0]


def _scale(plot: Any, x: Axis, y: Axis) -> None:
    plot.set_xlabel(x.label)
    plot.set_ylabel(y.label)
    if x.log:
        plot.set_xscale("log")
    if y.log:
        plot.set_yscale("log")
    plot.set_xlim(x.low, x.high)
    plot.set_ylim(y.low, y.high)


def plain_label(text: str) -> str:
    """A name for a chart, of which matplotlib makes no formula."""
    return printable(text).replace("$", r"\$")


@contextmanager
def chart(title: str) -> Iterator[tuple[Any, list[Markup]]]:
    """Axes to draw in; when the block ends, the chart's HTML is put into the list."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt keeps the ids of several charts in one page apart, and the same from run to run.
    # What is drawn may come from a file: of figures that make a poor chart, matplotlib warns and draws what it can.
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        result: list[Markup] = []
        yield figure.subplots(), result
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for color, name in VARIABLES.items():
        drawn = drawn.replace(color, f"var(--{name})")
    # matplotlib escapes the text in its drawing; what is formatted into markup is escaped by it.
    frame = Markup('<figure class="chart" role="img" aria-label="{0}"><figcaption><b>{0}</b></figcaption>{1}</figure>')
    result.append(frame.format(printable(title), Markup(drawn)))
