"""Several processes on the CPU, as ``accelerate launch`` starts them, and what one of them does in a finetune:
``-m tests.processes ddp|fsdp2 RECIPE.yaml [SECTION.KEY=VALUE]...``

``ddp+`` and ``fsdp2+`` go on from the recipe's latest checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from liftkit.finetune import run
from liftkit.finetune.recipe_file import load_recipe

ROOT = Path(__file__).parents[1]
make_accelerator = run.make_accelerator


def launch(processes: int, module: str, *arguments: object, machines: int = 1) -> str:
    """Run a module in several processes, spread over machines that are all this one; what it prints on the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--multi_gpu", "--num_machines", machines, "--num_processes", processes]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    launchers = [
        subprocess.Popen(
            [str(each) for each in (*command, "--machine_rank", rank, "-m", module, *arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(machines)
    ]
    try:
        said = [each.communicate(timeout=600) for each in launchers]
    finally:
        for each in launchers:
            each.kill()
    for launcher, (_, errors) in zip(launchers, said):
        assert launcher.returncode == 0, errors[-4000:]
    return said[0][0]


def sharding(*arguments: Any) -> Any:
    """accelerate takes FSDP on GPUs and their like alone, and would not say so; its code runs on CPUs all the same."""
    accelerator = make_accelerator(*arguments)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    return accelerator


def main(how: str, recipe: str, *overrides: str) -> None:
    """Train; the first process says what it trained with."""
    if how.startswith("fsdp2"):
        run.make_accelerator = sharding
    trainer = run.finetune(load_recipe(recipe, overrides), resume="latest" if how.endswith("+") else None).trainer
    if trainer.accelerator.is_main_process:
        sharded = sum(isinstance(module, FSDPModule) for module in trainer.learner.model.modules())
        print(json.dumps({"processes": trainer.accelerator.num_processes, "sharded": sharded}))


if __name__ == "__main__":
    main(*sys.argv[1:])
