"""Folders of samples: which file holds which sample, and what goes with it; a plain data set, or as a benchmark of text-to-image
models reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liftkit.checkpoint.files import atomic_file, write_text
from liftkit.errors import UsageError
from liftkit.evaluate.cache import digest
from liftkit.options import GenerateOptions
from liftkit.tally import Tally


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Args:
        prompt: what is painted.
        samples: files of its samples within the folder, in the order of their seeds.
        texts: files that go with them, and what they hold.
        grid: file that shows its samples two in a row, if there is one.
    """

    prompt: str
    samples: tuple[str, ...]
    texts: dict[str, str] = field(default_factory=dict)
    grid: str | None = None


@dataclass(frozen=True)
class Layout:
    """A benchmark's folder. Image i is sample ``i modulo k`` of prompt ``i // k``, where a prompt has k samples.

    Args:
        name: of the benchmark.
        items: its prompts.
        tally: entries of the prompt files, and those that are left out.
        captions: COCO's entry of each sample, by the sample's file; empty for the others.
    """

    name: str
    items: list[Item]
    tally: Tally
    captions: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def repeat(self) -> int:
        """Samples of each prompt."""
        return len(self.items[0].samples)

    @property
    def digest(self) -> str:
        """Of all names, prompts and texts."""
        return digest([[each.prompt, each.samples, each.texts, each.grid] for each in self.items])

    def count(self, options: GenerateOptions) -> int:
        """Images of the finished folder.

        Raises:
            UsageError: if the options ask for more than there are, for a part of a prompt's samples, or for what the
                benchmark cannot read.
        """
        most = len(self.items) * self.repeat
        count = most if options.count is None else options.count
        if count > most or count % self.repeat:
            raise UsageError(
                f"-n {count}: {self.name} has {len(self.items)} prompts with {self.repeat} images each; "
                f"give a multiple of {self.repeat} up to {most}, or leave -n out for all"
            )
        if options.pictures.record:
            raise UsageError(f"--layout {self.name}: paints from text alone; leave --image and --reference out")
        if self.name == "dpg" and options.height != options.width:
            raise UsageError(
                f"--height {options.height}, --width {options.width}: DPG-Bench cuts its grids into squares of a side "
                "that it is given; give both, and the same for both"
            )
        return count

    def text(self, index: int) -> str:
        """The prompt of an image."""
        return self.items[index // self.repeat].prompt

    def file(self, index: int) -> str:
        """The file of an image within the folder."""
        return self.items[index // self.repeat].samples[index % self.repeat]

    def existing(self, output: Path) -> list[int]:
        """Numbers of the images that are there."""
        return [index for index in range(len(self.items) * self.repeat) if (output / self.file(index)).is_file()]

    def finish(self, output: Path, new: set[int]) -> None:
        """Write grids and texts of all prompts whose samples are there; grids of new samples are written anew."""
        there = set(self.existing(output))
        whole = []
        for number, item in enumerate(self.items):
            own = set(range(number * self.repeat, (number + 1) * self.repeat))
            if not own <= there:
                continue
            whole.append(item)
            for name, text in item.texts.items():
                if not (output / name).is_file():
                    write_text(output / name, text)
            if item.grid is not None and (own & new or not (output / item.grid).is_file()):
                _write_grid([output / name for name in item.samples], output / item.grid)
        if self.captions:
            write_text(output / "captions.json", _coco_captions([self.captions[each.samples[0]] for each in whole]))


def _coco_captions(entries: list[dict[str, Any]]) -> str:
    """A captions file of the images that were painted."""
    images = [{"id": each["image_id"], "file_name": each["file_name"]} for each in entries]
    annotations = [{key: each[key] for key in ("id", "image_id", "caption")} for each in entries]
    return json.dumps({"images": images, "annotations": annotations}, ensure_ascii=False, indent=1) + "\n"


def _write_grid(samples: list[Path], path: Path) -> None:
    """Samples of one size, two in a row, in the order of reading."""
    from PIL import Image

    images = [Image.open(each).convert("RGB") for each in samples]
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, image in enumerate(images):
        grid.paste(image, (number % 2 * width, number // 2 * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        grid.save(file, "PNG")


@dataclass(frozen=True)
class Numbered:
    """A plain dataset folder: numbered images whose prompts take turns."""

    prompts: list[str]

    def count(self, options: GenerateOptions) -> int:
        """Images of the finished folder."""
        if options.count is None:
            raise UsageError("-n: how many images? Only with --layout may it be left out")
        return options.count

    def text(self, index: int) -> str:
        """The prompt of an image."""
        return self.prompts[index % len(self.prompts)]

    def file(self, index: int) -> str:
        """The file of an image within the folder."""
        return f"{index:06d}.png"

    def existing(self, output: Path) -> list[int]:
        """Numbers of the images that are there."""
        return sorted(int(path.stem) for path in output.glob("*.png") if path.stem.isdecimal())


Files = Numbered | Layout
