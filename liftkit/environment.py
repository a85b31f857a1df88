"""What a machine offers to liftkit: packages, devices, memory, disk, the Hub's cache. Everything as plain data."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

OPTIONAL = {
    "bitsandbytes": ("bitsandbytes", "optimizer adamw8bit"),
    "datasets": ("'liftkit[data]'", "Hub datasets"),
    "gradio": ("'liftkit[try]'", "liftkit try"),
    "pillow-heif": ("'liftkit[pictures]'", "HEIC pictures"),
    "pillow-jxl-plugin": ("'liftkit[pictures]'", "JPEG XL pictures"),
    "lpips": ("'liftkit[lpips]'", "perceptual loss"),
    "tensorboard": ("tensorboard", "tracker"),
    "torchao": ("torchao", "int8 weights"),
    "trackio": ("trackio", "tracker"),
    "wandb": ("wandb", "tracker"),
}
"""What pip installs, and what it is for."""


@dataclass(frozen=True)
class Package:
    """A package that liftkit needs.

    Args:
        name: as pip knows it.
        version: installed; None if it is not.
        needed: the versions that will do, such as ``>=2.6``; empty for any.
        problem: what is wrong and what to do, on one line; empty if nothing is.
    """

    name: str
    version: str | None
    needed: str = ""
    problem: str = ""


@dataclass
class Environment:
    """What was found.

    Args:
        liftkit: its version.
        python: version; ``platform``: operating system and processor.
        packages: what liftkit needs.
        optional: versions of what it can use, by name; None where it is not installed.
        devices: one entry each: ``device``, ``name``, ``memory`` and ``free`` in bytes (None where they are unknown), and
            ``compute`` of a GPU; in the order in which ``--device auto`` looks at them.
        device: what ``--device auto`` takes; None if torch is missing.
        memory: ``total`` and ``available`` bytes, the latter within the container's limit.
        disk: for ``here`` and ``cache``: ``path``, ``free`` and ``total`` bytes, ``writable``.
        hub: ``cache``, ``offline``, and ``token``: where one is set, never what it is; None where there is none.
        threads: ``cpus`` of the machine, ``usable`` by this process, those of ``torch``, and ``OMP_NUM_THREADS``.
        problems: what keeps liftkit from working and what to do, a line each.
        notes: what is worth knowing, a line each.
    """

    liftkit: str
    python: str
    platform: str
    packages: list[Package]
    optional: dict[str, str | None]
    devices: list[dict[str, Any]] = field(default_factory=list)
    device: str | None = None
    memory: dict[str, int] | None = None
    disk: dict[str, dict[str, Any]] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    threads: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"packages": {each.name: each.version for each in self.packages}}


def examine() -> Environment:
    """Look at everything. Nothing is downloaded or written."""
    from liftkit import __version__

    found = Environment(
        liftkit=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()}, {platform.machine()}",
        packages=required(),
        optional={name: installed(name) for name in OPTIONAL},
    )
    found.problems += _python_problem(found.python)
    found.problems += [package.problem for package in found.packages if package.problem]
    found.threads = {"cpus": os.cpu_count(), "usable": _usable_cpus(), "torch": None}
    found.threads["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS")
    torch = _load("torch", found)
    if torch is not None:
        found.threads["torch"] = torch.get_num_threads()
        from liftkit.device import choose_device

        found.devices, found.device = _gpus(torch, found.notes), choose_device("auto")[0]
    found.memory = _memory()
    found.devices.append(_processor(found.memory))
    _hub(found)
    found.disk["here"] = _disk(Path.cwd())
    for place, what in (("here", "the current folder"), ("cache", "the Hub's cache")):
        if place in found.disk and not found.disk[place]["writable"]:
            found.notes.append(f"{what} cannot be written to: {found.disk[place]['path']}")
    return found


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def required() -> list[Package]:
    """What liftkit's own metadata says it needs, in alphabetical order."""
    try:
        lines = [line for line in metadata.requires("liftkit") or [] if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return [
            Package("liftkit", None, problem="liftkit: runs from its source, not installed; pip install -e . there")
        ]
    return sorted((_package(line) for line in lines), key=lambda package: package.name)


def _package(line: str) -> Package:
    """One line of requirements, such as ``torch>=2.6``, against what is there."""
    matched = re.match(r"([\w.-]+)\s*([^;]*)", line)
    assert matched is not None
    name, needed = matched[1], matched[2].strip()
    version = installed(name)
    advice = f"pip install '{name}{needed}'"
    if version is None:
        return Package(name, None, needed, f"{name}: not installed, needed{needed and f' {needed}'}; {advice}")
    if not _is_enough(version, needed):
        return Package(name, version, needed, f"{name}: {version} is installed, needed {needed}; {advice}")
    return Package(name, version, needed)


def _is_enough(version: str, needed: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # it comes with packages that are then missing themselves, which is reported
        return True
    return SpecifierSet(needed).contains(version, prereleases=True)


def _python_problem(version: str) -> list[str]:
    try:
        needed = metadata.metadata("liftkit")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return []
    if _is_enough(version, needed):
        return []
    return [f"python: this is {version}, needed {needed}; make a virtual environment with another python"]


def _load(name: str, found: Environment) -> Any:
    """A package that has to be imported to be asked; one that is there and cannot be is a problem of its own."""
    if installed(name) is None:
        return None
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # a shared library that is missing is an OSError
        reason = " ".join(str(error).split())
        found.problems.append(
            f"{name}: {installed(name)} is installed and cannot be imported ({reason}); pip install --force-reinstall {name}"
        )
        return None


def _gpus(torch: Any, notes: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(index)
            entry = {"device": f"cuda:{index}", "name": known.name, "memory": known.total_memory, "free": None}
            try:
                entry["free"] = torch.cuda.mem_get_info(index)[0]
            except RuntimeError as error:
                notes.append(f"cuda:{index}: cannot be used now ({str(error).splitlines()[0]})")
            found.append(entry | {"compute": f"{known.major}.{known.minor}"})
    elif shutil.which("nvidia-smi"):
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        notes.append(f"nvidia-smi is here, but torch {torch.__version__} sees no GPU; it {built}")
    if torch.backends.mps.is_available():
        entry = {"device": "mps", "name": platform.processor(), "free": None}
        found.append(entry | {"memory": torch.mps.recommended_max_memory(), "compute": None})
    return found


def _processor(memory: dict[str, int] | None) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        name = model[1] if model else name
    amounts = memory or {}
    return {
        "device": "cpu",
        "name": name,
        "memory": amounts.get("total"),
        "free": amounts.get("available"),
        "compute": None,
    }


def _memory() -> dict[str, int] | None:
    try:
        import psutil

        from liftkit.device import available_memory
    except ImportError:
        return None
    return {"total": psutil.virtual_memory().total, "available": available_memory("cpu")}


def _usable_cpus() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count()


def _hub(found: Environment) -> None:
    """Cache, offline mode, and whether there is a token: where it comes from, never what it is."""
    hub = _load("huggingface_hub", found)
    if hub is None:
        return
    from huggingface_hub import constants

    token = None
    if hub.get_token() is not None:
        named = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
        token = named[0] if named else "hf auth login"
    found.hub = {"cache": constants.HF_HUB_CACHE, "offline": constants.HF_HUB_OFFLINE, "token": token}
    found.disk["cache"] = _disk(Path(constants.HF_HUB_CACHE))


def _disk(path: Path) -> dict[str, Any]:
    """Of the file system that a folder is on, or would be on."""
    there = next(each for each in (path, *path.parents) if each.exists())
    usage = shutil.disk_usage(there)
    return {"path": str(path), "free": usage.free, "total": usage.total, "writable": os.access(there, os.W_OK)}
