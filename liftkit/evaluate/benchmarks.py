"""Prompt files of benchmarks of text-to-image models, each read into the layout of its folder.

They are the benchmarks' own, which their users fetch; nothing of them is shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from liftkit.checkpoint.text import lines, read_json, read_text
from liftkit.data.captions import CAPTION_KEYS, caption_of, check_characters
from liftkit.errors import UsageError
from liftkit.evaluate.layouts import Item, Layout
from liftkit.tally import Tally

NAME_LIMIT = 200
"""Bytes of a name that a benchmark's file prescribes."""
_TAKEN = ("generate.json", "metadata.jsonl")


def read_layout(name: str, path: Path) -> Layout:
    """The layout of a benchmark, from its own prompt files.

    Args:
        name: ``geneval``: GenEval's ``evaluation_metadata.jsonl``. ``dpg``: DPG-Bench's folder of ``.txt`` files, one
            prompt each. ``hpsv3``: a benchmark file of HPDv3, or the folder of them. ``coco``: a captions file of COCO.
        path: of the file or folder.

    Raises:
        UsageError: if it is not there, is of another kind, or holds an entry that is not as the benchmark's are.
    """
    folder = name == "dpg" or (name == "hpsv3" and path.is_dir())
    if not (path.is_dir() if folder else path.is_file()):
        kind = {"dpg": "the folder of .txt files", "hpsv3": "a .json file or the folder of them"}.get(name, "its file")
        raise UsageError(f"--prompts {path}: not there, or of the wrong kind; for --layout {name} give {kind}")
    layout = {"geneval": _geneval, "dpg": _dpg, "hpsv3": _hpsv3, "coco": _coco}[name](path)
    if not layout.items:
        raise UsageError(f"--prompts {path}: holds no prompt ({layout.tally.summary() or 'it is empty'})")
    _check_names(layout, path)
    return layout


def _geneval(path: Path) -> Layout:
    """``00000/samples/0000.png`` to ``0003.png``, with the prompt's line of metadata and a grid."""
    items: list[Item] = []
    for number, line in lines(read_text(path)):
        where = f"--prompts {path}:{number}"
        entry = _parsed(line, where)
        for key in ("tag", "prompt", "include"):
            if not isinstance(entry, dict) or key not in entry:
                raise UsageError(
                    f"{where}: no {key!r}; expected a line of GenEval's metadata with tag, prompt, include"
                )
        own = f"{len(items):05d}"
        samples = tuple(f"{own}/samples/{each:04d}.png" for each in range(4))
        texts = {f"{own}/metadata.jsonl": json.dumps(entry) + "\n"}
        items.append(Item(_prompt(entry, where, "prompt"), samples, texts, f"{own}/grid.png"))
    return Layout("geneval", items, Tally("lines of metadata", used=len(items)))


def _dpg(path: Path) -> Layout:
    """``images/NAME.png``, a grid of two by two, for ``NAME.txt``; the samples lie in ``samples``, for all else in
    ``images`` would be taken for a grid."""
    items: list[Item] = []
    tally = Tally("files of prompts")
    for each in sorted(path.iterdir()):
        if each.suffix.lower() != ".txt":
            tally.leave_out(each.name, "no .txt file")
            continue
        where, own = f"--prompts {each}", each.stem
        if "." in own:
            raise UsageError(f"{where}: DPG-Bench takes a name up to its first point, so that none may stand in it")
        text = read_text(each).strip()
        samples = tuple(f"samples/{_name(own, where)}/{number}.png" for number in range(4))
        items.append(Item(_prompt({"text": text}, where, "text"), samples, grid=f"images/{own}.png"))
        tally.use()
    return Layout("dpg", items, tally)


def _hpsv3(path: Path) -> Layout:
    """``CATEGORY/NAME.png`` beside ``NAME.txt``, which holds the prompt; NAME is that of the entry's ``image_file``."""
    items: list[Item] = []
    tally = Tally("prompts")
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        found = _parsed(read_text(file), f"--prompts {file}")
        if not isinstance(found, list):
            raise UsageError(f"--prompts {file}: expected a list of entries, found {type(found).__name__}")
        for number, entry in enumerate(found, start=1):
            where = f"--prompts {file}:{number}"
            if not isinstance(entry, dict):
                raise UsageError(f"{where}: expected category, image_file and caption, found {str(entry)[:60]!r}")
            category = _name(entry.get("category"), f"{where}: category")
            image = entry.get("image_file")
            stem = PurePosixPath(image).stem if isinstance(image, str) else image
            own = f"{category}/{_name(stem, f'{where}: image_file')}"
            prompt = _prompt(entry, where)
            items.append(Item(prompt, (f"{own}.png",), {f"{own}.txt": prompt}))
            tally.use()
    return Layout("hpsv3", items, tally)


def _coco(path: Path) -> Layout:
    """``images/NAME.png`` after the photograph's file, and ``captions.json`` with the captions that were painted.

    Of a photograph's captions the one of the lowest id is painted; the rest are counted.
    """
    found, tally = read_json(path), Tally("captions")
    names: dict[int, str] = {}
    for number, entry in enumerate(_list(found, "images", path), start=1):
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            raise UsageError(f"--prompts {path}: image {number} has no whole number as id")
        file = entry.get("file_name", f"{entry['id']:012d}.jpg")
        stem = PurePosixPath(file).stem if isinstance(file, str) else file
        names[entry["id"]] = _name(stem, f"--prompts {path}: image {number}: file_name")
    first: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(_list(found, "annotations", path), start=1):
        ids = [entry.get(key) for key in ("id", "image_id")] if isinstance(entry, dict) else [None]
        if any(type(each) is not int for each in ids) or ids[1] not in names:
            raise UsageError(
                f"--prompts {path}: annotation {number}: expected id, caption and the image_id of an image"
            )
        chosen = first.setdefault(entry["image_id"], entry)
        if chosen is not entry:
            if entry["id"] < chosen["id"]:
                first[entry["image_id"]] = entry
            tally.leave_out(f"annotation {max(entry['id'], chosen['id'])}", "a further caption of the same image")
    items: list[Item] = []
    captions: dict[str, dict[str, Any]] = {}
    for image in sorted(first):
        entry, own = first[image], f"images/{names[image]}.png"
        prompt = _prompt(entry, f"--prompts {path}: annotation {entry['id']}", "caption")
        items.append(Item(prompt, (own,)))
        captions[own] = {"id": entry["id"], "image_id": image, "caption": prompt, "file_name": f"{names[image]}.png"}
        tally.use()
    for image in sorted(names.keys() - first.keys()):
        tally.leave_out(f"image {image}", "missing, as the image has none")
    return Layout("coco", items, tally, captions)


def _check_names(layout: Layout, path: Path) -> None:
    """Raise where two samples would share a file, also on disks that do not tell capitals from small letters."""
    seen: dict[str, str] = {}
    for name in _all_names(layout):
        if (other := seen.setdefault(name.casefold(), name)) and other is not name:
            raise UsageError(
                f"--prompts {path}: two prompts are called {PurePosixPath(name).with_suffix('')}; rename one"
            )


def _all_names(layout: Layout) -> Iterator[str]:
    for item in layout.items:
        yield from item.samples


def _name(found: Any, where: str) -> str:
    """A name from a benchmark's file, if it can be that of one file or folder and no more."""
    bad = not isinstance(found, str) or not found.strip(" .") or found.casefold() in _TAKEN
    if bad or found.startswith(".") or any(each in '/\\:*?"<>|' or not each.isprintable() for each in found):
        raise UsageError(f"{where}: {str(found)[:60]!r} cannot be the name of a file")
    if len(found.encode()) > NAME_LIMIT:
        raise UsageError(f"{where}: {str(found)[:60]!r} cannot be the name of a file")
    return str(found)


def _prompt(entry: dict[str, Any], where: str, *keys: str) -> str:
    value = entry.get(keys[0]) if keys else caption_of(entry)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: no prompt; expected {' or '.join(keys or CAPTION_KEYS)}, found {str(entry)[:60]!r}")
    check_characters({"prompt": value}, where)
    return value.strip()


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no valid JSON, found {text[:60].strip()!r}") from error


def _list(found: dict[str, Any], key: str, path: Path) -> list[Any]:
    value = found.get(key)
    if not isinstance(value, list):
        raise UsageError(f"--prompts {path}: no list of {key}; expected a captions file of COCO")
    return value
