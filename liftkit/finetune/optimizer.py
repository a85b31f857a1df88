"""Optimizers by parameter group, and the learning rate over the steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liftkit.errors import LiftkitError, UsageError
from liftkit.finetune.recipe import Ema
from liftkit.finetune.recipe import Optimizer as OptimizerRecipe
from liftkit.finetune.stages import trunk_of
from liftkit.models.detail_head import in_head
from liftkit.models.spec import Architecture

BASE_RATE = "base_lr"
"""Key of a parameter group: its learning rate at its highest."""


def make_optimizers(
    parameters: dict[str, nn.Parameter], recipe: OptimizerRecipe, spec: Architecture
) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe: one, or two with Muon, which takes matrices between hidden layers only.

    Args:
        parameters: what learns, by name.
        recipe: the section ``optimizer``.
        spec: the architecture. Its raw-token projections are AdamW's even under Muon, for their rows are pixels.

    Raises:
        UsageError: if the optimizer is not installed, or a multiplier names nothing that learns.
    """
    _check_multipliers(parameters, recipe)
    trunk = trunk_of(spec, parameters).keys() if recipe.trunk is not None else frozenset()
    matrices = {}
    if recipe.name == "muon":
        outer = tuple(f"{projection.path}." for projection, _ in spec.projections)
        matrices = {
            name: p
            for name, p in parameters.items()
            if p.ndim == 2 and not name.startswith(outer) and not in_head(name)
        }
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    result: list[torch.optim.Optimizer] = []
    if matrices:
        muon = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise UsageError(
                f"optimizer.name: muon: torch {torch.__version__} has none; install torch >= 2.9, or take adamw"
            )
        groups = _groups(matrices, recipe, trunk)
        result.append(muon(groups, weight_decay=recipe.weight_decay, ns_steps=4, adjust_lr_fn="match_rms_adamw"))
    if rest:
        result.append(
            _adamw(recipe)(_groups(rest, recipe, trunk), betas=recipe.betas, weight_decay=recipe.weight_decay)
        )
    return result


def _adamw(recipe: OptimizerRecipe) -> Any:
    if recipe.name != "adamw8bit":
        return functools.partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(
            "optimizer.name: adamw8bit: bitsandbytes is not installed; pip install bitsandbytes, or take adamw"
        ) from error
    return AdamW8bit


def _groups(
    parameters: dict[str, nn.Parameter], recipe: OptimizerRecipe, trunk: Container[str]
) -> list[dict[str, Any]]:
    """One group per learning rate, and others for the detail head: where the network is sharded, it is not."""
    grouped: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factors = [factor for module, factor in recipe.multipliers.items() if _within(name, module)]
        factors += [recipe.trunk.factor] if recipe.trunk is not None and name in trunk else []
        grouped.setdefault((math.prod(factors), in_head(name)), []).append(parameter)
    rates = [(recipe.learning_rate * factor, each) for (factor, _), each in grouped.items()]
    return [{"params": each, "lr": rate, BASE_RATE: rate} for rate, each in rates]


def _within(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _check_multipliers(parameters: dict[str, nn.Parameter], recipe: OptimizerRecipe) -> None:
    for module in recipe.multipliers:
        if not any(_within(name, module) for name in parameters):
            raise UsageError(
                f"optimizer.multipliers: {module}: nothing of this module learns; see --dry-run for what does"
            )


def rate_factor(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``, relative to its highest, in (0, 1]."""
    warm = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
    begin = recipe.decay_from * steps
    if recipe.decay == "constant" or step < begin:
        return warm
    progress = (step - begin) / max(steps - begin, 1.0)
    return warm * (1.0 - progress if recipe.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Give every group its rate times a factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[BASE_RATE] * factor


def step_scaled(optimizers: Sequence[Any], scaler: Any, norm: float) -> bool:
    """One step of all optimizers, or of none where gradients overflowed, which then are to be computed again.

    accelerate's own optimizers leave such a step out, and would then take the gradients of a second one for scaled.

    Args:
        optimizers: as accelerate prepared them.
        scaler: of the loss, which has unscaled the gradients; None but in fp16.
        norm: of the unscaled gradients.

    Raises:
        LiftkitError: if they are not finite and a smaller scale does not help.
    """
    if scaler is None:
        for optimizer in optimizers:
            optimizer.step()
        return True
    scale = scaler.get_scale()
    finite = math.isfinite(norm)
    if finite:
        for optimizer in optimizers:
            scaler.step(optimizer.optimizer)
    scaler.update()
    if not finite and (scaler.get_scale() >= scale or scale < 1.0):
        raise LiftkitError("the gradients overflow in fp16 whatever their scale; use precision: bf16")
    return finite


class Average:
    """Running mean of parameters, by Karras' power function, ``beta_t = (1 - 1 / t)^(gamma + 1)``, or of one constant beta.

    Args:
        parameters: what learns, by name.
        recipe: the section ``ema``. By the power function the mean reaches back over about 1 / gamma of the steps; before its
            start it is the parameters themselves.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], recipe: Ema) -> None:
        self.recipe = recipe
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter], step: int) -> None:
        """After step ``step`` (from 1)."""
        recipe = self.recipe
        age = max(step - recipe.start, 1)
        kept = (1.0 - 1.0 / age) ** (recipe.gamma + 1.0)
        if recipe.kind == "constant":
            kept = recipe.decay if step > recipe.start else 0.0
        means, current = [self.values[name] for name in parameters], list(parameters.values())
        # In a few kernels instead of one for each of some hundred tensors.
        torch._foreach_lerp_([*map(_local, means)], [*map(_local, current)], weight=1.0 - kept)

    @torch.no_grad()
    def exchange(self, parameters: dict[str, nn.Parameter]) -> None:
        """Swap mean and parameters; twice is nothing."""
        for name, parameter in parameters.items():
            current = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(current)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, others as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
