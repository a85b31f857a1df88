"""Put the stages' results together: ``liftkit/assets/tiny-klein`` and the oracle, in bfloat16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file

from tools.tiny_klein import autoencoder, common, flow, text

ASSETS = Path("liftkit/assets")
MODEL = ASSETS / "tiny-klein"


def assemble() -> None:
    """Write the pipeline folder with every component that the real FLUX.2 klein has.

    Raises:
        SystemExit: when the result of a stage is missing, the sharpened decoder's included.
    """
    vae = autoencoder.build("vae-sharp.safetensors")
    transformer = Flux2Transformer2DModel(**flow.CONFIG)
    transformer.load_state_dict(common.load("flow.safetensors"))
    shutil.rmtree(MODEL, ignore_errors=True)
    write_pipeline(MODEL, vae, transformer, shift=2.0)
    shutil.copyfile(common.WORK / "oracle.safetensors", ASSETS / "oracle.safetensors")
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    print(f"assembled {MODEL}; all assets take {size / 1e6:.2f} MB", flush=True)


def write_pipeline(folder: Path, vae: Any, transformer: Flux2Transformer2DModel, shift: float) -> None:
    """A FLUX.2 klein with the embedded text side, its weights in bfloat16 and its configs without paths of this machine."""
    words = text.tokenizer()
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=text.encoder(len(words)),
        tokenizer=words,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        halve(path)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in folder.rglob("*.json"):
        path.write_text(json.dumps(_plain(json.loads(path.read_text())), indent=2, ensure_ascii=False) + "\n")


def halve(path: Path) -> None:
    """Store weights in bfloat16; the batch-norm statistics, which the flow was trained behind, stay as they are."""
    tensors = load_file(path)
    halved = {k: v if "running" in k or not v.is_floating_point() else v.to(torch.bfloat16) for k, v in tensors.items()}
    common.save(path, halved)


def _plain(content: object) -> object:
    """Configs without paths of the machine that made them."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items() if key != "_name_or_path"}
    return content
