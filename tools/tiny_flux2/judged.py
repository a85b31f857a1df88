"""Judge models of tiny-flux2 by the figures of ``liftkit compare``: lines of ``results.jsonl``, and rows of pictures."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftkit.color import to_signed, to_uint8
from tools.tiny_flux2 import flow

GUIDANCE = 4.0
TEST_STEPS = int(os.environ.get("TINY_FLUX2_TEST_STEPS", "400"))
"""Of the two-sample test; fewer to try the script."""


def judge(
    model: str, base: str, name: str, device: str, count: int, how: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The figures of a model's samples as ``liftkit compare`` has them; some of the samples are kept.

    Args:
        model, base: a pipeline folder, or an adapter and what it applies to.
        name: of its row of pictures.
        device: to sample on.
        count: samples.
        how: fields of liftkit's options Guidance and Sampler, and ``steps``, where they are not guidance 4 and 16 Euler steps.
    """
    from liftkit.evaluate.entries import open_entry
    from liftkit.evaluate.real import open_real
    from liftkit.evaluate.tied import pixel_noise
    from liftkit.lift import Lift
    from liftkit.models.sampling import sample
    from liftkit.options import Guidance, SampleOptions, Sampler

    real, entry = open_real("demo", count, 64, 0, None), open_entry(model, base)
    noise = pixel_noise(range(count), 64, 64, 0)
    if entry.lift is None:
        noise = Lift.load(flow.WORK / "pixel" / "lift.safetensors").lower(noise)
    chosen = {"scale": GUIDANCE, "steps": 16, **how}
    guidance = Guidance(**{each.name: chosen.pop(each.name) for each in fields(Guidance) if each.name in chosen})
    steps = chosen.pop("steps")
    common = {"steps": steps, "guidance": guidance, "sampler": Sampler(**chosen), "height": 64, "width": 64}
    # In bfloat16, as it was trained: 4.5 times faster on a CPU that multiplies it.
    with torch.autocast(device, torch.bfloat16):
        images = sample(entry.load(device), list(real.prompts), SampleOptions(**common, batch_size=128), noise=noise)
    return {"guidance": guidance.record, "sampler": {"steps": steps, **chosen}, **figures(to_uint8(images), real, name)}


def figures(images: Tensor, real: Any, name: str) -> dict[str, Any]:
    """The figures of uint8 images (n, 3, 64, 64); the first eight are kept as a row of pictures."""
    from liftkit.evaluate.figures import Scorer

    flow.WORK.joinpath("rows").mkdir(parents=True, exist_ok=True)
    np.save(flow.WORK / "rows" / f"{name}.npy", images[:8].numpy())
    score = Scorer(real.reference, patch=16, scenes=real.scenes, steps=TEST_STEPS).score(images)
    return {key: None if value is None else round(value, 4) for key, value in score.figures.items()}


def pictures(out: Path) -> None:
    """All rows of samples, one below the other, enlarged threefold."""
    from PIL import Image, ImageDraw

    rows = sorted((flow.WORK / "rows").glob("*.npy"))
    sheet = Image.new("RGB", (8 * 194, 212 * len(rows)), "white")
    for index, path in enumerate(rows):
        ImageDraw.Draw(sheet).text((4, index * 212 + 2), path.stem, fill="black")
        for column, image in enumerate(np.load(path)):
            shown = Image.fromarray(image.transpose(1, 2, 0)).resize((192, 192), Image.Resampling.NEAREST)
            sheet.paste(shown, (column * 194, index * 212 + 16))
    sheet.save(out / "samples.png", optimize=True)


def record(out: Path, row: dict[str, Any]) -> None:
    """A line of results; processes write whole lines."""
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(json.dumps({key: value for key, value in row.items() if key != "record"}), flush=True)
    _keep_best(out)


def _keep_best(out: Path, most: int = 2) -> None:
    """The weights of the attempts at pixels that the two-sample test finds nearest to real images so far."""
    with (flow.WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        tried = [row for row in rows if "two_sample" in row and "keys" in row and "space=latent" not in row["keys"]]
        best = [row["name"] for row in sorted(tried, key=lambda row: row["two_sample"])[:most]]
        kept = {out / f"best-{name}.safetensors" for name in best}
        for path in set(out.glob("best-*.safetensors")) - kept:
            path.unlink()
        for name in best:
            if not (out / f"best-{name}.safetensors").exists():
                shutil.copyfile(
                    flow.WORK / "runs" / name / "adapter" / "adapter.safetensors", out / f"best-{name}.safetensors"
                )


def judge_base(out: Path, device: str, count: int) -> None:
    """The rows that every attempt is beside: real images, those through the VAE, the base, and its conversion untrained."""
    from liftkit.evaluate.real import open_real
    from liftkit.models.latents import LatentSpace
    from liftkit.models.load import load_vae

    real = open_real("demo", count, 64, 0, None)
    model, pixel = str(flow.WORK / "model"), str(flow.WORK / "pixel")
    for scale in (2.0, 4.0):
        name = f"base-{scale:g}"
        record(out, {"name": name, **judge(model, model, f"0-{name}", device, count, {"scale": scale})})
    space = LatentSpace(load_vae(flow.WORK / "model").to(device))
    shown = torch.cat(
        [to_uint8(space.decode(space.encode(to_signed(part).to(device)))).cpu() for part in real.shown.split(64)]
    )
    record(out, {"name": "vae", **figures(shown, real, "0-vae")})
    record(out, {"name": "converted", **judge(pixel, model, "0-converted", device, count)})
