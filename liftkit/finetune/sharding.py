"""What the processes of a run share, and what accelerate's FSDP2 has to know of a lifted network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from liftkit.errors import UsageError
from liftkit.finetune.network import blocks_of
from liftkit.models.detail_head import HEAD


def keep_apart(network: nn.Module, module: nn.Module) -> None:
    """Let accelerate leave the gradients of a network's module alone, which runs outside of the network's forward."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    apart = [names[id(parameter)] for parameter in module.parameters()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, apart)


def share_gradients(accelerator: Any, parameters: Iterable[nn.Parameter]) -> None:
    """The mean over processes, where one that has no gradient counts as zero; a gradient that nobody has stays None."""
    each = list(parameters)
    if accelerator.num_processes == 1 or not each:
        return
    here = [p.grad if p.grad is not None else torch.zeros_like(p) for p in each]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in here]), "mean")
    if mean.any():
        for parameter, gradient in zip(each, mean.split([p.numel() for p in each])):
            parameter.grad = gradient.view_as(parameter)


def set_sharding(accelerator: Any, transformer: nn.Module, dtype: torch.dtype) -> None:
    """Settings of accelerate's FSDP2, before it prepares a network; without FSDP nothing happens.

    Args:
        accelerator: of accelerate.
        transformer: its blocks are sharded one by one, unless the launcher says otherwise.
        dtype: that is computed in.

    Raises:
        UsageError: if it is the first FSDP, whose parameters are flat and cannot be saved by name.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    head = getattr(transformer, HEAD, None)
    if head is not None:
        plugin.ignored_modules = [head.to(accelerator.device)]
    if plugin.fsdp_version != 2:
        raise UsageError(f"FSDP {plugin.fsdp_version}: expected FSDP 2; launch with --fsdp_version 2")
    # Every process reads the files itself: broadcasting from the first takes buffers for parameters and fails at the basis.
    plugin.cpu_ram_efficient_loading = False
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks_of(transformer)})
    # accelerate's own policy also sums gradients over processes in this dtype.
    half = dtype if dtype != torch.float32 else None
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
