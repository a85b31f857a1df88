"""The ablation table of docs/lab/tiny-klein.md: python -m tools.ablation [FOLDER] [--steps 200] [--samples 256]

Short runs of the recipe tiny-klein with Muon, each with one thing changed; every run is the command that is printed. Rows come
out as soon as they are there, kept in FOLDER/rows.json: an interrupted table goes on where it stopped. About three minutes a run on
one core.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from liftkit.checkpoint.files import write_text
from liftkit.options import Guidance, SampleOptions

MUON = ("optimizer.name=muon", "optimizer.learning_rate=2e-3")
ALL, ONE = (0, 1, 2), (0,)
ROWS: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "plain flow loss": (["objective.loss=flow"], ALL),
    "variance reduction, kappa 0.3": ([], ALL),
    "variance reduction at every noise level (kappa null)": (["objective.kappa=null"], ALL),
    "kappa 0.3 + perceptual, the VAE's features": (["objective.perceptual=vae"], ONE),
    "kappa 0.3 + perceptual, image gradients": (["objective.perceptual=gradient"], ONE),
    "LoRA of rank 64 instead of full": (["trainable.mode=lora", "trainable.rank=64"], ONE),
    "AdamW 1e-3 instead of Muon 2e-3": (["optimizer.name=adamw", "optimizer.learning_rate=1e-3"], ONE),
    "complement closed": (["trainable.open=0"], ONE),
    "noise shift 2.4 instead of 1.0": (["noise.shift=2.4"], ONE),
}
FIGURES = ("digit", "color", "patch_frechet", "two_sample", "gradient_median", "patch_grid")
"""Of :data:`liftkit.evaluate.figures.FIGURES`."""


def command(base: Path, output: Path, changes: list[str], seed: int, steps: int) -> list[str]:
    """What makes a run."""
    return [
        *(
            "liftkit",
            "finetune",
            "tiny-klein",
            f"model={base}",
            f"steps={steps}",
            f"seed={seed}",
            "threads=1",
            "trainable.head=null",
        ),
        *(
            "previews.every=0",
            "validation.every=0",
            f"data.cache={base.parent / 'cache'}",
            *MUON,
            *changes,
            "-o",
            str(output),
        ),
    ]


def measure(folder: Path, count: int) -> dict[str, float]:
    """Figures of a model's samples on held-out prompts, against 1024 other held-out images."""
    import torch

    from liftkit.checkpoint.model import find_model
    from liftkit.color import to_signed
    from liftkit.data import demo
    from liftkit.embedded import GUIDANCE, STEPS
    from liftkit.evaluate.figures import Scorer
    from liftkit.evaluate.patches import patch_frechet
    from liftkit.models.loaded import load_pipeline
    from liftkit.models.sampling import sample

    torch.set_num_threads(1)
    scenes = [demo.scene_at(index, split="heldout") for index in range(count)]
    drawn = demo.images(1024, split="heldout", start=4000)[0]
    real = to_signed(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    prompts = [scene.prompt for scene in scenes]
    options = SampleOptions(steps=STEPS, guidance=Guidance(GUIDANCE), batch_size=32)
    images = sample(load_pipeline(find_model(str(folder))), prompts, options)
    found = Scorer(real, patch=8, scenes=scenes).score(images).figures
    # The scorer has no Frechet distance for so few samples; rows of one table, of equal number, can be ranked by it.
    found["patch_frechet"] = patch_frechet(images, real)
    return {name: value for name in FIGURES if (value := found[name]) is not None}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: means, with the range over seeds where there are several."""
    lines = ["| change | seeds | " + " | ".join(FIGURES) + " |", "|---" * (2 + len(FIGURES)) + "|"]
    for name, rows in found.items():
        cells = []
        for figure in FIGURES:
            values = [row[figure] for row in rows]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/ablation"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=256)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    base, kept = chosen.folder / "base", chosen.folder / "rows.json"
    run = [sys.executable, "-m"]
    if not base.exists():
        source = "liftkit convert liftkit/assets/tiny-klein --images demo --device cpu -o"
        subprocess.run([*run, *source.split(), str(base)], check=True)
    found: dict[str, dict[str, dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in ALL:
        for index, (name, (changes, seeds)) in enumerate(ROWS.items()):
            if seed not in seeds or str(seed) in found.get(name, {}):
                continue
            output = chosen.folder / f"{index}-{seed}"
            words = command(base, output, changes, seed, chosen.steps)
            print(shlex.join(words), flush=True)
            again = ["--resume", "latest"] if list(output.glob("checkpoints/step-*")) else []
            if not again:
                shutil.rmtree(output, ignore_errors=True)
            subprocess.run([*run, *words, *again, "--quiet"], check=True)
            found.setdefault(name, {})[str(seed)] = measure(output / "model", chosen.samples)
            write_text(kept, json.dumps(found, indent=1))
            print(json.dumps(found[name][str(seed)]), flush=True)
    print(table({name: list(found[name].values()) for name in ROWS}))


if __name__ == "__main__":
    main()
