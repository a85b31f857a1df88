"""The section of a recipe that says what it trains on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from liftkit.finetune.recipe_types import LISTED, File, Section, Share, Text, Urls


class _Source(Section):
    kind: str
    weight: Annotated[
        float, Field(gt=0, description="Share of the samples that come from here, relative to the other sources.")
    ] = 1.0


class DemoSource(_Source):
    """The embedded digits on photographs: nothing to download."""

    kind: Literal["demo"]
    count: Annotated[int, Field(ge=1, description="Images to draw from.")] = 16384


class FolderSource(_Source):
    """A folder of images, nested or not, with `.txt` captions beside them or a `metadata.jsonl`."""

    kind: Literal["folder"]
    path: Annotated[File, Field(description="The folder.")]
    captions: Annotated[
        Literal["files", "folders"],
        Field(
            description="Where captions come from: files beside the images, or the names of the folders that they are in."
        ),
    ] = "files"
    repeats: Annotated[
        bool,
        Field(
            description="Whether folders right below it begin with how often an image is seen an epoch, as `10_name`; the name is "
            "the caption of those that have none, and images elsewhere are left out."
        ),
    ] = False
    reference_column: Annotated[
        Text | None,
        Field(
            description="Column of its metadata that names what an image was made from; null: nothing. Editing is trained."
        ),
    ] = None


class WebDatasetSource(_Source):
    """Tar shards in webdataset's format, uncompressed."""

    kind: Literal["webdataset"]
    urls: Annotated[Urls, Field(description="Local files, one or a list; `{0000..0099}` counts, `*` matches.")]


class DatasetSource(_Source):
    """A dataset that the `datasets` library loads."""

    kind: Literal["dataset"]
    path: Annotated[Text, Field(description="A Hub id, a folder, or a table (.parquet, .csv, .jsonl).")]
    split: Annotated[Text, Field(description="Which part of it.")] = "train"
    image_column: Annotated[Text, Field(description="Column of the images.")] = "image"
    caption_column: Annotated[Text | None, Field(description="Column of the captions; null: there are none.")] = "text"


Source = Annotated[DemoSource | FolderSource | WebDatasetSource | DatasetSource, Field(discriminator="kind")]


class Data(Section):
    """What is learned from."""

    sources: Annotated[
        tuple[Source, ...], LISTED, Field(min_length=1, description="Where images and captions come from.")
    ]
    resolution: Annotated[int | None, Field(ge=1, description="Side in pixels; null: the model's own.")] = None
    buckets: Annotated[
        bool, Field(description="Keep aspect ratios, in buckets of about equal area; else square crops.")
    ] = False
    prompt_dropout: Annotated[
        Share, Field(description="Share of the samples whose prompt is empty, for classifier-free guidance.")
    ] = 0.1
    flip: Annotated[Share, Field(description="Share of the samples that are mirrored; needs loss flow in pixels.")] = (
        0.0
    )
    crop: Annotated[
        Literal["lanczos", "adm"],
        Field(
            description="How images become smaller: by Lanczos' filter, or as ADM prepares ImageNet (boxes, then bicubic)."
        ),
    ] = "lanczos"
    cache: Annotated[
        File | None, Field(description="Folder for encoded prompts and latents; null: `cache` in the run folder.")
    ] = None
    workers: Annotated[int, Field(ge=0, description="Threads that decode images; 0: none beside the trainer.")] = 2


SOURCES: dict[str, type[Section]] = {
    "demo": DemoSource,
    "folder": FolderSource,
    "webdataset": WebDatasetSource,
    "dataset": DatasetSource,
}
"""The members of the union, by their ``kind``."""
