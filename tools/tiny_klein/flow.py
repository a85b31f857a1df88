"""The latent flow model of tiny-klein: rectified flow on the normalized latents, prompts dropped now and then."""

from __future__ import annotations

import copy

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor

from liftkit.checkpoint.folder import sha256
from liftkit.data import demo
from tools.tiny_klein import autoencoder, common, text

CONFIG = {
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 1,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 96,
    "timestep_guidance_channels": 128,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": False,
}
POOL = 24576
SHIFT = 1.5
PROMPT_DROP = 0.1
SAVE_EVERY = 250


def build() -> Flux2Transformer2DModel:
    """The transformer with random weights and a silent output projection."""
    torch.manual_seed(common.SEED)
    model = Flux2Transformer2DModel(**CONFIG)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


def train(steps: int = 4600, batch_size: int = 48) -> None:
    """Muon on the block matrices and AdamW on the rest, an EMA of 0.999; saves now and then and resumes.

    A state is resumed only behind the VAE that it was trained behind.
    """
    torch.manual_seed(common.SEED)
    model = build()
    average = copy.deepcopy(model).requires_grad_(False)
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "blocks" in name else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    latents, captions, embeds = _data()
    vae = torch.tensor(list(bytes.fromhex(sha256(common.work_file("vae.safetensors")))), dtype=torch.uint8)
    first = _resume(model, average, optimizers, vae)
    image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 1, 8, 8))
    text_ids = Flux2KleinPipeline._prepare_text_ids(embeds[:1])
    log = common.Log("flow", steps, batch_size)
    smooth = 0.0
    for step, index in common.batches(len(latents), batch_size, steps):
        if step < first:
            continue
        generator = torch.Generator().manual_seed(common.SEED * 1_000_003 + step)
        x0 = latents[index]
        noise = torch.randn(x0.shape, generator=generator)
        time = torch.sigmoid(torch.randn(len(x0), generator=generator))
        sigma = SHIFT * time / (1.0 + (SHIFT - 1.0) * time)
        drop = torch.rand(len(x0), generator=generator) < PROMPT_DROP
        prompt = embeds[torch.where(drop, len(embeds) - 1, captions[index])]
        x_t = torch.lerp(x0, noise, sigma.view(-1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(
                hidden_states=x_t,
                encoder_hidden_states=prompt,
                timestep=sigma,
                img_ids=image_ids.expand(len(x0), -1, -1),
                txt_ids=text_ids.expand(len(x0), -1, -1),
                guidance=None,
                return_dict=False,
            )[0]
        loss = (output.float() - (noise - x0)).square().mean()
        # Constant, then a linear decay over the second half.
        rate = 2e-3 * min(1.0, (step + 1) / 50, 2.0 * (1.0 - step / steps))
        for optimizer in optimizers:
            autoencoder.set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        _update(average, model, min(0.999, (step + 1) / (step + 10)))
        smooth = 0.98 * smooth + 0.02 * loss.item() if step > first else loss.item()
        log(step, loss=smooth)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(step + 1, model, average, optimizers, vae)


def _data() -> tuple[Tensor, Tensor, Tensor]:
    """Latent tokens (n, 64, 32), the caption of each, and the features of all captions, the empty one last."""
    images, scenes = common.demo_images(POOL)
    latents = autoencoder.normalized_latents(autoencoder.build("vae.safetensors"), images)
    order = {scene: index for index, scene in enumerate(demo.all_scenes())}
    captions = torch.tensor([order[scene] for scene in scenes])
    embeds = text.embed([scene.prompt for scene in demo.all_scenes()] + [""])
    return latents.flatten(2).transpose(1, 2).contiguous(), captions, embeds


@torch.no_grad()
def _update(average: torch.nn.Module, model: torch.nn.Module, momentum: float) -> None:
    for kept, current in zip(average.parameters(), model.parameters()):
        kept.lerp_(current, 1.0 - momentum)


def _save(step: int, model, average, optimizers, vae: Tensor) -> None:
    """Write the state of the training, with the VAE's SHA-256, (32,) uint8, and the average by itself."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    state |= {f"average.{key}": value for key, value in average.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{which}.{index}.{key}": torch.as_tensor(value) for key, value in entry.items()}
    common.save(common.work_file("flow-state.safetensors"), state | {"step": torch.tensor(step), "vae": vae})
    common.save(common.work_file("flow.safetensors"), average.state_dict())


def _resume(model, average, optimizers, vae: Tensor) -> int:
    """Load a saved state, if it is of this VAE; the step to go on from."""
    if not (common.WORK / "flow-state.safetensors").exists():
        return 0
    state = common.load("flow-state.safetensors")
    if "vae" not in state or not torch.equal(state["vae"], vae):
        print("flow: the saved state is not of this vae.safetensors; starting from zero", flush=True)
        return 0
    for prefix, target in (("model.", model), ("average.", average)):
        target.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    for which, optimizer in enumerate(optimizers):
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith(f"optimizer.{which}."):
                _, _, index, name = key.split(".")
                entries.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
    step = int(state["step"])
    print(f"flow: resumed at step {step}", flush=True)
    return step
