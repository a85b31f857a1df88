"""Frozen blocks in host memory: each comes to the device when it runs, and the one that runs next is on its way meanwhile.

diffusers' group offloading serves inference. In training its prefetch follows the order of the first forward, where a backward pass
runs blocks again in the opposite one, and what gradient checkpointing stops early never reaches the hook that sends a block back.
Here a block that comes sends away those that are not needed; nothing depends on how it ends. With gradient checkpointing a block's
backward pass follows its second run, and keeps that run's weights itself for as long as it needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from liftkit.errors import UsageError
from liftkit.finetune.network import blocks_of


def offload_blocks(models: list[Any], device: torch.device) -> list[BlockOffload]:
    """Keep the frozen parameters of models' blocks in host memory from now on.

    Args:
        models: transformers whose blocks run in their order, under gradient checkpointing where there are gradients.
        device: where they run.

    Raises:
        UsageError: if one has no blocks with frozen parameters.
    """
    return [BlockOffload(model, device) for model in models]


class BlockOffload:
    """Of one model, by hooks before its blocks.

    Args:
        model: the transformer.
        device: where it runs.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.blocks: list[list[nn.Parameter]] = []
        self.host: list[list[Tensor]] = []
        self.here: dict[int, Any] = {}
        """Blocks on the device or on their way, with the event after their copies."""
        for block in blocks_of(model):
            frozen = [each for each in block.parameters() if not each.requires_grad]
            if not frozen:
                continue
            self.host.append([self._kept(each.data) for each in frozen])
            self.blocks.append(frozen)
            self._leave(len(self.blocks) - 1)
            block.register_forward_pre_hook(self._hook(len(self.blocks) - 1))
        if not self.blocks:
            raise UsageError(f"base.offload: {type(model).__name__} has no blocks with frozen weights; set it to none")

    def _kept(self, values: Tensor) -> Tensor:
        return values.cpu().pin_memory() if self.stream is not None else values.cpu()

    def _hook(self, number: int) -> Any:
        def arrive(module: nn.Module, given: tuple[Any, ...]) -> None:  # noqa: ARG001
            # In a backward pass, where checkpointed blocks run again, they come in the opposite order.
            back = torch._C._current_graph_task_id() != -1
            following = number - 1 if back else number + 1
            for each in [each for each in self.here if each not in (number, following)]:
                self._leave(each)
            self._fetch(number)
            event = self.here[number]
            if event is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(event)
                for parameter in self.blocks[number]:
                    # Copied on another stream, which must not reuse their memory before this one is done with them.
                    parameter.data.record_stream(stream)
            self._fetch(following)

        return arrive

    def _fetch(self, number: int) -> None:
        """Bring a block, unless it is there or none."""
        if number in self.here or not 0 <= number < len(self.blocks):
            return
        if self.stream is None:
            for parameter, host in zip(self.blocks[number], self.host[number]):
                parameter.data = host.to(self.device, copy=True)
            self.here[number] = None
            return
        with torch.cuda.stream(self.stream):
            for parameter, host in zip(self.blocks[number], self.host[number]):
                parameter.data = host.to(self.device, non_blocking=True)
            self.here[number] = self.stream.record_event()

    def _leave(self, number: int) -> None:
        """Send a block away. What asks for its weights now finds none, and fails rather than to compute with others."""
        for parameter in self.blocks[number]:
            parameter.data = parameter.data.new_empty(0)
        self.here.pop(number, None)
