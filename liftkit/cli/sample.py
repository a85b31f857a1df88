"""``liftkit sample``: images from a latent or a converted folder."""

from __future__ import annotations

import os
from typing import Annotated

from liftkit.cli import console
from liftkit.options import Argument, Option, SampleOptions

Pipeline = Annotated[
    str,
    Argument("Pipeline, latent or converted: a folder, a Hub id, or `demo`.", "FOLDER", names="model"),
]


def sample(
    folder: Pipeline,
    prompt: Annotated[
        list[str], Option("What the image should show; repeat it for several prompts.", "TEXT", ("--prompt", "-p"))
    ],
    count: Annotated[
        int, Option("Number of images in all; the prompts take turns.", flags=("--count", "-n"), min=1, max=10_000)
    ] = 8,
    output: Annotated[
        str,
        Option(
            "Picture file for one sheet of all images, or a folder for single images and a sheet. Every file holds its "
            "prompt, seed and settings.",
            "FILE|FOLDER",
            ("--output", "-o"),
        ),
    ] = "samples.png",
    columns: Annotated[int | None, Option("Number of columns of the sheet.", min=1, default="by count")] = None,
    *,
    options: SampleOptions,
) -> None:
    """Sample images from a latent or a converted model.

    The stock diffusers pipeline does it, for latent and converted folders alike.

    Example: liftkit sample klein-pixel -p "a red seven on flower petals" -n 8 --seed 0 -o grid.png
    """
    console.first_word(f"reading {folder}")
    from liftkit.checkpoint.model import find_model
    from liftkit.report.saving import held_output, save_images

    output = os.path.expanduser(output)
    console.hold(held_output(output))
    model = find_model(folder)
    from liftkit.device import choose_device
    from liftkit.formats.adapters import open_adapter
    from liftkit.models.editing import check_pictures
    from liftkit.models.loaded import load_pipeline
    from liftkit.models.sampling import check_options
    from liftkit.models.sampling import sample as run

    console.quiet_libraries()
    chosen, why = choose_device(options.device)
    check_pictures(model, options.pictures)
    adapter = None if options.adapter is None else open_adapter(options.adapter)
    pipeline = load_pipeline(model, chosen, adapter=adapter, offload=options.offload)
    check_options(pipeline, options)
    prompts = [prompt[index % len(prompt)] for index in range(count)]
    with console.Bars().stage(f"sample: {model.index['_class_name']} on {chosen}", count, "images") as advance:
        images = run(pipeline, prompts, options, advance=advance)
    made = {"model": model.name, "adapter": options.adapter, **pipeline.settings(options, *images.shape[-2:])}
    settings = [{"prompt": text, "seed": options.seed + index, **made} for index, text in enumerate(prompts)]
    written = save_images(images, output, settings, columns)
    seeds = [each["seed"] for each in settings]
    console.result(output=output, files=written, count=count, prompts=prompts, seeds=seeds, device=chosen)
    steps, size = settings[0]["steps"], f"{images.shape[-1]} x {images.shape[-2]}"
    walked = f"{steps} step{'' if steps == 1 else 's'}"
    about = f"{size} pixels, {walked}, seeds {seeds[0]} to {seeds[-1]}, {chosen}: {why}"
    sheet = written[-1].absolute()
    if len(written) == 1:
        console.out.print(f"{count} images in {sheet} ({about})")
    else:
        console.out.print(f"{count} images and {sheet.name} in the folder {sheet.parent} ({about})")
