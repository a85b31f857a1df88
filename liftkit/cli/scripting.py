"""``--quiet`` and ``--json``: two options that every command takes, for scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer

from liftkit.cli import console
from liftkit.cli.options import with_options
from liftkit.progress import first_process

QUIET = "Print nothing but errors; files are written all the same."
JSON = "Print one JSON object on stdout, and everything else on stderr."
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)]
Json = Annotated[bool, typer.Option("--json", help=JSON)]


def add_options(app: typer.Typer) -> None:
    """Give both options to every command of an app and of the apps in it; commands themselves need not know.

    A command that has a ``--json FILE`` of its own keeps that, and prints the object by ``liftkit --json COMMAND``.
    """
    for command in app.registered_commands:
        assert command.callback is not None
        command.callback = _scripted(with_options(command.callback))
    for group in app.registered_groups:
        assert group.typer_instance is not None
        add_options(group.typer_instance)


def _scripted(command: Callable[..., Any]) -> Callable[..., Any]:
    own = signature(command)
    own_json = "json" in own.parameters

    @wraps(command)
    def run(context: typer.Context, quiet: bool, as_json: bool = False, **given: Any) -> Any:
        console.settings.quiet |= quiet
        console.settings.json |= as_json
        console.out.quiet = console.settings.quiet
        console.answer.command = name_of(context)
        # Whatever a library prints, the object stands alone.
        with console.held, redirect_stdout(sys.stderr) if console.settings.json else nullcontext():
            return command(**given)

    # typer reads a command's parameters from its signature: it gets the command's own and these.
    common = {"context": typer.Context, "quiet": Quiet} | ({} if own_json else {"as_json": Json})
    added = [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, **({} if name == "context" else {"default": False}))
        for name, kind in common.items()
    ]
    parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own.parameters.values()]
    vars(run)["__signature__"] = own.replace(parameters=[*parameters, *added])
    run.__annotations__ = {each.name: each.annotation for each in (*parameters, *added)}
    return run


def name_of(context: Any) -> str:
    """Of a command as it is typed after ``liftkit``, such as ``recipes list``; empty for liftkit itself."""
    if context.parent is None:
        return ""
    return f"{name_of(context.parent)} {context.info_name}".strip()


def finish(exit_code: int, failure: BaseException | None = None) -> None:
    """A run ends: the object of ``--json``, where there is something to say.

    Args:
        exit_code: of the program.
        failure: what ended it, where that was typer: people have seen its message, and the object repeats it.
    """
    # Typer exits while it handles what was wrong with the arguments.
    wrong = getattr(failure, "__context__", None)
    if hasattr(wrong, "format_message"):
        _learn(wrong)
    if console.settings.json and first_process() and (console.answer.command or exit_code):
        print(console.answer_text(exit_code), flush=True)


def _learn(wrong: Any) -> None:
    """What typer knows of wrong arguments. It stops before it has seen all options."""
    console.answer.errors.append(wrong.format_message())
    context = getattr(wrong, "ctx", None)
    if context is not None:
        console.answer.command = name_of(context)
        flags = {name for option in context.command.params if getattr(option, "is_flag", False) for name in option.opts}
        console.settings.json |= bool({"--json"} & flags & set(sys.argv[1:]))
