"""The VAE of tiny-klein: first regression, then an adversarial finetune of the decoder alone.

Regression alone gives a decoder that blurs, and a VAE whose blur a sharpening filter undoes is no fair
stage for a pixel model. So the decoder is trained on against two small discriminators while the encoder,
and with it everything the flow model sees, stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from liftkit.color import to_signed
from liftkit.fit.gallery import psnr
from tools.tiny_klein import common

CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 48, 96),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 64,
}
POOL = 16384


def build(weights: str | None = None) -> AutoencoderKLFlux2:
    """The autoencoder with random weights, or with those of a stage's result."""
    torch.manual_seed(common.SEED)
    vae = AutoencoderKLFlux2(**CONFIG)
    if weights is not None:
        vae.load_state_dict(common.load(weights))
    return vae


def train(steps: int = 3600, batch_size: int = 16) -> None:
    """Encoder and decoder: L1, L1 of image gradients and a light KL; then the batch-norm statistics."""
    vae = build()
    images, _ = common.demo_images(POOL)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    log = common.Log("vae", steps, batch_size)
    for step, index in common.batches(POOL, batch_size, steps):
        set_learning_rate(optimizer, 2e-3 * common.cosine(step, steps))
        target = to_signed(images[index])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample()).sample
        output = output.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1.0 - posterior.logvar.float()).mean()
        loss = F.l1_loss(output, target) + 0.5 * gradient_loss(output, target) + 3e-4 * kl
        descend(optimizer, loss, vae.parameters())
        log(step, loss=loss.item(), kl=kl.item(), psnr=psnr(output.detach(), target).mean().item())
    fill_statistics(vae, images[:4096])
    common.save(common.work_file("vae.safetensors"), vae.state_dict())
    print(f"vae: held-out PSNR {held_out_psnr(vae):.2f} dB", flush=True)


def sharpen(steps: int = 1100, batch_size: int = 16) -> None:
    """The decoder alone, on: regression, fixed random features, and a hinge loss against two critics."""
    vae = build("vae.safetensors")
    vae.requires_grad_(False)
    trained = nn.ModuleList([vae.decoder, vae.post_quant_conv]).requires_grad_(True)
    critics = nn.ModuleList([critic(stride=2), critic(stride=1)])
    features = random_features()
    images, _ = common.demo_images(POOL)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-4, betas=(0.5, 0.9), weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critics.parameters(), lr=5e-4, betas=(0.5, 0.9), weight_decay=0.0)
    log = common.Log("decoder", steps, batch_size)
    for step, index in common.batches(POOL, batch_size, steps, seed=common.SEED + 1):
        for each in (optimizer, critic_optimizer):
            set_learning_rate(each, 5e-4 * min(1.0, (step + 1) / 50, 1.5 * (1.0 - step / steps)))
        target = to_signed(images[index])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(target).latent_dist.mode()
            output = vae.decode(latents).sample.float()
            real = [judge(target) for judge in critics]
            fake = [judge(output.detach()) for judge in critics]
        hinges = [F.relu(1.0 - r.float()).mean() + F.relu(1.0 + f.float()).mean() for r, f in zip(real, fake)]
        critic_loss = torch.stack(hinges).sum()
        descend(critic_optimizer, critic_loss, critics.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            adversarial = -sum(judge(output).float().mean() for judge in critics)
            perceptual = sum(F.l1_loss(a.float(), b.float()) for a, b in zip(features(output), features(target)))
        loss = F.l1_loss(output, target) + 0.2 * perceptual + 0.05 * adversarial
        descend(optimizer, loss, trained.parameters())
        quality = psnr(output.detach(), target).mean().item()
        log(step, loss=loss.item(), critic=critic_loss.item(), psnr=quality)
    common.save(common.work_file("vae-sharp.safetensors"), vae.state_dict())
    print(f"decoder: held-out PSNR {held_out_psnr(vae):.2f} dB", flush=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, parameters) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def gradient_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 distance of horizontal and vertical differences."""
    return F.l1_loss(output.diff(dim=-1), target.diff(dim=-1)) + F.l1_loss(output.diff(dim=-2), target.diff(dim=-2))


def critic(stride: int) -> nn.Module:
    """A small spectrally normalized discriminator: stride 2 sees shapes, stride 1 sees grain."""
    widths = (3, 32, 48, 64)
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        convolution = nn.Conv2d(inputs, outputs, 4 if stride == 2 and index < 2 else 3, stride if index < 2 else 1, 1)
        layers += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 3, 1, 1)))


class RandomFeatures(nn.Module):
    """Fixed random convolutions: enough to compare textures without any downloaded weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(common.SEED)
        self.convolutions = nn.ModuleList()
        for inputs, outputs in ((3, 32), (32, 48), (48, 64)):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            weight = torch.randn(convolution.weight.shape, generator=generator)
            convolution.weight = nn.Parameter(weight * (2.0 / (9 * inputs)) ** 0.5, requires_grad=False)
            self.convolutions.append(convolution)

    def forward(self, images: Tensor) -> list[Tensor]:
        result = []
        for convolution in self.convolutions:
            images = F.leaky_relu(convolution(images), 0.2)
            result.append(images)
            images = F.avg_pool2d(images, 2)
        return result


def random_features() -> RandomFeatures:
    return RandomFeatures().requires_grad_(False)


@torch.no_grad()
def fill_statistics(vae: AutoencoderKLFlux2, images: Tensor) -> None:
    """Set the batch-norm buffers to the mean and variance of the 2 x 2 patchified latents.

    The pipeline divides by sqrt(running_var + batch_norm_eps), so that eps is taken off the variance.
    """
    latents = torch.cat([vae.encode(to_signed(part)).latent_dist.mode() for part in images.split(64)])
    folded = F.pixel_unshuffle(latents, 2).double()
    vae.bn.running_mean.copy_(folded.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(folded.var(dim=(0, 2, 3)) - vae.config.batch_norm_eps)


@torch.no_grad()
def normalized_latents(vae: AutoencoderKLFlux2, images: Tensor) -> Tensor:
    """(n, 3, 64, 64) uint8 -> (n, 32, 8, 8), what the transformer is trained on."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    parts = [vae.encode(to_signed(part)).latent_dist.mode() for part in images.split(64)]
    return (F.pixel_unshuffle(torch.cat(parts), 2) - mean) / std


@torch.no_grad()
def reconstruct(vae: AutoencoderKLFlux2, images: Tensor) -> Tensor:
    """uint8 images to the VAE's reconstructions in [-1, 1]."""
    parts = [vae.decode(vae.encode(to_signed(part)).latent_dist.mode()).sample for part in images.split(64)]
    return torch.cat(parts).clamp(-1.0, 1.0)


def held_out_psnr(vae: AutoencoderKLFlux2, count: int = 512) -> float:
    """Mean PSNR over held-out composites, in dB."""
    images, _ = common.demo_images(count, split="heldout")
    return psnr(reconstruct(vae, images), to_signed(images)).mean().item()
