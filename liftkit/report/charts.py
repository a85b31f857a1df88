"""Charts as inline SVG: small, sharp in print, light and dark by the page's own colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 520, 290
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 46
INK = ("var(--first)", "var(--second)", "var(--third)")


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


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Curves over a common axis.

    Args:
        title: what to conclude.
        lines: at most three.
        x, y: the axes.
        marks: vertical lines at x, with a label.
    """
    across = _Scale(x, [value for line in lines for value in line.x], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [value for line in lines for value in line.y], HEIGHT - BOTTOM, TOP)
    parts = [_frame(across, up)]
    for place, label in marks:
        at = across(place)
        side = "end" if at > WIDTH / 2 else "start"
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        shift = -6 if side == "end" else 6
        parts.append(f'<text x="{at + shift:.1f}" y="{TOP + 12}" text-anchor="{side}">{escape(label)}</text>')
    for line, ink in zip(lines, INK):
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(line.x, line.y))
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="2"{dash}/>')
    return _figure(title, "".join(parts), [(line.name, ink) for line, ink in zip(lines, INK)])


def bar_chart(
    title: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], y: Axis, x_label: str
) -> str:
    """Bars side by side.

    Args:
        title: what to conclude.
        groups: names along the axis.
        series: name and one value per group each; at most three.
        y: the vertical axis.
        x_label: what the groups are.
    """
    up = _Scale(y, [0.0, *(value for _, values in series for value in values)], HEIGHT - BOTTOM, TOP)
    span = (WIDTH - LEFT - RIGHT) / max(len(groups), 1)
    width = span * 0.8 / len(series)
    parts = [_frame(None, up, x_label)]
    every = max(1, -(-len(groups) // 16))
    for index, group in enumerate(groups):
        start = LEFT + span * (index + 0.1)
        for which, (_, values) in enumerate(series):
            top, base = sorted((up(values[index]), up(max(0.0, up.low))))
            box = f'x="{start + which * width:.1f}" y="{top:.1f}" width="{width:.1f}" height="{base - top:.1f}"'
            parts.append(f'<rect {box} fill="{INK[which]}"><title>{escape(group)}: {values[index]:.3f}</title></rect>')
        if index % every == 0:
            middle = LEFT + span * (index + 0.5)
            parts.append(
                f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(group)}</text>'
            )
    return _figure(title, "".join(parts), [(name, INK[which]) for which, (name, _) in enumerate(series)])


class _Scale:
    """Values to places on the page, with round ticks."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        usable = [value for value in values if value > 0] if axis.log else list(values)
        usable = usable or [1.0]
        self.low = axis.low if axis.low is not None else min(usable)
        self.high = axis.high if axis.high is not None else max(usable)
        if self.high <= self.low:
            self.high = self.low + 1.0 if not axis.log else self.low * 10.0

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.axis.log:
            share = (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.axis.log:
            decades = range(-(-_exponent(self.low) // 1), _exponent(self.high) + 1)
            every = max(1, len(decades) // 6)
            return [10.0**power for power in decades if power % every == 0 and self.low <= 10.0**power <= self.high]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** floor(log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        begin = floor(self.low / step)
        found = (index * step for index in range(begin, begin + 12))
        return [tick for tick in found if self.low - 1e-9 <= tick <= self.high + 1e-9]


def _exponent(value: float) -> int:
    return floor(log10(value) + 1e-9)


def _frame(across: _Scale | None, up: _Scale, x_label: str = "") -> str:
    floor_, parts = HEIGHT - BOTTOM, []
    for tick in up.ticks():
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_say(tick)}</text>')
    for tick in across.ticks() if across is not None else []:
        at = across(tick) if across is not None else 0.0
        parts.append(f'<text x="{at:.1f}" y="{floor_ + 16}" text-anchor="middle">{_say(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor_}" y2="{floor_}"/>')
    label = escape(across.axis.label if across is not None else x_label)
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
    middle = (TOP + floor_) / 2
    side = escape(up.axis.label)
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{side}</text>')
    return "".join(parts)


def _say(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def _figure(title: str, inner: str, legend: list[tuple[str, str]]) -> str:
    keys = "".join(f'<span><i style="background:{ink}"></i>{escape(name)}</span>' for name, ink in legend)
    key = f'<div class="legend">{keys}</div>' if len(legend) > 1 else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b></figcaption>{key}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{inner}</svg></figure>'
    )
