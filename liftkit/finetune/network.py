"""The student and its frozen reference in one module: shared base weights, no second copy of the network.

The student is the pixel model with adapters and a few modules trained in full. The reference is the latent model that it
came from: a second view of the same blocks, adapters off, with the originals of those modules, in latent tokens, where it is as
large as it was.
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
from liftkit.errors import UsageError
from liftkit.finetune.objective import Velocity
from liftkit.lift import Lift
from liftkit.models.flow import FlowModel
from liftkit.models.mixin import ADDED_KEYS, channels_for
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


class LatentView:
    """The latent model that an Asym transformer came from, over the same blocks.

    The modules that contain an original, or that remember channels beside their weights, are the stock class's own; all others
    are the Asym transformer's, the same objects.

    Args:
        live: the Asym transformer.
        originals: the source's own modules by path.
    """

    def __init__(self, live: Any, originals: Mapping[str, nn.Module]) -> None:
        self.live, self.latent = live, _empty(live, latent=True)
        self.adapters = adapters_of(live)
        self.eights = [module for module in live.modules() if hasattr(module, "in_float8")]
        changed = (*originals, *_remembering(self.latent, _empty(live, latent=False)))
        self.own: list[tuple[nn.Module, nn.Module]] = []
        self._share(self.latent, live, "", {above for path in changed for above in _above(path)}, originals)

    def _share(
        self, ours: nn.Module, theirs: nn.Module, path: str, own: set[str], originals: Mapping[str, nn.Module]
    ) -> None:
        self.own.append((ours, theirs))
        for name, module in theirs.named_children():
            here = f"{path}.{name}" if path else name
            if here in originals:
                ours._modules[name] = originals[here]
            elif here in own:
                self._share(ours.get_submodule(name), module, here, own, originals)
            elif name in ours._modules:  # lift and detail head are not
                ours._modules[name] = module

    def model(self) -> Any:
        """The stock model, with the live model's own tensors: loading and sharding put new ones in the places of old ones."""
        for ours, theirs in self.own:
            ours.training = theirs.training
            ours._parameters.update({name: theirs._parameters[name] for name in ours._parameters})
            ours._buffers.update({name: theirs._buffers[name] for name in ours._buffers})
        return self.latent

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Adapters live in the shared blocks: they are off while the reference runs, and what has float8 products has them then."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        for layer in self.adapters:
            layer._disable_adapters = on
        for layer in self.eights:
            layer.in_float8 = on


def _empty(live: Any, *, latent: bool) -> Any:
    """A model of a twin's config without memory, as the latent or the pixel one."""
    import diffusers

    spec, config = live.architecture, dict(live.config)
    kind = getattr(diffusers, spec.name) if latent else type(live)
    channels = channels_for(spec, config, latent=latent)
    # Not accelerate's way to the meta device, which makes parameters of what may have no memory already.
    with torch.device("meta"):
        return kind.from_config({key: value for key, value in channels.items() if not (latent and key in ADDED_KEYS)})


def _remembering(latent: nn.Module, pixel: nn.Module) -> list[str]:
    """Paths of modules with an attribute, beside weights, that depends on the channels."""
    others = dict(pixel.named_modules())
    found = []
    for path, module in latent.named_modules():
        theirs = vars(others[path])
        plain = ((key, value) for key, value in vars(module).items() if _is_plain(value) and not key.startswith("_"))
        if any(theirs.get(key) != value for key, value in plain):
            found.append(path)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, int | float | str)


def _above(path: str) -> list[str]:
    """A path and all that contain it, the outermost (the model itself) first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


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

    On an H100 a compiled step at 1024 x 1024 once read memory that was not its own. Compiled so, on an H200, it does not. The backward
    pass of cuDNN's attention is particular about strides, which a compiler chooses; that it is the cause is a guess.

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


def adapters_of(model: nn.Module) -> list[Any]:
    """A network's layers with adapters of peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


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
