"""One of several processes of a finetune on the CPU: ``-m tests.processes ddp|fsdp2 RECIPE.yaml [SECTION.KEY=VALUE]...``"""

from __future__ import annotations

import json
import sys
from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from liftkit.finetune import run
from liftkit.finetune.recipe_file import load_recipe

make_accelerator = run.make_accelerator


def sharding(*arguments: Any) -> Any:
    """accelerate takes FSDP on GPUs and their like alone, and would not say so; its code runs on CPUs all the same."""
    accelerator = make_accelerator(*arguments)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    return accelerator


def main(how: str, recipe: str, *overrides: str) -> None:
    """Train; the first process says what it trained with."""
    if how == "fsdp2":
        run.make_accelerator = sharding
    trainer = run.finetune(load_recipe(recipe, overrides)).trainer
    if trainer.accelerator.is_main_process:
        sharded = sum(isinstance(module, FSDPModule) for module in trainer.learner.model.modules())
        print(json.dumps({"processes": trainer.accelerator.num_processes, "sharded": sharded}))


if __name__ == "__main__":
    main(*sys.argv[1:])
