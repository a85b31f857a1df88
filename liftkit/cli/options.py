"""Options objects on the command line: a command takes one object of :mod:`liftkit.options`, and people see its fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial, wraps
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import ParameterInfo

from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.misplaced import check_named
from liftkit.options import Argument, Option

PICTURE = re.compile(r"\.[a-zA-Z]{3,5}$")
"""The end of a file's name that is no folder's, and no model's."""
WORDS = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}


class Command(TyperCommand):
    """A command whose help is in words: no types of Python, no inequalities."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        for each in self.params:
            vars(each)["_get_number_range_help_str"] = partial(_bounds, each)
            if each.param_type_name == "argument":
                vars(each)["display_type_rich"] = lambda ctx: None  # its metavar says it

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Options of several files may be given once: ``--reference a.png b.png``."""
        many = {flag for each in self.params if str(each.metavar).endswith("...") for flag in each.opts}
        given: list[str] = []
        for word in args:
            follows = len(given) > 1 and given[-2] in many and PICTURE.search(word) and not word.startswith("-")
            given += [given[-2], word] if follows else [word]
        return super().parse_args(ctx, given)


def _bounds(parameter: Any) -> str | None:
    """The bounds of a number as they are printed; large ones are there to catch mistakes, and go without saying."""
    low, high = parameter.min, parameter.max
    if low is not None and high is not None and high < 10**6:
        return f"{low:g} to {high:g}"
    return None if low is None or low == 0 else f"at least {low:g}"


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose options objects are options of their own, and whose metavars are words.

    What its options name is looked for first: a command that names nothing is refused before it imports anything.
    """
    own = signature(command, eval_str=True)
    objects = {name: each.annotation for name, each in own.parameters.items() if is_dataclass(each.annotation)}
    options = named_options(command)

    @wraps(command)
    def run(**given: Any) -> Any:
        given = {name: _from_home(value) for name, value in given.items()}
        for name, option in options.items():
            _check_there(name, option, given[name])
            if option.parse is not None and given[name] is not None:
                given[name] = option.parse(given[name])
        for name, kind in objects.items():
            given[name] = _build(kind, given)
        return command(**given)

    parameters: list[Parameter] = []
    for name, each in own.parameters.items():
        if name in objects:
            parameters += _parameters(objects[name])
        else:
            parameters.append(each.replace(kind=Parameter.KEYWORD_ONLY, annotation=_typer(name, each.annotation)))
    vars(run)["__signature__"] = own.replace(parameters=parameters)
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def named_options(command: Callable[..., Any]) -> dict[str, Option]:
    """The options of a command by parameter, those of its options objects among them."""
    hints: dict[str, Any] = {}
    for each in signature(command, eval_str=True).parameters.values():
        own = is_dataclass(each.annotation)
        hints |= {name: hint for name, _, hint in _fields(each.annotation)} if own else {each.name: each.annotation}
    found = {name: get_args(hint)[1] for name, hint in hints.items() if get_origin(hint) is Annotated}
    return {name: info for name, info in found.items() if isinstance(info, Option)}


def _check_there(name: str, option: Option, value: Any) -> None:
    """Raise unless what an option names is there."""
    flag = "" if isinstance(option, Argument) else f"{_flags(name, option)[0]} "
    for each in value if isinstance(value, list | tuple) else (value,):
        if each is not None and option.names is not None:
            check_named(str(each), option.names, flag)


def _flags(name: str, option: Option) -> tuple[str, ...]:
    return option.flags or (f"--{name.replace('_', '-')}",)


def _from_home(value: Any) -> Any:
    """Paths with the home folder in the place of ``~``, which shells leave in quotes and in ``--output=~/x``."""
    if isinstance(value, list | tuple):
        return type(value)(map(_from_home, value))
    return expanded(value) if isinstance(value, Path) else value


def _fields(kind: Any, lead: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """The parameter's name, the field and its annotation, of every field that people may choose."""
    hints = get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        if is_dataclass(hints[each.name]):
            yield from _fields(hints[each.name], f"{each.name}_")
        elif get_origin(hints[each.name]) is Annotated:
            yield f"{lead}{each.name}", each, hints[each.name]


def _build(kind: Any, given: dict[str, Any], lead: str = "") -> Any:
    """The object, of what was given; what it does not know is left."""
    found = {}
    hints = get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        name, hint = f"{lead}{each.name}", hints[each.name]
        if is_dataclass(hint):
            found[each.name] = _build(hint, given, f"{each.name}_")
        elif name in given:
            value = given.pop(name)
            found[each.name] = tuple(value or ()) if get_origin(get_args(hint)[0]) is tuple else value
    return kind(**found)


def _parameters(kind: Any) -> Iterator[Parameter]:
    for name, each, hint in _fields(kind):
        default = Parameter.empty if each.default is MISSING else each.default
        annotation = _typer(name, hint)
        if get_origin(get_args(annotation)[0]) is tuple:
            # typer gives repeated options as lists.
            (inner, *_), info = get_args(get_args(annotation)[0]), get_args(annotation)[1]
            required = default is Parameter.empty
            annotation = Annotated[list[inner] if required else list[inner] | None, info]  # type: ignore[valid-type]
            default = Parameter.empty if required else None
        yield Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _typer(name: str, annotation: Any) -> Any:
    """An annotation as typer knows it, with a metavar that is a word."""
    if get_origin(annotation) is not Annotated:
        return annotation
    type_, info = get_args(annotation)[:2]
    if isinstance(info, Argument):
        info = typer.Argument(help=info.help, metavar=info.metavar)
    elif isinstance(info, Option):
        flags = _flags(name, info)
        shown: Any = info.default or True
        bounds: Any = {"min": info.min, "max": info.max}
        if info.parse is not None:
            type_ = str | None
        info = typer.Option(*flags, help=info.help, metavar=info.metavar, show_default=shown, **bounds)
    if isinstance(info, ParameterInfo) and info.metavar is None:
        info.metavar = _word(type_)
    return Annotated[type_, info]


def _word(type_: Any) -> str | None:
    """What stands for a value in the help; nothing for a flag."""
    kinds = [each for each in get_args(type_) if each not in (NoneType, Ellipsis)]
    if get_origin(type_) is Literal:
        return f"[{'|'.join(kinds)}]"
    return _word(kinds[0]) if kinds else WORDS.get(type_)
