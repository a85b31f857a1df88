"""What is in float32 where several processes share the weights."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from liftkit.finetune.network import Network, connect
from liftkit.finetune.sharding import set_sharding
from liftkit.models.surgery import convert_transformer
from tests import tiny


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
