"""The types of a recipe's keys. Values are strict: text is no number, 1 is no boolean, and unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from liftkit.checkpoint.files import expanded
from liftkit.finetune.terms import PERCEPTUAL


def _path(value: object) -> object:
    """A path from text; ``~`` is the home folder."""
    if not isinstance(value, str):
        return value
    if not value.strip() or "\0" in value:
        raise ValueError(f"expected a path, found {value!r}")
    # os.path leaves a ~ of nobody's as it is, where pathlib fails.
    return expanded(value)


def is_local(url: str) -> bool:
    """Whether a shard's name is a path; a recipe holds no commands (``pipe:``), and shards are read at random access."""
    return "://" not in url and not url.startswith("pipe:")


def _local(url: str) -> str:
    if not is_local(url):
        raise ValueError(f"{url}: shards must be local files; fetch them first")
    return url


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("expected each name once")
    return names


def distance(name: str) -> str:
    """The name of a perceptual distance, of which there may be more than ours; it complains as a Literal does."""
    choices = ("none", *PERCEPTUAL)
    if name not in choices:
        expected = ", ".join(f"'{each}'" for each in choices)
        raise PydanticCustomError("literal_error", "expected {expected}", {"expected": expected})
    return name


LISTED = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_ONE_OR_MANY = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
Text = Annotated[str, Field(min_length=1)]
File = Annotated[Path, BeforeValidator(_path)]
Names = Annotated[tuple[Text, ...], LISTED, Field(min_length=1)]
Urls = Annotated[tuple[Annotated[Text, AfterValidator(_local)], ...], _ONE_OR_MANY, LISTED, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], LISTED, AfterValidator(_distinct)]


class Section(BaseModel):
    """Keys that belong together; it does not change once it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
