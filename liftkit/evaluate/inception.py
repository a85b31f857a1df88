"""The Inception network of FID and KID: that of TensorFlow's archive of 2015-12-05, with the names of its PyTorch weights.

It is no torchvision network: its average pools leave padding out of their means, and its last block has a maximum instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liftkit.checkpoint.files import read_safetensors
from liftkit.checkpoint.header import read_header
from liftkit.errors import UsageError

SIDE = 299
"""Pixels of an image that it sees."""
STEM = 32
"""Channels of the first layer. All widths go with it, so that a test can take a small network."""
MEAN, MAXIMUM, HALVE = "mean", "maximum", "halve"
"""Pools: mean and maximum of 3 x 3 at every place, and maximum at every second one."""
# A block is a list of branches, whose results are joined. A branch is a sequence of pools and of convolutions (name, width,
# kernel, stride); a list of convolutions in it is a fork, whose ends are joined.
Step = str | tuple[Any, ...] | list[Any]
Branches = list[list[Step]]


def _block_a(pooled: int) -> Branches:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [MEAN, ("branch_pool", pooled, 1)],
    ]


def _block_c(width: int) -> Branches:
    row, column = (1, 7), (7, 1)
    long = [("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, column), ("branch7x7dbl_3", width, row)]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
        [*long, ("branch7x7dbl_4", width, column), ("branch7x7dbl_5", 192, row)],
        [MEAN, ("branch_pool", 192, 1)],
    ]


def _block_e(pool: str) -> Branches:
    def fork(name: str) -> list[tuple[Any, ...]]:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        [pool, ("branch_pool", 192, 1)],
    ]


BLOCK_B: Branches = [
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    [HALVE],
]
BLOCK_D: Branches = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2),
    ],
    [HALVE],
]
BLOCKS: dict[str, Branches] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": BLOCK_D,
    "Mixed_7b": _block_e(MEAN),
    "Mixed_7c": _block_e(MAXIMUM),
}


class Convolution(nn.Module):
    """A convolution with batch normalization, rectified."""

    def __init__(
        self, inputs: int, width: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if same and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, width, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H', W') >= 0."""
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches over the same input, joined by channels."""

    def __init__(self, inputs: int, branches: Branches) -> None:
        super().__init__()
        self.branches, self.width = branches, 0
        for branch in branches:
            width = inputs
            for step in branch:
                width = width if isinstance(step, str) else self._add(width, step)
            self.width += width

    def _add(self, inputs: int, step: Any) -> int:
        """Make the convolutions of a step; returns the channels that it gives."""
        if isinstance(step, list):
            return sum(self._add(inputs, each) for each in step)
        name, width, *shape = step
        self.add_module(name, Convolution(inputs, _scaled(width), *shape))
        return _scaled(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, width, H', W')."""
        results = []
        for branch in self.branches:
            result = x
            for step in branch:
                result = self._take(step, result)
            results.append(result)
        return torch.cat(results, dim=1)

    def _take(self, step: Any, x: Tensor) -> Tensor:
        if isinstance(step, list):
            return torch.cat([self._take(each, x) for each in step], dim=1)
        if step == MEAN:
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if isinstance(step, str):
            return F.max_pool2d(x, 3, stride=2) if step == HALVE else F.max_pool2d(x, 3, stride=1, padding=1)
        return self.get_submodule(step[0])(x)


class Inception(nn.Module):
    """From images (B, 3, 299, 299) in [-1, 1] to the features of its last pool, (B, 2048), >= 0."""

    def __init__(self) -> None:
        super().__init__()
        widths = [_scaled(width) for width in (32, 64, 80, 192)]
        self.Conv2d_1a_3x3 = Convolution(3, widths[0], 3, 2)
        self.Conv2d_2a_3x3 = Convolution(widths[0], widths[0], 3, same=False)
        self.Conv2d_2b_3x3 = Convolution(widths[0], widths[1], 3)
        self.Conv2d_3b_1x1 = Convolution(widths[1], widths[2], 1)
        self.Conv2d_4a_3x3 = Convolution(widths[2], widths[3], 3, same=False)
        width = widths[3]
        for name, branches in BLOCKS.items():
            block = Block(width, branches)
            self.add_module(name, block)
            width = block.width

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


def load_inception(path: Path) -> Inception:
    """The network with the weights of a file, in float32.

    Raises:
        UsageError: if a tensor is missing or has another shape, or the file is broken.
    """
    network = Inception()
    check_inception(path, network)
    network.load_state_dict(read_safetensors(path)[0], strict=False)
    return network.eval().requires_grad_(False)


def check_inception(path: Path, network: Inception | None = None) -> None:
    """Raise unless a file holds the network's tensors; its weights are not read.

    Raises:
        UsageError: naming the tensor.
    """
    found = {name: tuple(entry.shape) for name, entry in read_header(path).tensors.items()}
    for name, tensor in (network or Inception()).state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if found.get(name) != tuple(tensor.shape):
            what = f"{name} is {list(found[name])}" if name in found else f"{name} is missing"
            raise UsageError(
                f"{path}: not the Inception network of FID: {what}, expected {list(tensor.shape)}; convert "
                "pt_inception-2015-12-05-6726825d.pth again, as docs/compare.md shows"
            )


def _scaled(width: int) -> int:
    return width * STEM // 32
