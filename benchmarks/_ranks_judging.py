"""What ranks.py finds in a trained network: errors on held-out images by noise level, and what its samples are like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _ranks_data import CLASSES, FULL
from _ranks_training import Student
from torch import Tensor

LEVELS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
SAMPLING_FLOOR = 0.04


@torch.no_grad()
def errors(student: Student, images: Tensor, digits: Tensor) -> dict[str, float]:
    """Mean |x_0 - xhat_0|^2 by noise level."""
    found = {}
    for number, level in enumerate(LEVELS):
        generator = torch.Generator(images.device).manual_seed(1000 + number)
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        total = 0.0
        for x0, eps, label in zip(images.split(256), noise.split(256), digits.split(256)):
            sigma = torch.full((len(x0),), level, device=x0.device)
            x_t = torch.lerp(x0, eps, level)
            denoised = x_t - level * student.velocity(x_t, sigma, label, 1e-6)
            total += (x0 - denoised).square().sum().item()
        found[f"{level:g}"] = total / images.numel()
    return found


@torch.no_grad()
def samples(student: Student, count: int, steps: int, guidance: float, seed: int) -> Tensor:
    """Heun's method from the same noise for every rank, Euler's at last; digits in turn. (n, 3, side, side) in [-1, 1], CPU."""
    device, made = student.device, []
    grid = [1.0 - index / steps for index in range(steps)] + [0.0]
    labels = torch.arange(count, device=device) % CLASSES
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn((count, 3, student.side, student.side), generator=generator, device=device)

    def velocity(x: Tensor, level: float, label: Tensor) -> Tensor:
        sigma = torch.full((len(x),), level, device=device)
        if guidance == 1.0 or level > 0.88:
            return student.velocity(x, sigma, label, SAMPLING_FLOOR)
        both = torch.cat([label, torch.full_like(label, CLASSES)])
        found = student.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both, SAMPLING_FLOOR)
        conditional, free = found.chunk(2)
        return free + guidance * (conditional - free)

    for x, label in zip(noise.split(512), labels.split(512)):
        for now, after in zip(grid[:-1], grid[1:]):
            u = velocity(x, now, label)
            ahead = x + (after - now) * u
            if after > 0.0:
                ahead = x + (after - now) * 0.5 * (u + velocity(ahead, after, label))
            x = ahead
        made.append(x.clamp(-1.0, 1.0).cpu())
    return torch.cat(made)


def judged(images: Tensor, reference: Tensor) -> dict[str, float]:
    """What the oracle reads, and distances to held-out images; smaller images than the oracle's are enlarged for it."""
    from liftkit.data.oracle import load_oracle
    from liftkit.evaluate.features import texture_features
    from liftkit.evaluate.patches import frechet, gaussian, patch_frechet

    oracle = load_oracle()
    images, reference = (F.interpolate(x, (FULL, FULL), mode="bicubic").clamp(-1.0, 1.0) for x in (images, reference))
    with torch.no_grad():
        wanted = torch.arange(len(images)) % CLASSES
        read = torch.cat([oracle(part)[0].argmax(1) for part in images.split(256)])
        features = [torch.cat([oracle.features(p) for p in each.split(256)]) for each in (images, reference)]
    return {
        "digit": (read == wanted).float().mean().item(),
        "oracle_frechet": frechet(*map(gaussian, features)),
        "texture_frechet": frechet(gaussian(texture_features(images)), gaussian(texture_features(reference))),
        "patch_frechet": patch_frechet(images, reference),
    }
