"""The embedded demonstration data: real handwritten digits over real photographs.

Every image is a handwritten digit from scikit-learn's ``load_digits``, tinted in one of eight named
colors, with a soft dark halo, over a 64 x 64 crop of one of scikit-learn's two sample photographs.
The prompt names the three choices, as in ``"a red seven on flower petals"``, so that an oracle
(:mod:`liftkit.data.oracle`) can say whether an image obeys its prompt.

Image ``i`` of a split is a pure function of ``(seed, split, i)``: no order, worker or batch changes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIZE = 64
DIGIT_SIZE = 44
MARGIN = (SIZE - DIGIT_SIZE) // 2
JITTER = 4

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.08, 0.14),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.10, 0.66, 0.22),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.12, 0.25, 0.92),
    "magenta": (0.92, 0.15, 0.80),
    "white": (0.97, 0.97, 0.97),
}
# Where each photograph is cropped, in its own pixels after halving: (left, top, right, bottom).
BACKGROUNDS: dict[str, tuple[str, tuple[int, int, int, int]]] = {
    "on flower petals": ("flower.jpg", (46, 12, 270, 213)),
    "on a temple roof": ("china.jpg", (0, 8, 240, 213)),
}
HELD_OUT_DIGITS = 0.2

Split = Literal["train", "heldout"]
_SPLIT_CODE = {"train": 0, "heldout": 1}


@dataclass(frozen=True)
class Scene:
    """What one image shows: indices into :data:`DIGITS`, :data:`COLORS` and :data:`BACKGROUNDS`."""

    digit: int
    color: int
    background: int

    @property
    def prompt(self) -> str:
        """The caption, for example ``"a red seven on flower petals"``."""
        return f"a {list(COLORS)[self.color]} {DIGITS[self.digit]} {list(BACKGROUNDS)[self.background]}"


def all_scenes() -> list[Scene]:
    """All 160 combinations of digit, color and background, in a fixed order."""
    return [Scene(*choice) for choice in product(range(len(DIGITS)), range(len(COLORS)), range(len(BACKGROUNDS)))]


def scene_at(index: int, *, split: Split = "train", seed: int = 0) -> Scene:
    """The scene of image ``index`` without drawing it."""
    return _choose(_generator(index, split, seed))


def image_at(index: int, *, split: Split = "train", seed: int = 0) -> tuple[NDArray[np.uint8], Scene]:
    """Draw image ``index`` of a split.

    Args:
        index: any integer >= 0; the data never run out.
        split: ``heldout`` uses handwriting that ``train`` never shows.
        seed: another seed, another data set.

    Returns:
        The sRGB image, (64, 64, 3) uint8, and its scene.
    """
    rng = _generator(index, split, seed)
    scene = _choose(rng)
    mattes, halos = _handwriting(split)[scene.digit]
    which = int(rng.integers(len(mattes)))
    top, left = (MARGIN + rng.integers(-JITTER, JITTER + 1, size=2)).tolist()
    matte, halo = _placed(mattes[which], top, left), _placed(halos[which], top, left)
    image = _crop(scene.background, rng) * (1.0 - 0.55 * halo)
    image = image * (1.0 - matte) + _tints()[scene.color] * matte
    return np.rint(image.clip(0.0, 1.0) * 255.0).astype(np.uint8), scene


def images(
    count: int, *, split: Split = "train", seed: int = 0, start: int = 0
) -> tuple[NDArray[np.uint8], list[Scene]]:
    """Images ``start`` to ``start + count``: (count, 64, 64, 3) uint8, and their scenes."""
    drawn = [image_at(index, split=split, seed=seed) for index in range(start, start + count)]
    return np.stack([image for image, _ in drawn]), [scene for _, scene in drawn]


def _generator(index: int, split: Split, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, _SPLIT_CODE[split], index))))


def _choose(rng: np.random.Generator) -> Scene:
    return Scene(int(rng.integers(len(DIGITS))), int(rng.integers(len(COLORS))), int(rng.integers(len(BACKGROUNDS))))


def _placed(patch: NDArray[np.float32], top: int, left: int) -> NDArray[np.float32]:
    """A patch whose center is where a DIGIT_SIZE square at (top, left) has its own, cut to the canvas."""
    grow = (patch.shape[0] - DIGIT_SIZE) // 2
    row, col = top - grow, left - grow
    seen = patch[max(-row, 0) : SIZE - row, max(-col, 0) : SIZE - col]
    # All channels alike: numpy is several times slower where it has to repeat one.
    canvas = np.zeros((SIZE, SIZE, 3), dtype=patch.dtype)
    row, col = max(row, 0), max(col, 0)
    canvas[row : row + seen.shape[0], col : col + seen.shape[1]] = seen[..., None]
    return canvas


def _crop(background: int, rng: np.random.Generator) -> NDArray[np.float32]:
    photo, (left, top, right, bottom) = list(BACKGROUNDS.values())[background]
    row = int(rng.integers(top, bottom - SIZE + 1))
    col = int(rng.integers(left, right - SIZE + 1))
    whole, mirrored = _photograph(photo)
    if rng.integers(2):
        whole, col = mirrored, whole.shape[1] - SIZE - col
    return whole[row : row + SIZE, col : col + SIZE]


@lru_cache
def _tints() -> NDArray[np.float32]:
    """The colors as images, (n, 64, 64, 3)."""
    colors = np.asarray(list(COLORS.values()), dtype=np.float32)
    return np.broadcast_to(colors[:, None, None], (len(colors), SIZE, SIZE, 3)).copy()


@lru_cache
def _photograph(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One of scikit-learn's photographs at half its size, in [0, 1], and mirrored."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image(name))
    half = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
    pixels = np.asarray(half, dtype=np.float32) / 255.0
    return pixels, np.ascontiguousarray(pixels[:, ::-1])


@lru_cache
def _handwriting(split: Split) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """For each digit its mattes (n, 44, 44) and halos (n, 60, 60), both in [0, 1]."""
    from PIL import Image
    from scipy.ndimage import gaussian_filter
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.Generator(np.random.PCG64(20260512)).permutation(len(digits.target))
    cut = round(len(order) * HELD_OUT_DIGITS)
    chosen = order[:cut] if split == "heldout" else order[cut:]
    result = []
    for digit in range(len(DIGITS)):
        mattes, halos = [], []
        for index in sorted(chosen[digits.target[chosen] == digit].tolist()):
            small = Image.fromarray(digits.images[index].astype(np.float32) / 16.0)
            large = np.asarray(small.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC))
            matte = (1.0 / (1.0 + np.exp(-14.0 * (large - 0.45)))).astype(np.float32)
            mattes.append(matte)
            halos.append(np.clip(1.6 * gaussian_filter(np.pad(matte, 8), 2.5), 0.0, 1.0))
        result.append((np.stack(mattes), np.stack(halos)))
    return result
