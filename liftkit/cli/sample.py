"""``liftkit sample``: images from a latent or a converted folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from liftkit import __version__
from liftkit.cli import console, guiding

if TYPE_CHECKING:
    from torch import Tensor

    from liftkit.guidance import Guidance
    from liftkit.sampling import Loaded


def sample(
    folder: Annotated[str, typer.Argument(help="A latent or a converted pipeline: a folder, a Hub id, or 'demo'.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to paint; repeat for several.")],
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, max=10_000, help="Images in all; prompts take turns.")
    ] = 8,
    seed: guiding.Seed = 0,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER",
            help="Picture file for one sheet of all images; or a folder, for single images beside a sheet. "
            "Every file holds its prompt, seed and settings.",
        ),
    ] = "samples.png",
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
    columns: Annotated[int | None, typer.Option(min=1, help="Of the grid.", show_default="by count")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="A folder of liftkit finetune with save: adapter, or of the AsymFlow authors.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What not to paint, for all images; the empty prompt else.")
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Shift of the noise levels, in the model's own space.", show_default="the scheduler's"
        ),
    ] = None,
    clamp: Annotated[
        bool | None,
        typer.Option(
            "--clamp/--no-clamp",
            help="Keep the denoised estimate of a pixel model within the colors of sRGB at every step.",
            show_default="the scheduler's",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 8,
) -> None:
    """Sample images through the stock diffusers pipeline, for latent and converted folders alike.

    Example: liftkit sample klein-pixel -p "a red seven on flower petals" -n 8 --seed 0 -o grid.png
    """
    from liftkit.checkpoint.model import find_model
    from liftkit.device import choose_device
    from liftkit.formats.adapters import open_adapter
    from liftkit.guidance import Guidance
    from liftkit.report.saving import held_output, save_images
    from liftkit.sampling import check_size, load_pipeline, set_noise
    from liftkit.sampling import sample as run

    console.quiet_libraries()
    console.hold(held_output(output))
    guided = Guidance(guidance, guidance_start, guidance_stop, guidance_orthogonal)
    chosen, why = choose_device(device)
    model = find_model(folder)
    pipeline = load_pipeline(model, chosen, adapter=None if adapter is None else open_adapter(adapter))
    set_noise(pipeline, shift, clamp)
    check_size(pipeline, height, width)
    prompts = [prompt[index % len(prompt)] for index in range(count)]
    with console.Bars().stage(f"sample: {model.index['_class_name']} on {chosen}", count, "images") as advance:
        images = run(
            pipeline,
            prompts,
            seed=seed,
            height=height,
            width=width,
            steps=steps,
            guidance=guided,
            negative=negative,
            batch_size=batch_size,
            advance=advance,
        )
    settings = _settings(images, prompts, pipeline, model.name, seed, steps, guided, adapter)
    chosen_too = {"negative": negative, "shift": shift, "clamp": clamp}
    for each in settings:
        each |= {key: value for key, value in chosen_too.items() if value is not None}
    written = save_images(images, output, settings, columns)
    seeds = [made["seed"] for made in settings]
    console.result(output=output, files=written, count=count, prompts=prompts, seeds=seeds, device=chosen)
    first, size = settings[0], f"{images.shape[-1]} x {images.shape[-2]}"
    about = f"{size} pixels, {first['steps']} steps, seeds {seeds[0]} to {seeds[-1]}, {chosen}: {why}"
    console.out.print(f"{count} images in {output} ({about})")


def _settings(
    images: Tensor,
    prompts: list[str],
    pipeline: Loaded,
    model: str,
    seed: int,
    steps: int | None,
    guidance: Guidance,
    adapter: str | None,
) -> list[dict[str, Any]]:
    """What made each image, for its metadata: choices that were left to the pipeline by their value."""
    shared = {
        "model": model,
        "adapter": adapter,
        "width": images.shape[-1],
        "height": images.shape[-2],
        "steps": steps or pipeline.default("num_inference_steps"),
        "guidance": pipeline.default("guidance_scale") if guidance.record is None else guidance.record,
        "liftkit": __version__,
    }
    return [{"prompt": prompt, "seed": seed + index, **shared} for index, prompt in enumerate(prompts)]
