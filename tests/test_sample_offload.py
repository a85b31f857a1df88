"""Weights that wait in host memory while a pipeline samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from liftkit.checkpoint.model import find_model
from liftkit.embedded import TINY_KLEIN
from liftkit.models.loaded import Loaded, keep_on_host, load_pipeline
from liftkit.models.sampling import sample
from liftkit.options import Offload, SampleOptions
from tests.converting import Cli

PROMPTS = ["a red seven", "a blue two"]


@pytest.fixture(scope="module")
def folders(pixel_klein: Path) -> dict[str, Path]:
    return {"latent": TINY_KLEIN, "pixel": pixel_klein}


def painted(loaded: Loaded) -> torch.Tensor:
    options = SampleOptions(steps=2, seed=1, height=32, width=32, negative="a green one")
    return sample(loaded, PROMPTS, options)


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_pictures_are_the_same_bits(kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own hooks, with the processor in the place of the GPU."""
    expected = painted(load_pipeline(find_model(str(folders[kind]))))
    for offload in get_args(Offload)[1:]:
        loaded = load_pipeline(find_model(str(folders[kind])))
        keep_on_host(loaded.pipeline, torch.device("cpu"), offload)
        blocks = [each for each in loaded.pipeline.transformer.modules() if hasattr(each, "_diffusers_hook")]
        assert bool(blocks) == (offload == "group")
        assert hasattr(loaded.pipeline.transformer, "_hf_hook") == (offload == "model")
        assert torch.equal(painted(loaded), expected)


def test_what_is_asked_of_a_gpu_comes_to_it_before_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("diffusers.DiffusionPipeline.to", lambda *_: pytest.fail("all of it was moved"))
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.enable_group_offload", lambda pipeline, device, **how: asked.append((device, how))
    )
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.enable_model_cpu_offload", lambda pipeline, device: asked.append((device, None))
    )
    model = find_model(str(TINY_KLEIN))
    for offload in get_args(Offload)[1:]:
        load_pipeline(model, "cuda:1", offload=offload)
    stream = {"offload_type": "leaf_level", "use_stream": True, "low_cpu_mem_usage": True}
    assert asked == [(torch.device("cuda:1"), None), (torch.device("cuda:1"), stream)]


@pytest.mark.parametrize("command", ["sample", "generate"])
def test_a_cpu_has_nothing_to_offload(command: str, cli: Cli, tmp_path: Path) -> None:
    prompts = ("-p", "a seven") if command == "sample" else ("--prompts", "demo")
    code, _, err = cli(
        command, TINY_KLEIN, *prompts, "-n", 1, "--offload", "group", "--device", "cpu", "-o", tmp_path / "out"
    )
    assert code == 2
    assert "--offload group: the model runs on the CPU, in host memory already: there is nothing to offload" in err
