"""``liftkit/assets/models.json``, and its tables in README.md and docs/architectures.md: ``python -m tools.model_table``.

What a class is comes from its entry and its stock class, what was proved from the specimens of the conformance suite.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers

from liftkit.models.catalog import FILE, PROOFS, Supported
from liftkit.models.spec import Architecture
from tests.zoo import ZOO
from tests.zoo.specimen import Specimen

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- Made by python -m tools.model_table -->\n", "<!-- Until here -->\n"
FACTORS = {
    "AutoencoderKL": 8,
    "AutoencoderKLFlux2": 8,
    "AutoencoderKLQwenImage": 8,
    "AutoencoderKLQwenImage21": 16,
    "AutoencoderKLWan": 8,
    "AutoencoderDC": 32,
    "AutoencoderKLHunyuanImage": 32,
}
"""Downsampling of the released VAEs, by class; some have defaults of their own."""
RELEASED = {
    "BriaFiboTransformer2DModel": (16, 48),
    "HiDreamImageTransformer2DModel": (16, 64),
    "JiTTransformer2DModel": (16, 8),
    "Kandinsky5Transformer3DModel": (16, 64),
}
"""P and r where the released models are not what their class would make without arguments; of JiT, which has no latents, the
rank that the paper takes on ImageNet."""
VAES = {
    "CosmosTransformer3DModel": "AutoencoderKLQwenImage",
    "DiTTransformer2DModel": "AutoencoderKL",
    "Flux3Transformer2DModel": "AutoencoderKLFlux2",
}
"""Of the released models that have no pipeline, or a modular one, in diffusers."""


def rows() -> list[Supported]:
    """All classes of the zoo, by name."""
    names = sorted({specimen.architecture for specimen in ZOO.values()})
    return [_supported([each for each in ZOO.values() if each.architecture == name]) for name in names]


def _supported(specimens: list[Specimen]) -> Supported:
    """A class, from its specimens: what one of them proves is proved."""
    spec = specimens[0].spec
    proved: dict[str, str] = {}
    missing: dict[str, str] = {}
    for specimen in specimens:
        proved.setdefault("bare", "float64, 1e-9, both models from tied noise")
        if specimen.pipeline is None or "pipeline" in specimen.without:
            missing.setdefault("pipeline", specimen.without.get("pipeline", "diffusers has no pipeline for it"))
        if "finetune" in specimen.without:
            missing.setdefault("finetune", specimen.without["finetune"])
        else:
            proved.setdefault("finetune", "LoRA, steps from random images and captions")
    ran = [each.pipeline for each in specimens if each.pipeline and "pipeline" not in each.without]
    pipelines = tuple(dict.fromkeys(ran))
    if pipelines:
        remarks = [f", {each.remark}" for each in specimens if each.remark]
        proved["pipeline"] = f"{', '.join(pipelines)}: float32, 1e-3{''.join(remarks)}"
    vae = next((type(each.vae()).__name__ for each in specimens if each.vae is not None), VAES.get(spec.name))
    patch, rank = _sizes(spec, vae)
    return Supported(
        name=spec.name,
        pipelines=pipelines,
        vae=vae,
        rank=rank,
        patch=patch,
        dim=3 * patch**2,
        proved={proof: proved[proof] for proof in PROOFS if proof in proved},
        missing={proof: missing[proof] for proof in PROOFS if proof in missing and proof not in proved},
    )


def _sizes(spec: Architecture, vae: str | None) -> tuple[int, int]:
    """P and r of the released models: the defaults of the stock class, with the factor of the released VAE."""
    if spec.name in RELEASED:
        return RELEASED[spec.name]
    parameters = inspect.signature(getattr(diffusers, spec.name).__init__).parameters.values()
    config: dict[str, Any] = {each.name: each.default for each in parameters if each.default is not each.empty}
    return FACTORS[vae or "AutoencoderKL"] * spec.latent_patch(config), spec.token_size(config)


def listing() -> str:
    """The contents of the list."""
    return json.dumps([each.to_dict() for each in rows()], indent=1) + "\n"


def table() -> str:
    """The table of docs/architectures.md: a row for each class."""
    lines = ["| transformer | pipelines | VAE | r / P / D | proved |", "|---|---|---|---|---|"]
    for each in rows():
        vae = f"`{each.vae}`" if each.vae else ""
        pipelines = ", ".join(f"`{name.removesuffix('Pipeline')}`" for name in each.pipelines)
        lines.append(f"| `{each.name}` | {pipelines} | {vae} | {each.size} | {', '.join(each.proved)} |")
    return "\n".join(lines) + "\n"


def summary() -> str:
    """The table of README.md: a row for each set of proofs."""
    found: dict[tuple[str, ...], list[str]] = {}
    for each in rows():
        short = re.sub(r"(MoEImage|Edit)?(Transformer|DiT)[23]DModel$", "", each.name)
        found.setdefault(tuple(each.proved), []).append(short)
    ordered = sorted(found.items(), key=lambda item: -len(item[0]))
    lines = [f"| {', '.join(proofs)} | {len(names)} | {', '.join(names)} |" for proofs, names in ordered]
    return "\n".join(["| proved | classes | of the families |", "|---|---:|---|", *lines]) + "\n"


PAGES: dict[Path, Callable[[], str]] = {ROOT / "README.md": summary, ROOT / "docs" / "architectures.md": table}


def write() -> None:
    """Bring all up to date."""
    FILE.write_text(listing())
    for page, content in PAGES.items():
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(before + BEGIN + "\n" + content() + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    write()
