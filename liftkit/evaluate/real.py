"""The real images of a comparison: one set whose prompts are painted, and another that everything is scored against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftkit.checkpoint.files import expanded
from liftkit.data import demo
from liftkit.data.captioned import CaptionedFolder, CaptionedSource, DemoCaptioned
from liftkit.data.filling import check_captions
from liftkit.data.images import check_folder
from liftkit.data.picture_errors import PictureError
from liftkit.data.prompts import read_prompts
from liftkit.errors import UsageError
from liftkit.tally import Tally, combined

REFERENCE = 1024
"""Images to score against, where there are so many: more make the figures of few samples no better."""


@dataclass(frozen=True)
class Real:
    """Real images in two disjoint sets.

    Args:
        shown: uint8 (n, 3, S, S), the images that the prompts belong to: the row of real images, and what the
            strengths of the filter controls are chosen against.
        reference: uint8 (m, 3, S, S), m >= n: what every row is scored against, and nothing is chosen by.
        prompts: n captions of the shown images, or the user's own in turn.
        scenes: what the prompts ask for, where all are the demo data's; else None.
        silent: names of the shown images without a caption, whose prompts are empty.
        description: plain data for reports.
        tallies: accounts of images and captions.
    """

    shown: Tensor
    reference: Tensor
    prompts: tuple[str, ...]
    scenes: list[demo.Scene] | None
    silent: tuple[str, ...]
    description: dict[str, Any]
    tallies: tuple[Tally, ...] = ()


def open_real(name: str, count: int, size: int, seed: int, prompts: Path | None) -> Real:
    """The real images of ``--real``.

    Args:
        name: ``demo`` for held-out images of the demo data, or a folder of images; those without a caption get the empty
            prompt.
        count: n. The reference has 2 n images and at least 1024; from a folder, what it holds beyond the first n, but at
            least n.
        size: S; smaller images are left out.
        seed: of the demo data, or of the order of a folder.
        prompts: a file of prompts to use instead of captions.

    Raises:
        UsageError: if the folder is missing or too small, or what looks like its captions cannot be read.
    """
    source: CaptionedSource
    most = count + max(2 * count, REFERENCE)
    if name == "demo":
        if size != demo.SIZE:
            raise UsageError(
                f"--real demo: its images are {demo.SIZE} x {demo.SIZE}, the models' {size} x {size}; "
                "give a folder of images by --real"
            )
        source = DemoCaptioned(most, split="heldout", seed=seed)
        order: Sequence[int] = range(len(source))
    else:
        check_folder(expanded(name), f"--real {name}", "give a folder of images with captions, or 'demo'")
        source = CaptionedFolder(name)
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(source)).tolist()
    images, places, tally = _load(source, order, most, size)
    if len(images) < 2 * count:
        raise UsageError(
            f"--real {name}: {len(images)} images of at least {size} x {size} pixels; {2 * count} are needed, {count} "
            f"to paint the prompts of and {count} others to score against"
            + (f"; left out: {tally.reasons()}" if tally.lost else "")
        )
    captions = {source.label(place): source.caption(place) for place in places[:count]} if prompts is None else {}
    texts = _repeated(prompts, count) if prompts is not None else tuple(captions.values())
    silent = tuple(label for label, text in captions.items() if not text)
    if silent:
        check_captions(source, texts)
    tallies = tuple(combined([tally, *source.texts]))
    description = {
        **source.describe(),
        "size": size,
        "shown": count,
        "reference": len(images) - count,
        "without_caption": len(silent),
        "tallies": [each.to_json() for each in tallies],
    }
    return Real(images[:count], images[count:], texts, _scenes(texts), silent, description, tallies)


def _load(source: CaptionedSource, order: Sequence[int], most: int, size: int) -> tuple[Tensor, list[int], Tally]:
    """The first images of an order that can be used, their places, and the account of them."""
    images, places, tally = [], [], source.tally + Tally("images")
    for place in order:
        try:
            if min(source.size(place)) < size:
                raise PictureError(source.label(place), f"smaller than {size} x {size}")
            images.append(source.image(place, (size, size)))
        except PictureError as error:
            tally.leave_out(error.name, error.reason)
            continue
        tally.use()
        tally.remark(source.label(place), source.remark(place))
        places.append(place)
        if len(images) == most:
            break
    empty = torch.empty(0, 3, size, size, dtype=torch.uint8)
    return torch.stack(images) if images else empty, places, tally


def _repeated(file: Path, count: int) -> tuple[str, ...]:
    """The prompts of a file, in turn."""
    if not file.is_file():
        raise UsageError(f"--prompts {file}: no such file")
    lines = read_prompts(file)
    return tuple(lines[index % len(lines)] for index in range(count))


def _scenes(prompts: tuple[str, ...]) -> list[demo.Scene] | None:
    known = {scene.prompt: scene for scene in demo.all_scenes()}
    return [known[prompt] for prompt in prompts] if all(prompt in known for prompt in prompts) else None
