"""What benchmarks/gpu.py measures: models of random numbers on the device, their operations, and a clock that waits for it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from convert import KLEIN_4B
from torch import Tensor

from liftkit.checkpoint.model import ModelFolder
from liftkit.data.batch import Batch
from liftkit.data.captioned import DemoCaptioned
from liftkit.data.training import TrainingData
from liftkit.finetune.memory import peak_memory
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.run import make_accelerator
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.trainee import Trainee, make_trainee
from liftkit.finetune.trainer import Trainer
from liftkit.lift import Lift
from liftkit.models.families.flux2 import FLUX2
from liftkit.models.registry import lifted_class
from liftkit.models.spec import Grid
from liftkit.models.surgery import convert_transformer, lifted_config
from liftkit.progress import Silent

# TFLOP/s of dense bfloat16 matrix products, as the maker states them, by what a device's name holds; the first that fits.
PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("B200", 2250.0),
    ("A100", 311.9),
    ("L40S", 362.1),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Args:
        config: of the latent transformer.
        resolutions: sides of images, in pixels, with the batch to begin with; half of it is next where memory ends.
        text: tokens of a prompt.
        rank: of the LoRA.
        vae: changes to the config of the VAE.
        images: that the fit encodes.
        patch: side of a token, in pixels.
        square: side of the matrices of the plain product.
        conversion: bytes of the checkpoint that is converted, as benchmarks/convert.py takes them.
        rounds: of each comparison.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: KLEIN_4B)
    resolutions: Mapping[int, int] = field(default_factory=lambda: {1024: 4, 512: 16})
    text: int = 512
    rank: int = 256
    vae: Mapping[str, Any] = field(default_factory=dict)
    images: int = 16
    patch: int = 16
    square: int = 8192
    conversion: str = "500MB"
    rounds: int = 5


TINY = Scale(
    config={
        **KLEIN_4B,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": [4, 4, 4, 4],
    },
    resolutions={16: 2, 8: 2},
    text=7,
    rank=4,
    vae={
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    },
    images=2,
    patch=4,
    square=64,
    conversion="20MB",
    rounds=1,
)


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_of(name: str) -> float | None:
    """TFLOP/s that a device of this name could reach; None where it is not in the table."""
    return next((peak for part, peak in PEAKS if part in name), None)


def rate(flops: float, seconds: float) -> dict[str, float | None]:
    """TFLOP/s and utilization."""
    tflops = flops / seconds / 1e12
    peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {"tflops": tflops, "mfu": tflops / peak if peak else None}


def compile_options() -> dict[str, Any]:
    """On a CPU, where only the program is tried, without code for it: that takes minutes."""
    return {} if torch.cuda.is_available() else {"backend": "aot_eager"}


def peak_gb() -> float:
    """The most memory in use so far: of the GPU since :func:`fresh`, or of the process."""
    return peak_memory(device()) / 1e9


def timed(work: Callable[[], object]) -> float:
    """Seconds of some work, to its end on the device."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fresh() -> None:
    """Free what the last model held, and forget what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_lift(scale: Scale) -> Lift:
    """Any orthonormal basis: what it costs does not depend on it."""
    rank, dim = scale.config["in_channels"], 3 * scale.patch**2
    basis = torch.linalg.qr(torch.randn(dim, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    return Lift(basis.float(), 2.4, patch_size=scale.patch, latent_patch=2)


def latent_transformer(scale: Scale, where: torch.device) -> Any:
    """A stock transformer of random bfloat16 numbers, made on the device; norms have weight 1."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel(**scale.config)
    model = model.to(torch.bfloat16).to_empty(device=where)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Drawn on the device, which is quicker than a processor.
                drawn = torch.randn(parameter.shape, dtype=torch.bfloat16, device=device())
                parameter.copy_(drawn.mul_(parameter[0].numel() ** -0.5))
            else:
                parameter.fill_(1.0)
    return model.eval().requires_grad_(False)


def call_arguments(scale: Scale, side: int, channels: int, where: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a pipeline gives a transformer at one step, for one image of ``side`` pixels."""
    tokens = side // scale.patch
    text = {"encoder_hidden_states": torch.randn(1, scale.text, scale.config["joint_attention_dim"], device=where)}
    text = FLUX2.arguments(Grid(1, tokens, tokens, where, scale.config), text)
    ids = {name: text.pop(name) for name in ("img_ids", "txt_ids")}
    state = torch.randn(1, tokens**2, channels, device=where)
    given = {"hidden_states": state, "timestep": torch.full((1,), 0.5, device=where), **text}
    return {**{name: value.to(dtype) for name, value in given.items()}, **ids, "return_dict": False}


def make_recipe(scale: Scale, output: Path, batch: int, **changes: Any) -> Recipe:
    """A finetune as the shipped recipe of FLUX.2 klein 4B has it, without what would have to be downloaded."""
    return Recipe.model_validate(
        {
            "model": "random",
            "output": str(output),
            "data": {"sources": [{"kind": "demo"}]},
            "batch_size": batch,
            "trainable": {"rank": scale.rank},
            "trackers": [],
            **changes,
            "optimizer": {"clip": 200.0, "multipliers": {"proj_out": 10.0}, **changes.get("optimizer", {})},
        }
    )


def batches(scale: Scale, side: int, count: int) -> Any:
    """The same batch without end, on the CPU, as a run's data gives it."""
    latents = torch.randn(count, scale.config["in_channels"] // 4, *(2 * side // scale.patch,) * 2)
    text = torch.randn(count, scale.text, scale.config["joint_attention_dim"]).bfloat16()
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    places = [(0, index) for index in range(count)]
    return repeat(Batch(images, latents, {"encoder_hidden_states": text}, [""] * count, places))


def make_trainer(scale: Scale, latent: Any, recipe: Recipe) -> Trainer:
    """A run's trainer around random weights: what it does in a step is what it always does."""
    accelerator = make_accelerator(recipe, RunFolder(recipe.output))
    lift = random_lift(scale)
    trainee = _trainee(recipe, convert_transformer(latent, lift), lift, latent.state_dict())
    recipe.output.mkdir(parents=True, exist_ok=True)
    # Never asked for a batch: those of :func:`batches` come in its place.
    data = TrainingData(
        [(DemoCaptioned(1), 1.0)],
        resolution=min(scale.resolutions),
        multiple=scale.patch,
        buckets=False,
        batch_size=recipe.batch_size,
        seed=0,
        prompt_dropout=0.0,
        cache=recipe.output / "cache",
        workers=0,
    )
    return Trainer(recipe, trainee, data, None, None, accelerator, RunFolder(recipe.output), Silent(), {})


def _trainee(recipe: Recipe, transformer: Any, lift: Lift, tensors: Mapping[str, Tensor]) -> Trainee:
    folder = ModelFolder(Path("random"), "random", {})
    return make_trainee(recipe, folder, FLUX2, transformer.requires_grad_(False), lift, tensors)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one image: those of matrix products and attention, two for each multiplication and
    addition, as torch counts them. An attention's backward has twice those of its forward: what kernels compute a second
    time does not count, and neither does what gradient checkpointing computes again.

    Args:
        latent: the stock transformer's forward.
        student: the student's, with its LoRA.
        backward: the student's: gradients of all activations, and of the weights that learn.
        reference: the frozen reference's forward.
        parameters: of the transformer.
        tokens: of image and prompt.
    """

    latent: float
    student: float
    backward: float
    reference: float
    parameters: int
    tokens: int

    @property
    def step(self) -> float:
        """Of a finetuning step, for each image."""
        return self.student + self.backward + self.reference

    @property
    def rule(self) -> float:
        """The same by the rule of thumb, 6 N D: forward, backward through frozen weights and reference, 2 N D each."""
        return 6.0 * self.parameters * self.tokens


def without_weights(scale: Scale, lift: Lift) -> tuple[Any, Any]:
    """The stock transformer and its pixel twin on the meta device."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        stock = Flux2Transformer2DModel(**scale.config).requires_grad_(False)
        twin = lifted_class(FLUX2).from_config(lifted_config(FLUX2, dict(stock.config), lift))
    return stock, twin.requires_grad_(False)


@torch.enable_grad()
def count_flops(scale: Scale, side: int) -> Flops:
    """Count on tensors without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    lift, nowhere = random_lift(scale), torch.device("meta")
    stock, twin = without_weights(scale, lift)
    recipe = make_recipe(scale, Path("unused"), 1, precision="no")
    network = _trainee(recipe, twin, lift, stock.state_dict()).network.train()
    narrow, wide = (call_arguments(scale, side, size, nowhere, torch.float32) for size in (lift.rank, lift.dim))

    def forward(model: Any, arguments: dict[str, Any], counter: Any) -> tuple[Tensor, float]:
        before = counter.get_total_flops()
        return model(**arguments)[0], counter.get_total_flops() - before

    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            _, latent = forward(stock, narrow, counter)
            _, reference = forward(network, {**narrow, "reference": True}, counter)
        output, student = forward(network, wide, counter)
        before = counter.get_total_flops()
        output.square().mean().backward()
        backward = counter.get_total_flops() - before
    tokens = (side // scale.patch) ** 2 + scale.text
    size = sum(parameter.numel() for parameter in stock.parameters())
    return Flops(latent, student, backward, reference, size, tokens)
