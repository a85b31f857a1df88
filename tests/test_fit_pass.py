"""One pass over images: folds, parts and merges, resume, convergence, and images that will not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import liftkit
from liftkit.color import Oklab, to_signed
from liftkit.data.images import DemoImages
from liftkit.embedded import TINY_KLEIN
from liftkit.fit import engine, gallery
from liftkit.fit.engine import fit_pass
from liftkit.fit.folds import FoldedMoments, read_folds, write_folds
from liftkit.fit.pairs import EncodedImages
from liftkit.fit.stream import Pass, collect
from liftkit.lift import Lift
from liftkit.options import FitOptions
from liftkit.tokens import patchify
from tests import tiny
from tests.klein import demo_source, latent_space
from tests.test_fit import moments

Cli = Callable[..., tuple[int, str, str]]


def photographs(folder: Path, count: int) -> list[Path]:
    """Demo images as files."""
    from PIL import Image

    from liftkit.data import demo

    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(demo.image_at(index)[0]).save(path)
    return paths


def test_folds_hold_images_apart_and_add_up(tmp_path: Path) -> None:
    folded = FoldedMoments(tiny.RANK, tiny.DIM)
    z, x = (torch.randn(12, 7, size) for size in (tiny.RANK, tiny.DIM))
    for start in (0, 5):
        part = slice(start, start + (5 if start == 0 else 7))
        folded.update(z[part], x[part], torch.arange(12)[part])
    assert [fold.images for fold in folded.folds] == [3, 3, 2, 2, 2]
    torch.testing.assert_close(folded.total.cross, moments((z, x)).cross)
    for rest, fold in folded.splits():
        torch.testing.assert_close(rest.cross + fold.cross, folded.total.cross)
    write_folds(tmp_path / "m.safetensors", {"oklab": folded}, {"part": "1/1"})
    again, metadata = read_folds(tmp_path / "m.safetensors")
    assert metadata["part"] == "1/1"
    assert torch.equal(again["oklab"].total.pixel_gram, folded.total.pixel_gram)


def test_parts_merge_to_the_single_run(cli: Cli, tmp_path: Path) -> None:
    """Moments of eight machines equal those of one to 1e-12, whatever the batches."""
    common = ("fit", TINY_KLEIN, "--images", "demo", "--num-images", 37, "--device", "cpu")
    for part in range(1, 4):
        code, _, err = cli(*common, "--part", f"{part}/3", "--moments-out", tmp_path / f"{part}.safetensors")
        assert code == 0, err
    assert cli(*common, "--moments-out", tmp_path / "whole.safetensors")[0] == 0
    parts = [read_folds(tmp_path / f"{part}.safetensors")[0]["oklab"] for part in range(1, 4)]
    merged, whole = parts[0] + parts[1] + parts[2], read_folds(tmp_path / "whole.safetensors")[0]["oklab"]
    for name, tensor in whole.tensors().items():
        other = merged.tensors()[name]
        assert (other - tensor).abs().max() <= 1e-12 * tensor.abs().max(), name
    files = [tmp_path / f"{part}.safetensors" for part in range(1, 4)]
    assert cli("fit", "--merge", *files, "-o", tmp_path / "merged.safetensors")[0] == 0
    assert cli(*common, "--merge", *files, "-o", tmp_path / "pictured.safetensors")[0] == 0
    assert cli(*common, "-o", tmp_path / "single.safetensors")[0] == 0
    single, merged, pictured = (
        Lift.load(tmp_path / f"{name}.safetensors") for name in ("single", "merged", "pictured")
    )
    for lift in (merged, pictured):
        assert (lift.basis - single.basis).abs().max() < 1e-9
        assert lift.scale == pytest.approx(single.scale, rel=1e-12)
    assert merged.pictures == {}
    assert single.pictures.keys() == pictured.pictures.keys() == set(gallery.ROWS)
    other = ("fit", TINY_KLEIN, "--images", "demo", "--num-images", 40, "--device", "cpu", "--part", "3/3")
    assert cli(*other, "--moments-out", tmp_path / "other.safetensors")[0] == 0
    for wrong, expected in (
        (files[:2], "part 3/3 is missing"),
        (files[:1] * 2, "part 1/3 was already given"),
        ([tmp_path / "single.safetensors"], "no moments of liftkit"),
        ([*files, "--color", "srgb"], "not in srgb"),
        ([*files[:2], tmp_path / "other.safetensors"], "not of the same model, images"),
        ([], "no moments given"),
        ([*files, "--kind", "jacobian"], "needs a model beside the moments"),
    ):
        model = (TINY_KLEIN,) if not wrong else ()
        code, _, err = cli("fit", *model, "--merge", *wrong, "-o", tmp_path / "bad.safetensors")
        assert code == 2
        assert expected in err
    assert not (tmp_path / "bad.safetensors").exists()


def test_parts_of_different_orders_do_not_merge(cli: Cli, tmp_path: Path) -> None:
    """Another seed is another order: its parts would count some images twice and miss others."""
    (tmp_path / "images").mkdir()
    photographs(tmp_path / "images", 8)
    common = ("fit", TINY_KLEIN, "--images", tmp_path / "images", "--device", "cpu")
    for part, seed in ((1, 0), (2, 7)):
        out = tmp_path / f"{part}.safetensors"
        assert cli(*common, "--part", f"{part}/2", "--seed", seed, "--moments-out", out)[0] == 0
    code, _, err = cli(
        "fit", "--merge", tmp_path / "1.safetensors", tmp_path / "2.safetensors", "-o", tmp_path / "l.safetensors"
    )
    assert code == 2
    assert "not of the same model, images" in err


def test_an_interrupted_fit_resumes(tmp_path: Path) -> None:
    class Breaks(EncodedImages):
        def pairs(self, which: range) -> Iterator[Any]:
            for count, pair in enumerate(super().pairs(which)):
                if count == 2:
                    raise KeyboardInterrupt
                yield pair

    images, checkpoint = DemoImages(64), tmp_path / ".lift.moments"
    with pytest.raises(KeyboardInterrupt):
        collect(Pass(Breaks(latent_space(), images, 64, 2), ("oklab",), 2, checkpoint=checkpoint))
    assert checkpoint.exists()
    resumed = collect(Pass(EncodedImages(latent_space(), images, 64, 2), ("oklab",), 2, checkpoint=checkpoint))
    assert resumed.resumed == 32
    assert (
        collect(Pass(EncodedImages(latent_space(), images, 64, 2), ("oklab",), 2, checkpoint=checkpoint)).resumed == 64
    )
    whole = collect(Pass(EncodedImages(latent_space(), images, 64, 2), ("oklab",), 2))
    torch.testing.assert_close(resumed.any.total.cross, whole.any.total.cross, rtol=1e-12, atol=1e-12)
    assert resumed.any.total.images == 64


def test_moments_that_are_half_added_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two folds: a resumed run would count the first one's images twice."""
    update, calls = FoldedMoments.update, []

    def breaks(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(FoldedMoments, "update", breaks)
    checkpoint = tmp_path / ".lift.moments"
    images = Pass(
        EncodedImages(latent_space(), DemoImages(32), 64, 2), ("oklab",), 2, checkpoint=checkpoint, together=1
    )
    with pytest.raises(KeyboardInterrupt):
        collect(images)
    assert not checkpoint.exists()
    assert collect(images).any.total.images == 32


@pytest.mark.parametrize("together", [1, 1024, 10**9])
def test_batches_added_together_give_the_same_moments(together: int) -> None:
    """Odd sizes among them, which are batches of their own."""

    class Mixed(DemoImages):
        def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[Any]:
            for place, image in super().images(resolution, multiple, which):
                yield place, image[:, :, :48] if place in (3, 20, 21) else image

    source = EncodedImages(latent_space(), Mixed(37), 64, 2)
    found = collect(Pass(source, ("oklab",), 2, together=together))
    expected = [liftkit.TokenMoments(32, 192) for _ in range(5)]
    for places, latents, images in source.pairs(range(37)):
        for place, z, x in zip(places.tolist(), latents, images):
            expected[place % 5].update(patchify(z[None], 2), patchify(Oklab.plain(x[None]), 8))
    for ours, theirs in zip(found.any.folds, expected):
        assert (ours.count, ours.images) == (theirs.count, theirs.images)
        for name in liftkit.TokenMoments.SUMS:
            exact = getattr(theirs, name)
            assert (getattr(ours, name) - exact).abs().max() <= 1e-12 * exact.abs().max(), name


def test_a_checkpoint_of_other_data_is_not_resumed(tmp_path: Path) -> None:
    checkpoint = tmp_path / ".lift.moments"
    write_folds(checkpoint, {"oklab": FoldedMoments(32, 192)}, {"identity": "other", "part": "(0, 1)", "done": "8"})
    assert collect(Pass(demo_source(16), ("oklab",), 2, checkpoint=checkpoint)).resumed == 0


def test_auto_stops_when_halves_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    class Ears(engine.Silent):
        def note(self, text: str) -> None:
            heard.append(text)

    monkeypatch.setattr(engine.Convergence.__init__, "__defaults__", (0.99,))
    collection = fit_pass(demo_source(512), FitOptions(num_images="auto"), 2, observer=Ears())
    assert 64 < collection.any.total.images < 512
    assert "converged" in heard[-1]
    assert "(stops: at least 0.99)" in heard[0]


def test_values_that_are_not_finite_name_the_image(tmp_path: Path) -> None:
    class Breaks(EncodedImages):
        def pairs(self, which: range) -> Iterator[Any]:
            for places, latents, images in super().pairs(which):
                yield places, torch.where((places == 21)[:, None, None, None], torch.nan, latents), images

    checkpoint = tmp_path / ".lift.moments"
    with pytest.raises(liftkit.UsageError, match="image 21 of the source"):
        collect(Pass(Breaks(latent_space(), DemoImages(32), 64, 2), ("oklab",), 2, checkpoint=checkpoint))
    folds, told = read_folds(checkpoint)
    assert told["done"] == "16"
    assert folds["oklab"].total.images == 16, "what is counted as done is there, and nothing else"


def test_a_small_folder_with_a_broken_file_still_fits(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    paths = photographs(tmp_path / "images", 4)
    for broken in paths:
        whole = broken.read_bytes()
        broken.write_bytes(whole[:100])
        code, _, err = cli(
            "fit", TINY_KLEIN, "--images", tmp_path / "images", "-o", tmp_path / "l.safetensors", "--device", "cpu"
        )
        broken.write_bytes(whole)
        assert code == 0, err
        assert f"1 truncated ({broken.name})" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "give either -o LIFT, or --moments-out"),
        (("-o", "lift.bin"), "ends in .safetensors"),
        (("-o", "no/lift.safetensors"), "no such folder"),
        (("-o", "l.safetensors", "--rank", 4), "--rank is for --kind pca"),
        (("-o", "l.safetensors", "--rank", 400, "--kind", "pca"), "--rank 400"),
        (("-o", "l.safetensors", "--part", "1/2"), "--part needs --moments-out"),
        (("--moments-out", "m.safetensors", "--part", "3/2"), "--part 3/2"),
        (("--moments-out", "m.safetensors", "--part", "1/2", "--num-images", "auto"), "cannot be shared"),
        (("-o", "l.safetensors", "--num-images", "many"), "expected a number"),
        (("-o", "l.safetensors", "--latents", "model", "--prompts", "none.txt"), "no such file"),
    ],
)
def test_fit_options_that_do_not_go_together(
    arguments: tuple[Any, ...], expected: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("fit", TINY_KLEIN, "--images", "demo", "--device", "cpu", *arguments)
    assert code == 2
    assert expected in err
    assert not list(tmp_path.iterdir())


def test_images_of_eight_bits_give_the_moments_of_the_same_floats() -> None:
    """Colors looked up in a table are those computed, to float rounding."""

    class Floats(EncodedImages):
        def pairs(self, which: range) -> Iterator[Any]:
            for places, latents, images in super().pairs(which):
                assert images.dtype == torch.uint8
                yield places, latents, to_signed(images)

    colors = ("oklab", "srgb")
    looked_up = collect(Pass(demo_source(32), colors, 2))
    computed = collect(Pass(Floats(latent_space(), DemoImages(32), 64, 2), colors, 2))
    for name in colors:
        a, b = looked_up.folds[name].total, computed.folds[name].total
        assert torch.equal(a.latent_gram, b.latent_gram)
        torch.testing.assert_close(a.pixel_gram, b.pixel_gram, rtol=0, atol=1e-6 * b.pixel_gram.abs().max().item())


class Elsewhere:
    """Pairs whose VAE says that it is on a GPU: a thread adds them."""

    def __init__(self, broken: int | None = None) -> None:
        device = SimpleNamespace(type="mps")
        self.space = SimpleNamespace(vae=SimpleNamespace(device=device), factor=2, channels=4, fingerprint=lambda: "")
        self.broken = broken

    def __len__(self) -> int:
        return 12

    def pairs(self, which: range) -> Iterator[Any]:
        for place in which:
            generator = torch.Generator().manual_seed(place)
            latents = torch.randn(1, 4, 8, 8, generator=generator)
            images = torch.randint(0, 256, (1, 3, 16, 16), generator=generator, dtype=torch.uint8)
            yield torch.tensor([place]), latents * (torch.nan if place == self.broken else 1), images

    def describe(self) -> dict[str, Any]:
        return {}


def test_a_thread_adds_what_a_gpu_encodes() -> None:
    source: Any = Elsewhere()
    threaded = collect(Pass(source, ("oklab",), 2))
    source.space.vae.device.type = "cpu"
    here = collect(Pass(source, ("oklab",), 2))
    assert threaded.done == here.done == 12
    for name, tensor in here.any.tensors().items():
        assert torch.equal(threaded.any.tensors()[name], tensor), name
    broken: Any = Elsewhere(broken=11)
    with pytest.raises(liftkit.UsageError, match="image 11 of the source"):
        collect(Pass(broken, ("oklab",), 2))
