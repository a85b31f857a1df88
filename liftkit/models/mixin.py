"""The pixel twin of a transformer: the stock forward between two pure functions.

``Asym<Stock>`` is a subclass of the stock class. Its forward scales the state by k, passes tau for the time, calls
the stock forward and recovers the velocity in float32 (:mod:`liftkit.models.velocity`). State-dict keys, LoRA, offloading,
checkpointing and compilation are the stock class's own; the only additions are the buffer ``lift.basis`` and, where the config
has one, a :mod:`detail head <liftkit.models.detail_head>`.

On disk the config keeps the *latent* channel counts beside ``lift_rank`` and ``lift_dim``: the stock class then
refuses the folder by a shape mismatch instead of making wrong images from it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from liftkit.asymflow import SIGMA_MIN, recover_velocity
from liftkit.lift import SCALES, Space
from liftkit.models.detail_head import HEAD, KEY, DetailHead, check_patch
from liftkit.models.spec import HOME, Architecture
from liftkit.models.velocity import lifted_forward

LIFT_KEYS = ("lift_rank", "lift_dim", "lift_scale")
SPACE = "lift_space"
"""Config entry: ``latent`` where the states of a model from nothing are a VAE's latents."""
ADDED_KEYS = (*LIFT_KEYS, KEY, SPACE)
"""Entries of the config that the stock class does not know."""


class LiftHead(nn.Module):
    """Holds A in the transformer's own token order, (D, r) float32, whatever dtype the rest is cast to."""

    basis: Tensor
    sigma_min: float = SIGMA_MIN
    """Floor of the divisions by sigma."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.zeros(dim, rank, dtype=torch.float32))

    def forward(self, u_cal: Tensor, x_t: Tensor, sigma: Tensor, scale: float) -> Tensor:
        """Tokens in, the full velocity out, in float32 even under autocast."""
        with torch.autocast(x_t.device.type, enabled=False):
            return recover_velocity(u_cal, x_t, sigma, self.basis, scale, self.sigma_min)

    def _apply(self, fn: Any, recurse: bool = True) -> LiftHead:
        kept = self.basis
        super()._apply(fn, recurse)
        if self.basis.dtype not in (torch.float32, torch.float64):
            self.basis = kept.to(self.basis.device)
        return self


class LoadsInFullPrecision:
    """A model of diffusers with modules that stay in float32.

    diffusers casts all others while it loads with ``low_cpu_mem_usage``, and refuses to load such a model without. The
    result is the same, so that a wish to do without is not passed on.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, low_cpu_mem_usage: bool | None = None, **kwargs: Any) -> Any:
        """See diffusers' ``ModelMixin.from_pretrained``."""
        return super().from_pretrained(*args, low_cpu_mem_usage=low_cpu_mem_usage or None, **kwargs)  # type: ignore[misc]


class AsymMixin(LoadsInFullPrecision):
    """What every Asym class adds to its stock class."""

    architecture: ClassVar[Architecture]
    _forward_names: ClassVar[tuple[str, ...]]
    lift: LiftHead
    detail_head: DetailHead | None
    config: Any
    _pixel: Any = None
    dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward's arguments and results; the output is the full velocity, in the state's dtype
        or float32, whichever is wider, with the stock class's sign."""
        arguments = dict(zip(self._forward_names, args), **kwargs)
        return self.through(self.stock_forward, arguments)

    def stock_forward(self, **arguments: Any) -> Any:
        """The network alone: calibrated state and time in, the asymmetric velocity out."""
        return super().forward(**arguments)  # type: ignore[misc]

    def through(self, call: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """This model's :func:`~liftkit.models.velocity.lifted_forward` with ``call`` for its network, such as a wrapped one."""
        config = self._pixel or self.config
        return lifted_forward(self.architecture, config, self.lift, self.dtype, call, arguments, self.detail_head)

    def to_json_string(self) -> str:
        """The config as it is stored: with latent channel counts, so that the stock class refuses it."""
        with self.latent_config():
            return super().to_json_string()  # type: ignore[misc]

    @contextmanager
    def latent_config(self) -> Iterator[None]:
        """Within the block ``config`` has the channel counts of the latent model that this one was."""
        pixel = self._internal_dict  # type: ignore[has-type]
        self._internal_dict = type(pixel)(channels_for(self.architecture, dict(pixel), latent=True))
        self._pixel = pixel  # for calls within the block
        try:
            yield
        finally:
            self._internal_dict, self._pixel = pixel, None


def channels_for(spec: Architecture, config: dict[str, Any], *, latent: bool) -> dict[str, Any]:
    """A config with its channel counts as the latent or as the pixel model has them.

    Args:
        config: with ``lift_rank`` and ``lift_dim``; its channels may be either.

    Raises:
        ValueError: if the channels are neither.
    """
    rank, dim = config["lift_rank"], config["lift_dim"]
    size, area = spec.token_size(config), spec.cell(config) ** 2
    # A model that was made from nothing may have a rank that no channels give: it is stored with other counts than its own.
    channels = max(rank // area, 1)
    if size not in (channels * area, dim):
        raise ValueError(
            f"{spec.lifted_name}: a token of {size} numbers is neither the latent {rank} nor the pixel {dim} of its lift"
        )
    wanted = channels if latent else dim // area
    present = [key for key in spec.channel_keys if config.get(key) is not None]
    scaled = {key: spec.scaled(config[key], size // area, wanted) for key in present}
    return {**config, **scaled}


def make_class(spec: Architecture) -> type:
    """The Asym class: stock signature plus ``lift_rank``, ``lift_dim``, ``lift_scale``, ``lift_head``, ``lift_space``."""
    import diffusers
    from diffusers.loaders import PeftAdapterMixin

    stock = getattr(diffusers, spec.name)
    bases = (AsymMixin, stock) if issubclass(stock, PeftAdapterMixin) else (AsymMixin, PeftAdapterMixin, stock)

    def __init__(
        self: Any,
        *args: Any,
        lift_rank: int,
        lift_dim: int,
        lift_scale: float,
        lift_head: Mapping[str, int] | None = None,
        lift_space: str = "pixel",
        **kwargs: Any,
    ) -> None:
        number = isinstance(lift_scale, int | float) and not isinstance(lift_scale, bool)
        if not number or not SCALES[0] <= lift_scale <= SCALES[1]:
            raise ValueError(f"lift_scale is {lift_scale!r}, expected a number from {SCALES[0]:g} to {SCALES[1]:g}")
        config = inspect.signature(stock.__init__).bind(self, *args, **kwargs)
        config.apply_defaults()
        names = {key: value for key, value in config.arguments.items() if key != "self"}
        added = {"lift_rank": lift_rank, "lift_dim": lift_dim, "lift_scale": lift_scale}
        pixel = channels_for(spec, {**names, **added}, latent=False)
        stock.__init__(self, **{key: pixel[key] for key in names})
        if lift_space not in get_args(Space):
            raise ValueError(f"lift_space is {lift_space!r}, expected {' or '.join(get_args(Space))}")
        self.register_to_config(**added, lift_head=lift_head, lift_space=lift_space)
        self.lift = LiftHead(lift_dim, lift_rank)
        self.detail_head = None
        if lift_head is not None:
            check_patch(isqrt(lift_dim // 3))
            self.detail_head = DetailHead(**lift_head)

    parameters = list(inspect.signature(stock.__init__).parameters.values())
    for name, annotation in zip(LIFT_KEYS, (int, int, float)):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
    parameters.append(inspect.Parameter(KEY, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=dict | None))
    parameters.append(inspect.Parameter(SPACE, inspect.Parameter.KEYWORD_ONLY, default="pixel", annotation=str))
    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    # Each class has a forward of its own, wrapped, because callers read its signature.
    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return AsymMixin.forward(self, *args, **kwargs)

    in_full_precision = [*(stock._keep_in_fp32_modules or []), "lift", HEAD]
    uncast = [*(stock._skip_layerwise_casting_patterns or []), "lift", HEAD, *(p.path for p, _ in spec.projections)]
    return type(
        spec.lifted_name,
        bases,
        {
            "__module__": HOME,
            "__doc__": f"The pixel twin of ``{spec.name}``: see :mod:`liftkit.models.mixin`.",
            "__init__": __init__,
            "forward": forward,
            "architecture": spec,
            "_forward_names": tuple(inspect.signature(stock.forward).parameters)[1:],
            "_keep_in_fp32_modules": in_full_precision,
            "_skip_layerwise_casting_patterns": uncast,
        },
    )
