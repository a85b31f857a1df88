"""Captioned images from a dataset of the Hub, or from one on disk, through the optional ``datasets`` package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from liftkit.checkpoint.files import expanded, reason
from liftkit.data.captions import plain_caption
from liftkit.data.picture_errors import PictureError
from liftkit.data.pictures import open_picture_file
from liftkit.data.source import EncodedSource, file_stamp
from liftkit.errors import UsageError
from liftkit.tally import Tally

TABLES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}


class HubDataset(EncodedSource):
    """Rows of a dataset.

    Args:
        path: a Hub id, a folder that ``save_to_disk`` wrote or ``load_dataset`` reads, or a table (.parquet, .csv,
            .jsonl).
        split: which one; a table has only ``train``.
        image_column: pictures, their bytes, or their paths (relative ones from the table's folder).
        caption_column: text; of a list the first. None for no captions.

    Raises:
        UsageError: if the package, the dataset or a column is missing.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image_column: str = "image",
        caption_column: str | None = "text",
    ) -> None:
        self.path, self.split = str(path), split
        rows = _load(self.path, split)
        for column in (image_column, caption_column):
            if column is not None and column not in rows.column_names:
                raise UsageError(_no_column(self.path, column, rows.column_names))
        if not len(rows):
            raise UsageError(f"{path}: the split {split!r} holds no row")
        self.name = Path(self.path).name
        self.tally, self.texts = Tally("images"), [Tally("captions", used=len(rows))]
        self.image_column, self.caption_column = image_column, caption_column
        self.images = _undecoded(rows, image_column)
        self.captions = None if caption_column is None else rows.select_columns([caption_column])
        if self.captions is None:
            self.texts = []
        self.fingerprint = rows._fingerprint
        place = expanded(self.path)
        self.folder = place if place.is_dir() else place.parent

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return f"{self.name}[{index}]"

    def stamp(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        value = self.images[index][self.image_column]
        path = self._file(value)
        return f"{self.fingerprint}|{index}" if path is None else file_stamp(path, self.label(index))

    @contextmanager
    def open(self, index: int) -> Iterator[IO[bytes]]:
        """See :class:`EncodedSource`."""
        value = self.images[index][self.image_column]
        path = self._file(value)
        if path is not None:
            with open_picture_file(path, self.label(index)) as file:
                yield file
            return
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            found = "nothing" if content is None else type(content).__name__
            raise PictureError(self.label(index), "no picture in its row", f"found {found}")
        yield BytesIO(content)

    def caption(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        if self.captions is None:
            return ""
        value = self.captions[index][self.caption_column]
        names = getattr(self.captions.features[self.caption_column], "names", None)
        if names is not None and isinstance(value, int) and 0 <= value < len(names):
            value = names[value]  # a column of classes has their numbers
        found = plain_caption(value)
        if not found:
            kind = (
                "empty"
                if value is None or isinstance(value, str) or not value
                else f"no text but {type(value).__name__}"
            )
            if self.label(index) not in self.texts[0].left_out.get(kind, {}):
                self.texts[0].leave_out(self.label(index), kind)
                self.texts[0].use(-1)
        return found

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {"source": "dataset", "name": self.name, "images": len(self), "split": self.split}

    def _file(self, value: Any) -> Path | None:
        """The file that a row points to, or None where it holds the picture itself."""
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else None
        return self.folder / value if isinstance(value, str) else None


def _load(path: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{path}: needs the package 'datasets', which is missing; pip install datasets") from error
    place = expanded(path)
    try:
        if place.is_file():
            if place.suffix not in TABLES:
                raise UsageError(f"{path}: unknown kind of table; expected {', '.join(TABLES)}, or a folder")
            return datasets.load_dataset(TABLES[place.suffix], data_files=str(place), split=split)
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            return _split(path, datasets.load_from_disk(str(place)), split)
        return datasets.load_dataset(str(place) if place.is_dir() else path, split=split)
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"{path}: 'datasets' cannot load the split {split!r} ({reason(error)})") from error


def _split(path: str, found: Any, split: str) -> Any:
    """One split of what a folder holds, which is either all of them or only one."""
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise UsageError(f"{path}: no split {split!r}; it has {', '.join(found)}")
    return found[split]


def _undecoded(rows: Any, column: str) -> Any:
    """The column of pictures as bytes or paths."""
    import datasets

    images = rows.select_columns([column])
    if isinstance(images.features[column], datasets.Image):
        images = images.cast_column(column, datasets.Image(decode=False))
    return images


def _no_column(path: str, column: str, columns: list[str]) -> str:
    close = get_close_matches(column, columns, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"{path}: no column {column!r}{hint}; it has {', '.join(columns)}"
