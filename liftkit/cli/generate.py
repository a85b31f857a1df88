"""``liftkit generate``: a model's own samples as training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liftkit.cli import console, guiding


def generate(
    folder: Annotated[str, typer.Argument(help="A latent or a converted pipeline: a folder, a Hub id, or 'demo'.")],
    prompts: Annotated[
        str, typer.Option("--prompts", help="A file of prompts, one a line, or 'demo'; they take turns.")
    ],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=10**9, help="Images in the folder.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The dataset folder; an interrupted one is gone on with.")
    ],
    seed: guiding.Seed = 0,
    steps: guiding.Steps = None,
    guidance: guiding.Scale = None,
    guidance_start: guiding.Start = 0.0,
    guidance_stop: guiding.Stop = 1.0,
    guidance_orthogonal: guiding.Orthogonal = False,
    height: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="In pixels.", show_default="the autoencoder's size")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="In pixels.", show_default="the autoencoder's size")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 8,
) -> None:
    """Sample a dataset folder (images, captions) from a model, to finetune on or to mix with real images.

    Example: liftkit generate black-forest-labs/FLUX.2-klein-base-4B --prompts prompts.txt -n 2000 -o self-generated
    """
    from liftkit.checkpoint.model import find_model
    from liftkit.data.prompts import read_prompts
    from liftkit.device import choose_device
    from liftkit.errors import UsageError
    from liftkit.evaluate.generate import GenerateOptions
    from liftkit.evaluate.generate import generate as run
    from liftkit.guidance import Guidance

    console.quiet_libraries()
    console.resumable()
    if prompts != "demo" and not Path(prompts).is_file():
        raise UsageError(f"--prompts {prompts}: no such file; give a text file, one prompt a line, or 'demo'")
    texts = read_prompts(None if prompts == "demo" else Path(prompts))
    chosen, why = choose_device(device)
    model = find_model(folder)
    guided = Guidance(guidance, guidance_start, guidance_stop, guidance_orthogonal)
    options = GenerateOptions(count, seed, steps, guided, height, width, batch_size, chosen)
    done = run(model, texts, output, options, console.Bars())
    console.result(output=done.folder, new=done.new, found=done.found, device=chosen)
    if done.found:
        console.note(f"{done.found} images had been made by an earlier run")
    console.out.print(f"{done.new} new images in {done.folder} ({chosen}: {why})")
