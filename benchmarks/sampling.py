"""What a sampling step costs beyond its floor, the stock latent transformer's forward: python -m benchmarks sampling

Side by side in one run, in turns: a forward of a transformer of tiny-klein's shape, and one of its pixel twin, on as many tokens.
The numbers are random. ``benchmarks/gpu.py`` has the same at FLUX.2 klein 4B's size, on a GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch
from _gpu_model import TINY, call_arguments, latent_transformer, random_lift
from _gpu_sections import in_turns
from _table import Row, add_option, finish

from liftkit.embedded import TINY_KLEIN
from liftkit.models.surgery import convert_transformer

GOAL = 1.1


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--side", type=int, default=256, help="of the image, in pixels (%(default)s)")
    add_option(parser)
    chosen = parser.parse_args()
    config = json.loads((TINY_KLEIN / "transformer" / "config.json").read_text())
    scale = replace(TINY, config={name: value for name, value in config.items() if name[0] != "_"}, patch=8, text=32)
    where, lift = torch.device("cpu"), random_lift(scale)
    latent = latent_transformer(scale, where).float()
    twin = convert_transformer(latent, lift)
    narrow, wide = (call_arguments(scale, chosen.side, size, where, torch.float32) for size in (lift.rank, lift.dim))
    stock, pixel = lambda: latent(**narrow), lambda: twin(**wide)
    in_turns(3, stock, pixel)
    floor, ours, ratio = in_turns(chosen.rounds, stock, pixel)
    note = f"{torch.get_num_threads()} threads, {(chosen.side // scale.patch) ** 2} tokens"
    finish([Row("sampling: a step / the latent transformer's", floor, ours, "s", ratio, GOAL, note=note)], chosen.rows)


if __name__ == "__main__":
    main()
