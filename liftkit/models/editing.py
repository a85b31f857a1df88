"""Pictures in sampling: a start image in the place of noise alone, and reference images beside what is painted.

A start image works with every pipeline that paints from noise: the scheduler begins later, at the noised image (see
:class:`~liftkit.models.scheduler.LiftedScheduleMixin`). Reference images are tokens of their own, for the stock pipelines that
the registry names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.model import ModelFolder
from liftkit.color import to_signed
from liftkit.data.images import covered
from liftkit.data.pictures import PictureError, open_picture_file, read_picture
from liftkit.errors import UsageError
from liftkit.models.flow import FlowModel
from liftkit.models.latents import LatentSpace
from liftkit.models.registry import architecture, architectures
from liftkit.options import Pictures, SampleOptions

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST, LONGEST = 64, 8
"""Of a reference image: its smaller side in pixels at least, and how often the other may hold that, as FLUX.2's pipelines ask."""
WHOLE = 1 << 20
"""A resolution at which no picture is decoded at a reduced size."""


def check_pictures(folder: ModelFolder, pictures: Pictures) -> None:
    """Raise unless pictures can be read and the model takes them; nothing of it is loaded.

    Raises:
        UsageError: naming the flag.
    """
    name, count = str(folder.index["_class_name"]), len(pictures.references)
    kind = folder.class_of("transformer")
    spec = None if kind is None else architecture(kind)
    allowed = range(1) if spec is None else spec.references.get(name, range(1))
    if count and len(allowed) == 1 and not allowed.start:
        others = sorted(pipeline for each in architectures().values() for pipeline in each.references)
        raise UsageError(f"--reference: {name} takes no reference images; pipelines that do: {', '.join(others)}")
    if count not in allowed:
        wanted = "edits pictures: give it one by --reference" if not count else f"takes at most {allowed[-1]}"
        raise UsageError(f"--reference: {name} {wanted}; {count} given")
    if pictures.image is not None:
        read("--image", pictures.image)
    for path in pictures.references:
        image = read("--reference", path)
        if min(image.size) < SMALLEST or max(image.size) > LONGEST * min(image.size):
            raise UsageError(
                f"--reference {path}: {image.width} x {image.height} pixels; expected at least {SMALLEST} a side, and sides of "
                f"at most {LONGEST} : 1; crop or enlarge it"
            )


def read(flag: str, path: Path) -> Image:
    """A picture in sRGB.

    Raises:
        UsageError: if it is none.
    """
    try:
        with open_picture_file(expanded(path), str(path)) as file:
            return read_picture(file, str(path), WHOLE)
    except PictureError as error:
        raise UsageError(f"{flag} {error}") from error


def size_for(options: SampleOptions, side: int, multiple: int) -> tuple[int, int]:
    """Height and width of the images in pixels.

    What is not given follows the shape of the start image, or else of the first reference image, at the model's own number of
    pixels.

    Args:
        options: say what is given.
        side: of the square images that the model was made for.
        multiple: of which sides have to be.
    """
    pictures, height, width = options.pictures, options.height, options.width
    shapes = [*([] if pictures.image is None else [("--image", pictures.image)])]
    shapes += [("--reference", path) for path in pictures.references[:1]]
    if not shapes or (height and width):
        return height or side, width or side
    image = read(*shapes[0])
    ratio = image.width / image.height

    def whole(length: float) -> int:
        return max(round(length / multiple), 1) * multiple

    if height or width:
        return height or whole((width or side) / ratio), width or whole((height or side) * ratio)
    return whole(side / math.sqrt(ratio)), whole(side * math.sqrt(ratio))


def start_from(pipeline: Any, flow: FlowModel, path: Path, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """What gives the clean state of a start image, of a pipeline's noise in whatever layout that is.

    Args:
        pipeline: a stock one, latent or pixel.
        flow: its transformer.
        path: of the picture, which is made to cover the size and cropped about its center.
        height, width: of what is painted, in pixels.
    """
    images = to_signed(covered(read("--image", path), height, width))[None].to(pipeline._execution_device)
    if flow.is_pixel:
        state = pipeline.vae.color.encode(images)
    else:
        state = LatentSpace(pipeline.vae, flow.architecture.latent_statistics).encode(images)
    return lambda noise: flow.running_state(state.expand(len(noise), -1, -1, -1), noise)


def reference_arguments(paths: tuple[Path, ...], known: Any, height: int, width: int) -> dict[str, Any]:
    """What a stock pipeline is given for reference images.

    Args:
        paths: of the images.
        known: names of the arguments of its call.
        height, width: of what is painted; Kontext would take another size of about a megapixel.
    """
    if not paths:
        return {}
    images = [read("--reference", path) for path in paths]
    area = {"max_area": height * width} if "max_area" in known else {}
    return {"image": images if len(images) > 1 else images[0], **area}
