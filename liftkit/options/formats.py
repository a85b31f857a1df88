"""Choices of imports and exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from liftkit.options.option import Option, Overwrite, ShardsOption


@dataclass(frozen=True)
class ImportOptions:
    """Choices of ``liftkit import``; which of them mean something depends on what is imported."""

    base: Annotated[
        str | None,
        Option(
            "Model that the source is for. For an adapter: the latent model or its conversion; for a LoRA: the converted folder.",
            "FOLDER",
            names="model",
            default="none",
        ),
    ] = None
    config: Annotated[
        str | None,
        Option(
            "Diffusers folder of the same model, for a checkpoint: all but the transformer's weights comes from it.",
            "FOLDER",
            names="model",
            default="none",
        ),
    ] = None
    keep_adapter: Annotated[
        bool, Option("Make an adapter folder of ours, instead of merging the adapter into its base.")
    ] = False
    shards: ShardsOption = "copy"
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Choices of ``liftkit export``."""

    format_: Annotated[
        Literal["adapter", "asymflow-adapter"],
        Option(
            "Format of the adapter: our own, or that of the AsymFlow authors and their ComfyUI nodes.",
            flags=("--format",),
        ),
    ]
    base: Annotated[
        str | None,
        Option(
            "Model that the folder came from; needed where only that shows what a finetune has changed.",
            "FOLDER",
            names="model",
            default="as recorded",
        ),
    ] = None
    rank: Annotated[
        int | None,
        Option("Rank of the LoRA taken from a finetuned folder, whatever is lost.", min=1, default="its recipe's"),
    ] = None
    overwrite: Overwrite = False
