"""How right the estimate of memory is: python -m benchmarks memory [NAME ...]

Models of 40 to 100 million random numbers are trained for two steps, each in a process of its own. Its resident memory at its
peak is set beside an estimate by liftkit.finetune.estimates: the libraries (measured in the same process before the
model is made), and the estimate. On a CPU the allocator of the C library keeps part of what it is given back; the estimate has
a share for that.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from convert import KLEIN_4B

from liftkit.checkpoint.model import ModelFolder
from liftkit.finetune.ahead import Ahead
from liftkit.finetune.estimates import Estimate, estimate
from liftkit.finetune.learner import Learner
from liftkit.finetune.memory import resident_memory
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.run import make_accelerator
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.sketch import Sketch
from liftkit.finetune.trainee import make_trainee
from liftkit.lift import Lift
from liftkit.models.registry import architecture, lifted_class
from liftkit.models.surgery import lifted_config

SIDE = 16
STEPS = 2
KLEIN = {**KLEIN_4B, "num_layers": 1, "num_single_layers": 3, "num_attention_heads": 8, "joint_attention_dim": 1024}
SD3 = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 12,
    "joint_attention_dim": 1024,
    "caption_projection_dim": 768,
    "pooled_projection_dim": 512,
    "pos_embed_max_size": 64,
}
QWEN = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 128,
    "num_attention_heads": 6,
    "joint_attention_dim": 1024,
    "axes_dims_rope": (16, 56, 56),
}


@dataclass(frozen=True)
class Setting:
    """One row.

    Args:
        kind: class of the transformer.
        config: of the latent one.
        channels: of the latents.
        side: of the images, in pixels.
        text: tokens of a prompt.
        recipe: keys that differ.
    """

    kind: str = "Flux2Transformer2DModel"
    config: dict[str, Any] = field(default_factory=lambda: KLEIN)
    channels: int = 32
    side: int = 128
    text: int = 77
    recipe: dict[str, Any] = field(default_factory=dict)

    def make_recipe(self, output: str) -> Recipe:
        """The recipe: float32 and a batch of 4 unless it says otherwise."""
        shared = {
            "model": "random",
            "output": output,
            "data": {"sources": [{"kind": "demo"}]},
            "trackers": [],
            "precision": "no",
        }
        return Recipe.model_validate({**shared, "batch_size": 4, "trainable": {"rank": 64}, **self.recipe})

    def sketch(self) -> Sketch:
        """The model without its weights."""
        import diffusers

        rank = 4 * self.channels
        random = torch.randn(3 * SIDE**2, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        lift = Lift(torch.linalg.qr(random)[0].float(), 2.4, patch_size=SIDE, latent_patch=2)
        spec = architecture(self.kind)
        with torch.device("meta"):
            stock = getattr(diffusers, self.kind)(**self.config)
            twin = lifted_class(spec).from_config(lifted_config(spec, dict(stock.config), lift)).requires_grad_(False)
        folder = ModelFolder(Path("random"), "random", {})
        return Sketch(folder, spec, lambda dtype: copy.deepcopy(twin).to(dtype), lift, stock.state_dict(), self.text)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.side, self.side


CHECKPOINTING = {"gradient_checkpointing": True}
FULL = {"trainable": {"mode": "full"}, "batch_size": 2}
SD3_KIND, QWEN_KIND = ("SD3Transformer2DModel", SD3, 16), ("QwenImageTransformer2DModel", QWEN, 16)
SETTINGS: dict[str, Setting] = {
    "flux2 LoRA": Setting(),
    "flux2 LoRA, checkpointing": Setting(recipe={**CHECKPOINTING, "batch_size": 8}),
    "flux2 LoRA, 192 pixels, batch 2": Setting(side=192, recipe={"batch_size": 2}),
    "flux2 LoRA, bf16": Setting(recipe={"precision": "bf16"}),
    "flux2 LoRA, Muon": Setting(recipe={"optimizer": {"name": "muon"}}),
    "flux2 LoRA, micro batches of 2": Setting(recipe={"batch_size": 8, "micro_batch": 2}),
    "flux2 full": Setting(recipe=FULL),
    "flux2 full, checkpointing, Muon": Setting(recipe={**FULL, **CHECKPOINTING, "optimizer": {"name": "muon"}}),
    "sd3 LoRA": Setting(*SD3_KIND),
    "sd3 full, checkpointing": Setting(*SD3_KIND, recipe={**FULL, **CHECKPOINTING}),
    "qwen LoRA": Setting(*QWEN_KIND),
    "qwen LoRA, checkpointing, batch 8": Setting(*QWEN_KIND, recipe={**CHECKPOINTING, "batch_size": 8}),
    "flux2 LoRA, 8-bit AdamW": Setting(recipe={"optimizer": {"name": "adamw8bit"}}),
    "flux2 LoRA, int8 base": Setting(recipe={"base": {"quantize": "int8"}}),
    "flux2 LoRA, nf4 base": Setting(recipe={"base": {"quantize": "nf4"}}),
    "flux2 LoRA, offload": Setting(recipe={"base": {"offload": "blocks"}, **CHECKPOINTING}),
}


def measure(setting: Setting) -> dict[str, int]:
    """Train in this process; bytes before the model is made, and at the peak of the steps."""
    before, sketch = resident_memory(), setting.sketch()
    with TemporaryDirectory() as output:
        recipe = setting.make_recipe(output)
        transformer = sketch.transformer(recipe).to_empty(device="cpu")
        with torch.no_grad():
            for each in (*transformer.parameters(), *transformer.buffers()):
                each.normal_(std=0.02)
        transformer.lift.basis.copy_(sketch.lift.basis)
        _give_tables(transformer, setting)
        tensors = {name: torch.randn(sketch.tensors[name].shape) for name in _originals(sketch)}
        trainee = make_trainee(recipe, sketch.folder, sketch.spec, transformer, sketch.lift, tensors)
        learner = Learner(recipe, trainee, None, make_accelerator(recipe, RunFolder(recipe.output), cpu=True))
        batch = sketch.batch(recipe, transformer.config, setting.size, SIDE)
        ahead = Ahead(recipe, slice(0, recipe.batch_size), torch.device("cpu"), pixels=True)
        ready = [ahead(step, batch) for step in range(2)]
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here on.
        for step in range(STEPS):
            learner.learn(ready[step], step)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return {"libraries": before, "peak": peak}


def _give_tables(transformer: Any, setting: Setting) -> None:
    """Tables that a class keeps as plain tensors, which come from the meta device as they are: those of a model of one layer."""
    import diffusers

    layers = {key: 1 for key in setting.config if key in ("num_layers", "num_single_layers")}
    whole = dict(getattr(diffusers, setting.kind)(**{**setting.config, **layers}).named_modules())
    for path, module in transformer.named_modules():
        for name, each in vars(module).items():
            if isinstance(each, torch.Tensor) and each.is_meta:
                setattr(module, name, getattr(whole[path], name))


def _originals(sketch: Sketch) -> list[str]:
    paths = [projection.path for projection, _ in sketch.spec.projections] + list(sketch.spec.reference)
    return [name for name in sketch.tensors if any(name.startswith(f"{path}.") for path in paths)]


def measured(name: str) -> dict[str, int]:
    """What :func:`measure` finds in a process of its own.

    Raises:
        RuntimeError: with its last words, where it fails.
    """
    child = subprocess.run([sys.executable, __file__, "--measure", name], capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(child.stderr.strip().splitlines()[-1][:120])
    found: dict[str, int] = json.loads(child.stdout.splitlines()[-1])
    return found


def estimated(name: str) -> Estimate:
    """Of the same setting."""
    setting = SETTINGS[name]
    return estimate(setting.make_recipe("unused"), setting.sketch(), setting.size, SIDE)


def compare(names: list[str]) -> None:
    """Print a row for each setting."""
    print("| setting | libraries | estimate | sum | measured | sum / measured |\n|---|---|---|---|---|---|", flush=True)
    for name in names:
        try:
            found = measured(name)
        except RuntimeError as error:
            print(f"| {name} | | | | {error} | |", flush=True)
            continue
        guess = estimated(name)
        parts = {part: round(each / 1e6) for part, each in guess.parts.items()}
        print(name, parts, "host", round(guess.host / 1e6), file=sys.stderr)
        both = found["libraries"] + guess.resident
        cells = [f"{each / 1e6:.0f} MB" for each in (found["libraries"], guess.resident, both, found["peak"])]
        print(f"| {name} | {' | '.join(cells)} | {both / found['peak']:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="NAME", help="train one setting in this process")
    parser.add_argument("names", nargs="*", help="of settings; all if left out")
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(SETTINGS[chosen.measure])))
    else:
        compare(chosen.names or list(SETTINGS))


if __name__ == "__main__":
    main()
