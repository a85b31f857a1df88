"""Pictures as bytes, and how they are read."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from liftkit.data.picture_color import D65, matrix_profile
from liftkit.data.picture_errors import PictureError
from liftkit.data.pictures import read_picture

ADOBE = matrix_profile([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], D65, 563 / 256)
P3 = matrix_profile([(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)], D65, None)
RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
COLORS = np.stack([60 + RAMP // 2, 60 + RAMP.T // 2, np.full_like(RAMP, 90)], -1)


def encoded(array: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(content: bytes, resolution: int = 64) -> np.ndarray:
    image = read_picture(io.BytesIO(content), "picture", resolution)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(content: bytes, name: str = "picture") -> str:
    with pytest.raises(PictureError) as caught:
        read_picture(io.BytesIO(content), name, 64)
    return caught.value.reason


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
