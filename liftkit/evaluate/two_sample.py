"""A learned two-sample test: can a small network tell crops of two sets of images apart?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liftkit.evaluate.batches import batches

CROP = 16


def two_sample_accuracy(images: Tensor, reference: Tensor, *, seed: int = 0, steps: int = 400) -> float:
    """Held-out accuracy of a network that tells 16 x 16 crops of ``images`` from those of ``reference``.

    Args:
        images, reference: (n, 3, H, W) in [-1, 1], or uint8; each is split in two halves, for training and for the test.
        seed: of crops and weights.
        steps: of training, 256 crops each.

    Returns:
        In [0, 1]; 0.5 is best: the two cannot be distinguished.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = [part.split(len(part) // 2)[:2] for part in (images, reference)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        crops, labels = _draw([half[0] for half in halves], 128, generator)
        loss = F.cross_entropy(network(crops), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        crops, labels = _draw([half[1] for half in halves], 4096, generator)
        answers = torch.cat([network(part).argmax(dim=1) for part in crops.split(1024)])
    return (answers == labels).float().mean().item()


def _network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 24, 1), (24, 32, 2), (32, 48, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 2))


def _draw(sets: list[Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` random crops from each set, half of them mirrored, and the set that each came from."""
    crops = []
    for images in sets:
        which = torch.randint(len(images), (count,), generator=generator)
        rows = torch.randint(images.shape[2] - CROP + 1, (count,), generator=generator)
        columns = torch.randint(images.shape[3] - CROP + 1, (count,), generator=generator)
        for index, row, column in zip(which.tolist(), rows.tolist(), columns.tolist()):
            crops.append(images[index, :, row : row + CROP, column : column + CROP])
    stacked = torch.cat(list(batches(torch.stack(crops)))).contiguous(memory_format=torch.channels_last)
    mirrored = torch.rand(len(stacked), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, stacked.flip(3), stacked), torch.arange(len(sets)).repeat_interleave(count)
