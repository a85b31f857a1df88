"""``liftkit``: the commands, and the one place where errors become a line and an exit code.

Exit codes: 0 done, 2 usage, 1 anything else that failed; 130, 143 and 129 ended by Ctrl-C, SIGTERM and SIGHUP.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from types import FrameType
from typing import Annotated

import typer

from liftkit.checkpoint.lock import remove_begun
from liftkit.cli import console, scripting, terminal
from liftkit.cli.clean import clean
from liftkit.cli.compare import compare
from liftkit.cli.convert import convert
from liftkit.cli.demo import demo
from liftkit.cli.doctor import doctor
from liftkit.cli.export import export
from liftkit.cli.finetune import finetune
from liftkit.cli.fit import fit
from liftkit.cli.generate import generate
from liftkit.cli.import_ import import_
from liftkit.cli.init import init
from liftkit.cli.models import models
from liftkit.cli.options import Command
from liftkit.cli.recipes import recipes
from liftkit.cli.report import report
from liftkit.cli.sample import sample
from liftkit.cli.try_ import try_
from liftkit.cli.verify import verify
from liftkit.interrupt import ENDING, Stopped, exit_code, listening, stopped_by

app = typer.Typer(
    name="liftkit",
    help="Turn a pretrained latent flow model into a pixel flow model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(convert)
app.command(cls=Command)(fit)
app.command(cls=Command)(verify)
app.command(cls=Command)(report)
app.command(cls=Command)(init)
app.command(cls=Command)(finetune)
app.command(cls=Command)(clean)
app.command(cls=Command)(compare)
app.command(cls=Command)(sample)
app.command(cls=Command)(generate)
app.command(name="try", cls=Command)(try_)
app.command(name="import", cls=Command)(import_)
app.command(cls=Command)(export)
app.command(cls=Command)(demo)
app.command(cls=Command)(models)
app.command(cls=Command)(doctor)
app.add_typer(recipes)
scripting.add_options(app)


def _version(wanted: bool) -> None:
    if wanted:
        from liftkit import __version__

        typer.echo(f"liftkit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", envvar="LIFTKIT_QUIET", help=scripting.QUIET),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help=scripting.JSON)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, for a bug report.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a pretrained latent flow model into a pixel flow model.

    --quiet and --json go before or after the command.

    Example: liftkit doctor
    """
    console.settings.quiet, console.settings.json, console.settings.debug = quiet, json, debug
    console.quiet_loggers()


def run() -> None:
    """Entry point: run a command, turn what it raises into a message and an exit code."""
    set_waiting(os.environ)
    # Libraries below draw bars and print notices of their own; ours says what matters.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console.begin()
    with terminal.guarded(), listening(_Ending()):
        failure: BaseException | None = None
        try:
            app()
            code = 0
        except SystemExit as exit_:  # how typer ends, well or not
            failure = exit_
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
            # typer has one exit code for all signals.
            number = stopped_by(exit_)
            code = exit_code(number) if number is not None else code
            if code in map(exit_code, ENDING):
                console.interrupted()
        except KeyboardInterrupt as error:
            console.interrupted()
            code = exit_code(stopped_by(error))
        except Exception as error:  # the edge of the program: everything becomes one line
            code = _tell(error)
            if console.settings.debug:
                scripting.finish(code)
                raise
        scripting.finish(code, failure)
        lost = terminal.lost()
        if lost is not None:
            console.fail(f"stdout: {lost}; not everything was printed")
            code = code or 1
        sys.exit(code)


class _Ending:
    """A signal once: unwind, so that everything is cleaned up. Twice: clean up without unwinding, and end."""

    ended = False

    def __call__(self, number: int, _: FrameType | None) -> None:
        if self.ended:
            remove_begun()
            os.write(2, b"error: interrupted\n")
            os._exit(exit_code(number))
        self.ended = True
        raise Stopped(number)


def set_waiting(environment: MutableMapping[str, str]) -> None:
    """How threads of torch wait for each other, unless the user said so; before torch is loaded.

    A step of finetuning on two cores, idle and beside another process on one of them: 0.27 and 0.92 s where waiting
    threads spin, 0.40 to 0.47 and 0.49 s where they sleep at once, 0.29 and 0.67 s where they spin for a moment first.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment.setdefault("GOMP_SPINCOUNT", "5000")


def _tell(error: Exception) -> int:
    """What happened, on one line; the exit code."""
    from liftkit.checkpoint.files import reason
    from liftkit.errors import LiftkitError

    if isinstance(error, LiftkitError):
        console.fail(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename is not None else ""
        console.fail(f"{what}{reason(error)}")
        return 1
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "not enough memory" in str(error):
        console.fail(f"no memory left ({reason(error)[:200]}); take smaller batches or pictures, or a larger machine")
        return 1
    hint = "" if console.settings.debug else "; run with --debug for the traceback"
    console.fail(f"{type(error).__name__}: {error} (this is a fault of liftkit{hint})")
    return 1
