"""Build liftkit/assets/tiny-klein from nothing, one stage at a time: ``python -m tools.tiny_klein STAGE``."""

from __future__ import annotations

import argparse

import torch


def main() -> None:
    from tools.tiny_klein import assemble, autoencoder, flow, judge, measure

    stages = {
        "vae": autoencoder.train,
        "oracle": judge.train,
        "flow": flow.train,
        "decoder": autoencoder.sharpen,
        "assemble": assemble.assemble,
        "measure": measure.measure,
    }
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_klein", description=__doc__)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of this stage")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stages[arguments.stage]()


if __name__ == "__main__":
    main()
