"""The surgery (Sec. 5.1): ``W_in' = W_in A^T`` and ``W_out' = A W_out``; nothing else in the network changes.

Products are made in float64, on the CPU because not every device has it, and rounded once. Weights hold a patch in
the architecture's own order, and the pixel model sees its pixels folded, so A is permuted to meet them
(:func:`liftkit.tokens.token_order`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.models.detail_head import HEAD
from liftkit.models.layout import Layout
from liftkit.models.registry import architecture, lifted_class
from liftkit.models.spec import LIFTED, Architecture, Blocks, Config, Projection, counts
from liftkit.tokens import TokenOrder, token_order

BASIS = "lift.basis"
ROWS = 256
"""Features whose products are made at once."""


def native_basis(lift: Lift, order: TokenOrder) -> Tensor:
    """A with rows and columns in the order of a projection that flattens patches as ``order``, (D, r) float64, CPU."""
    rows = token_order(3, lift.latent_patch, order, fold=lift.fold)
    columns = token_order(lift.latent_channels, lift.latent_patch, order)
    return lift.basis.cpu().double()[rows][:, columns]


def free_basis(lift: Lift, spec: Architecture, config: Config) -> Tensor:
    """A of a model that was made from nothing, rows in the order in which its velocity is recovered: a free lift knows no latent
    patch, so that the network's own says how a token is cut."""
    cell = spec.latent_patch(config)
    return lift.basis[token_order(lift.channels, cell, spec.state_order, fold=lift.patch_size // cell)]


def lift_input(weight: Tensor, basis: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``W_in A^T``: a Linear (hidden, r) or a convolution (hidden, C, [1,] p, p) to pixel tokens; rounded once, to
    ``dtype`` or its own."""
    flat, right = weight.flatten(1).cpu(), basis.cpu().T
    product = torch.empty(flat.shape[0], right.shape[1], dtype=dtype or weight.dtype)
    # Block by block: in float64 the whole would take several times what it becomes.
    for block, result in zip(flat.split(ROWS), product.split(ROWS)):
        result.copy_(block.double() @ right)
    return product.reshape(weight.shape[0], -1, *weight.shape[2:]).to(weight.device)


def lift_output(weight: Tensor, basis: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``A W_out`` (or ``A b_out``): the rows of a weight (r, hidden) or bias (r,) to pixel tokens; rounded once, to
    ``dtype`` or its own."""
    columns, left = weight.cpu().reshape(weight.shape[0], -1), basis.cpu()
    product = torch.empty(left.shape[0], columns.shape[1], dtype=dtype or weight.dtype)
    for block, result in zip(columns.split(ROWS, 1), product.split(ROWS, 1)):
        result.copy_(left @ block.double())
    return product.reshape(-1, *weight.shape[1:]).to(weight.device)


@dataclass(frozen=True)
class RawChannels:
    """Where the raw channels of a projection's tensors are, and which of them a lift replaces.

    Args:
        spec: the architecture.
        projection: one of its own.
        side: on which side of the network it is.
        latent_patch: side of a token's patch, in latents.
    """

    spec: Architecture
    projection: Projection
    side: str
    latent_patch: int

    @property
    def _area(self) -> int:
        """Elements of one channel in a raw token, as the projection sees it."""
        return 1 if self.spec.layout is Layout.TOKENS else self.latent_patch**2

    def width(self, shape: Sequence[int]) -> int:
        """Raw numbers per token of a weight (or of a bias or LoRA factor) of this shape."""
        return prod(shape[1:]) if self.side == "input" else shape[0]

    def blocks(self, width: int, size: int) -> Blocks:
        """What ``width`` raw numbers consist of, where a lifted block has ``size``: numbers, or LIFTED."""
        area = self._area
        found = self.projection.blocks(width // area, size // area)
        return tuple(each if each == LIFTED else each * area for each in found)

    def expected(self, width: int, size: int) -> int:
        """What ``width`` has to be."""
        return sum(counts(self.blocks(width, size), size))

    def reshaped(self, shape: Sequence[int], size: int, wanted: int) -> tuple[int, ...]:
        """A tensor's shape after its lifted blocks of ``size`` numbers have become blocks of ``wanted``."""
        width = self.width(shape)
        after = sum(counts(self.blocks(width, size), wanted))
        axis = 1 if self.side == "input" else 0
        return tuple(after * n // width if i == axis else n for i, n in enumerate(shape))

    def places(self, width: int, size: int) -> list[Tensor]:
        """Indices of each block among ``width`` raw numbers, in the projection's own order."""
        side = 1 if self._area == 1 else self.latent_patch
        rows = torch.arange(width).reshape(-1, side, side)
        if self.projection.order == "pqc":
            rows = torch.arange(width).reshape(side, side, -1).permute(2, 0, 1)
        sizes = [each // self._area for each in counts(self.blocks(width, size), size)]
        back = (1, 2, 0) if self.projection.order == "pqc" else (0, 1, 2)
        return [block.permute(back).flatten() for block in rows.split(sizes)]

    def lift(self, tensor: Tensor, lift: Lift, dtype: torch.dtype | None = None) -> Tensor:
        """A weight, an output's bias or a LoRA factor for pixel tokens: lifted blocks by A, others as they are; rounded once."""
        basis = native_basis(lift, self.projection.order)
        apply = lift_input if self.side == "input" else lift_output
        width = self.width(tensor.shape)
        blocks = self.blocks(width, lift.rank)
        if len(blocks) == 1:
            return apply(tensor, basis, dtype)
        shape = self.reshaped(tensor.shape, lift.rank, lift.dim)
        flat = tensor.flatten(1).T if self.side == "input" else tensor.reshape(width, -1)
        result = flat.new_empty(self.width(shape), flat.shape[1], dtype=dtype or tensor.dtype)
        for block, old, new in zip(blocks, self.places(width, lift.rank), self.places(len(result), lift.dim)):
            rows = flat[old]
            if block == LIFTED:
                rows = lift_input(rows.T, basis, dtype).T if self.side == "input" else lift_output(rows, basis, dtype)
            result[new] = rows.to(result.dtype)
        return (result.T if self.side == "input" else result).reshape(shape)


def check_lift(spec: Architecture, config: Config, factor: int, lift: Lift) -> None:
    """Raise unless a lift fits a transformer and its VAE, and the transformer can be lifted at all.

    Args:
        spec: the architecture.
        config: of the latent transformer.
        factor: the VAE's downsampling factor.

    Raises:
        UsageError: naming the numbers that disagree.
    """
    check_liftable(spec, config)
    if lift.space == "latent":
        raise UsageError(
            "the lift is a subspace of latents, for a model from nothing (liftkit init --vae ... --subspace ...); a conversion "
            "needs one of pixels: liftkit fit MODEL --images ..."
        )
    patch = spec.latent_patch(config)
    found = {"rank": lift.rank, "latent patch": lift.latent_patch, "pixel patch": lift.patch_size}
    wanted = {"rank": spec.token_size(config), "latent patch": patch, "pixel patch": factor * patch}
    wrong = [f"{key} {found[key]}, the model needs {wanted[key]}" for key in wanted if found[key] != wanted[key]]
    if wrong:
        raise UsageError(f"the lift does not fit {spec.name}: " + "; ".join(wrong) + "; fit one on this model")


def check_liftable(spec: Architecture, config: Config) -> None:
    """Raise unless models of this config can be lifted.

    Raises:
        UsageError: with the reason.
    """
    reason = spec.refuse(config)
    if reason is not None:
        raise UsageError(f"{spec.name}: {reason}")


def lifted_tensors(
    spec: Architecture,
    read: Callable[[str], Tensor | None],
    lift: Lift,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """The tensors that a conversion rewrites or adds, by name, on the CPU.

    Args:
        read: the source's tensor of a name, or None where there is none (a projection without bias).
        lift: fits the model (see :func:`check_lift`).
        dtype: of the result, for all or by name; None takes each source tensor's own. The basis is float32 beside
            anything narrower.

    Raises:
        UsageError: if a projection's weight is missing, has an unexpected shape or numbers that are not finite.
    """
    result = {}
    for projection, side in spec.projections:
        raw = RawChannels(spec, projection, side, lift.latent_patch)
        name = f"{projection.path}.weight"
        weight = read(name)
        check_width(name, None if weight is None else tuple(weight.shape), raw, lift.rank)
        assert weight is not None
        result[name] = _rounded(name, raw, weight, lift, _dtype(name, weight, dtype))
        name = f"{projection.path}.bias"
        bias = read(name)
        if side == "output" and bias is not None:
            result[name] = _rounded(name, raw, bias, lift, _dtype(name, bias, dtype))
    basis = native_basis(lift, spec.state_order)
    result[BASIS] = basis if result[f"{spec.inputs[0].path}.weight"].dtype == torch.float64 else basis.float()
    return result


def lifted_names(spec: Architecture) -> set[str]:
    """Names of the tensors that a conversion rewrites or adds; an output may have no bias."""
    weights = {f"{projection.path}.weight" for projection, _ in spec.projections}
    return weights | {f"{projection.path}.bias" for projection in spec.outputs} | {BASIS}


def check_width(name: str, shape: tuple[int, ...] | None, raw: RawChannels, rank: int, where: object = "") -> None:
    """Raise unless a projection's weight takes or gives tokens of r numbers, and what else its blocks hold.

    Raises:
        UsageError: naming the tensor, its shape and ``where`` it stands.
    """
    width = None if not shape or len(shape) < 2 else raw.width(shape)
    expected = rank if width is None else raw.expected(width, rank)
    if width != expected:
        found = "it is missing" if shape is None else f"found {width} (shape {shape})"
        place = f"{where}: " if where else ""
        raise UsageError(f"{place}tensor {name}: expected {expected} numbers per token, {found}")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, in one pass and without a mask."""
    return not tensor.numel() or all(bound.isfinite().item() for bound in tensor.aminmax())


def check_finite(name: str, tensor: Tensor, where: object = "") -> None:
    """Raise unless a projection's numbers are all finite: one that is not would spoil every pixel.

    Raises:
        UsageError: naming the tensor, how many are not, and ``where`` it stands.
    """
    if not is_finite(tensor):
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        place = f"{where}: " if where else ""
        raise UsageError(
            f"{place}tensor {name!r}: {wrong} of {tensor.numel()} numbers are NaN or infinite; fetch the file again"
        )


def _rounded(name: str, raw: RawChannels, tensor: Tensor, lift: Lift, dtype: torch.dtype) -> Tensor:
    """A product in float64, rounded to ``dtype``; on the CPU."""
    check_finite(name, tensor)
    rounded = raw.lift(tensor.cpu(), lift, dtype)
    if not is_finite(rounded):
        raise UsageError(
            f"tensor {name!r}: source times lift is more than {str(rounded.dtype).removeprefix('torch.')} can hold; "
            "choose bfloat16 or float32"
        )
    return rounded


def _dtype(name: str, tensor: Tensor, wanted: torch.dtype | Mapping[str, torch.dtype] | None) -> torch.dtype:
    found = wanted.get(name) if isinstance(wanted, Mapping) else wanted
    return found or tensor.dtype


def lifted_config(spec: Architecture, config: Config, lift: Lift) -> dict[str, Any]:
    """The config of the pixel twin as it is stored: latent channels, plus what the lift adds."""
    added = {"lift_rank": lift.rank, "lift_dim": lift.dim, "lift_scale": lift.scale}
    return {**config, **spec.config(config), "_class_name": spec.lifted_name, **added}


def convert_transformer(transformer: Any, lift: Lift) -> Any:
    """A stock diffusers transformer in memory to its Asym twin.

    Args:
        transformer: of a supported class; it is left as it is, and its unchanged weights are shared, not copied.
        lift: fitted to its latents.

    Returns:
        The Asym model, in the same dtype and mode.

    Raises:
        UsageError: if the class is not supported or the lift does not fit.
    """
    from accelerate import init_empty_weights

    spec = architecture(type(transformer).__name__)
    check_lift(spec, transformer.config, lift.fold, lift)
    state: Mapping[str, Tensor] = transformer.state_dict()
    with init_empty_weights(include_buffers=False):
        twin = lifted_class(spec).from_config(lifted_config(spec, dict(transformer.config), lift))
    twin.load_state_dict({**state, **lifted_tensors(spec, state.get, lift)}, strict=True, assign=True)
    # What a state dict does not hold (rotary tables and the like) follows the source's device.
    return twin.to(transformer.device).train(transformer.training)


def held_in_full(spec: Architecture, names: Iterable[str]) -> list[str]:
    """The tensors of a transformer that an adapter holds in full: of the projections, the output norm and a detail head."""
    modules = (*(projection.path for projection, _ in spec.projections), *spec.reference, HEAD)
    paths = tuple(f"{path}." for path in modules)
    return [name for name in names if name.startswith(paths)]
