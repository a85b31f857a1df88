"""Grids of images: one picture with labeled rows, and the same as data for a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liftkit.color import to_signed

if TYPE_CHECKING:
    from torch import Tensor

    from liftkit.lift import Lift


TILE = 112
"""Pixels of an image's side at least, where people look at it."""
PATCHES = 32
"""Basis vectors that are shown, at most."""


@dataclass(frozen=True)
class Row:
    """One row of a grid.

    Args:
        label: what it shows, a few words.
        images: (n, 3, H, W) in [-1, 1].
    """

    label: str
    images: Tensor


def to_uint8(images: Tensor) -> Any:
    """(n, 3, H, W) in [-1, 1] to a numpy array (n, H, W, 3) uint8."""
    from liftkit import color

    return color.to_uint8(images).cpu().permute(0, 2, 3, 1).numpy()


ROWS = {
    "image": "Images: as they are",
    "vae": "VAE: encoded and decoded, what the latent model can show at best",
    "projection": "Projection `A A^T x`: all that the subspace can hold",
    "lift": "Lift `s A z`: the latents carried into pixels by one rotation and one scale",
    "linear": "Unconstrained linear map of `z`: the ceiling of any lift",
}


def gallery_rows(lift: Lift) -> list[Row]:
    """The pictures that a lift carries, as labeled rows."""
    return [Row(label, to_signed(lift.pictures[name])) for name, label in ROWS.items() if name in lift.pictures]


def basis_patches(lift: Lift) -> Tensor:
    """Basis vectors as patches of color, (n, 3, P, P) in [-1, 1]: the smoothest first.

    Each is shown on the mean color, as strong as the gamut bears.
    """
    import torch

    # A smooth patch has a mean that its details do not cancel.
    order = torch.linalg.vector_norm(lift.basis.view(3, -1, lift.rank).mean(dim=1), dim=0).argsort(descending=True)
    patches = lift.basis[:, order[:PATCHES]].T.reshape(-1, 3, lift.patch_size, lift.patch_size).float()
    strength = patches.abs().amax(dim=(1, 2, 3), keepdim=True)
    return lift.color.decode(1.5 * patches / strength)


def grid(images: Tensor, columns: int, gap: int = 2) -> Any:
    """Images (n, 3, H, W) in [-1, 1] side by side, row-major, as a Pillow image on a light ground."""
    from PIL import Image

    tiles = to_uint8(images)
    count, height, width = tiles.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (245, 245, 245))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        canvas.paste(Image.fromarray(tile), (column * (width + gap), row * (height + gap)))
    return canvas


def labeled(rows: list[Row], *, title: str, tile: int = TILE) -> Any:
    """One picture: a title, and for each row its label above its images, enlarged to ``tile`` pixels without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    gap, margin = 4, 20
    columns = max(len(row.images) for row in rows)
    width = margin * 2 + columns * (tile + gap) - gap
    band = 26
    canvas = Image.new("RGB", (width, margin + 30 + len(rows) * (tile + band) + margin), (252, 252, 250))
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin - 4), title, fill=(20, 20, 20), font=ImageFont.load_default(20))
    top = margin + 30
    for row in rows:
        draw.text((margin, top + 6), row.label.replace("`", ""), fill=(70, 70, 70), font=ImageFont.load_default(14))
        for column, array in enumerate(to_uint8(row.images)):
            picture = Image.fromarray(array)
            enlarged = picture.resize(
                (tile, tile), Image.Resampling.NEAREST if tile >= picture.width else Image.Resampling.LANCZOS
            )
            canvas.paste(enlarged, (margin + column * (tile + gap), top + band))
        top += tile + band
    return canvas


def captioned(images: Tensor, captions: list[str], title: str, columns: int) -> Any:
    """Images (n, 3, H, W) in [-1, 1] with their captions under them and a title above, as a Pillow image.

    Small images are enlarged without smoothing to :data:`TILE` pixels; captions that are too long for two lines are cut.
    """
    from PIL import Image, ImageDraw, ImageFont

    tiles, gap, band = to_uint8(images), 4, 30
    columns = min(columns, len(tiles))
    factor = max(1, -(-TILE // tiles.shape[2]))
    height, width = tiles.shape[1] * factor, tiles.shape[2] * factor
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, 22 + rows * (height + band)), (252, 252, 250))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    draw.text((2, 3), title, fill=(20, 20, 20), font=ImageFont.load_default(14))
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(index, columns)
        left, top = column * (width + gap), 22 + row * (height + band)
        canvas.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(wrapped(draw, caption, font, width - 2, 2)):
            draw.text((left + 1, top + height + 2 + 13 * number), line, fill=(70, 70, 70), font=font)
    return canvas


def wrapped(draw: Any, text: str, font: Any, width: int, most: int) -> list[str]:
    """A text in lines that are no wider than some pixels; what does not fit into the most lines is cut."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < most:
        fits = next(
            n for n in range(min(len(rest), width), 0, -1) if n == 1 or draw.textlength(rest[:n], font) <= width
        )
        # Between words, where there is a place to break.
        cut = rest.rfind(" ", 0, fits + 1) if fits < len(rest) else fits
        cut = fits if cut <= 0 else cut
        lines.append(rest[:cut])
        rest = rest[cut:].strip()
    return lines


def data_uri(image: Any) -> str:
    """A Pillow image as a ``data:`` address of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
