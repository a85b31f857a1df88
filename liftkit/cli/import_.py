"""``liftkit import``: adapters, LoRAs and single files of others, as ours."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from liftkit.checkpoint.files import expanded
from liftkit.cli import console
from liftkit.cli.push import Public, Push, check, send
from liftkit.options import Argument, ImportOptions, Option

if TYPE_CHECKING:
    from liftkit.formats.kinds import Kind
    from liftkit.tally import Tally


def import_(
    source: Annotated[
        str,
        Argument(
            "Source: an adapter (our folder, the AsymFlow authors', or a Hub id), a LoRA (a file, or peft's folder), or a "
            "checkpoint in the original layout (a file).",
            "SOURCE",
            names="model",
        ),
    ],
    output: Annotated[Path, Option("Output folder; for a LoRA, the file.", "FOLDER|FILE", ("--output", "-o"))],
    options: ImportOptions,
    push: Push = None,
    public: Public = False,
) -> None:
    """Import adapters, LoRAs and single-file checkpoints.

    An adapter with --base becomes a converted folder; with --keep-adapter, one of our adapter folders. A latent model's LoRA with
    --base CONVERTED becomes one for its pixel model. A checkpoint in the original layout with --config becomes a diffusers
    folder, ready for liftkit convert.

    Example: liftkit import flux-2-klein-base-4b.safetensors --config black-forest-labs/FLUX.2-klein-base-4B -o klein
    """
    console.first_word(f"reading {source}")
    from liftkit.checkpoint.files import output_file
    from liftkit.checkpoint.folder import output_folder
    from liftkit.formats.kinds import kind_of

    kind = kind_of(source)
    _check_options(kind, source, options, push)
    check(push, public)
    target = (
        output_file(output, ".safetensors") if kind == "lora" else output_folder(output, overwrite=options.overwrite)
    )
    console.hold(target)
    console.quiet_libraries()
    {"lora": _lora, "checkpoint": _checkpoint, "adapter": _adapter}[kind](source, output, options)
    console.result(kind=kind, output=output)
    send(output, push, public)


def _check_options(kind: Kind, source: str, options: ImportOptions, push: str | None) -> None:
    """Raise unless the options are those of the kind of thing that is imported."""
    from liftkit.errors import UsageError

    needed, allowed, what, example = {
        "adapter": (
            "base",
            ("base", "keep_adapter", "push"),
            "an adapter",
            "--base MODEL, the latent model that it is for",
        ),
        "lora": ("base", ("base",), "a LoRA", "--base FOLDER, the conversion of the model that it is for"),
        "checkpoint": (
            "config",
            ("config", "push"),
            "a checkpoint",
            "--config MODEL, a diffusers folder of the same model",
        ),
    }[kind]
    if not getattr(options, needed):
        raise UsageError(f"{source}: is {what}; give {example}")
    for name in ("base", "config", "keep_adapter", "push"):
        if name not in allowed and (push if name == "push" else getattr(options, name)):
            raise UsageError(f"--{name.replace('_', '-')}: means nothing for {what}, which {source} is")


def _adapter(source: str, output: Path, options: ImportOptions) -> None:
    from liftkit.formats.adapters import fuse, keep
    from liftkit.formats.asymflow_limits import NORM

    base, overwrite = str(options.base), options.overwrite
    if options.keep_adapter:
        adapter = keep(source, base, output, overwrite=overwrite)
        following = f'liftkit sample {base} --adapter {output} -p "a prompt" -o samples.png'
        rows = [("base", adapter.base)]
    else:
        done = fuse(source, base, output, shards=options.shards, overwrite=overwrite, observer=console.Bars())
        adapter, following = done.adapter, f'liftkit sample {output} -p "a prompt" -o samples.png'
        rows = [("base", f"{adapter.base}, with the adapter merged in")]
        if done.proof is not None:
            proof = done.proof
            rows.append(
                ("proof", f"of the conversion: deviation {proof.exact:.1e} in full precision, on the {proof.kind}")
            )
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    rows.append(
        ("adapter", f"{len(adapter.full)} tensors in full, LoRA on {len(adapter.pairs)} modules, {console.size(size)}")
    )
    if "imported" in adapter.provenance and NORM not in adapter.full:
        rows.append(("output norm", "the base's own: the adapter holds none"))
    if adapter.lift is not None:
        rows.append(("lift", f"rank {adapter.lift.rank} of {adapter.lift.dim}, scale {adapter.lift.scale:.4f}"))
    console.table("Imported", [*rows, ("folder", str(output)), ("next", following)])


def _lora(source: str, output: Path, options: ImportOptions) -> None:
    from liftkit.formats.lora import import_lora

    done = import_lora(expanded(source), str(options.base), output, overwrite=options.overwrite)
    rows = [
        ("LoRA", f"on {done.modules} modules, from {done.tally.used} keys of {', '.join(done.kinds)}"),
        ("lifted", ", ".join(done.lifted) or "nothing: it touches no projection, and applies as it is"),
        ("file", str(output)),
        ("next", f'pipe.load_lora_weights("{output}")'),
    ]
    console.table("Imported", rows)
    _account(done.tally, done.notes)


def _account(tally: Tally, notes: Iterable[str] = ()) -> None:
    """What became of all that was found."""
    for text in (*notes, tally.summary()):
        if text:
            console.note(text)
    console.result(tally=tally.to_json())


def _checkpoint(source: str, output: Path, options: ImportOptions) -> None:
    from liftkit.formats.single_file import import_checkpoint

    done = import_checkpoint(
        expanded(source),
        str(options.config),
        output,
        shards=options.shards,
        overwrite=options.overwrite,
        observer=console.Bars(),
    )
    rows = [
        ("transformer", f"{done.transformer}, {done.tally.used} tensors"),
        ("folder", str(output)),
        ("next", f"liftkit convert {output} --images photos/ -o {output}-pixel"),
    ]
    console.table("Imported", rows)
    _account(done.tally)
