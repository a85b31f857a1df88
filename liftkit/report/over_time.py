"""Previews over the time of a run in one picture: a row for each prompt, a column for each step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from liftkit.report.pictures import to_uint8, wrapped
from liftkit.report.saving import read_settings, write_picture

if TYPE_CHECKING:
    from torch import Tensor

NAME = "over-time.png"
SIDE, LABEL, HEAD, GAP, MOST = 128, 150, 20, 4, 60
"""Pixels of a picture's longer side, of the prompts' column, of the line of steps, between pictures; and columns at most."""
GROUND, INK = (252, 252, 250), (70, 70, 70)


def add_column(path: Path, step: int, images: Tensor, prompts: list[str]) -> None:
    """Add a step's previews to the picture of all; steps from this one on, which a resumed run makes again, are replaced.

    Beyond :data:`MOST` columns every second of those before goes.

    Args:
        path: of the picture, a PNG, which may be there or not.
        step: of the previews.
        images: (n, 3, H, W) in [-1, 1].
        prompts: of each.

    Raises:
        LiftkitError: if the disk refuses.
    """
    from PIL import Image, ImageDraw, ImageFont

    tiles = to_uint8(images)
    scale = SIDE / max(tiles.shape[1:3])
    height, width = (max(1, round(side * scale)) for side in tiles.shape[1:3])
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    column = Image.new("RGB", (width, len(tiles) * (height + GAP)), GROUND)
    for row, tile in enumerate(tiles):
        column.paste(Image.fromarray(tile).resize((width, height), way), (0, row * (height + GAP)))
    columns = {**_columns(path, step, column.size, prompts), step: column}
    if len(columns) > MOST:
        columns = {number: columns[number] for number in [*list(columns)[:-1:2], step]}
    canvas = Image.new("RGB", (LABEL + len(columns) * (width + GAP), HEAD + column.height), GROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for row, prompt in enumerate(prompts):
        for number, line in enumerate(wrapped(draw, prompt, font, LABEL - 6, max(1, height // 13))):
            draw.text((2, HEAD + row * (height + GAP) + 13 * number), line, fill=INK, font=font)
    for place, (number, each) in enumerate(columns.items()):
        left = LABEL + place * (width + GAP)
        draw.text((left, 3), f"step {number}" if not place else f"{number}", fill=INK, font=font)
        canvas.paste(each, (left, HEAD))
    write_picture(canvas, path, {"steps": list(columns), "prompts": prompts})


def _columns(path: Path, before: int, size: tuple[int, int], prompts: list[str]) -> dict[int, Any]:
    """The columns of an earlier picture of the same prompts, by step; none if it is no such picture."""
    from PIL import Image

    try:
        made = read_settings(path)
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        steps = [int(step) for step in made["steps"]]
        if made["prompts"] != prompts or picture.size != (LABEL + len(steps) * (size[0] + GAP), HEAD + size[1]):
            return {}
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        return {}
    lefts = {step: LABEL + place * (size[0] + GAP) for place, step in enumerate(steps) if step < before}
    return {step: picture.crop((left, HEAD, left + size[0], HEAD + size[1])) for step, left in lefts.items()}
