"""The embedded checkpoint: real, stock, small; and what the commands do with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file

from liftkit import demo
from liftkit.checkpoint.folder import tree_size
from liftkit.conversion.plan import make_plan
from liftkit.data import demo as data
from liftkit.data.oracle import judge, load_oracle
from liftkit.embedded import TINY_KLEIN, TINY_PIXEL
from liftkit.formats.adapters import fuse, open_adapter
from liftkit.options import ConvertOptions
from liftkit.progress import Silent

Cli = Callable[..., tuple[int, str, str]]
MODEL = TINY_KLEIN
ASK = {"height": 64, "width": 64, "max_sequence_length": 12, "output_type": "pt"}


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> demo.Demonstration:
    """The quick demo, with fewer samples than the command takes."""
    return demo.run(tmp_path_factory.mktemp("demo"), seed=0, observer=Silent(), quick=True, samples=32)


def test_it_fits_into_git() -> None:
    folders = (MODEL, TINY_PIXEL)
    assets = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in assets) <= 18_000_000
    assert {path.suffix for path in assets} <= {".safetensors", ".json", ".jinja", ".md"}


def test_it_has_every_component_of_the_real_one() -> None:
    index = json.loads((MODEL / "model_index.json").read_text())
    assert {key: value[1] for key, value in index.items() if isinstance(value, list)} == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3ForCausalLM",
        "tokenizer": index["tokenizer"][1],
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
    }
    assert index["_class_name"] == "Flux2KleinPipeline"
    assert "Qwen2Tokenizer" in index["tokenizer"][1]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_the_stock_pipeline_loads_and_runs_it(dtype: torch.dtype | None) -> None:
    choices = {} if dtype is None else {"dtype": dtype}
    pipeline = Flux2KleinPipeline.from_pretrained(MODEL, **choices)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(prompt="a red seven on flower petals", num_inference_steps=2, **ASK).images
    assert images.shape == (1, 3, 64, 64)
    assert torch.isfinite(images).all()


def test_it_obeys_prompts() -> None:
    """A quick look; the bars are measured on 256 prompts by make tiny-klein."""
    pipeline = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes = [data.scene_at(index, split="heldout", seed=9) for index in range(32)]
    images = pipeline(prompt=[s.prompt for s in scenes], num_inference_steps=16, guidance_scale=4.0, **ASK).images
    verdicts = judge(load_oracle(), images * 2 - 1, scenes)
    assert verdicts.digit >= 0.8
    assert verdicts.color >= 0.95
    assert verdicts.background >= 0.95


def test_its_card_holds_measured_figures() -> None:
    card = (MODEL / "README.md").read_text()
    guided = [float(value) for value in re.findall(r"\| samples, guidance [\d.]+ \| ([\d.]+)", card)]
    assert max(guided) >= 0.92
    assert float(re.search(r"at ([\d.]+) dB", card).group(1)) >= 28.5


def figures_of(demonstration: demo.Demonstration, key: str) -> dict[str, float | None]:
    row = next(row for row in demonstration.comparison.rows if row.key == key)
    assert row.score is not None
    return row.score.figures


def test_demo_shows_one_picture_and_one_page(demonstration: demo.Demonstration) -> None:
    with Image.open(demonstration.picture) as picture:
        assert picture.width > 900
    page = demonstration.page.read_text()
    assert page.count("data:image/png;base64,") >= 16
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert demonstration.conversion.proof.exact < 1e-4
    assert figures_of(demonstration, "base")["digit"] > 0.8


def test_demo_s_lift_keeps_shapes_and_loses_colors(demonstration: demo.Demonstration) -> None:
    """What finetuning has to mend: digits survive the untrained lift, colors do not."""
    latent, pixel = figures_of(demonstration, "base"), figures_of(demonstration, "pixel-1")
    assert pixel["digit"] > 0.4
    assert pixel["color"] < latent["color"] - 0.2


def test_the_shipped_finetune_has_its_colors_back(demonstration: demo.Demonstration) -> None:
    shipped, untrained = figures_of(demonstration, "pixel-2"), figures_of(demonstration, "pixel-1")
    assert shipped["color"] >= 0.95
    assert shipped["digit"] >= 0.8
    assert shipped["patch_grid"] < untrained["patch_grid"]


def test_sample_for_latent_and_converted_folders(cli: Cli, demonstration: demo.Demonstration, tmp_path: Path) -> None:
    prompt = ("-p", "a red seven on flower petals", "--steps", 2, "--device", "cpu")
    for folder, name in ((MODEL, "latent.png"), (demonstration.conversion.output, "pixel.webp")):
        code, out, err = cli("sample", folder, *prompt, "-n", 3, "-o", tmp_path / name)
        assert code == 0, err
        assert "3 images" in out
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (3 * 64 + 4, 64)
    assert cli("sample", MODEL, *prompt, "-n", 1, "--seed", 1, "-o", tmp_path / "second.png")[0] == 0
    with Image.open(tmp_path / "latent.png") as three, Image.open(tmp_path / "second.png") as one:
        first, second = np.asarray(three.crop((66, 0, 130, 64)), float), np.asarray(one, float)
    assert np.abs(first - second).mean() < 1, "image i starts from seed + i, whatever the batch"


def test_sample_says_what_is_wrong(cli: Cli, tmp_path: Path) -> None:
    for arguments, expected in (
        ((tmp_path, "-o", tmp_path / "a.png"), "model_index.json is missing"),
        ((MODEL, "-o", tmp_path / "a.tga"), "unknown picture format '.tga'"),
        ((MODEL, "-o", tmp_path / "none" / "a.png"), "no such folder"),
        ((MODEL, "-o", tmp_path / "a.png", "--height", 60), "--height 60: not a multiple of the 8 pixels"),
    ):
        code, _, err = cli("sample", *arguments, "-p", "x", "--device", "cpu")
        assert code == 2
        assert expected in err
    assert not list(tmp_path.iterdir())


def test_the_plan_knows_the_disk_that_a_conversion_takes(pixel_klein: Path, tmp_path: Path) -> None:
    plan = make_plan("demo", tmp_path / "new", ConvertOptions(images="demo"))
    assert plan.needed_bytes == sum(plan.parts.values())
    assert 1.0 <= plan.needed_bytes / tree_size(pixel_klein) < 1.25


def test_the_long_finetune_becomes_a_folder(tmp_path: Path) -> None:
    done = fuse(TINY_PIXEL, "demo", tmp_path / "pixel")
    assert done.proof is not None
    adapter, whole = open_adapter(TINY_PIXEL), tmp_path / "pixel" / "transformer"
    (file,) = whole.glob("*.safetensors")
    merged = load_file(file)
    assert adapter.full
    assert all(torch.equal(merged[name], value.to(merged[name].dtype)) for name, value in adapter.full.items())
