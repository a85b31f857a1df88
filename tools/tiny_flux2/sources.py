"""What the demo images are drawn from, in one file, for a machine without scikit-learn and scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from liftkit.data import demo

PACKED = Path("demo-sources.npz")
SPLITS: tuple[demo.Split, ...] = ("train", "heldout")
PHOTOGRAPHS = sorted({photo for photo, _ in demo.BACKGROUNDS.values()})


def pack() -> None:
    """Write :data:`PACKED` where the libraries are; in half precision, by which pixels differ by one gray level at most."""
    arrays: dict[str, NDArray[np.float16]] = {}
    for photo in PHOTOGRAPHS:
        arrays[photo] = demo._photograph(photo)[0].astype(np.float16)
    for split in SPLITS:
        for digit, (mattes, halos) in enumerate(demo._handwriting(split)):
            arrays[f"{split}-{digit}-mattes"] = mattes.astype(np.float16)
            arrays[f"{split}-{digit}-halos"] = halos.astype(np.float16)
    np.savez_compressed(PACKED, allow_pickle=False, **arrays)


def use_where_needed() -> None:
    """Draw from the packed file where the libraries are missing."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError:
        packed = np.load(PACKED)
        photographs = {photo: packed[photo].astype(np.float32) for photo in PHOTOGRAPHS}
        written = {
            split: [
                tuple(packed[f"{split}-{digit}-{kind}"].astype(np.float32) for kind in ("mattes", "halos"))
                for digit in range(len(demo.DIGITS))
            ]
            for split in SPLITS
        }
        mirrored = {photo: np.ascontiguousarray(image[:, ::-1]) for photo, image in photographs.items()}
        demo._photograph = lambda name: (photographs[name], mirrored[name])  # type: ignore[assignment]
        demo._handwriting = lambda split: written[split]  # type: ignore[assignment,return-value]
