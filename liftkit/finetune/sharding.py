"""What accelerate's FSDP2 has to know of a lifted network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from liftkit.errors import UsageError


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
    if plugin.fsdp_version != 2:
        raise UsageError(f"FSDP {plugin.fsdp_version}: expected FSDP 2; launch with --fsdp_version 2")
    # Every process reads the files itself: broadcasting from the first takes buffers for parameters and fails at the basis.
    plugin.cpu_ram_efficient_loading = False
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = list(getattr(transformer, "_no_split_modules", None) or ())
    # accelerate's own policy also sums gradients over processes in this dtype.
    half = dtype if dtype != torch.float32 else None
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
