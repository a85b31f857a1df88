"""The demonstration: convert an embedded model, mend it for a minute, and compare what all of them paint from the same noise."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from liftkit.checkpoint.files import atomic_file, write_text
from liftkit.checkpoint.leftovers import discard, sweep_inside
from liftkit.checkpoint.lock import claim
from liftkit.color import to_signed
from liftkit.conversion.execute import execute
from liftkit.conversion.plan import make_plan
from liftkit.conversion.result import Conversion
from liftkit.embedded import DEMO, TINY_FLUX2_PIXEL, TINY_PIXEL
from liftkit.errors import UsageError
from liftkit.evaluate.compare import compare
from liftkit.evaluate.comparison import Comparison
from liftkit.evaluate.page import compare_page
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.run import finetune
from liftkit.finetune.run_folder import RunFolder
from liftkit.interrupt import Stopped
from liftkit.options import CompareOptions, ConvertOptions
from liftkit.progress import Observer
from liftkit.report.pictures import Row, gallery_rows, labeled

STEPS = 120
IMAGES = 2048
"""Of the live finetune: enough for its steps, encoded in seconds."""
SAMPLES = 128
BATCH = 32
"""Images in a step of it."""
RECIPES = {DEMO: "tiny-klein", "tiny-flux2": "tiny-flux2"}
"""The recipe of each embedded model, which is named as the model itself is."""
SHIPPED = {DEMO: TINY_PIXEL, "tiny-flux2": TINY_FLUX2_PIXEL}
LABELS = {
    "converted": "converted",
    "live": f"finetuned {STEPS} steps",
    "shipped": "shipped finetune",
}


@dataclass
class Demonstration:
    """What the demo made and found.

    Args:
        name: of the embedded model.
        conversion: of it.
        finetuned: folder of the live finetune; None where it was left out.
        comparison: of all models, with the controls.
        picture, page: the files.
    """

    name: str
    conversion: Conversion
    finetuned: Path | None
    comparison: Comparison
    picture: Path
    page: Path


def run(
    output: Path,
    *,
    seed: int,
    observer: Observer,
    quick: bool = False,
    samples: int | None = None,
    model: str = DEMO,
) -> Demonstration:
    """Convert, finetune, compare; write ``demo.png``, ``demo.html`` and ``demo.json``.

    Args:
        output: a folder; what an earlier demo left in it is replaced.
        seed: of noise, images and prompts.
        quick: leave the live finetune out, and judge fewer samples.
        samples: of each model.
        model: the embedded model, of :data:`RECIPES`.

    Raises:
        UsageError: if the output is no folder, or another demo is at work there.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; the demo needs a folder")
    with claim(output, inside=True):
        sweep_inside(output)
        return _run(model, output, seed, observer, quick, samples)


def _run(model: str, output: Path, seed: int, observer: Observer, quick: bool, samples: int | None) -> Demonstration:
    name = RECIPES[model]
    conversion = _convert(model, output / f"pixel-{name.removeprefix('tiny-')}", seed, observer)
    models = {"converted": conversion.output}
    if not quick:
        models["live"] = _finetune(name, output / "finetune", conversion.output, seed, observer)
    if SHIPPED[model].is_dir():
        models["shipped"] = SHIPPED[model]
    found = compare(
        CompareOptions(
            base=model,
            pixels=tuple(map(str, models.values())),
            labels=tuple(LABELS[name] for name in models),
            count=samples or (SAMPLES // 2 if quick else SAMPLES),
            seed=seed,
            device="cpu",
            batch_size=32,
            quick=True,
        ),
        observer,
    )
    result = Demonstration(name, conversion, models.get("live"), found, output / "demo.png", output / "demo.html")
    with atomic_file(result.picture) as file:
        labeled(_rows(result), title=f"{name}, lifted from latents to pixels").save(file, "PNG")
    write_text(result.page, compare_page(found))
    write_text(output / "demo.json", json.dumps(found.to_dict(), indent=2) + "\n")
    return result


def _convert(model: str, target: Path, seed: int, observer: Observer) -> Conversion:
    options = ConvertOptions(images="demo", seed=seed, overwrite=True, device="cpu")
    return execute(make_plan(model, target, options), observer)


def _finetune(name: str, run_folder: Path, model: Path, seed: int, observer: Observer) -> Path:
    """The shipped recipe, cut short; an earlier demo's run goes."""
    if RunFolder(run_folder).begun:
        discard(run_folder)
    overrides = {
        "model": str(model),
        "output": str(run_folder),
        "seed": seed,
        "steps": STEPS,
        "batch_size": BATCH,
        "data.sources": [{"kind": "demo", "count": IMAGES}],
        "checkpoints.every": 0,
        "previews.every": 0,
        "validation.every": 0,
    }
    recipe = load_recipe(name, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    done = finetune(recipe, observer=observer)
    if done.result is None:
        raise Stopped(done.outcome.signal or signal.SIGINT)
    return done.result


def _rows(result: Demonstration) -> list[Row]:
    """What the fit shows of real images, and below it what each model paints from the same noise."""
    gallery = [row for row in gallery_rows(result.conversion.lift) if row.label.startswith(("Image", "VAE", "Lift"))]
    labels = {"base": f"Latent model: samples of {result.name}"}
    labels |= {row.key: f"Pixel model: {row.label}" for row in result.comparison.rows if row.role == "pixel"}
    painted = [(row, row.images) for row in result.comparison.rows if row.key in labels and row.images is not None]
    return [*gallery, *(Row(labels[row.key], to_signed(torch.as_tensor(images))) for row, images in painted)]
