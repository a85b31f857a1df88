"""Shared fixtures; offline, seeded, one thread per worker and weights where torch puts them, unless options say otherwise."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from liftkit.data import demo
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.recipe_file import load_recipe
from tests import tiny
from tests.alignment import misalign_weights
from tests.training import TEXT


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("liftkit")
    group.addoption("--threads", type=int, default=1, help="CPU threads of a test process (%(default)s); 0: all")
    group.addoption("--misaligned", action="store_true", help="weights begin 4 bytes late: see tests/alignment.py")
    group.addoption("--gpu-device", default="cuda", help="where the tests marked gpu run (%(default)s); cpu tries them")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that runs the tests in the background hands down an ignored Ctrl-C, and the tests of Ctrl-C need theirs.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--misaligned"):
        misalign_weights()
    _set_threads(config)


def _set_threads(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads") or os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def _seeded(pytestconfig: pytest.Config) -> None:
    torch.manual_seed(0)
    # Again, because tests change it; what a whole session shares is made before, with as many.
    _set_threads(pytestconfig)


@pytest.fixture(scope="session", params=sorted(tiny.PIPELINES))
def architecture(request: pytest.FixtureRequest) -> str:
    """Name of each tiny pipeline in turn."""
    return request.param


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny latent pipelines on disk; not to be changed."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.save(make(), root / name) for name, make in tiny.PIPELINES.items()}


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty smooth images of several sizes and formats, nested."""
    root = tmp_path_factory.mktemp("images")
    (root / "inner").mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        size = (16 + 4 * (index % 3), 20)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        kind = ("png", "jpg", "webp", "bmp")[index % 4]
        small.resize(size, Image.Resampling.BICUBIC).save(
            root / ("inner" if index % 2 else ".") / f"{index:02d}.{kind}"
        )
    return root


@pytest.fixture(scope="session")
def converted(
    model_folders: dict[str, Path], image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The tiny pipelines, converted through the public function; not to be changed."""
    import liftkit

    root = tmp_path_factory.mktemp("converted")
    for name, folder in model_folders.items():
        liftkit.convert(str(folder), root / name, images=str(image_folder), device="cpu")
    return {name: root / name for name in model_folders}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout and stderr (unwrapped)."""
    from rich.console import Console

    from liftkit.cli import app, console

    for name, stderr in (("out", False), ("err", True)):
        wide = Console(stderr=stderr, width=1000, highlight=False, soft_wrap=True, emoji=False, markup=False)
        monkeypatch.setattr(console, name, wide)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["liftkit", *map(str, arguments)])
        capsys.readouterr()
        try:
            app.run()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def pixel_klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded tiny-klein, converted; not to be changed."""
    import liftkit
    from liftkit.embedded import TINY_KLEIN

    folder = tmp_path_factory.mktemp("klein") / "pixel"
    liftkit.convert(str(TINY_KLEIN), folder, images="demo", num_images=48, proof_steps=2, device="cpu")
    return folder


@pytest.fixture(scope="session")
def gpu(pytestconfig: pytest.Config) -> str:
    """The device of a test marked ``gpu``."""
    chosen: str = pytestconfig.getoption("--gpu-device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return chosen


@pytest.fixture
def klein(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny klein that a test may spoil."""
    return Path(shutil.copytree(model_folders["flux2"], tmp_path / "klein"))


@pytest.fixture
def lift_file(tmp_path: Path) -> Path:
    tiny.lift().save(tmp_path / "given.safetensors")
    return tmp_path / "given.safetensors"


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder that holds outputs alone."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


@pytest.fixture(scope="session")
def run_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded once for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(pixel_klein: Path, run_cache: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes of a few steps; overrides as on the command line."""

    def recipe(name: str, *overrides: str) -> Recipe:
        file = tmp_path / f"{name}.yaml"
        threads = torch.get_num_threads()
        file.write_text(TEXT.format(model=pixel_klein, output=tmp_path / name, cache=run_cache, threads=threads))
        return load_recipe(file, overrides)

    return recipe


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve demo images in a folder, two of them unreadable."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(demo.image_at(index)[0]).save(folder / f"{index:02d}.png")
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:200])
    return folder
