"""The demonstration: convert tiny-klein, and paint the same noise with the latent model and its pixel twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.files import atomic_file, write_text
from liftkit.checkpoint.model import find_model
from liftkit.conversion.execute import execute
from liftkit.conversion.plan import ConvertOptions, Plan, make_plan
from liftkit.conversion.result import Conversion
from liftkit.data import demo as data
from liftkit.data.oracle import Verdicts, judge, load_oracle
from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.progress import Observer
from liftkit.report.pages import figures_table, gallery, page, proof_table, verdict_block
from liftkit.report.pictures import Row, gallery_rows, labelled
from liftkit.sampling import load_pipeline, sample, state_noise
from liftkit.tokens import patchify, unpatchify

TINY_KLEIN = Path(__file__).parent / "assets" / "tiny-klein"
SHOWN = 8
STEPS, GUIDANCE = 16, 4.0


@dataclass
class Demonstration:
    """What the demo made and found.

    Args:
        conversion: of tiny-klein.
        picture, page: the files.
        latent_verdicts, pixel_verdicts: how many prompts each model's samples obey.
        samples: images judged per model.
    """

    conversion: Conversion
    picture: Path
    page: Path
    latent_verdicts: Verdicts
    pixel_verdicts: Verdicts
    samples: int

    def say(self, verdicts: Verdicts) -> str:
        """Verdicts in words."""
        return f"digit {verdicts.digit:.0%}, colour {verdicts.color:.0%}, background {verdicts.background:.0%} of {self.samples}"


def run(
    output: Path,
    *,
    seed: int,
    observer: Observer,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    samples: int = 64,
) -> Demonstration:
    """Convert, sample both models from tied noise, write ``demo.png`` and ``demo.html``.

    Args:
        output: a folder; the converted model goes to ``pixel-klein`` inside it and replaces an earlier demo's.
        seed: of noise, images and prompts.
        samples: images per model that the oracle judges; the first ones are shown.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; the demo needs a folder")
    output.mkdir(parents=True, exist_ok=True)
    options = ConvertOptions(images="demo", seed=seed, overwrite=True, device="cpu")
    plan = make_plan(str(TINY_KLEIN), output / "pixel-klein", options)
    on_plan(plan)
    conversion = execute(plan, observer)
    scenes = [data.scene_at(index, split="heldout", seed=seed) for index in range(samples)]
    with observer.stage("sample: both models from tied noise", 2 * samples, "images") as advance:
        latent, pixel = tied_samples(conversion, [s.prompt for s in scenes], seed, advance)
    oracle = load_oracle()
    verdicts = [judge(oracle, images, scenes) for images in (latent, pixel)]
    shown = [row for row in gallery_rows(conversion.lift) if row.label.startswith(("Image", "VAE", "Lift"))]
    rows = [
        *shown,
        Row("Latent model: samples of tiny-klein", latent[:SHOWN]),
        Row("Pixel model, untrained: the same noise and prompts, without a VAE", pixel[:SHOWN]),
    ]
    picture, html = output / "demo.png", output / "demo.html"
    with atomic_file(picture) as file:
        labelled(rows, title="tiny-klein, lifted from latents to pixels").save(file, "PNG")
    result = Demonstration(conversion, picture, html, verdicts[0], verdicts[1], samples)
    write_text(html, _page(result, rows, [scene.prompt for scene in scenes[:SHOWN]]))
    return result


@torch.no_grad()
def tied_samples(
    conversion: Conversion, prompts: list[str], seed: int, advance: Callable[[float], None]
) -> tuple[Tensor, Tensor]:
    """Samples of both stock pipelines, starting at eps and at A^T eps.

    Returns:
        Images of the latent and of the pixel model, (n, 3, H, W) in [-1, 1].
    """
    lift = conversion.lift
    choices: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "batch_size": 16, "advance": advance}
    pipeline = load_pipeline(find_model(str(conversion.output)))
    noise = state_noise(pipeline.flow, len(prompts), data.SIZE, data.SIZE, lift.fold, seed)
    pixel = sample(pipeline, prompts, noise=noise, **choices)
    pipeline = load_pipeline(conversion.plan.model)
    return sample(pipeline, prompts, noise=lower(lift, noise), **choices), pixel


def lower(lift: Lift, noise: Tensor) -> Tensor:
    """A^T eps: pixel noise (n, 3, H, W) to the latent noise (n, C, H / f, W / f) that is tied to it."""
    tokens = patchify(noise, lift.patch_size) @ lift.basis.to(noise)
    height, width = (size // lift.fold for size in noise.shape[-2:])
    return unpatchify(tokens, lift.latent_patch, height, width)


def _page(result: Demonstration, rows: list[Row], prompts: list[str]) -> str:
    """The demo's page: pictures, what the oracle says, alignment and proof."""
    conversion = result.conversion
    alignment = conversion.lift.figures["alignment"]
    lead = (
        "A latent flow model was turned into a pixel flow model by rewriting two linear layers. "
        "Nothing was trained; the next step is finetuning, which mends colour and fine detail."
    )
    verdicts = "".join(
        f'<tr><td>{name}</td><td class="number">{v.digit:.3f}</td><td class="number">{v.color:.3f}</td>'
        f'<td class="number">{v.background:.3f}</td></tr>'
        for name, v in (("latent model", result.latent_verdicts), ("pixel model, untrained", result.pixel_verdicts))
    )
    body = (
        gallery(rows)
        + f"<p>Prompts, left to right: {'; '.join(escape(prompt) for prompt in prompts)}.</p>"
        + f"<h2>Do the samples obey their prompts?</h2><p>Share of {result.samples} samples in which an oracle, trained on "
        + 'real images, reads what the prompt asked for.</p><table><tr><th>Model</th><th class="number">digit</th>'
        + f'<th class="number">colour</th><th class="number">background</th></tr>{verdicts}</table>'
        + f"<h2>How well latents and pixels align</h2>{verdict_block(alignment['verdict'])}{figures_table(alignment)}"
        + f"<h2>The converted model does what its source does</h2>{proof_table(conversion.proof.to_dict())}"
    )
    return page("tiny-klein, lifted from latents to pixels", lead, body)
