"""An adversarial term: two small patch discriminators that tell the student's denoised images from real ones.

Squared errors cannot say whether an image looks sharp or grainy: they are best served by the mean of what it might be.
At low noise, where a sampler's last steps paint the detail, the discriminators look at patches of it instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liftkit.finetune.recipe import Recipe
from liftkit.finetune.sharding import share_gradients
from liftkit.finetune.state import load_parameters

LOOKS_BELOW = 0.3
"""Noise level above which denoised images are blurred by right, and are not judged."""
LEARNING_RATE = 5e-4


class Adversary:
    """Discriminators with their optimizer.

    Args:
        recipe: gives the seed of their weights.
        device: where images are.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.networks = nn.ModuleList([discriminator(stride) for stride in (4, 1)]).to(device)
        self.optimizer = torch.optim.AdamW(self.networks.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.9))

    def __call__(self, real: Tensor, fake: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """The student's term and the discriminators' loss; no gradient of either reaches the other's weights.

        Args:
            real: images (B, 3, H, W) in [-1, 1].
            fake: the student's denoised ones of the same.
            sigma: (B,) their noise levels.

        Returns:
            Minus the mean judgment of the student's images, times the share of them that is judged, (); and the hinge loss of
            the discriminators, (), times that share, or None where no image is judged.
        """
        judged = sigma < LOOKS_BELOW
        if not bool(judged.any()):
            return fake.sum() * 0.0, None
        return self.judge(real[judged], fake[judged], judged.float().mean())

    def judge(self, real: Tensor, fake: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """The same of images that are all judged, ``share`` () of a batch."""
        loss = sum(
            F.relu(1.0 - network(real)).mean() + F.relu(1.0 + network(fake.detach())).mean()
            for network in self.networks
        )
        self.networks.requires_grad_(False)
        term = -sum(network(fake).mean() for network in self.networks) * share
        self.networks.requires_grad_(True)
        return term, share * loss

    def step(self, factor: float, accelerator: Any) -> None:
        """Update the discriminators, alike in all processes; ``factor`` scales their learning rate."""
        share_gradients(accelerator, self.networks.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, the power iterations' vectors and the optimizer's state, by name."""
        result = {name: value.detach().cpu().clone() for name, value in self.networks.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            result |= {f"optimizer/{index}/{name}": torch.as_tensor(value).cpu() for name, value in entries.items()}
        return result

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Read what :meth:`tensors` gave."""
        mine = self.networks.state_dict()
        load_parameters(mine, {k: v for k, v in tensors.items() if not k.startswith("optimizer/")}, "adversary")
        entries: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                entries.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})


def discriminator(stride: int) -> nn.Module:
    """A spectrally normalized patch discriminator: (B, 3, H, W) to judgments (B, 1, H / stride, W / stride)."""
    normed = nn.utils.parametrizations.spectral_norm

    def layer(inputs: int, outputs: int, size: int, step: int) -> nn.Module:
        return normed(nn.Conv2d(inputs, outputs, size, step, 1))

    sizes = [(32, 4, 2), (64, 4, 2), (64, 3, 1)] if stride == 4 else [(24, 3, 1), (24, 3, 1)]
    layers: list[nn.Module] = []
    channels = 3
    for width, kernel, step in sizes:
        layers += [layer(channels, width, kernel, step), nn.LeakyReLU(0.2)]
        channels = width
    return nn.Sequential(*layers, layer(channels, 1, 3, 1))
