"""What a fit will find in a folder, before it begins."""

from __future__ import annotations

from liftkit.data.images import ImageFolder, prefetch
from liftkit.data.picture_errors import TOO_SMALL, PictureError
from liftkit.data.pictures import Look, look, open_picture_file
from liftkit.tally import Tally


def survey(folder: str, count: int, seed: int, multiple: int) -> Tally:
    """What a fit on a folder will find, from the headers of its pictures alone.

    Args:
        folder: of ``--images``.
        count: how many pictures will be taken at most; no others are looked at.
        seed: of their order.
        multiple: the smallest side that will do, in pixels.

    Raises:
        UsageError: if the folder is missing or holds no picture.
    """
    source = ImageFolder(folder, count, seed)

    def header(place: int) -> Look:
        name = source.files[place].relative_to(source.path).as_posix()
        with open_picture_file(source.files[place], name) as file:
            return look(file, name)

    for place, future in prefetch(header, range(len(source))):
        name = source.files[place].relative_to(source.path).as_posix()
        try:
            seen = future.result()
        except PictureError as error:
            source.tally.leave_out(name, error.reason)
            continue
        if min(seen.height, seen.width) < multiple:
            source.tally.leave_out(name, TOO_SMALL)
        else:
            source.tally.use()
            source.tally.remark(name, seen.remark)
    return source.tally
