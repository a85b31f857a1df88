"""What a converted folder says about itself: the model card, the small pipeline file, the versions."""

from __future__ import annotations

from string import Template
from typing import TYPE_CHECKING

from liftkit.checkpoint.card import front_matter, plain_name, source_header
from liftkit.checkpoint.classes import pipeline_parts
from liftkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from liftkit.conversion.plan import Plan
    from liftkit.conversion.result import Conversion
    from liftkit.models.adapter import Adapter

ASYMFLOW = "[Asymmetric Flow](https://arxiv.org/abs/2605.12964)"
_PROVED = {
    "model": "both models",
    "projections": "the projections of both models (every other tensor is the source's, bit for bit)",
}
PIPELINE = Template('''\
"""Load with DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)."""

import diffusers
import liftkit  # noqa: F401  (teaches diffusers the pixel classes)


class $stock(diffusers.$stock):
    """The stock pipeline, by its own name so that what it saves loads again; its parts are liftkit's."""
''')
"""``pipeline.py``; ``stock`` is a name out of diffusers' own source."""


def pipeline_file(pipeline: str) -> str:
    """``pipeline.py``: lets a folder load by ``custom_pipeline`` where nobody imported liftkit.

    Raises:
        UsageError: if diffusers has no such pipeline; what a file says otherwise must not become code.
    """
    known = pipeline_parts(pipeline)
    if known is None:
        raise UsageError(f"{pipeline!r} is no pipeline of diffusers")
    return PIPELINE.substitute(stock=known[0])


def model_card(result: Conversion) -> str:
    """README.md of a converted folder."""
    plan, proof = result.plan, result.proof
    terms = source_header(plan.model.path / "README.md")
    source = plain_name(plan.model.name)
    header = {**terms, "base_model": source} if "/" in source else terms
    rows = "".join(f"| {label} | {value} |\n" for label, value in _rows(result))
    size = plan.model.image_size()
    return f"""{front_matter(header)}
# {source.rsplit("/", 1)[-1]}, lifted to pixels

A pixel flow model made from the latent flow model `{source}` by
[Asymmetric Flow](https://arxiv.org/abs/2605.12964): the input and output projections were rewritten, everything else
is the source's own. Untrained, it paints s A z of what its source would paint; finetuning mends color and fine detail.

```python
import liftkit
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe(prompt="a prompt", height={size}, width={size}{_text_length(plan)}).images[0]
```

| what | value |
|---|---|
{rows}
The proof ran {_PROVED[proof.kind]} from tied noise for {proof.steps} Euler steps on
{proof.tokens[0]} x {proof.tokens[1]} tokens; deviations are relative to the largest value. See `alignment.html` for pictures
and `liftkit.json` for provenance.

{_license_line(plan, terms)}
"""


def _rows(result: Conversion) -> list[tuple[str, str]]:
    lift, proof = result.lift, result.proof
    rows = [
        ("rank of the lift", f"{lift.rank} of {lift.dim}"),
        ("scale s", f"{lift.scale:.4f}"),
        ("pixel patch", f"{lift.patch_size} x {lift.patch_size}"),
        ("color", repr(lift.color)),
        ("largest deviation from the source, full precision", f"{proof.exact:.1e}"),
        (f"largest deviation from the source, stored as {proof.dtype}", f"{proof.stored:.1e}"),
    ]
    alignment = lift.figures.get("alignment")
    if not alignment:
        return rows
    value = {name: entry["value"] for name, entry in alignment["figures"].items()}
    return [
        *rows,
        ("pixel energy captured (best subspace)", f"{value['energy_captured']:.4f} ({value['energy_best']:.4f})"),
        ("pixel variance explained by the lift", f"{value['r2_pixels']:.3f}"),
        ("... by an unconstrained linear map", f"{value['r2_pixels_linear']:.3f}"),
    ]


def _license_line(plan: Plan, terms: dict[str, str]) -> str:
    found = terms.get("license")
    if found:
        return f"The license is the source's: {terms.get('license_name', found)}."
    return f"The source states no license in its card; the terms of `{plain_name(plan.model.name)}` apply."


def _text_length(plan: Plan) -> str:
    """The pipeline argument that a tokenizer of few tokens needs."""
    limit = plan.model.text_length()
    return "" if limit is None else f", max_sequence_length={limit}"


def adapter_card(adapter: Adapter, sources: Sequence[Path]) -> str:
    """README.md of an adapter folder of ours.

    Args:
        adapter: with the name of its base.
        sources: folders whose cards may state a license; the first that does counts.
    """
    base = plain_name(adapter.base)
    body = f"""An {ASYMFLOW} adapter for `{base}`: projections, output norm, lift and LoRA.

```python
import liftkit

pipe = liftkit.load_adapter("{base}", "path/to/this/folder")
```"""
    return card_of(adapter, sources, "pixel adapter" if adapter.lift else "adapter", body)


def card_of(adapter: Adapter, sources: Sequence[Path], title: str, body: str) -> str:
    """README.md of what was made from an adapter: the license that a source states, a title and a text."""
    stated = next(filter(None, (source_header(folder / "README.md") for folder in sources)), {})
    base = plain_name(adapter.base)
    header = {**stated, "base_model": base} if base.count("/") == 1 else stated
    stated_terms = f"License: {stated.get('license_name', stated['license'])}. " if "license" in stated else ""
    return f"""{front_matter(header)}
# {base.rsplit("/", 1)[-1]}, {title}

{body}

`liftkit.json` holds provenance. {stated_terms}The license and terms of `{base}` apply.
"""
