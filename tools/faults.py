"""The tutorial's gallery of faults: makes each on purpose, paints all of them alike, and measures what gives them away.

    python -m tools.faults build/faults

runs the commands of the page's gallery in that folder (those of the tutorial before it too, where their results are
missing), writes ``docs/faults.png`` and prints the table of docs/tutorial.md.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from liftkit.color import to_signed
from liftkit.data import demo
from liftkit.embedded import GUIDANCE, STEPS
from liftkit.evaluate.figures import FIGURES, Scorer
from liftkit.options import Guidance, SampleOptions, Sampler
from liftkit.report.pictures import Row, labeled

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
PICTURE = ROOT / "docs" / "faults.png"
SAMPLES, SHOWN, TILE, COLORS = 64, [1, 4, 5], 128, 96
MAKING = ("demo", "convert", "import", "finetune")
PROGRAMS = {"liftkit": [sys.executable, "-P", "-m", "liftkit"], "python": [sys.executable], "cp": ["cp"]}
FLOOR, FEW = 0.8, 3


@dataclass(frozen=True)
class Fault:
    """A row of the gallery: its name on the page, the model that has it, and how that is sampled."""

    label: str
    model: str
    sigma_floor: float | None = None
    steps: int = STEPS


FAULTS = (
    Fault("as it should be", "long-pixel"),
    Fault("color cast", "cast-pixel"),
    Fault("grain", "long-pixel", FLOOR),
    Fault("washed-out detail", "long-pixel", steps=FEW),
    Fault("150 steps", "runs/mine/model"),
    Fault("patch grid", "runs/grid/model"),
    Fault("blotches", "runs/rank-1/model"),
    Fault("wrong captions", "runs/mixed/model"),
)
COLUMNS = ("digit", "color", "patch_grid", "gradient_median", "laplacian", "spectrum_high")


def commands() -> list[list[str]]:
    """The page's commands that make or copy models, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    lines = [line for line in lines if line and "--dry-run" not in line]
    return [line for line in lines if line[0] != "liftkit" or line[1] in MAKING]


def make(folder: Path) -> None:
    """Run them in a folder, except those whose result is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "liftkit").exists():
        (folder / "liftkit").symlink_to(ROOT / "liftkit")
    for line in commands():
        # Small files are copied and rewritten again.
        if not (folder / line[-1]).is_dir():
            print("$", shlex.join(line), flush=True)
            subprocess.run([*PROGRAMS[line[0]], *line[1:]], cwd=folder, check=True)


def paint(folder: Path) -> dict[str, Tensor]:
    """Held-out prompts, painted by every row's model from the same noise: (n, 3, 64, 64) in [-1, 1]."""
    from liftkit.checkpoint.model import find_model
    from liftkit.models.loaded import load_pipeline
    from liftkit.models.sampling import sample

    prompts = [scene.prompt for scene in scenes()]
    painted = {}
    for fault in FAULTS:
        sampler = Sampler(sigma_floor=fault.sigma_floor)
        options = SampleOptions(steps=fault.steps, guidance=Guidance(GUIDANCE), batch_size=32, sampler=sampler)
        painted[fault.label] = sample(load_pipeline(find_model(str(folder / fault.model))), prompts, options)
        print(f"painted: {fault.label}", flush=True)
    return painted


def scenes() -> list[demo.Scene]:
    """What the images of every row were asked to show."""
    return [demo.scene_at(index, split="heldout") for index in range(SAMPLES)]


def table(painted: dict[str, Tensor]) -> str:
    """The figures of every row against held-out images, as Markdown."""
    drawn = demo.images(1024, split="heldout", start=4000)[0]
    real = to_signed(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    scorer = Scorer(real, patch=8, scenes=scenes(), steps=1, seeds=(0,))
    lines = ["| | " + " | ".join(f"`{name}`" for name in COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for label, images in painted.items():
        figures = scorer.score(images).figures
        lines.append(f"| {label} | " + " | ".join(FIGURES[name].show(figures[name]) for name in COLUMNS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/faults"))
    folder = parser.parse_args().folder
    make(folder)
    painted = paint(folder)
    rows = [Row(label, images[SHOWN]) for label, images in painted.items()]
    picture = labeled(rows, title="one model, and six ways to spoil it", tile=TILE)
    picture = picture.quantize(COLORS, kmeans=4, dither=Image.Dither.NONE)
    picture.save(PICTURE, "PNG", optimize=True)
    print(table(painted))


if __name__ == "__main__":
    main()
