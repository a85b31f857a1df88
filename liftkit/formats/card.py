"""Model cards of what was imported or exported: the license of whatever it came from, what it is, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from liftkit.adapter import Adapter
from liftkit.checkpoint.card import front_matter, plain_name, source_header

_ASYMFLOW = "[Asymmetric Flow](https://arxiv.org/abs/2605.12964)"


def adapter_card(adapter: Adapter, sources: Sequence[Path]) -> str:
    """README.md of an adapter folder of ours.

    Args:
        adapter: with the name of its base.
        sources: folders whose cards may state a license; the first that does counts.
    """
    base = plain_name(adapter.base)
    body = f"""An {_ASYMFLOW} adapter for `{base}`: projections, output norm, lift and LoRA.

```python
import liftkit

pipe = liftkit.load_adapter("{base}", "path/to/this/folder")
```"""
    return _card(adapter, sources, "pixel adapter" if adapter.lift else "adapter", body)


def fused_card(adapter: Adapter, sources: Sequence[Path]) -> str:
    """README.md of a model folder with an adapter merged in; arguments as :func:`adapter_card`."""
    base = plain_name(adapter.base)
    what = f"A pixel flow model: `{base}` lifted by {_ASYMFLOW}" if adapter.lift else f"`{base}`"
    body = f"""{what}, with an adapter merged in.

```python
import liftkit
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
```"""
    return _card(adapter, sources, "with an adapter merged in", body)


def exported_card(adapter: Adapter, sources: Sequence[Path]) -> str:
    """README.md of an adapter in the authors' format; arguments as :func:`adapter_card`."""
    base = plain_name(adapter.base)
    body = f"""An {_ASYMFLOW} adapter for `{base}` in the format of the paper's authors: load it with their pipeline, or
turn it into a diffusers folder with `liftkit import this-folder --base {base} -o OUT`."""
    return _card(adapter, sources, "pixel adapter", body)


def _card(adapter: Adapter, sources: Sequence[Path], title: str, body: str) -> str:
    stated = next(filter(None, (source_header(folder / "README.md") for folder in sources)), {})
    base = plain_name(adapter.base)
    header = {**stated, "base_model": base} if base.count("/") == 1 else stated
    stated_terms = f"License: {stated.get('license_name', stated['license'])}. " if "license" in stated else ""
    return f"""{front_matter(header)}
# {base.rsplit("/", 1)[-1]}, {title}

{body}

`liftkit.json` holds provenance. {stated_terms}The license and terms of `{base}` apply.
"""
