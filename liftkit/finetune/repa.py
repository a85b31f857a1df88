"""REPA: hidden tokens are drawn toward what DINOv2 sees in the clean picture (Yu et al. 2024, arXiv 2410.06940).

A small MLP, which learns beside the network and is not kept, maps the tokens to DINOv2's; the term is one minus their cosine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liftkit.checkpoint.files import expanded, reason
from liftkit.errors import UsageError

PROJECTOR = "repa"
"""Name of the MLP within the transformer under training."""
HIDDEN = 2048
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_encoder(name: str) -> Any:
    """DINOv2, frozen, in float32.

    Args:
        name: a folder that transformers reads, or a Hub id; without a network the Hub's cache serves.

    Raises:
        UsageError: if its weights are not there, or it is another network.
    """
    from transformers import AutoModel

    where = str(expanded(name)) if expanded(name).is_dir() else name
    try:
        model = AutoModel.from_pretrained(where, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"objective.repa_encoder: {name}: its weights are not here and the Hub did not give them ({reason(error)[:200]}); "
            "fetch them first (hf download facebook/dinov2-base), name a folder, or set objective.repa to 0"
        ) from error
    if not str(model.config.model_type).startswith("dinov2"):
        raise UsageError(f"objective.repa_encoder: {name}: is a {model.config.model_type}; expected a DINOv2")
    return model.eval().requires_grad_(False)


def attach(transformer: Any, size: int, seed: int) -> None:
    """Give a transformer the MLP that learns beside it.

    Args:
        transformer: with blocks in ``transformer_blocks`` and a width, as JiT.
        size: numbers of a token of the encoder.
        seed: of the weights.

    Raises:
        UsageError: if it is another network.
    """
    if not hasattr(transformer, "class_embed"):
        raise UsageError(f"objective.repa: {type(transformer).__name__}: REPA is for JiT alone; set it to 0")
    width = transformer.class_embed.embedding_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, size)
    transformer.add_module(PROJECTOR, nn.Sequential(*layers))


class Repa:
    """The term of one run.

    Args:
        transformer: that :func:`attach` was called with.
        encoder: see :func:`load_encoder`.
        block: after how many blocks the tokens are taken.

    Raises:
        UsageError: if it has fewer blocks.
    """

    def __init__(self, transformer: Any, encoder: Any, block: int) -> None:
        blocks = transformer.transformer_blocks
        if block > len(blocks):
            raise UsageError(f"objective.repa_block: {block}: the network has {len(blocks)} blocks")
        self.transformer, self.encoder = transformer, encoder
        self.tokens: Tensor | None = None
        blocks[block - 1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: Any, tokens: Tensor) -> None:  # noqa: ARG002
        # A checkpointed block runs again in the backward pass, when nobody asks any more.
        self.tokens = tokens

    def __call__(self, images: Tensor) -> Tensor:
        """1 - cosine, () in [0, 2], of the tokens of the last forward.

        Args:
            images: clean sRGB (B, 3, H, W) in [-1, 1].
        """
        assert self.tokens is not None
        tokens, self.tokens = self.tokens, None
        patch = self.transformer.config.patch_size
        rows, columns = (side // patch for side in images.shape[-2:])
        seen = self.features(images, rows, columns)
        found = getattr(self.transformer, PROJECTOR)(tokens[:, -rows * columns :])
        return 1.0 - F.cosine_similarity(found.float(), seen.float(), dim=-1).mean()

    @torch.no_grad()
    def features(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """The encoder's patch tokens, (B, rows * columns, size), of pictures resized so that each token has one of its patches."""
        patch = self.encoder.config.patch_size
        self.encoder.to(images.device)
        mean, std = (torch.tensor(each, device=images.device).view(1, 3, 1, 1) for each in (MEAN, STD))
        size = (rows * patch, columns * patch)
        resized = F.interpolate((images.float() + 1.0) / 2.0, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        states = self.encoder(pixel_values=(resized - mean) / std).last_hidden_state
        return states[:, -rows * columns :]


def without_projector(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was learned, without the MLP that only training needs."""
    return {name: value for name, value in values.items() if not name.startswith(f"{PROJECTOR}.")}
