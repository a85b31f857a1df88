"""What a lift says of itself, checked when it is read: the figures of docs/report.md by type and range.

Pages, cards and tables show these, whoever wrote the file. Keys that this version does not know are kept, as plain data.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e30, le=1e30)]
Spread = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1e30)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Words = Annotated[str, Field(strict=True, max_length=4000)]
Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_ .+-]{1,64}$")]
Numbers = Annotated[list[Number], Field(max_length=1 << 20)]
ALWAYS = ("energy_captured", "energy_best", "r2_pixels", "r2_pixels_linear")
"""Figures that every table shows."""
MOST_DEPTH = 12


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class Figure(_Part):
    """One figure: its mean over folds that the fit did not see, its spread over them, and on the fit's own images."""

    value: Number
    spread: Spread
    fitted: Number


class Channels(_Part):
    """R^2 by channel."""

    latents: Numbers
    colors_lift: Annotated[list[Number], Field(min_length=3, max_length=3)]
    colors_linear: Annotated[list[Number], Field(min_length=3, max_length=3)]
    spread: dict[Name, list[Spread]] | None = None

    @model_validator(mode="after")
    def _pairs_up(self) -> Channels:
        for name, values in (self.spread or {}).items():
            if len(values) != len(getattr(self, name, None) or ()):
                raise ValueError(f"spread.{name} has another length than {name}")
        return self


class Angles(_Part):
    """Degrees between subspaces and lifts."""

    pca: Annotated[Numbers, Field(min_length=1)]
    pca_energy: Number
    halves: Annotated[Numbers, Field(min_length=1)]
    halves_energy: Number
    halves_lift: Number


class Pictures(_Part):
    """Figures of the pictures, by the name of their row."""

    count: Count
    psnr: dict[Name, Number]
    patch_grid: dict[Name, Number]
    psnr_vae: dict[Name, Number] | None = None
    spread: dict[Name, dict[Name, Number]] | None = None


class Reason(_Part):
    """One figure of the verdict, beside its bounds."""

    level: Literal["good", "usable", "poor"]
    value: Number | None
    meaning: Words
    good: Number
    poor: Number


class Verdict(_Part):
    """What to expect."""

    level: Literal["good", "usable", "poor"]
    text: Words
    reasons: list[Reason]
    mend: list[Words]
    advice: list[Words]


class Alignment(_Part):
    """The ``alignment`` of docs/report.md."""

    images: Count
    tokens: Count
    folds: Count
    figures: dict[Name, Figure]
    channels: Channels
    spectrum: Annotated[list[Spread], Field(min_length=1, max_length=1 << 20)]
    angles: Angles
    pictures: Pictures | None = None
    verdict: Verdict
    color_reason: Words
    source: dict[str, Any] | None = None


class Proof(_Part):
    """The proof of a conversion."""

    exact: Number
    stored: Number
    steps: Count
    tokens: Annotated[list[Count], Field(min_length=2, max_length=2)]
    dtype: Name
    kind: Literal["model", "projections"] = "model"


class Description(_Part):
    """What a lift's file says beside its tensors."""

    format: Literal["liftkit.lift"]
    version: Literal[1]
    scale: Number
    patch_size: Count
    latent_patch: Count
    color: dict[str, Any]
    figures: dict[str, Any]
    space: Literal["pixel", "latent"] = "pixel"


def check_figures(figures: Any) -> dict[str, Any]:
    """The figures of a lift.

    Raises:
        ValueError: naming the first that is missing, of another type or out of range.
    """
    if not isinstance(figures, dict):
        raise ValueError(f"figures: expected an object, found {type(figures).__name__}")
    _check_plain(figures, "figures")
    if not isinstance(figures.get("kind", ""), str) or len(figures.get("kind", "")) > 64:
        raise ValueError("figures.kind: expected a word")
    if figures.get("alignment") is not None:
        check(Alignment, figures["alignment"], "figures.alignment")
        missing = [name for name in ALWAYS if name not in figures["alignment"]["figures"]]
        if missing:
            raise ValueError(f"figures.alignment.figures: {missing[0]} is missing")
        # What may be left out is there, as None, for those who read on.
        figures = {**figures, "alignment": {"pictures": None, "source": None, **figures["alignment"]}}
    return figures


def check(model: type[BaseModel], value: Any, where: str) -> None:
    """Raise unless plain data have the form of a model.

    Raises:
        ValueError: naming the first place that has not, on one line.
    """
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join([where, *map(str, first["loc"])])
        raise ValueError(f"{place[:200]}: {first['msg']}") from error


def parse_json(text: str) -> Any:
    """JSON without the numbers that JSON has not.

    Raises:
        ValueError: if it is none, holds NaN or infinity, or is nested too deep.
    """

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raise unless all numbers are finite and nothing is nested deeper than a table of tables."""
    if depth > MOST_DEPTH:
        raise ValueError(f"{where}: nested deeper than {MOST_DEPTH} levels")
    if isinstance(value, float) and not abs(value) <= 1e300:
        raise ValueError(f"{where}: {value} is no finite number")
    if isinstance(value, int) and abs(value) > 2**63:
        raise ValueError(f"{where}: a number of more than 63 bits")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _check_plain(child, where, depth + 1)
