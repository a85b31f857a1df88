"""``liftkit generate``: a model's own samples as training data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from liftkit.checkpoint.files import expanded
from liftkit.cli import console
from liftkit.cli.sample import Pipeline
from liftkit.options import GenerateOptions, Option
from liftkit.progress import first_process


def generate(
    folder: Pipeline,
    prompts: Annotated[
        str,
        Option(
            "Text file of prompts, one in each line, which take turns; `demo` takes the embedded ones. With --layout, the "
            "benchmark's file or folder.",
            "FILE",
            names="path",
        ),
    ],
    output: Annotated[
        Path,
        Option("Dataset folder; if it holds an unfinished run, the run continues.", "FOLDER", ("--output", "-o")),
    ],
    options: GenerateOptions,
) -> None:
    """Sample a dataset folder of images and captions.

    Finetune on a model's own samples, or mix them with real images. With --layout, the folder is what a benchmark reads.

    Example: liftkit generate black-forest-labs/FLUX.2-klein-base-4B --prompts prompts.txt -n 2000 -o self-generated
    """
    console.first_word(f"reading {folder}")
    from liftkit.checkpoint.model import find_model
    from liftkit.data.prompts import read_prompts
    from liftkit.errors import UsageError

    path = expanded(prompts)
    if options.layout is None and prompts != "demo" and not path.is_file():
        raise UsageError(f"--prompts {prompts}: no such file; give a text file, one prompt a line, or 'demo'")
    texts = [] if options.layout is not None else read_prompts(None if prompts == "demo" else path)
    model = find_model(folder)
    from liftkit.device import choose_device
    from liftkit.evaluate.benchmarks import read_layout
    from liftkit.evaluate.generate import generate as run
    from liftkit.formats.adapters import open_adapter
    from liftkit.models.editing import check_pictures

    console.quiet_libraries()
    console.resumable()
    layout = None if options.layout is None else read_layout(options.layout, path)
    if layout is not None and (summary := layout.tally.summary()):
        console.note(summary)
    chosen, why = choose_device(options.device)
    check_pictures(model, options.pictures)
    adapter = None if options.adapter is None else open_adapter(options.adapter)
    first = first_process()
    done = run(
        model, texts, output, replace(options, device=chosen), console.Bars() if first else None, adapter, layout
    )
    if not first:
        return
    console.result(output=done.folder, new=done.new, found=done.found, device=chosen)
    if done.found:
        console.note(f"{done.found} images had been made by an earlier run")
    console.out.print(f"{done.new} new images in {done.folder} ({chosen}: {why})")
