"""The error that shows as a grid: how wrong an estimate's steps across the borders of patches are.

The network's last layer paints each patch alone. At high noise an estimate is smooth but for the steps between its patches. They
are small beside its error as a whole, so that a loss by pixels hardly sees them; guidance makes them larger, and a sampler
keeps them: at lower noise they are in the state, where the model takes them for part of the image. This term counts them alone, at
every noise level, with the weight that the flow loss gives an error in x_0::

    B = mean over neighbors i, j on both sides of a border of  (e_j - e_i)^2 / max(sigma, floor)^2,    e = x_0 - xhat_0

Like the flow loss it is least where xhat_0 is the mean of all x_0 that a state may have come from: it wants no other result.
"""

from __future__ import annotations

from torch import Tensor


def border_loss(error: Tensor, sigma: Tensor, patch: int, sigma_floor: float) -> Tensor:
    """B of the equation above, (); 0 for an image of one patch.

    Args:
        error: ``x_0 - xhat_0``, (B, C, H, W), of sides that patches divide.
        sigma: (B,) noise levels in [0, 1].
        patch: side of a patch, in pixels.
        sigma_floor: least sigma that is divided by.
    """
    scaled = error.float() / sigma.float().clamp(min=sigma_floor).view(-1, 1, 1, 1)
    squares = [
        (side[..., patch::patch] - side[..., patch - 1 : -1 : patch]).square().flatten()
        for side in (scaled, scaled.transpose(-1, -2))
    ]
    pairs = sum(len(each) for each in squares)
    return sum((each.sum() for each in squares), scaled.new_zeros(())) / max(pairs, 1)
