"""The student and its frozen reference in one module: shared base weights, no second copy of the network.

The student is the pixel model with adapters and a few modules trained in full. The reference is the latent model that it
came from: a second view of the same blocks, adapters off, with the originals of those modules, in latent tokens, where it is as
large as it was.
What accelerate wraps is the bare stock forward alone: gains, clocks and the recovery of the velocity stay outside, in
float32, whatever precision or sharding the network runs in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liftkit.asymflow import calibrate
from liftkit.errors import UsageError
from liftkit.finetune.latent_view import LatentView
from liftkit.finetune.objective import Velocity
from liftkit.lift import Lift
from liftkit.models.flow import FlowModel
from liftkit.models.registry import is_lifted
from liftkit.tokens import patchify, unpatchify

COMPILED_SHAPES = 64
"""Shapes that a block is compiled for, at most."""
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
        # In a tuple, because it owns no weights: as a submodule it would list the shared ones again.
        self._views: tuple[LatentView, ...] = ()

    def forward(self, reference: bool = False, **arguments: Any) -> Any:
        """The stock forward of the student, or of the reference."""
        if not reference:
            forward = getattr(self.transformer, "stock_forward", self.transformer)
            return _run(self.transformer, forward, arguments)
        if not self._views:
            # When first needed: until then adapters, compilation and sharding may still change the shared modules.
            model = self.frozen if self.frozen is not None else self.transformer
            self._views = (LatentView(model, dict(zip(self.paths, self.originals))),)
        view = self._views[0]
        with view.as_reference():
            return _run(view.live, view.model(), arguments)


def compile_blocks(transformer: Any, **options: Any) -> None:
    """Compile a transformer's blocks, each kind once; not the whole network, which would take as many times longer.

    Args:
        transformer: of diffusers.
        options: of ``torch.compile``.
    """
    for block in blocks_of(transformer):
        block.compile(**options)


def blocks_of(transformer: Any) -> list[nn.Module]:
    """The blocks that a transformer of diffusers repeats, in the order in which it has them: those in lists, of the classes that
    it names, or all in lists of its own where it names none."""
    kinds = set(transformer._repeated_blocks or transformer._no_split_modules or ())
    if not kinds:
        return [block for each in transformer.children() if isinstance(each, nn.ModuleList) for block in each]
    # Some classes name the embedding of patches as well, which is in no list, and of which the reference has one of its own.
    return [
        module
        for path, module in transformer.named_modules()
        if type(module).__name__ in kinds and any(map(str.isdigit, path.split(".")))
    ]


def compile_for_training(transformer: Any, device: torch.device, **options: Any) -> None:
    """Compile a transformer's blocks for a run: each shape of a batch by itself, without cuDNN's attention.

    On an H100 a compiled step at 1024 x 1024 once read memory that was not its own. Compiled so, on an H200, it does not. The
    backward pass of cuDNN's attention is particular about strides, which a compiler chooses; that it is the cause is a guess.

    Args:
        transformer: of diffusers.
        device: that it trains on.
        options: of ``torch.compile``.

    Raises:
        UsageError: if it has no blocks.
    """
    if not blocks_of(transformer):
        raise UsageError(f"compile: {type(transformer).__name__} has no blocks that repeat; set it to false")
    config: Any = torch._dynamo.config
    # Student and reference, with and without gradients, in every bucket; beyond the limit blocks would run as they are, unnoticed.
    config.recompile_limit = max(config.recompile_limit, COMPILED_SHAPES)
    if device.type == "cuda":
        # For the whole process: a checkpointed block runs again in the backward pass, outside of any context.
        torch.backends.cuda.enable_cudnn_sdp(False)
    compile_blocks(transformer, dynamic=False, **options)


def _run(transformer: Any, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    # A checkpointed block is run again in the backward pass, outside of this context.
    again = getattr(transformer, "gradient_checkpointing", False)
    spec = getattr(transformer, "architecture", None)
    states = arguments[spec.state if spec is not None else "hidden_states"]
    with nullcontext() if again else _attention_for(states):
        return forward(**arguments)


def _attention_for(states: Any) -> Any:
    """The attention that trains fastest: torch's choice, but plain products for few tokens in bfloat16 on a CPU.

    There the fused kernel's forward and backward take 50 ms where plain products take 19 (76 tokens, 192 heads in all); in
    float32 it is 10 against 15, and for 256 tokens it is twice as fast in both.

    Args:
        states: tokens (B, N, channels), or another layout, which the network patchifies itself.
    """
    few = isinstance(states, Tensor) and states.ndim == 3 and states.shape[1] <= FEW_TOKENS
    half = few and states.device.type == "cpu" and torch.is_autocast_enabled("cpu")
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
        transformer: inside the network. The student of a pixel twin calls ``run`` between the twin's pure functions; a stock one
            is ``run`` itself, and has no reference.
        run: the network as accelerate prepared it.
    """
    if not is_lifted(type(transformer).__name__):
        return FlowModel(transformer, call=run), None

    def latent(**arguments: Any) -> Any:
        return run(reference=True, **arguments)

    def student(**arguments: Any) -> Any:
        return transformer.through(run, arguments)

    return FlowModel(transformer, call=student), FlowModel(transformer, call=latent, latent=True)
