"""Build liftkit/assets/tiny-flux2, one stage at a time: ``python -m tools.tiny_flux2 STAGE``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from liftkit.embedded import TINY_FLUX2_PIXEL


def main() -> None:
    from tools.tiny_flux2 import along, assemble, flow, judged, lab, measure, sources, taef2

    parser = argparse.ArgumentParser(prog="python -m tools.tiny_flux2", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    vae = stages.add_parser("vae", help="TAEF2's two files as a VAE folder")
    vae.add_argument("source", type=Path, help="folder of taef2_encoder.safetensors and taef2_decoder.safetensors")
    train = stages.add_parser("flow", help="train the latent flow model; it resumes")
    train.add_argument("--steps", type=int, default=1200)
    train.add_argument("--batch-size", type=int, default=48)
    train.add_argument("--pool", type=int, default=24576, help="images to draw")
    train.add_argument("--device", default="cpu")
    train.add_argument("--seconds", type=float, help="at most, from the first step on")
    train.add_argument("--workers", type=int, default=1, help="processes that draw images")
    train.add_argument("--threads", type=int, default=1, help="CPU threads")
    stages.add_parser("pack", help="what demo images are drawn from, for a machine without scikit-learn")
    ship = stages.add_parser("ship", help="make an attempt's result the shipped finetune")
    ship.add_argument("adapter", type=Path, help="folder that an attempt left")
    ship.add_argument("target", type=Path, nargs="?", default=TINY_FLUX2_PIXEL)
    ship.add_argument("--onto", type=Path, help="the adapter that it went on from, for what it left as it was")
    stages.add_parser("measure", help="measure it and write its model card")
    stages.add_parser("assemble", help="write the pipeline folder")
    _lab(stages)
    given = parser.parse_args()
    sources.use_where_needed()
    if given.stage == "measure":
        measure.measure()
    if given.stage == "pack":
        sources.pack()
    if given.stage == "vae":
        taef2.merge(given.source)
    if given.stage == "assemble":
        assemble.assemble()
    if given.stage == "ship":
        assemble.ship(given.adapter, given.target, given.onto)
    if given.stage == "lab":
        base = None
        if given.base_seconds:
            base = partial(
                flow.train, 100_000, given.base_batch, given.base_pool, given.device, given.base_seconds, given.workers
            )
        choices = {"device": given.device, "seconds": given.seconds, "count": given.count, "keys": given.set}
        lab.run(given.names or list(lab.ATTEMPTS), given.out, base=base, pool=given.pool, **choices)
    if given.stage == "attempt":
        torch.set_num_threads(given.threads)
        choices = {"device": given.device, "seconds": given.seconds, "count": given.count, "keys": given.set}
        lab.attempt(given.name, given.out, steps=given.steps, label=given.label, **choices)
    if given.stage == "judge":
        torch.set_num_threads(given.threads)
        how = {key: yaml.safe_load(value) for key, value in (each.split("=", 1) for each in given.set)}
        found = judged.judge(given.model, given.base, given.label, given.device, given.count, how)
        judged.record(given.out, {"name": given.label, **found})
    if given.stage == "along":
        along.along(given.model, given.count, given.guidance)
    if given.stage == "flow":
        torch.set_num_threads(given.threads)
        flow.train(given.steps, given.batch_size, given.pool, given.device, given.seconds, given.workers)


def _lab(stages: Any) -> None:
    from tools.tiny_flux2 import judged

    many = stages.add_parser("lab", help="train the base and attempts at a finetune side by side, and judge them")
    many.add_argument("out", type=Path)
    many.add_argument("names", nargs="*", help="of attempts; all if none is given")
    many.add_argument(
        "--base-seconds", type=float, default=0.0, help="of training the base; 0: take the one that is there"
    )
    many.add_argument("--base-batch", type=int, default=256)
    many.add_argument("--base-pool", type=int, default=65536, help="images that the base learns from")
    many.add_argument("--pool", type=int, default=65536, help="images that attempts learn from")
    many.add_argument("--workers", type=int, default=1, help="processes that draw images")
    one = stages.add_parser("attempt", help="one of them, in its own process")
    one.add_argument("name")
    one.add_argument("out", type=Path)
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--steps", type=int, help="of training, instead of --seconds")
    one.add_argument("--as", dest="label", help="name of its results")
    some = stages.add_parser("judge", help="the figures of a model's samples")
    some.add_argument("model", help="a pipeline folder, or an adapter")
    some.add_argument("out", type=Path)
    some.add_argument("--base", default="tiny-flux2", help="what an adapter applies to")
    some.add_argument("--as", dest="label", required=True, help="name of its results")
    some.add_argument("--threads", type=int, default=1)
    some.add_argument("--set", action="append", default=[], help="key=value of Guidance and Sampler, and steps")
    some.add_argument("--device", default="cpu")
    some.add_argument("--count", type=int, default=512, help="samples to judge")
    where = stages.add_parser("along", help="borders of patches in a model's estimates, step by step of the sampler")
    where.add_argument("model", help="a pixel model's folder, or an adapter of tiny-flux2")
    where.add_argument("--count", type=int, default=64, help="samples")
    where.add_argument("--guidance", type=float, default=judged.GUIDANCE)
    for each in (many, one):
        each.add_argument("--set", action="append", default=[], help="key=value of the recipe, for all attempts")
        each.add_argument("--device", default="cpu")
        each.add_argument("--seconds", type=float, default=90.0, help="of training each attempt")
        each.add_argument("--count", type=int, default=512, help="samples to judge")


if __name__ == "__main__":
    main()
