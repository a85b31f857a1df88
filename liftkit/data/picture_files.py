"""Which files of a folder are pictures, and which are left out and why."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from liftkit.data.picture_errors import NO_PERMISSION, PictureError
from liftkit.data.picture_kinds import ENDINGS, HEAD, NOT_READ, TEXTS, format_of
from liftkit.data.pictures import open_picture_file
from liftkit.tally import Tally

HIDDEN = "hidden, or another program's"
MASK = "a mask of the picture beside it, by its name"
_MASK = re.compile(r"[-_](?:mask|masklabel|condlabel)$", re.IGNORECASE)
_FOREIGN = {"__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
_FOREIGN_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}


@dataclass
class Folder:
    """The files of a folder and of all folders in it.

    Args:
        root: the folder.
        pictures: its pictures, in the order of their names.
        others: all its other files that are not hidden, in the order of their names.
        tally: of pictures; what is used is counted when it is read.
    """

    root: Path
    pictures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    tally: Tally = field(default_factory=lambda: Tally("images"))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name (no path) is no data: hidden, or what other programs leave in folders."""
    small = name.lower()
    return name.startswith(".") or small in _FOREIGN or small in _FOREIGN_FILES


def picture_ending(name: str) -> str:
    """The ending of a file's name in small letters, with its dot; empty where it has none."""
    stem, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def scan(root: Path) -> Folder:
    """Find the pictures below a folder.

    A file whose name has a picture's ending is one, and so is any other whose content begins as a picture does, unless its
    ending says that it is something else. Links to folders are followed, each folder once.
    """
    found = Folder(root)
    seen: set[tuple[int, int]] = set()
    _walk(root, found, seen)
    _leave_out_masks(found)
    found.pictures.sort()
    found.others.sort()
    return found


def _walk(folder: Path, found: Folder, seen: set[tuple[int, int]]) -> None:
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            reason = NO_PERMISSION if isinstance(error, PermissionError) else f"not readable ({error.strerror})"
            found.tally.leave_out(f"{_name(folder, found)}/", reason)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link to a folder that was read
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = folder / entry.name
            if _is_folder(entry):
                if is_hidden(entry.name):
                    found.tally.leave_out(f"{_name(path, found)}/", HIDDEN)
                else:
                    waiting.append(path)
            else:
                _file(path, found)


def _leave_out_masks(found: Folder) -> None:
    """Take ``a_mask.png`` for a mask where there is a picture ``a``: trainers that have masks keep them so."""
    stems = {path.with_suffix("") for path in found.pictures}
    whose = {path: _MASK.sub("", path.stem) for path in found.pictures}
    masks = [path for path, of in whose.items() if of not in ("", path.stem) and path.with_name(of) in stems]
    for path in sorted(masks):
        found.tally.leave_out(_name(path, found), MASK)
        found.pictures.remove(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _file(path: Path, found: Folder) -> None:
    ending, name = picture_ending(path.name), _name(path, found)
    if is_hidden(path.name):
        if ending in ENDINGS:
            found.tally.leave_out(name, HIDDEN)
    elif ending in ENDINGS:
        if path.is_symlink() and not path.exists():
            found.tally.leave_out(name, "a link that leads nowhere")
        else:
            found.pictures.append(path)
    elif ending in NOT_READ:
        found.tally.leave_out(name, NOT_READ[ending])
    elif ending not in TEXTS and _is_picture(path):
        found.pictures.append(path)
    else:
        found.others.append(path)


def _is_picture(path: Path) -> bool:
    """Whether a file without a known ending begins as a picture does."""
    try:
        with open_picture_file(path, path.name) as file:
            return format_of(file.read(HEAD)) is not None
    except (PictureError, OSError):
        return False


def _name(path: Path, found: Folder) -> str:
    return path.relative_to(found.root).as_posix()
