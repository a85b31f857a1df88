"""The next step's batch and noise, made ready by a thread while a step runs.

Drawing the noise of four images of 1024 x 1024 takes a processor 50 ms or more, and moving them to a GPU some 20 ms: in turn
with a step of 1.8 s that is some percent of it, in which the GPU has nothing to do.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from liftkit.data.batch import Batch
from liftkit.data.images import prefetch
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.step import draw


@dataclass(frozen=True)
class Prepared:
    """What a step needs: on the device, or in pinned memory where a step takes its rows in parts.

    Args:
        batch: this process's rows.
        noise: shaped like the states of the batch.
        sigma: noise levels, (B,).
        arrived: on a GPU, the event after the copies.
        levels: the noise levels on the host; None where nobody knows them there.
    """

    batch: Batch
    noise: Tensor
    sigma: Tensor
    arrived: Any = None
    levels: list[float] | None = None

    def wait(self) -> Prepared:
        """This, for whatever is queued on the device from now on."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.noise.device)
            stream.wait_event(self.arrived)
            for tensor in (*self.batch.tensors(), self.noise, self.sigma):
                # Copied on another stream: their memory must not be given away before this one is done with them.
                tensor.record_stream(stream)
        return self

    def part(self, rows: slice, device: torch.device) -> tuple[Batch, Tensor, Tensor]:
        """Batch, noise and noise levels of some rows, on a device."""
        noise, sigma = (each[rows].to(device, non_blocking=each.is_pinned()) for each in (self.noise, self.sigma))
        return self.batch.rows(rows).to(device), noise, sigma


class Ahead:
    """Makes batches ready.

    Args:
        recipe: gives the noise, its seed, and the size of the global batch.
        rows: of the global batch that are this process's.
        device: of the network.
        pixels: whether states are images, else latents.
    """

    def __init__(self, recipe: Recipe, rows: slice, device: torch.device, pixels: bool) -> None:
        self.recipe, self.rows, self.device, self.pixels = recipe, rows, device, pixels
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: int, batch: Batch) -> Prepared:
        """A step's batch with its noise. Noise is drawn for the global batch, so that it does not matter how many processes
        share it."""
        states = batch.images if self.pixels else batch.latents
        assert states is not None
        noise, sigma = draw((self.recipe.batch_size, *states.shape[1:]), self.recipe.noise, self.recipe.seed, step)
        noise, sigma = noise[self.rows], sigma[self.rows]
        levels = sigma.tolist()
        if self.stream is None:
            return Prepared(batch.to(self.device), noise.to(self.device), sigma.to(self.device), levels=levels)
        if (self.recipe.micro_batch or len(sigma)) < len(sigma):
            # 256 images of 1024 x 1024 with their noise and prompts are 7 GB; parts come when they are used.
            return Prepared(batch.pinned(), noise.pin_memory(), sigma.pin_memory(), levels=levels)
        with torch.cuda.stream(self.stream):
            there = batch.pinned().to(self.device)
            noise, sigma = (each.pin_memory().to(self.device, non_blocking=True) for each in (noise, sigma))
            return Prepared(there, noise, sigma, self.stream.record_event(), levels)

    def each(self, batches: Iterable[Batch], first: int) -> Generator[Prepared, None, None]:
        """The batches of the steps from ``first`` on, of which the next is made ready meanwhile."""
        with closing(prefetch(lambda pair: self(*pair), zip(count(first), batches), workers=1, window=1)) as ready:
            for _, prepared in ready:
                yield prepared.result()
