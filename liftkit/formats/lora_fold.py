"""Changes of a module, whatever a trainer made them of, as one pair B A of the same product.

| kind | change of the weight |
|---|---|
| LoRA | s B A |
| LoHa | s (w1_a w1_b) * (w2_a w2_b), element by element |
| LoKr | s kron(w1, w2), either one whole or w_a w_b |
| difference | diff |

with s = alpha / rank. Products of sums have exact factors: row i, column j of a LoHa is
sum_mn w1_a[i,m] w2_a[i,n] w1_b[m,j] w2_b[n,j], and kron(PQ, RS) = kron(P, R) kron(Q, S). A matrix without factors is itself
times the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liftkit.checkpoint.contents import ALPHA, B_BIAS, DIFF, DIFF_B, MAGNITUDE, A, B
from liftkit.checkpoint.header import shown
from liftkit.errors import UsageError
from liftkit.formats.lora_names import Place

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@dataclass(frozen=True)
class Change:
    """What is added to one matrix of a file.

    Args:
        up: B (rows, rank), with the strength in it; where ``down`` is None the whole change (rows, columns).
        down: A (rank, columns).
        bias: added to the bias (rows,).
        magnitude: of a DoRA (rows,).
    """

    up: Tensor
    down: Tensor | None
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    def at(self, place: Place, sizes: list[int]) -> Change:
        """The rows of one of the modules that share the matrix, which have ``sizes`` rows; less what these rows take nothing of."""
        rest = {
            name: place.rows(tensor, sizes)
            for name, tensor in (("bias", self.bias), ("magnitude", self.magnitude))
            if tensor is not None
        }
        up, down = place.rows(self.up, sizes), self.down
        used = up.any(dim=0)
        if down is not None and used.any():
            up, down = up[:, used], down[used]
        return replace(self, up=up, down=down, **rest)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (rank, columns) and B (rows, rank)."""
        if self.down is not None:
            return self.down, self.up
        rows, columns = self.up.shape
        if rows < columns:
            return self.up, torch.eye(rows, dtype=self.up.dtype)
        return torch.eye(columns, dtype=self.up.dtype), self.up


def folded(stem: str, parts: Mapping[str, Tensor], strength: Callable[[int | None], float]) -> Change:
    """The change that the parts of a module make together.

    Args:
        stem: what the file calls the module.
        parts: by the names of :func:`liftkit.checkpoint.contents.part_of`.
        strength: s where no alpha is among the parts, by rank (None for LoKr without factors).

    Raises:
        UsageError: if a part is missing, too many, of another shape, not finite or no matrix of numbers.
    """
    where = f"module {shown(stem)}"
    alpha = _alpha(where, parts.get(ALPHA))
    plain = {name: _numbers(where, name, tensor) for name, tensor in parts.items() if name != ALPHA}
    makers = {"LoRA": (A, B, B_BIAS), "LoHa": _LOHA, "LoKr": _LOKR, "difference": (DIFF,)}
    found = [kind for kind, names in makers.items() if plain.keys() & set(names)]
    if len(found) > 1:
        raise UsageError(f"{where}: both {found[0]} and {found[1]}; which of them is meant?")
    if not found:
        return _bias_alone(where, plain)
    if found[0] == "LoRA":
        change = _lora(where, plain, lambda rank: strength(rank) if alpha is None else alpha / rank)
    elif found[0] == "difference":
        change = Change(_matrix(where, plain, DIFF), None)
    else:
        make = _loha if found[0] == "LoHa" else _lokr
        change = make(where, plain, alpha, strength)
    return _with_rest(where, change, plain, _product_scale(alpha, change, strength) if B_BIAS in plain else 1.0)


def _lora(where: str, parts: Mapping[str, Tensor], strength: Callable[[int], float]) -> Change:
    for here, there in ((A, B), (B, A)):
        if there not in parts:
            raise UsageError(f"{where}: tensor {here} has no {there} beside it; is the file complete?")
    down, up = _matrix(where, parts, A), _matrix(where, parts, B)
    if down.shape[0] != up.shape[1] or not down.shape[0]:
        raise UsageError(
            f"{where}: {A} of shape {tuple(parts[A].shape)} does not go with {B}, {tuple(parts[B].shape)}: "
            "their ranks differ or are 0"
        )
    return _scaled(down, up, strength(len(down)))


def _loha(
    where: str, parts: Mapping[str, Tensor], alpha: float | None, strength: Callable[[int | None], float]
) -> Change:
    missing = next((name for name in _LOHA if name not in parts), None)
    if missing:
        raise UsageError(f"{where}: a LoHa without {missing}; is the file complete?")
    a1, b1, a2, b2 = (_matrix(where, parts, name).double() for name in _LOHA)
    agree = a1.shape[1] == len(b1) and a2.shape[1] == len(b2) and len(a1) == len(a2) and b1.shape[1] == b2.shape[1]
    if not agree or not len(b1) or not len(b2):
        raise UsageError(f"{where}: the four matrices of its LoHa do not go together: {_shapes(parts, _LOHA)}")
    scale = strength(len(b1)) if alpha is None else alpha / len(b1)
    if len(b1) * len(b2) >= min(len(a1), b1.shape[1]):
        return Change((scale * (a1 @ b1) * (a2 @ b2)).float(), None)
    up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
    down = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
    return Change((scale * up).float(), down.float())


def _lokr(
    where: str, parts: Mapping[str, Tensor], alpha: float | None, strength: Callable[[int | None], float]
) -> Change:
    sides, ranks = [], []
    for whole in ("lokr_w1", "lokr_w2"):
        first, second = f"{whole}_a", f"{whole}_b"
        if (whole in parts) == (first in parts) or (first in parts) != (second in parts):
            raise UsageError(f"{where}: a LoKr has {whole}, or {first} and {second}; is the file complete?")
        factors = [_matrix(where, parts, name).double() for name in ((whole,) if whole in parts else (first, second))]
        if len(factors) == 2 and (factors[0].shape[1] != len(factors[1]) or not len(factors[1])):
            raise UsageError(f"{where}: the matrices of its LoKr do not go together: {_shapes(parts, _LOKR)}")
        ranks += [len(factors[1])] if len(factors) == 2 else []
        sides.append(factors)
    # Readers take the rank of the second factor where both have one, and leave alpha alone where neither has.
    rank = ranks[-1] if ranks else None
    if alpha is None:
        scale = strength(rank)
    else:
        scale = alpha / rank if rank else 1.0
    (one, two), narrow = sides, [_narrow(factors) for factors in sides]
    rows, columns = (math.prod(factors[end].shape[axis] for factors in sides) for end, axis in ((0, 0), (-1, 1)))
    if math.prod(up.shape[1] for up, _ in narrow) < min(rows, columns):
        (up1, down1), (up2, down2) = narrow
        return Change((scale * torch.kron(up1, up2)).float(), torch.kron(down1, down2).float())
    whole1, whole2 = (factors[0] @ factors[1] if len(factors) == 2 else factors[0] for factors in (one, two))
    return Change((scale * torch.kron(whole1, whole2)).float(), None)


def _narrow(factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A factor of a LoKr as a product through as few numbers as is plain to see."""
    if len(factors) == 2 and len(factors[1]) < min(len(factors[0]), factors[1].shape[1]):
        return factors[0], factors[1]
    whole = factors[0] @ factors[1] if len(factors) == 2 else factors[0]
    rows, columns = whole.shape
    one = torch.eye(min(rows, columns), dtype=whole.dtype)
    return (one, whole) if rows < columns else (whole, one)


def _scaled(down: Tensor, up: Tensor, scale: float) -> Change:
    """The strength goes into B; where that would round, both are kept in float32."""
    exact = up.double() * scale
    if not torch.equal(exact.to(up.dtype).double(), exact):
        wide = torch.promote_types(up.dtype, torch.float32)
        return Change(exact.to(wide), down.to(wide))
    return Change(exact.to(up.dtype), down)


def _bias_alone(where: str, parts: Mapping[str, Tensor]) -> Change:
    if parts.keys() != {DIFF_B}:
        what = next(iter(parts), None)
        raise UsageError(f"{where}: {what or ALPHA} has no LoRA beside it; is the file complete?")
    raise UsageError(f"{where}: a difference of a bias alone, which a LoRA file cannot hold; leave the module out")


def _product_scale(alpha: float | None, change: Change, strength: Callable[[int | None], float]) -> float:
    rank = None if change.down is None else len(change.down)
    return strength(rank) if alpha is None else alpha / (rank or 1)


def _with_rest(where: str, change: Change, parts: Mapping[str, Tensor], scale: float) -> Change:
    """Bias and magnitude, each as many numbers as there are rows."""
    bias = None
    for name in (B_BIAS, DIFF_B):
        if name in parts:
            # peft multiplies the bias of B as it does B; a difference of a bias stands for itself.
            value = parts[name].flatten().double() * (scale if name == B_BIAS else 1.0)
            bias = value if bias is None else bias + value
            _check_rows(where, name, parts[name], change)
    magnitude = parts.get(MAGNITUDE)
    if magnitude is not None:
        if change.down is None:
            raise UsageError(f"{where}: a DoRA magnitude beside another kind than LoRA, which no LoRA file can hold")
        _check_rows(where, MAGNITUDE, magnitude, change)
        magnitude = magnitude.flatten()
    return replace(change, bias=None if bias is None else bias.to(change.up.dtype), magnitude=magnitude)


def _check_rows(where: str, name: str, tensor: Tensor, change: Change) -> None:
    if tensor.numel() != len(change.up) or tensor.shape[:1] != change.up.shape[:1]:
        hint = (
            ": a magnitude for each column, not for each row, is not what peft's DoRA is" if name == MAGNITUDE else ""
        )
        raise UsageError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {len(change.up)} numbers{hint}")


def _numbers(where: str, name: str, tensor: Tensor) -> Tensor:
    """Finite numbers that can be reckoned with; 8-bit floats become bfloat16, which holds them exactly."""
    if not tensor.is_floating_point():
        raise UsageError(
            f"{where}: {name} is of dtype {_dtype(tensor)}, no weights; liftkit reads floating-point LoRAs"
        )
    wide = tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor
    if wide.numel() and not all(bound.isfinite() for bound in wide.aminmax()):
        raise UsageError(f"{where}: {name} has numbers that are NaN or infinite; fetch the file again")
    return wide


def _alpha(where: str, tensor: Tensor | None) -> float | None:
    if tensor is None:
        return None
    if tensor.numel() != 1 or tensor.is_complex():
        raise UsageError(f"{where}: alpha should be one number, found {_dtype(tensor)} of shape {tuple(tensor.shape)}")
    value = float(tensor.double().item())
    if not math.isfinite(value) or value == 0:
        hint = ": some programs take that for off and others for the rank" if value == 0 else ""
        raise UsageError(f"{where}: alpha is {value:g}{hint}; save the LoRA with the alpha that is meant")
    return value


def _matrix(where: str, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """A part as a matrix; a convolution's kernel lies in its columns."""
    if parts[name].ndim < 2:
        what = (
            "a vector, such as a norm's or a bias', cannot be in a LoRA file" if name == DIFF else "expected a matrix"
        )
        raise UsageError(f"{where}: {name} has shape {tuple(parts[name].shape)}: {what}")
    return parts[name].flatten(1)


def _shapes(parts: Mapping[str, Tensor], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {tuple(parts[name].shape)}" for name in names if name in parts)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
