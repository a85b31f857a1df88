"""``liftkit export``: our folders in the formats of others."""

from __future__ import annotations

from typing import Annotated

from liftkit.cli import console
from liftkit.cli.convert import Output
from liftkit.cli.push import Public, Push, check, send
from liftkit.options import Argument, ExportOptions


def export(
    folder: Annotated[
        str,
        Argument(
            "Folder to export: an adapter of ours, or a converted model, finetuned or not.", "FOLDER", names="model"
        ),
    ],
    output: Output,
    options: ExportOptions,
    push: Push = None,
    public: Public = False,
) -> None:
    """Write a converted folder or an adapter in another format.

    The result is an adapter, in our format or in that of the AsymFlow authors.

    Example: liftkit export runs/first/adapter --format asymflow-adapter -o klein-asymflow
    """
    console.first_word(f"reading {folder}")
    from liftkit.checkpoint.folder import output_folder

    check(push, public)
    console.hold(output_folder(output, overwrite=options.overwrite))
    from liftkit.formats.asymflow_limits import unknown_to_comfyui
    from liftkit.formats.exporting import export_adapter

    console.quiet_libraries()
    done = export_adapter(folder, output, **vars(options), observer=console.Bars())
    console.result(format=options.format_, output=output)
    adapter = done.adapter
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    rows = [
        ("format", options.format_),
        ("tensors", f"{len(adapter.full)} in full, LoRA on {len(adapter.pairs)} modules, {console.size(size)}"),
        ("base", adapter.base),
    ]
    if options.format_ == "asymflow-adapter":
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
