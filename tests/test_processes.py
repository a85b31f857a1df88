"""Runs on several processes and machines: what one alone would have made, whatever their number and how it changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from liftkit.embedded import TINY_KLEIN
from liftkit.finetune.network import Network, connect
from liftkit.finetune.run import finetune
from liftkit.finetune.sharding import set_sharding
from liftkit.finetune.state import checkpoints
from liftkit.fit.folds import read_folds
from liftkit.models.surgery import convert_transformer
from tests import tiny
from tests.processes import launch
from tests.training import rows

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_buffers_stay_in_float32_where_shards_compute_in_bfloat16(group: None) -> None:
    """A and what is outside of the network: the state is cast at its door, and not before."""
    twin = convert_transformer(tiny.flux2_transformer(), tiny.lift())
    plugin: Any = SimpleNamespace(fsdp_version=2, auto_wrap_policy=None)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu"))
    set_sharding(accelerator, twin, torch.bfloat16)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    network = Network(twin)
    mesh = init_device_mesh("cpu", (1,))
    for block in (*twin.transformer_blocks, *twin.single_transformer_blocks, network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    seen: list[torch.dtype] = []
    twin.x_embedder.register_forward_pre_hook(lambda module, given: seen.append(module.weight.dtype))
    student, _ = connect(twin, network)
    x_t = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = twin.architecture.conditioning(dict(twin.config), 1, torch.Generator().manual_seed(0))
    velocity = student.velocity(x_t, torch.tensor([0.5]), **given)
    assert seen == [torch.bfloat16]
    assert velocity.dtype == torch.float32
    assert {name: buffer.dtype for name, buffer in network.named_buffers() if name.endswith("basis")} == {
        "transformer.lift.basis": torch.float32
    }


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(how: str, make, tmp_path: Path) -> None:
    quick = ("steps=3", "previews.every=0", "validation.every=0", "trainable.dropout=0", "trainable.head={channels: 8}")
    quick += ("optimizer.name=adamw",) if how == "fsdp2" else ()
    alone = finetune(make("alone", *quick))
    make("both")
    said = json.loads(launch(2, "tests.processes", how, tmp_path / "both.yaml", *quick).splitlines()[-1])
    blocks = sum(alone.trainer.trainee.transformer.config[key] for key in ("num_layers", "num_single_layers"))
    assert said == {"processes": 2, "sharded": blocks + 1 if how == "fsdp2" else 0}
    pairs = list(zip(rows(tmp_path / "alone"), rows(tmp_path / "both"), strict=True))
    assert len(pairs) == 3
    for one, two in pairs:
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    weights = [
        load_file(tmp_path / name / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("alone", "both")
    ]
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name].float(), value.float(), rtol=1e-2, atol=1e-3), name
    judges = [
        load_file(checkpoints(tmp_path / name / "checkpoints")[-1][1] / "adversary.safetensors")
        for name in ("alone", "both")
    ]
    for name in (name for name in judges[0] if name.endswith("original")):
        # One step of AdamW is 5e-4: discriminators of one process's images alone would be farther off.
        assert torch.allclose(judges[1][name], judges[0][name], rtol=0, atol=1e-4), name


@pytest.mark.slow
def test_checkpoints_go_on_with_another_number_of_processes(make, tmp_path: Path) -> None:
    """Two machines of one process, then one process, then three: the losses of one that did all steps."""
    quick = (
        "previews.every=0",
        "validation.every=0",
        "trainable.dropout=0",
        "optimizer.decay=constant",
        "batch_size=6",
    )
    finetune(make("alone", *quick, "steps=6"))
    make("moved")
    said = launch(2, "tests.processes", "ddp", tmp_path / "moved.yaml", *quick, "steps=2", machines=2)
    assert json.loads(said.splitlines()[-1])["processes"] == 2
    finetune(make("moved", *quick, "steps=4"), resume="latest")
    said = launch(3, "tests.processes", "ddp+", tmp_path / "moved.yaml", *quick, "steps=6")
    assert json.loads(said.splitlines()[-1])["processes"] == 3
    moved = [row for row in rows(tmp_path / "moved") if "note" not in row]
    pairs = list(zip(rows(tmp_path / "alone"), moved, strict=True))
    assert [one["step"] for one, _ in pairs] == [1, 2, 3, 4, 5, 6]
    for one, other in pairs:
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


@pytest.mark.slow
def test_a_fit_has_the_moments_of_one_process(cli: Cli, tmp_path: Path) -> None:
    """Twenty-one images, which two do not share evenly; the VAE's float32 depends on how many it sees at a time."""
    command = ["fit", str(TINY_KLEIN), "--images", "demo", "--num-images", "21", "--device", "cpu", "--moments-out"]
    assert cli(*command, tmp_path / "1.safetensors")[0] == 0
    for processes in (2, 3):
        launch(processes, "liftkit", *command, tmp_path / f"{processes}.safetensors")
    alone, *others = (read_folds(tmp_path / f"{processes}.safetensors")[0] for processes in (1, 2, 3))
    for name, folds in alone.items():
        for other in others:
            sums = other[name].tensors()
            for key, value in folds.tensors().items():
                slack = 0.0 if key == "counts" else 1e-6 * value.abs().max()
                assert torch.allclose(sums[key], value, rtol=0, atol=slack), (name, key)
