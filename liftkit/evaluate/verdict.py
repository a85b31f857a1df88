"""What may be claimed of a pixel model: figure by figure, which controls it beats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from liftkit.evaluate.figures import FIGURES

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Standing:
    """Where a model stands among the controls in one figure; each holds keys of their rows.

    Args:
        beats: worse than the model by more than seeds alone can make.
        level: neither.
        behind: better than the model.
    """

    beats: list[str] = field(default_factory=list)
    level: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What may be claimed of a pixel model.

    Args:
        key, label: of its row.
        claims: figures in which it beats every control, none of them missing.
        partial: figures in which it beats every control that was given, while others were not.
        standings: by figure.
        missing: keys of the controls that were not given.
        text: the same in words.
    """

    key: str
    label: str
    claims: list[str]
    partial: list[str]
    standings: dict[str, Standing]
    missing: list[str]
    text: str


def judge(
    key: str, label: str, figures: Figures, controls: Mapping[str, Figures], labels: Mapping[str, str], count: int
) -> Verdict:
    """Compare one model with the controls.

    Args:
        key, label: of its row.
        figures: of the model, by name.
        controls: figures of each control that was given, by its row's key.
        labels: of all controls, by key; those without figures are missing.
        count: samples of each; fewer make wider tolerances.
    """
    judged = [name for name, value in figures.items() if value is not None and FIGURES[name].noise is not None]
    standings = {name: _standing(name, figures, controls, count) for name in judged}
    swept = [name for name, found in standings.items() if found.beats and not found.level and not found.behind]
    missing = [control for control in labels if control not in controls]
    claims, partial = ([], swept) if missing else (swept, [])
    text = _say(label, claims, partial, standings, labels, missing)
    return Verdict(key, label, claims, partial, standings, missing, text)


def _standing(name: str, figures: Figures, controls: Mapping[str, Figures], count: int) -> Standing:
    figure, found, value = FIGURES[name], Standing(), figures[name]
    for control, theirs in controls.items():
        other = theirs[name]
        if value is None or other is None:
            continue
        gain = figure.cost(other) - figure.cost(value)
        place = found.level if abs(gain) <= figure.tolerance(count) else found.beats if gain > 0 else found.behind
        place.append(control)
    return found


def _say(
    label: str,
    claims: list[str],
    partial: list[str],
    standings: dict[str, Standing],
    labels: Mapping[str, str],
    missing: list[str],
) -> str:
    if claims:
        return f"{label} improves on all controls in {_names(claims)}; in the other figures it does not."
    if partial:
        return (
            f"{label} improves on all given controls in {_names(partial)}. "
            f"Nothing is claimed without the controls that were not given: {', '.join(labels[key] for key in missing)}."
        )
    beaten = {key: [name for name, found in standings.items() if key in found.beats] for key in labels}
    some = "; ".join(f"{labels[key]} ({_names(names)})" for key, names in beaten.items() if names)
    if not some:
        return f"No figure of {label} improves on any control."
    return f"No figure of {label} improves on all controls. It beats some: {some}."


def _names(figures: list[str]) -> str:
    return ", ".join(FIGURES[name].label for name in figures)
