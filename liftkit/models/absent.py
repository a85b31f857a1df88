"""What a pipeline folder goes without, and what that means for its use."""

from __future__ import annotations

from liftkit.checkpoint.classes import CLASS_PIPELINE, pipeline_parts
from liftkit.checkpoint.components import Component, read_components
from liftkit.checkpoint.model import ModelFolder
from liftkit.errors import UsageError
from liftkit.models.registry import architecture

TEXT = ("text_encoder", "tokenizer", "text_processor", "processor")


def absent(folder: ModelFolder) -> list[str]:
    """Text and image encoders that the pipeline's class takes and the folder goes without, by a null entry or none."""
    taken = pipeline_parts(str(folder.index.get("_class_name")))
    optional = (*TEXT, "processor", "image_encoder", "feature_extractor", "vision_language_encoder")
    return [name for name in (taken[1] if taken else ()) if name.startswith(optional) and folder.class_of(name) is None]


def limits(folder: ModelFolder, parts: list[Component] | None = None) -> list[str]:
    """What cannot be done with a model, or with its conversion, though it converts: each on one line, with the reason."""
    needed = needed_encoders(folder)
    gone = [each for each in needed if folder.class_of(each) is None]
    found = []
    if gone:
        found.append(
            f"it cannot be sampled, finetuned or compared: {' and '.join(gone)} missing (null in model_index.json), which "
            "prompts need; converting, verifying and exporting work"
        )
    optional = [each for each in absent(folder) if each not in needed and each.startswith(TEXT)]
    if optional:
        found.append(
            f"it goes without {' and '.join(optional)}, as its source does: with diffusers alone, load it by "
            f"from_pretrained(folder, {', '.join(f'{each}=None' for each in optional)})"
        )
    for part in read_components(folder) if parts is None else parts:
        if part.quantized:
            found.append(f"{part.name} is quantized: sampling and finetuning need the package of {part.quantized}")
    return found


def needed_encoders(folder: ModelFolder) -> tuple[str, ...]:
    """The components without which a pipeline cannot read a prompt: none where prompts name classes."""
    by_class = folder.index.get("_class_name") == CLASS_PIPELINE
    return () if by_class else architecture(folder.class_of("transformer") or "").encoders


def check_text_side(folder: ModelFolder, pictures: bool = False) -> None:
    """Raise unless the pipeline has the text encoders and tokenizers that prompts need.

    Args:
        folder: of the pipeline.
        pictures: whether its text encoder is to read pictures too, for which it has a processor.

    Raises:
        UsageError: naming what it goes without.
    """
    needed = dict.fromkeys((*needed_encoders(folder), *(["processor"] if pictures else [])))
    gone = [each for each in needed if folder.class_of(each) is None]
    if gone:
        raise UsageError(
            f"{folder.source}: no {' and '.join(gone)} (null or missing in model_index.json), so that prompts mean nothing "
            "to it; give a model folder with its text encoders"
        )
