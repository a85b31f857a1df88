"""Model cards of what was imported or exported: the license of whatever it came from, what it is, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from liftkit.checkpoint.card import plain_name
from liftkit.conversion.card import ASYMFLOW, card_of
from liftkit.models.adapter import Adapter


def fused_card(adapter: Adapter, sources: Sequence[Path]) -> str:
    """README.md of a model folder with an adapter merged in; arguments as :func:`~liftkit.conversion.card.adapter_card`."""
    base = plain_name(adapter.base)
    what = f"A pixel flow model: `{base}` lifted by {ASYMFLOW}" if adapter.lift else f"`{base}`"
    body = f"""{what}, with an adapter merged in.

```python
import liftkit
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
```"""
    return card_of(adapter, sources, "with an adapter merged in", body)


def exported_card(adapter: Adapter, sources: Sequence[Path]) -> str:
    """README.md of an adapter in the authors' format; arguments as :func:`~liftkit.conversion.card.adapter_card`."""
    base = plain_name(adapter.base)
    body = f"""An {ASYMFLOW} adapter for `{base}` in the format of the paper's authors: load it with their pipeline, or
turn it into a diffusers folder with `liftkit import this-folder --base {base} -o OUT`."""
    return card_of(adapter, sources, "pixel adapter", body)
