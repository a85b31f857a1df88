"""What a run leaves: a converted-format folder, or the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from liftkit.checkpoint.card import LICENSE, front_matter, plain_name, source_header
from liftkit.checkpoint.files import write_text
from liftkit.checkpoint.folder import atomic_folder
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.record import read_record, versions, write_record
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.repa import without_projector
from liftkit.finetune.trainee import Trainee
from liftkit.formats.merging import write_merged
from liftkit.models.adapter import LORA_A, LORA_B, Adapter, compact
from liftkit.progress import Observer


def learned_adapter(recipe: Recipe, trainee: Trainee, values: dict[str, Tensor], steps: int) -> Adapter:
    """What was learned, in the format of :mod:`liftkit.models.adapter`, rounded once: see :func:`liftkit.models.adapter.compact`.

    Args:
        values: of the parameters that learn (their running mean), by name in the transformer under training.
        steps: done.
    """
    weights = trainee.folder.weights("transformer")
    tensors = {}
    for name, value in without_projector(values).items():
        key = _stored_name(name)
        weight = key.replace(LORA_A, ".weight").replace(LORA_B, ".weight")
        stored = weights.read(weight)
        tensors[key] = compact(value, value.dtype if stored is None else stored.dtype).contiguous()
    record = read_record(trainee.folder.path)
    return Adapter(
        tensors=tensors,
        alpha=recipe.trainable.alpha or float(recipe.trainable.rank),
        lift=trainee.lift,
        transformer=type(trainee.transformer).__name__,
        base=str(record.get("source", {}).get("model", trainee.folder.name)),
        provenance={
            "steps": steps,
            "recipe": plain_recipe(recipe),
            "versions": versions(),
            "config": trainee.folder.numbers("transformer"),
            **sampling_of(trainee.folder),
            # What the folder had been through before, stage by stage.
            **({"after": record["finetune"]} if "finetune" in record else {}),
        },
    )


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data that may be published: of paths the name alone."""
    plain = recipe.model_dump(mode="json")
    plain["output"], plain["model"] = Path(plain["output"]).name, Path(plain["model"]).name
    for key in ("classes", "images", "subspace", "vae"):
        plain["network"][key] = plain["network"][key] and Path(plain["network"][key]).name
    plain["adapter"] = None if plain["adapter"] is None else Path(plain["adapter"]).name
    plain["data"]["cache"] = None
    for source in plain["data"]["sources"]:
        source |= {"path": Path(source["path"]).name} if "path" in source else {}
        source |= {"urls": [Path(url).name for url in source["urls"]]} if "urls" in source else {}
    return plain


def sampling_of(folder: ModelFolder) -> dict[str, Any]:
    """How a folder is sampled, where its scheduler has a grid of its own: it goes on with the adapter."""
    if folder.class_of("scheduler") is None:
        return {}
    config = folder.config("scheduler")
    if config.get("pixel_shift") is None:
        return {}
    solver = str(folder.class_of("scheduler")).removeprefix("Asym")
    choices = {"shift": config["pixel_shift"], "shift_side": config.get("pixel_shift_side")}
    choices |= {"clamp": config.get("clamp") is not None, "orthogonal": config.get("guidance_orthogonal")}
    return {"sampling": {"solver": solver, **choices}}


def write_model(adapter: Adapter, folder: ModelFolder, target: Path, observer: Observer) -> None:
    """The folder that training began from with what was learned merged in; unchanged tensors are copied file to file.

    Raises:
        UsageError: if something is at ``target`` already.
        LiftkitError: if the disk refuses.
    """
    with atomic_folder(target, overwrite=True) as building:
        write_merged(adapter, folder, building, observer)
        write_text(building / "README.md", card(adapter, folder, "model"))
        record = {**read_record(folder.path), "finetune": adapter.provenance}
        record.setdefault("format", "liftkit.finetune")
        record.setdefault("version", 1)
        write_record(building, record)


def card(adapter: Adapter, folder: ModelFolder, kind: str) -> str:
    """The model card: the license of the base's own card, what it is, how to load it, how it was made."""
    header = source_header(folder.path / "README.md", (*LICENSE, "base_model"))
    base = plain_name(adapter.base)
    recipe = adapter.provenance["recipe"]
    what = "A pixel flow model" if adapter.lift is not None else "A latent flow model, continued"
    load = (
        'pipe = DiffusionPipeline.from_pretrained("this-folder")'
        if kind == "model"
        else f'pipe = liftkit.load_adapter("{base}", "this-folder")'
    )
    before, earlier = adapter.provenance.get("after"), ""
    if isinstance(before, dict):
        # An adapter of other authors does not say how long it was trained.
        steps = before.get("steps")
        earlier = f", after {steps} steps of an earlier run" if steps is not None else ", after an earlier finetune"
    return f"""{front_matter(header)}
# {base.rsplit("/", 1)[-1]}, finetuned in {"pixels" if adapter.lift is not None else "latents"}

{what} made from `{base}` by [Asymmetric Flow](https://arxiv.org/abs/2605.12964) with liftkit.
It was finetuned for {adapter.provenance["steps"]} steps of {recipe["batch_size"]} images
({recipe["trainable"]["mode"]}, loss {recipe["objective"]["loss"]}){earlier}.

```python
import liftkit
from diffusers import DiffusionPipeline

{load}
```

`liftkit.json` holds the recipe and versions. The license and terms of the base apply.
"""


def _stored_name(name: str) -> str:
    """Names as they are on disk: without peft's wrapping."""
    return (
        name.replace(".lora_A.default.", ".lora_A.")
        .replace(".lora_B.default.", ".lora_B.")
        .replace(".base_layer.", ".")
    )
