"""How the embedded latent flow models are trained: rectified flow on normalized latent tokens, prompts dropped now and then."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from tools.tiny_klein import common

SHIFT = 1.5
PROMPT_DROP = 0.1
RATE = 2e-3
SAVE_EVERY = 250


@dataclass(frozen=True)
class Tokens:
    """What is learned.

    Args:
        latents: (n, h * w, r), a square grid of tokens.
        captions: (n,), the row of each one's caption in ``embeds``.
        embeds: (m + 1, length, width), the empty prompt's last.
        origin: (32,) uint8, a digest of what the latents were made by: a state is resumed only behind the same.
    """

    latents: Tensor
    captions: Tensor
    embeds: Tensor
    origin: Tensor

    def to(self, device: str) -> Tokens:
        """All of it on a device."""
        return Tokens(self.latents.to(device), self.captions.to(device), self.embeds.to(device), self.origin)


def build(config: dict[str, Any]) -> Flux2Transformer2DModel:
    """The transformer with random weights and a silent output projection."""
    torch.manual_seed(common.SEED)
    model = Flux2Transformer2DModel(**config)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


def train(
    config: dict[str, Any],
    tokens: Tokens,
    folder: Path,
    *,
    steps: int,
    batch_size: int = 48,
    device: str = "cpu",
    seconds: float | None = None,
) -> None:
    """Muon on the block matrices and AdamW on the rest, an EMA of 0.999; saves now and then and resumes.

    Args:
        config: of the transformer.
        tokens: the data.
        folder: where ``flow.safetensors`` (the average) and ``flow-state.safetensors`` are written.
        steps: at most.
        batch_size: of each.
        device: where.
        seconds: after which it ends too, with its rate decayed as at the last step.
    """
    model = build(config).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = _optimizers(model)
    tokens = tokens.to(device)
    first = _resume(folder, model, average, optimizers, tokens.origin)
    side = int(tokens.latents.shape[1] ** 0.5)
    image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 1, side, side)).to(device)
    text_ids = Flux2KleinPipeline._prepare_text_ids(tokens.embeds[:1]).to(device)
    log = common.Log("flow", steps, batch_size)
    smooth: Tensor | None = None
    began = time.monotonic()
    for step, index in common.batches(len(tokens.latents), batch_size, steps):
        if step < first:
            continue
        done = step / steps if seconds is None else max(step / steps, (time.monotonic() - began) / seconds)
        if done >= 1.0:
            break
        generator = torch.Generator(device).manual_seed(common.SEED * 1_000_003 + step)
        x0 = tokens.latents[index.to(device)].float()
        noise = torch.randn(x0.shape, generator=generator, device=device)
        uniform = torch.sigmoid(torch.randn(len(x0), generator=generator, device=device))
        sigma = SHIFT * uniform / (1.0 + (SHIFT - 1.0) * uniform)
        drop = torch.rand(len(x0), generator=generator, device=device) < PROMPT_DROP
        prompt = tokens.embeds[torch.where(drop, len(tokens.embeds) - 1, tokens.captions[index.to(device)])]
        with torch.autocast(device, torch.bfloat16):
            output = model(
                hidden_states=torch.lerp(x0, noise, sigma.view(-1, 1, 1)),
                encoder_hidden_states=prompt,
                timestep=sigma,
                img_ids=image_ids.expand(len(x0), -1, -1),
                txt_ids=text_ids.expand(len(x0), -1, -1),
                guidance=None,
                return_dict=False,
            )[0]
        loss = (output.float() - (noise - x0)).square().mean()
        # Constant, then a linear decay over the second half.
        rate = RATE * min(1.0, (step + 1) / 50, 2.0 * (1.0 - done))
        _descend(model, optimizers, loss, rate)
        _update(average, model, min(0.999, (step + 1) / (step + 10)))
        smooth = loss.detach() if smooth is None else torch.lerp(smooth, loss.detach(), 0.02)
        if (step + 1) % log.every == 0:
            log(step, loss=smooth.item())
        if (step + 1) % SAVE_EVERY == 0 and device == "cpu":
            _save(folder, step + 1, model, average, optimizers, tokens.origin)
        first = step + 1
    _save(folder, first, model, average, optimizers, tokens.origin)
    print(f"flow: {first} steps in {time.monotonic() - began:.0f} s", flush=True)


def _optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "blocks" in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def _descend(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def _update(average: torch.nn.Module, model: torch.nn.Module, momentum: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - momentum)


def _save(folder: Path, step: int, model: Any, average: Any, optimizers: Any, origin: Tensor) -> None:
    """Write the state of the training and the average by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    state |= {f"average.{key}": value for key, value in average.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{which}.{index}.{key}": torch.as_tensor(value) for key, value in entry.items()}
    common.save(folder / "flow-state.safetensors", state | {"step": torch.tensor(step), "vae": origin})
    common.save(folder / "flow.safetensors", average.state_dict())


def _resume(folder: Path, model: Any, average: Any, optimizers: Any, origin: Tensor) -> int:
    """Load a saved state, if it is of these latents; the step to go on from."""
    if not (folder / "flow-state.safetensors").exists():
        return 0
    state = load_file(folder / "flow-state.safetensors")
    if "vae" not in state or not torch.equal(state["vae"], origin):
        print("flow: the saved state is of other latents; starting from zero", flush=True)
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
