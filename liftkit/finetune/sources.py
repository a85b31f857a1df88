"""What a run trains: the folder that it begins from, and the images and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.data.captioned import CaptionedFolder, DemoCaptioned
from liftkit.data.heldout import Weighted, split
from liftkit.data.picture_errors import PictureError
from liftkit.data.repeats import concepts, looks_repeated
from liftkit.data.source import CaptionedSource, EncodedSource
from liftkit.data.training import TrainingData
from liftkit.embedded import MODELS
from liftkit.errors import UsageError
from liftkit.finetune.encoders import load_vae
from liftkit.finetune.recipe import DatasetSource, DemoSource, FolderSource, Recipe, Source, WebDatasetSource
from liftkit.finetune.recipe_network import NEW
from liftkit.finetune.trainee import Trainee
from liftkit.models.flow import open_flow
from liftkit.models.latents import LatentSpace
from liftkit.models.registry import architectures
from liftkit.options import LAST_SEED
from liftkit.progress import Observer

SMALL_BATCH = 32


def find_source(recipe: Recipe, output: Path, observer: Observer) -> ModelFolder:
    """The folder that training begins from; an embedded model is converted into the run folder where need be, ``new`` is made
    there, and an adapter to go on from is merged into its base there."""
    if recipe.adapter is not None:
        from liftkit.formats.adapters import fuse

        merged = output / "base"
        if not merged.is_dir():
            output.mkdir(parents=True, exist_ok=True)
            fuse(recipe.adapter, recipe.model, merged, shards="link", observer=observer)
        return find_model(str(merged))
    if recipe.model == NEW:
        from liftkit.conversion.scratch import begin

        begun = output / "base"
        if not begun.is_dir():
            output.mkdir(parents=True, exist_ok=True)
            begin(begun, recipe.network.options(recipe.seed % LAST_SEED), observer)
        return find_model(str(begun))
    if recipe.model not in MODELS or recipe.space == "latent":
        return find_model(recipe.model)
    from liftkit.conversion.execute import convert

    base = output / "base"
    if not base.is_dir():
        output.mkdir(parents=True, exist_ok=True)
        convert(recipe.model, base, observer=observer, images="demo", device="cpu", color="oklab")
    return find_model(str(base))


def make_source(source: Source, crop: str = "lanczos") -> CaptionedSource:
    """Images and captions of one source of a recipe, cropped in one of the ways of :data:`liftkit.data.images.CROPS`."""
    if isinstance(source, DemoSource):
        return DemoCaptioned(source.count)
    made: EncodedSource
    if isinstance(source, FolderSource):
        made = CaptionedFolder(source.path, source.reference_column, by_folder=source.captions == "folders")
        if isinstance(made.references, EncodedSource):
            made.references.crop = crop
    elif isinstance(source, WebDatasetSource):
        from liftkit.data.shards import WebDataset

        made = WebDataset(list(source.urls))
    else:
        assert isinstance(source, DatasetSource)
        from liftkit.data.hub import HubDataset

        made = HubDataset(source.path, source.split, source.image_column, source.caption_column)
    made.crop = crop
    return made


def weighted(source: Source, made: CaptionedSource, observer: Observer) -> Weighted:
    """A source with its weight, or its folders of repeats, among which they share it."""
    if isinstance(made, CaptionedFolder) and isinstance(source, FolderSource):
        if source.repeats:
            parts = concepts(made)
            total = sum(seen for _, seen in parts)
            return [(part, source.weight * seen / total) for part, seen in parts]
        example = looks_repeated(made)
        if example:
            observer.note(
                f"{made.name}: every image counts once; with repeats: true, those in {example} as its name says"
            )
    return [(made, source.weight)]


def _check_references(key: str, trainee: Trainee, source: CaptionedSource, flip: float) -> None:
    """Raise unless a model can be trained on pairs that are mirrored so often, and its pipeline shown as many references
    afterwards.

    Raises:
        UsageError: saying which can, or naming `data.flip` or an image that is made from too many.
    """
    name, spec = str(trainee.folder.index["_class_name"]), trainee.spec
    if name not in spec.references or spec.beside is None:
        known = [each for other in architectures().values() if other.beside is not None for each in other.references]
        raise UsageError(
            f"{key}: {name} takes no reference images; pipelines that can: {', '.join(sorted(known))}; leave it out"
        )
    if flip and spec.prompts_beside is not None:
        raise UsageError(
            f"data.flip: {flip:g} would mirror references that {name} reads together with the prompt, and embeddings are kept of "
            "pictures as they are; take 0"
        )
    most = spec.references[name][-1]
    for index in range(len(source)):
        try:
            count = len(source.made_from(index))
        except PictureError:
            continue  # It is left out, and counted.
        if count > most:
            raise UsageError(f"{key}: {name} takes {most} at most, and {source.label(index)} is made from {count}")


def training_data(
    recipe: Recipe, trainee: Trainee, output: Path, observer: Observer
) -> tuple[TrainingData, TrainingData | None]:
    """Training data and, where the recipe validates and there are enough images, held-out data; not prepared yet."""
    if open_flow(trainee.transformer).channels_beside:
        observer.note(
            f"{trainee.folder.name} takes a picture beside the noise, to fill or to follow, and the data has none: it is trained "
            "with empty ones, and may forget what it did with others"
        )
    choice = recipe.data
    sources: Weighted = []
    for number, each in enumerate(choice.sources):
        made = make_source(each, choice.crop)
        if made.references is not None:
            _check_references(f"data.sources.{number}.reference_column", trainee, made, choice.flip)
        sources += weighted(each, made, observer)
    common: dict[str, Any] = {
        "resolution": choice.resolution or trainee.folder.image_size(),
        "multiple": token_side(trainee),
        "buckets": choice.buckets,
        "cache": choice.cache or output / "cache",
        "workers": choice.workers,
    }
    held_out = None
    if recipe.validation.every:
        sources, apart, notes = split(sources, recipe.validation.images, recipe.seed)
        for note in notes:
            observer.note(note)
        size = min(SMALL_BATCH, sum(len(source) for source, _ in apart))
        if apart:
            held_out = TrainingData(apart, batch_size=size, seed=recipe.seed, prompt_dropout=0.0, **common)
    data = TrainingData(
        sources,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        prompt_dropout=choice.prompt_dropout,
        flip=choice.flip,
        **common,
    )
    return data, held_out


def token_side(trainee: Trainee) -> int:
    """Pixels along one token."""
    if trainee.lift is not None:
        return trainee.lift.patch_size
    return LatentSpace(load_vae(trainee.folder)).factor * trainee.spec.latent_patch(trainee.transformer.config)
