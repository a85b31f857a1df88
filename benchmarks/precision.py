"""What reduced precision costs a converted model: python -m benchmarks precision [FOLDER]

Against the same model in float32: the velocity at several noise levels, on the way to the float32 model's own samples, and the
samples of 16 steps from the same noise and prompts, through the stock pipeline. Errors are relative, by the norm over all
images. A and sigma are float32 everywhere. So is the state x_t that velocities are taken of, but for one row: FLUX.2's stock
pipeline rounds it to the transformer's dtype, which is in all samples. torchao's int8 is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.conversion.execute import convert
from liftkit.embedded import STEPS, TINY_KLEIN
from liftkit.models.loaded import Loaded, load_pipeline
from liftkit.models.registry import architecture, lifted_class
from liftkit.models.sampling import sample, state_noise

LEVELS = (0.95, 0.3, 0.1, 0.03)
PROMPTS = ("a red seven on flower petals", "a blue three on clouds", "a green zero", "a yellow nine on waves")
IMAGES = 16


def variants(folder: ModelFolder) -> Iterator[tuple[str, Callable[[], Loaded]]]:
    """Name and loader of each precision."""
    yield "bfloat16", lambda: load_pipeline(folder, dtype=torch.bfloat16)
    yield "float16", lambda: load_pipeline(folder, dtype=torch.float16)
    yield "float8 storage, bfloat16 compute", lambda: float8(folder, torch.bfloat16)
    yield "float8 storage, float32 compute", lambda: float8(folder, torch.float32)
    if find_spec("torchao") is not None:
        yield "torchao int8 weights, bfloat16", lambda: int8(folder, torch.bfloat16, ())
        kept = tuple(
            projection.path for projection, _ in architecture(folder.class_of("transformer") or "").projections
        )
        yield "the same, projections kept", lambda: int8(folder, torch.bfloat16, kept)


def float8(folder: ModelFolder, compute: torch.dtype) -> Loaded:
    """diffusers' layerwise casting."""
    loaded = load_pipeline(folder, dtype=compute)
    loaded.pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    return loaded


def int8(folder: ModelFolder, compute: torch.dtype, kept: tuple[str, ...]) -> Loaded:
    """torchao's weight-only quantization, through diffusers."""
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(kept))
    made = lifted_class(architecture(folder.class_of("transformer") or ""))
    loaded = load_pipeline(folder, dtype=compute)
    transformer = made.from_pretrained(
        folder.path, subfolder="transformer", dtype=compute, quantization_config=config, use_safetensors=True
    )
    loaded.pipeline.register_modules(transformer=transformer)
    return loaded


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, by the norm."""
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def velocities(loaded: Loaded, clean: Tensor, noise: Tensor, conditioning: dict[str, Any], state: Any) -> list[Tensor]:
    """At each noise level, of states rounded to a dtype."""
    result = []
    for level in LEVELS:
        x_t = ((1.0 - level) * clean + level * noise).to(state)
        result.append(loaded.flow.velocity(x_t, torch.full((len(x_t),), level), **conditioning).float())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a converted folder; left out: tiny-klein, converted")
    chosen = parser.parse_args().folder
    if chosen is not None:
        measure(find_model(chosen))
        return
    with TemporaryDirectory() as scratch:
        measure(find_model(str(convert(str(TINY_KLEIN), Path(scratch) / "pixel", images="demo", device="cpu").output)))


def measure(folder: ModelFolder) -> None:
    """Print the table of one converted folder."""
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(IMAGES)]
    exact = load_pipeline(folder, dtype=torch.float32)
    pipeline = exact.pipeline
    noise = state_noise(exact.flow, IMAGES, exact.size, exact.size, pipeline.vae_scale_factor, 0)
    images = sample(exact, prompts, noise=noise, steps=STEPS)
    with torch.no_grad():
        conditioning = exact.flow.architecture.prompts(pipeline, prompts, exact.text_length)
    clean = pipeline.vae.color.encode(images)
    expected = velocities(exact, clean, noise, conditioning, torch.float32)
    print(f"torch {version('torch')}, diffusers {version('diffusers')}, {platform.machine()}, CPU; {IMAGES} images\n")
    titles = [f"velocity at sigma {level}" for level in LEVELS]
    print("| precision | " + " | ".join(titles) + f" | sample of {STEPS} steps |")
    print("|---|" + "---|" * (len(LEVELS) + 1))
    for name, load in variants(folder):
        loaded = load()
        assert loaded.pipeline.transformer.lift.basis.dtype == torch.float32
        last = f"{error(sample(loaded, prompts, noise=noise, steps=STEPS), images):.2%}"
        states = {"": torch.float32, ", x_t too": torch.bfloat16} if name == "bfloat16" else {"": torch.float32}
        for more, state in states.items():
            found = velocities(loaded, clean, noise, conditioning, state)
            errors = [f"{error(a, b):.2%}" for a, b in zip(found, expected)]
            print(f"| {name}{more} | " + " | ".join([*errors, last]) + " |")


if __name__ == "__main__":
    main()
