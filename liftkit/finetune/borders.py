"""The error that shows as a grid: how wrong an estimate's steps across the borders of patches are.

The network's last layer paints each patch alone. At high noise an estimate is smooth but for the steps between its patches. They
are small beside its error as a whole, so that a loss by pixels hardly sees them; guidance makes them larger, and a sampler
keeps them: at lower noise they are in the state, where the model takes them for part of the image. This term counts them alone::

    B = mean over neighbors i, j on both sides of a border of  (e_j - e_i)^2,    e = x_0 - xhat_0

Unlike the flow loss it has no 1 / sigma^2, so that it counts at high noise, where borders begin; with it, it costs detail at low
noise and wins less. Like the flow loss it is least where xhat_0 is the mean of all x_0 that a state may have come from.
"""

from __future__ import annotations

from torch import Tensor


def border_loss(error: Tensor, patch: int) -> Tensor:
    """B of the equation above, (); 0 for images of one patch.

    Args:
        error: ``x_0 - xhat_0``, (B, C, H, W), of sides that patches divide.
        patch: side of a patch, in pixels.
    """
    error = error.float()
    squares = [
        (each[..., patch::patch] - each[..., patch - 1 : -1 : patch]).square()
        for each in (error, error.transpose(-1, -2))
    ]
    total = squares[0].sum() + squares[1].sum()
    return total / max(sum(each.numel() for each in squares), 1)
