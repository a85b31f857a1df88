"""tiny-flux2: a model on FLUX.2's own latents by TAEF2, and what a finetune makes of it in pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline

from liftkit.checkpoint.model import find_model
from liftkit.conversion.execute import convert
from liftkit.conversion.result import Conversion
from liftkit.data import demo
from liftkit.data.oracle import Verdicts, judge, load_oracle
from liftkit.embedded import TINY_FLUX2, TINY_FLUX2_PIXEL
from liftkit.lift import Lift
from liftkit.models.adapter import Adapter
from liftkit.models.load import load_vae
from liftkit.models.loaded import load_pipeline

Cli = Callable[..., tuple[int, str, str]]
ASK = {"height": 64, "width": 64, "max_sequence_length": 12, "output_type": "pt", "num_inference_steps": 16}


@pytest.fixture(scope="module")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    target = tmp_path_factory.mktemp("flux2") / "pixel"
    return convert("tiny-flux2", target, images="demo", num_images=64, device="cpu", color="oklab")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def obeyed(pipeline: object, count: int = 32) -> Verdicts:
    scenes = [demo.scene_at(index, split="heldout", seed=9) for index in range(count)]
    generator = torch.Generator().manual_seed(0)
    images = pipeline(prompt=[s.prompt for s in scenes], guidance_scale=4.0, generator=generator, **ASK).images  # type: ignore[operator]
    return judge(load_oracle(), images * 2 - 1, scenes)


def test_both_fit_into_git() -> None:
    assert size(TINY_FLUX2) <= 24_000_000
    assert size(TINY_FLUX2_PIXEL) <= 18_000_000


def test_its_autoencoder_has_its_license_beside_it() -> None:
    assert "Copyright (c) 2023 Ollin Boer Bohan" in (TINY_FLUX2 / "vae" / "LICENSE").read_text()
    assert "MIT License" in (TINY_FLUX2 / "vae" / "LICENSE").read_text()
    assert json.loads((TINY_FLUX2 / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTinyFlux2"]


def test_the_stock_pipeline_loads_it_and_it_obeys_prompts() -> None:
    """A quick look; the bars are measured on 512 prompts by make tiny-flux2."""
    pipeline = Flux2KleinPipeline.from_pretrained(TINY_FLUX2, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    verdicts = obeyed(pipeline)
    assert verdicts.digit >= 0.85
    assert verdicts.color >= 0.95


def test_it_paints_64_pixels_unless_asked_otherwise(tmp_path: Path) -> None:
    assert find_model("tiny-flux2").image_size() == 64
    vae = load_vae(TINY_FLUX2)
    assert vae.config.sample_size == 64
    vae.save_pretrained(tmp_path)
    assert type(vae).from_pretrained(tmp_path).config.sample_size == 64


def test_its_card_holds_measured_figures() -> None:
    card = (TINY_FLUX2 / "README.md").read_text()
    found = re.search(r"\| latent base \| ([\d.]+) \| ([\d.]+) \|", card)
    assert found is not None
    assert float(found[1]) >= 0.95
    assert float(found[2]) >= 0.99


def test_its_conversion_is_proved(conversion: Conversion) -> None:
    assert conversion.proof.exact < 1e-4
    assert conversion.lift.basis.shape == (768, 128)


def test_the_name_of_its_autoencoder_fits_as_the_model_s_own(cli: Cli, conversion: Conversion, tmp_path: Path) -> None:
    target = tmp_path / "lift.safetensors"
    choices = ("--images", "demo", "--num-images", 64, "--device", "cpu", "--color", "oklab")
    code, _, err = cli("fit", "tiny-flux2", "--vae", "taef2", *choices, "-o", target)
    assert code == 0, err
    torch.testing.assert_close(Lift.load(target).basis, conversion.lift.basis)


def test_the_shipped_finetune_obeys_in_pixels() -> None:
    loaded = load_pipeline(find_model("tiny-flux2"), "cpu", adapter=Adapter.load(TINY_FLUX2_PIXEL))
    verdicts = obeyed(loaded.pipeline)
    assert verdicts.digit >= 0.85  # 0.99 over 512 prompts
    assert verdicts.color >= 0.95
