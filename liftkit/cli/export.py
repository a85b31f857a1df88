"""``liftkit export``: our folders in the formats of others."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from liftkit.cli import console
from liftkit.cli.push import Public, Push, check, send


class Format(StrEnum):
    """Choices of ``--format``."""

    adapter = "adapter"
    asymflow_adapter = "asymflow-adapter"


def export(
    folder: Annotated[str, typer.Argument(help="An adapter folder of ours, or a converted folder, finetuned or not.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    format_: Annotated[
        Format,
        typer.Option("--format", help="An adapter folder of ours, or of the AsymFlow authors and their ComfyUI nodes."),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The model that it came from; needed where only that tells what a finetune has changed."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the LoRA taken from a finetuned folder, whatever is lost.", show_default="its recipe's"
        ),
    ] = None,
    push: Push = None,
    public: Public = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export.", rich_help_panel="Dangerous options")
    ] = False,
) -> None:
    """Write a converted folder or an adapter of ours as an adapter, in our format or that of the AsymFlow authors.

    Example: liftkit export runs/first/adapter --format asymflow-adapter -o klein-asymflow
    """
    from liftkit.checkpoint.folder import output_folder
    from liftkit.formats.asymflow_adapter import unknown_to_comfyui
    from liftkit.formats.exporting import export_adapter

    check(push, public)
    console.hold(output_folder(output, overwrite=overwrite))
    console.quiet_libraries()
    done = export_adapter(
        folder, output, format_.value, base=base, rank=rank, overwrite=overwrite, observer=console.Bars()
    )
    console.result(format=format_.value, output=output)
    adapter = done.adapter
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    rows = [
        ("format", format_.value),
        ("tensors", f"{len(adapter.full)} in full, LoRA on {len(adapter.pairs)} modules, {console.size(size)}"),
        ("base", adapter.base),
    ]
    if format_ is Format.asymflow_adapter:
        unknown = unknown_to_comfyui(adapter)
        if unknown:
            console.note(
                f"the strict ComfyUI port knows 58 LoRA modules, those of AsymFLUX.2 klein 9B; {len(unknown)} of the "
                f"{len(adapter.pairs)} here are none of them, so that it refuses the file: {', '.join(unknown[:3])}"
                f"{' and others' if len(unknown) > 3 else ''}"
            )
        console.result(unknown_to_comfyui=unknown)
    if done.residual is not None:
        rows.append(("left out", f"{done.residual:.1e} of a weight at most, by its norm"))
    console.table("Exported", [*rows, ("folder", str(output))])
    send(output, push, public)
