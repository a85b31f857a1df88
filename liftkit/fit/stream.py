"""One pass over images: tokens of the VAE's latents and of the pixels, into folded moments."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from liftkit.color import SPACES, ColorSpace
from liftkit.errors import UsageError
from liftkit.fit.folds import FoldedMoments, read_folds, write_folds
from liftkit.fit.moments import TokenMoments
from liftkit.fit.pairs import Pair, PairSource
from liftkit.progress import Observer, Silent
from liftkit.tokens import patchify

SAVE_SECONDS = 30.0


@dataclass
class Collection:
    """Folded moments of plain color values, by color space, and how far the pass has come.

    Args:
        folds: one :class:`FoldedMoments` per color space, normalized by :func:`normalized` when a fit asks.
        done: places of this part that have been taken or skipped.
        resumed: how many of them by an earlier, interrupted run.
        whole: whether the moments are those of ``done`` places and no more: not so while some are being added.
    """

    folds: dict[str, FoldedMoments]
    done: int = 0
    resumed: int = 0
    whole: bool = True

    def on(self, device: torch.device | str) -> Collection:
        """The same with its moments on a device; itself where they are there."""
        if self.any.folds[0].cross.device == torch.device(device):
            return self
        moved = {name: folds.map(lambda moments: moments.to(device)) for name, folds in self.folds.items()}
        return replace(self, folds=moved)

    @property
    def any(self) -> FoldedMoments:
        """The folds of one color space; latents and counts are the same in all."""
        return next(iter(self.folds.values()))


@dataclass
class Pass:
    """One pass over pairs of latents and images.

    Args:
        source: of the pairs.
        colors: names of the color spaces to keep moments of.
        latent_patch: side of the latent patch of one token.
        part: which share of the places this machine takes, from 0, and of how many.
        checkpoint: where to save now and then, and at the end, so that an interrupted fit resumes; whoever has used the
            moments removes it. None does not save.
        stop: decides now and then whether enough has been seen; None never does.
        together: tokens that are added at once, from several batches where images are small; the larger, the less an
            image costs, and the more seldom ``stop`` is asked.
    """

    source: PairSource
    colors: tuple[str, ...]
    latent_patch: int
    part: tuple[int, int] = (0, 1)
    checkpoint: Path | None = None
    stop: Callable[[Collection], bool] | None = None
    together: int = 16384

    @property
    def side(self) -> int:
        """Side of the pixel patch of one token."""
        return self.source.space.factor * self.latent_patch

    def identity(self) -> str:
        """What has to be the same for moments to be added: latent space, data, colors and patch."""
        described = [self.source.describe(), self.colors, self.latent_patch, self.source.space.fingerprint()]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def collect(work: Pass, observer: Observer | None = None) -> Collection:
    """Gather the moments of all token pairs, in one pass.

    Place i of the source belongs to part ``i % parts`` and to fold ``i % K``, so that parts on many machines add up to
    what one would have gathered.

    Raises:
        UsageError: if the VAE makes something that is not finite.
    """
    collection = _resume(work)
    index, parts = work.part
    places = range(index, len(work.source), parts)
    with (observer or Silent()).stage("fit: encoding images", len(places), "images") as advance:
        advance(collection.done)
        saved = time.monotonic()
        try:
            shown = collection.done
            for _ in _gather(work, collection, places):
                advance(collection.done - shown)
                shown = collection.done
                if time.monotonic() - saved > SAVE_SECONDS:
                    _save(work, collection)
                    saved = time.monotonic()
                if work.stop is not None and work.stop(collection.on("cpu")):
                    break
        except BaseException:
            # Interrupted or broken: what was gathered is kept for the next run.
            _save(work, collection)
            raise
    collection = collection.on("cpu")
    _save(work, collection)
    return collection


def _gather(work: Pass, collection: Collection, places: range) -> Iterator[None]:
    """Add the pairs of all places that are not done; yields after each batch, when nothing is on its way.

    A GPU leaves the processor idle: a thread adds one batch while the VAE works on the next. On the processor itself both
    would only fight over its cores, and batches are added in turn.
    """
    pairs = _together(work, places[collection.done :])
    if work.source.space.vae.device.type == "cpu":
        for pair in pairs:
            _add(work, collection, places, *pair)
            yield
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        adding: Future[None] | None = None
        for pair in pairs:
            if adding is not None:
                adding.result()
                yield
            adding = pool.submit(_add, work, collection, places, *pair)
        if adding is not None:
            adding.result()
            yield


def _together(work: Pass, places: range) -> Iterator[Pair]:
    """The pairs of places, several batches of equal shape as one.

    Whatever follows a VAE finds the processor's caches full of other things, and many small operations pay for that many
    times over. When the source breaks, what came before it is given first.
    """
    waiting: list[Pair] = []
    try:
        for pair in work.source.pairs(places):
            _check_finite(pair)
            if waiting and waiting[0][2].shape[1:] != pair[2].shape[1:]:
                yield _joined(waiting)
            waiting.append(pair)
            if sum(images[:, 0].numel() for _, _, images in waiting) >= work.together * work.side**2:
                yield _joined(waiting)
    except (Exception, KeyboardInterrupt):
        if waiting:
            yield _joined(waiting)
        raise
    if waiting:
        yield _joined(waiting)


def _joined(waiting: list[Pair]) -> Pair:
    indices, latents, images = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*waiting))
    waiting.clear()
    return indices, latents, images


def _check_finite(pair: Pair) -> None:
    indices, latents, _ = pair
    # A sum is finite where all its terms are; it is one look at them instead of several.
    usable = torch.isfinite(latents.flatten(1).sum(dim=1)).cpu()
    if not usable.all():
        raise UsageError(
            f"image {int(indices[~usable][0])} of the source: the VAE makes NaN or infinity of it; "
            "use --device cpu, or leave it out"
        )


@torch.no_grad()
def _add(work: Pass, collection: Collection, places: range, indices: Tensor, latents: Tensor, images: Tensor) -> None:
    """Add pairs, and count them as done."""
    collection.whole = False
    device = collection.any.folds[0].cross.device
    groups = [which for _, which in collection.any.groups(indices)]
    order, sizes = torch.cat(groups), [len(which) for which in groups]
    own = patchify(latents.index_select(0, order.to(latents.device)), work.latent_patch).to(device).double()
    # Below one another patches are an image again, so that images are cut once for all color spaces, while a value is a byte.
    patches = _patches(images.index_select(0, order.to(images.device)), work.side)
    for name, folds in collection.folds.items():
        space, seen = SPACES[name], patches
        dtype = torch.uint8 if space.signed and patches.dtype == torch.uint8 else torch.float64
        if dtype != torch.uint8:
            seen = space.plain(patches.flatten(1, 2)[None]).view_as(patches)
        parts = seen.to(device).split([size * own.shape[1] for size in sizes], dim=1)
        for which, latent_tokens, part in zip(groups, own.split(sizes), parts):
            # Token by token, and in the moments' precision, in one copy, which the products find in the cache.
            tokens = torch.empty((*latent_tokens.shape[:2], 3 * work.side**2), dtype=dtype, device=device)
            tokens.view(-1, 3, work.side, work.side).copy_(part.transpose(0, 1))
            folds.update(latent_tokens, tokens, indices[which])
    collection.done = places.index(int(indices[-1])) + 1
    collection.whole = True


def _patches(images: Tensor, side: int) -> Tensor:
    """The patches of images (B, C, H, W), one image's behind the last one's, (C, patches, side, side)."""
    channels, height, width = images.shape[1:]
    # A copy takes as long for one byte as for eight: neighbors in a patch are moved together, on devices that are sure to do so.
    together = side * images.element_size() % 8 == 0 and images.device.type in ("cpu", "cuda")
    values = images.view(torch.int64) if together else images
    grid = values.reshape(-1, channels, height // side, side, width // side, side * values.shape[-1] // width)
    cut = grid.permute(1, 0, 2, 4, 3, 5).contiguous().view(images.dtype)
    return cut.view(channels, -1, side, side)


def _save(work: Pass, collection: Collection) -> None:
    if work.checkpoint is None or not collection.whole:
        return
    metadata = {"identity": work.identity(), "part": str(work.part), "done": str(collection.done)}
    write_folds(work.checkpoint, collection.on("cpu").folds, metadata)


def _resume(work: Pass) -> Collection:
    """The collection of an interrupted pass over the same images, or an empty one; on the GPU that encodes, which has what a
    product needs already. Other devices than CUDA's have no float64."""
    vae = work.source.space.vae.device
    device = vae if vae.type == "cuda" else torch.device("cpu")
    if work.checkpoint is not None and work.checkpoint.exists():
        try:
            folds, metadata = read_folds(work.checkpoint)
        except UsageError:  # nobody's to mend: a damaged one is gathered again
            folds, metadata = {}, {}
        if (metadata.get("identity"), metadata.get("part")) == (work.identity(), str(work.part)):
            done = int(metadata["done"])
            return Collection(folds, done, done).on(device)
    rank = work.source.space.channels * work.latent_patch**2
    with device:
        return Collection({name: FoldedMoments(rank, 3 * work.side**2) for name in work.colors})


def fitted_color(color: type[ColorSpace], moments: TokenMoments) -> ColorSpace:
    """The space normalized to the images behind moments of its plain values: mean per channel, one std for all."""
    per_channel = moments.pixel_dim // 3
    total = moments.pixel_sum.view(3, per_channel).sum(dim=1)
    return color.from_statistics(moments.count * per_channel, total, moments.pixel_gram.trace().item())


def normalized(moments: TokenMoments, color: ColorSpace) -> TokenMoments:
    """Moments of pixels ``(x - mean) / std`` from moments of plain values."""
    mean = torch.tensor(color.mean, dtype=torch.float64).repeat_interleave(moments.pixel_dim // 3)
    result = TokenMoments(moments.latent_dim, moments.pixel_dim)
    result.count, result.images = moments.count, moments.images
    result.latent_sum, result.latent_gram = moments.latent_sum, moments.latent_gram
    shifted = torch.outer(mean, moments.pixel_sum)
    gram = moments.pixel_gram - shifted - shifted.T + moments.count * torch.outer(mean, mean)
    result.pixel_sum = (moments.pixel_sum - moments.count * mean) / color.std
    result.pixel_gram = gram / color.std**2
    result.cross = (moments.cross - torch.outer(moments.latent_sum, mean)) / color.std
    return result
