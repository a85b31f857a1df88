"""The student and its frozen reference in one module: shared base weights, no second copy of the network.

The student is the pixel model with adapters and a few modules trained in full. The reference is the latent model that it
came from: adapters off, those modules exchanged for the originals, in latent tokens, where it is as large as it was.
What accelerate wraps is the bare stock forward alone: gains, clocks and the recovery of the velocity stay outside, in
float32, whatever precision or sharding the network runs in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liftkit.asymflow import calibrate
from liftkit.finetune.objective import Velocity
from liftkit.lift import Lift
from liftkit.models.flow import FlowModel
from liftkit.models.mixin import channels_for
from liftkit.models.registry import is_lifted
from liftkit.tokens import patchify, unpatchify

CHANNELS = ("in_channels", "out_channels")
FEW_TOKENS = 128
"""Of the image, up to which plain attention was faster; see :func:`_attention_for`."""


class Network(nn.Module):
    """The bare network of student and reference.

    Args:
        transformer: an Asym transformer (or a stock one, then without reference).
        originals: the source's own modules by path, as frozen ones: projections with latent channels, output norm.
        frozen: a frozen copy of the transformer, where the student trains base weights; None shares them.
    """

    def __init__(
        self, transformer: nn.Module, originals: Mapping[str, nn.Module] | None = None, frozen: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.paths = list(originals or ())
        self.originals = nn.ModuleList([each.requires_grad_(False) for each in (originals or {}).values()])
        self.frozen = frozen.requires_grad_(False) if frozen is not None else None

    def forward(self, reference: bool = False, **arguments: Any) -> Any:
        """The stock forward of the student, or of the reference."""
        if not reference:
            return _stock_forward(self.transformer, arguments)
        model = self.frozen if self.frozen is not None else self.transformer
        with self._as_reference(model):
            return _stock_forward(model, arguments)

    @contextmanager
    def _as_reference(self, model: Any) -> Iterator[None]:
        """The transformer as the latent one it was."""
        config = channels_for(model.architecture, dict(model.config), latent=True)
        here = [(*_parent(model, path), module) for path, module in zip(self.paths, self.originals)]
        kept = [getattr(parent, name) for parent, name, _ in here]
        counts = {name: getattr(model, name) for name in CHANNELS if name in vars(model)}
        adapters = _adapters(model)
        try:
            for parent, name, module in here:
                setattr(parent, name, module)
            for name in counts:
                setattr(model, name, config[name] if config.get(name) is not None else config["in_channels"])
            for layer in adapters:
                layer._disable_adapters = True
            yield
        finally:
            for (parent, name, _), module in zip(here, kept):
                setattr(parent, name, module)
            for name, value in counts.items():
                setattr(model, name, value)
            for layer in adapters:
                layer._disable_adapters = False


def compile_blocks(transformer: Any, **options: Any) -> None:
    """Compile a transformer's blocks, each kind once; not the whole network, which would take as many times longer.

    Args:
        transformer: of diffusers. Some of its classes do not name the blocks that repeat, but all those that are not split.
        options: of ``torch.compile``.
    """
    kinds = set(transformer._repeated_blocks or transformer._no_split_modules)
    for module in transformer.modules():
        if type(module).__name__ in kinds:
            module.compile(**options)


def _adapters(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _stock_forward(transformer: Any, arguments: dict[str, Any]) -> Any:
    # A checkpointed block is run again in the backward pass, outside of this context.
    again = getattr(transformer, "gradient_checkpointing", False)
    with nullcontext() if again else _attention_for(arguments["hidden_states"]):
        if hasattr(type(transformer), "network"):
            return type(transformer).network(transformer, **arguments)
        return transformer(**arguments)


def _attention_for(states: Tensor) -> Any:
    """The attention that trains fastest: torch's choice, but plain products for few tokens in bfloat16 on a CPU.

    There the fused kernel's forward and backward take 50 ms where plain products take 19 (76 tokens, 192 heads in all); in
    float32 it is 10 against 15, and for 256 tokens it is twice as fast in both.

    Args:
        states: tokens (B, N, channels), or images (B, channels, h, w) that the network patchifies itself.
    """
    few = states.ndim == 3 and states.shape[1] <= FEW_TOKENS
    half = states.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return sdpa_kernel(SDPBackend.MATH) if few and half and torch.is_grad_enabled() else nullcontext()


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def original_modules(transformer: Any, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The source's projections and output norm, from ``latent/reference.safetensors``.

    Args:
        transformer: the Asym twin.
        tensors: by name, with latent channels.

    Returns:
        Modules by path, in the dtype of the twin's own.
    """
    spec = transformer.architecture
    result = {}
    for path in [projection.path for projection, _ in spec.projections] + list(spec.reference):
        module = copy.deepcopy(transformer.get_submodule(path))
        for name, parameter in list(module.named_parameters()):
            parent, leaf = _parent(module, name)
            # A copy: the tensors may be the twin's own, which learn.
            value = tensors[f"{path}.{name}"].to(parameter, copy=True)
            setattr(parent, leaf, nn.Parameter(value, requires_grad=False))
        result[path] = _with_channels(module)
    return result


def _with_channels(module: nn.Module) -> nn.Module:
    """A projection that says of itself what its new weight says."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d | nn.Conv3d):
        module.in_channels = module.weight.shape[1]
    return module


class Reference:
    """The frozen converted model, run as the latent model that it is.

    On ``x_t^L = (1 - sigma) s A z_0 + sigma eps`` it sees ``z_tau = A^T (k x_t^L)`` and denoises to ``s A zhat_0``: what is
    outside of the subspace decays to zero whatever it says (Theorem 1).

    Args:
        flow: the latent network on the shared weights (:class:`FlowModel` with ``latent``).
        lift: A and s.
    """

    def __init__(self, flow: FlowModel, lift: Lift) -> None:
        self.flow, self.lift = flow, lift

    @torch.no_grad()
    def velocity(self, x_t: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
        """See :meth:`FlowModel.velocity`; ``x_t`` (B, 3, H, W) in the color space."""
        lift, size = self.lift, x_t.shape[-2:]
        basis = lift.basis.to(x_t)
        gain, tau = calibrate(sigma, lift.scale)
        tokens = gain.view(-1, 1, 1) * (patchify(x_t, lift.patch_size) @ basis)
        z_tau = unpatchify(tokens, lift.latent_patch, size[0] // lift.fold, size[1] // lift.fold)
        clean = z_tau - tau.view(-1, 1, 1, 1) * self.flow.velocity(z_tau, tau, **conditioning).float()
        denoised = unpatchify(lift.raise_tokens(patchify(clean, lift.latent_patch)), lift.patch_size, *size)
        return (x_t - denoised) / sigma.clamp(min=torch.finfo(torch.float32).eps).view(-1, 1, 1, 1)


def bind(model: Any, conditioning: dict[str, Any]) -> Velocity:
    """A model's velocity with its conditioning given."""

    def velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
        result: Tensor = model.velocity(x_t, sigma, **conditioning)
        return result

    return velocity


def connect(transformer: Any, run: Callable[..., Any]) -> tuple[FlowModel, FlowModel | None]:
    """Flow models of student and latent reference over a wrapped :class:`Network`.

    Args:
        transformer: inside the network. A pixel twin's forward calls ``run`` from now on, between its pure functions; a stock
            one is ``run`` itself, and has no reference.
        run: the network as accelerate prepared it.
    """
    if not is_lifted(type(transformer).__name__):
        return FlowModel(transformer, call=run), None

    def latent(**arguments: Any) -> Any:
        return run(reference=True, **arguments)

    transformer.network = lambda **arguments: run(**arguments)
    return FlowModel(transformer), FlowModel(transformer, call=latent, latent=True)
