"""How a transformer's ``forward`` sees its state, and how a batch of images gets there and back."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Layout(Enum):
    """The shape of the argument that holds the state."""

    TOKENS = "tokens"
    """(B, N, r): packed by the pipeline."""
    IMAGE = "image"
    """(B, C, H, W)"""
    VIDEO = "video"
    """(B, C, F, H, W)"""
    ITEMS = "items"
    """(B, N, C, 1, H, W): images of one size, the noisy one last"""
    LIST = "list"
    """A list of (C, F, H, W), one for each sample; their sizes may differ."""
    CHANNELS_LAST = "channels_last"
    """(B, F, H, W, C)"""

    @property
    def channel_axis(self) -> int:
        """Of a state's tensor, with a batch dimension in front."""
        if self is Layout.ITEMS:
            return 2
        return -1 if self in (Layout.TOKENS, Layout.CHANNELS_LAST) else 1

    def wrap(self, images: Tensor) -> Any:
        """Images (B, C, H, W) as ``forward`` takes them; packing tokens is the caller's."""
        if self is Layout.VIDEO:
            return images.unsqueeze(2)
        if self is Layout.LIST:
            return list(images.unsqueeze(2))
        if self is Layout.ITEMS:
            return images[:, None, :, None]
        return images.permute(0, 2, 3, 1).unsqueeze(1) if self is Layout.CHANNELS_LAST else images

    def unwrap(self, state: Any) -> Tensor:
        """The inverse of :meth:`wrap`, for states of one frame."""
        if self is Layout.LIST:
            state = torch.stack(list(state))
        if self in (Layout.VIDEO, Layout.LIST):
            return state.squeeze(2)
        if self is Layout.ITEMS:
            return state[:, -1].squeeze(2)
        return state.squeeze(1).permute(0, 3, 1, 2) if self is Layout.CHANNELS_LAST else state

    def split(self, state: Any) -> list[Tensor]:
        """A state as images, channels second: one (F, C, H, W) for each sample, or (B, C, H, W) as it is."""
        if self in (Layout.VIDEO, Layout.LIST):
            return [each.transpose(0, 1) for each in state]
        if self is Layout.ITEMS:
            return [each.squeeze(2) for each in state]
        return [each.permute(0, 3, 1, 2) for each in state] if self is Layout.CHANNELS_LAST else [state]

    def join(self, parts: list[Tensor]) -> Any:
        """The inverse of :meth:`split`."""
        if self is Layout.LIST:
            return [each.transpose(0, 1) for each in parts]
        if self is Layout.VIDEO:
            return torch.stack([each.transpose(0, 1) for each in parts])
        if self is Layout.ITEMS:
            return torch.stack(parts).unsqueeze(3)
        return torch.stack([each.permute(0, 2, 3, 1) for each in parts]) if self is Layout.CHANNELS_LAST else parts[0]
