"""Build liftkit/assets/tiny-flux2, one stage at a time: ``python -m tools.tiny_flux2 STAGE``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def main() -> None:
    from tools.tiny_flux2 import flow, taef2

    parser = argparse.ArgumentParser(prog="python -m tools.tiny_flux2", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    vae = stages.add_parser("vae", help="TAEF2's two files as a VAE folder")
    vae.add_argument("source", type=Path, help="folder of taef2_encoder.safetensors and taef2_decoder.safetensors")
    train = stages.add_parser("flow", help="train the latent flow model; it resumes")
    train.add_argument("--steps", type=int, default=3300)
    train.add_argument("--batch-size", type=int, default=48)
    train.add_argument("--pool", type=int, default=24576, help="images to draw")
    train.add_argument("--device", default="cpu")
    train.add_argument("--seconds", type=float, help="at most, from the first step on")
    train.add_argument("--workers", type=int, default=1, help="processes that draw images")
    train.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args()
    if given.stage == "vae":
        taef2.merge(given.source)
    if given.stage == "flow":
        torch.set_num_threads(given.threads)
        flow.train(given.steps, given.batch_size, given.pool, given.device, given.seconds, given.workers)


if __name__ == "__main__":
    main()
