"""PCA and Jacobian fits, folds, parts and merges, convergence, resume, and the verdict."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2
from sklearn.decomposition import PCA, IncrementalPCA

import liftkit
from liftkit.color import SRGB, Oklab
from liftkit.data.images import DemoImages, ImageFolder
from liftkit.demo import TINY_KLEIN
from liftkit.fit import engine, gallery
from liftkit.fit.alignment import energy_angle, lift_angle, principal_angles
from liftkit.fit.engine import FitOptions, fit_collected, fit_pass
from liftkit.fit.folds import FoldedMoments, read_folds, write_folds
from liftkit.fit.jacobian import directional_derivative, fit_jacobian, mean_jacobian
from liftkit.fit.pairs import EncodedImages, normal_latents
from liftkit.fit.pca import fit_pca
from liftkit.fit.procrustes import polar
from liftkit.fit.scale import scales
from liftkit.fit.stream import Collection, Pass, collect
from liftkit.lift import Lift
from liftkit.models.latents import LatentSpace
from tests import tiny
from tests.test_fit import moments, tokens

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def space() -> LatentSpace:
    """The latent space of tiny-klein."""
    return LatentSpace(AutoencoderKLFlux2.from_pretrained(TINY_KLEIN, subfolder="vae").eval().requires_grad_(False))


def demo_source(space: LatentSpace, count: int) -> EncodedImages:
    return EncodedImages(space, DemoImages(count), 64, 2)


def fitted(source: Any, **options: Any) -> Lift:
    chosen = FitOptions(**options)
    return fit_collected(fit_pass(source, chosen, 2), chosen, 2, source)


# ------------------------------------------------------------------------------------------------ PCA


def test_pca_agrees_with_scikit_learn() -> None:
    """On centred tokens our uncentred subspace is scikit-learn's; IncrementalPCA streams to nearly the same."""
    falling = 0.6 ** torch.arange(tiny.DIM, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(tiny.DIM, tiny.DIM, dtype=torch.float64))[0]
    x = torch.randn(1, 2000, tiny.DIM, dtype=torch.float64) * falling @ turned
    x = x - x.mean(dim=1, keepdim=True)
    lift = fit_pca(moments((torch.randn(1, 2000, tiny.RANK), x)), rank=6)
    for oracle, degrees in ((PCA(6), 1e-4), (IncrementalPCA(6, batch_size=200), 5.0)):
        theirs = torch.from_numpy(oracle.fit(x[0].numpy()).components_.T.copy())
        assert principal_angles(lift.basis, theirs)[-1] < degrees
    assert (lift.rank, lift.scale, lift.latent_patch) == (6, 1.0, 1)


def test_pca_for_a_conversion_is_the_subspace_turned_onto_the_latents() -> None:
    found = moments(tokens(noise=0.8))
    free, turned = fit_pca(found, rank=tiny.RANK), fit_pca(found)
    assert principal_angles(free.basis, turned.basis)[-1] < 1e-4
    aligned = (found.cross * turned.basis.T).sum()
    for seed in range(10):
        rotation = torch.linalg.qr(
            torch.randn(tiny.RANK, tiny.RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        )[0]
        assert (found.cross * (turned.basis @ rotation).T).sum() < aligned
    assert turned.figures["energy_captured"] >= liftkit.fit_procrustes(found).figures["energy_captured"]


def test_ranks_out_of_range() -> None:
    with pytest.raises(ValueError, match="rank 49 is out of range"):
        fit_pca(moments(tokens()), rank=49)


def test_both_scales() -> None:
    found = moments(tokens(noise=1.0))
    norm, lsq = liftkit.fit_procrustes(found), liftkit.fit_procrustes(found, scale="lsq")
    assert torch.equal(norm.basis, lsq.basis)
    z, x = tokens(noise=1.0)
    assert norm.scale == pytest.approx(((x @ norm.basis).norm() / z.norm()).item(), rel=1e-9)
    errors = [(x - factor * lsq.scale * z @ lsq.basis.T).norm().item() for factor in (0.99, 1.0, 1.01)]
    assert errors[1] < min(errors[0], errors[2])
    assert scales(norm.basis, found) == {"norm": norm.scale, "lsq": lsq.scale}


# ------------------------------------------------------------------------------------------- Jacobian


def linear_decoder(seed: int = 0) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A decoder that maps each latent patch to its pixel patch by a matrix."""
    matrix = torch.randn(tiny.DIM, tiny.RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        height, width = (size * tiny.FACTOR for size in latents.shape[-2:])
        pixels = liftkit.patchify(latents, 2) @ matrix.T.to(latents) + 0.3
        return liftkit.unpatchify(pixels, tiny.PATCH, height, width)

    return matrix, decode


def test_jacobian_of_a_linear_decoder_is_its_polar_factor() -> None:
    matrix, decode = linear_decoder()
    jacobian = mean_jacobian(decode, torch.randn(3, 4, 6, 10, dtype=torch.float64), 2)
    torch.testing.assert_close(jacobian, matrix, rtol=1e-6, atol=1e-6)
    lift = fit_jacobian(jacobian)
    torch.testing.assert_close(lift.basis, polar(matrix), rtol=1e-6, atol=1e-6)
    assert lift.scale == pytest.approx((torch.linalg.svdvals(matrix).mean()).item(), rel=1e-6)


def test_neighbours_leak_little() -> None:
    """A decoder whose patches also see their neighbours: probes are spaced and signed, so that the mean is their own."""
    matrix, decode = linear_decoder()
    blur = torch.full((3, 1, 1, 7), 1 / 7, dtype=torch.float64)

    def smeared(latents: torch.Tensor) -> torch.Tensor:
        x = decode(latents) - 0.3
        return torch.nn.functional.conv2d(x, blur, padding=(0, 3), groups=3)

    jacobian = mean_jacobian(
        smeared, torch.randn(24, 4, 12, 12, dtype=torch.float64), 2, generator=torch.Generator().manual_seed(0)
    )
    own = torch.zeros_like(matrix)
    for number in range(tiny.RANK):
        tokens_ = torch.zeros(1, 36, tiny.RANK, dtype=torch.float64)
        tokens_[0, 14, number] = 1.0
        moved = smeared(liftkit.unpatchify(tokens_, 2, 12, 12))
        own[:, number] = liftkit.patchify(moved, tiny.PATCH)[0, 14]
    assert (jacobian - own).norm() / own.norm() < 0.1


def test_operators_without_forward_mode_fall_back_to_reverse() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return 2 * gradient

    x, v = torch.randn(2, 5, dtype=torch.float64)
    found = directional_derivative(lambda value: Double.apply(value) ** 2, x, v)
    torch.testing.assert_close(found, 8 * x * v)


def test_jacobian_fit_needs_no_images(space: LatentSpace) -> None:
    source = normal_latents(space, 64, 40, seed=0)
    lift = fitted(source, kind="jacobian", latents="normal")
    assert (lift.rank, lift.dim) == (32, 192)
    assert lift.figures["alignment"]["source"]["source"] == "normal latents"
    again = next(iter(source.pairs(range(3, 5))))
    assert torch.equal(again[1], torch.cat([source.draw(3), source.draw(4)]))


# -------------------------------------------------------------------------- folds, parts, convergence


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


@pytest.mark.slow
def test_accelerate_launch_shares_the_work(tmp_path: Path) -> None:
    arguments = ["fit", str(TINY_KLEIN), "--images", "demo", "--num-images", "32", "--device", "cpu"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    program = str(Path(__file__).parents[1] / "cli.py")
    done = subprocess.run(
        [*launch, program, *arguments, "-o", str(tmp_path / "two.safetensors")],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    subprocess.run(
        [sys.executable, program, *arguments, "-o", str(tmp_path / "one.safetensors")], check=True, timeout=120
    )
    two, one = (Lift.load(tmp_path / f"{name}.safetensors") for name in ("two", "one"))
    assert (two.basis - one.basis).abs().max() < 1e-9
    assert two.figures["images"] == one.figures["images"] == 32


def test_an_interrupted_fit_resumes(space: LatentSpace, tmp_path: Path) -> None:
    class Breaks(EncodedImages):
        def pairs(self, which: range) -> Iterator[Any]:
            for count, pair in enumerate(super().pairs(which)):
                if count == 2:
                    raise KeyboardInterrupt
                yield pair

    images, checkpoint = DemoImages(64), tmp_path / ".lift.moments"
    with pytest.raises(KeyboardInterrupt):
        collect(Pass(Breaks(space, images, 64, 2), ("oklab",), 2, checkpoint=checkpoint))
    assert checkpoint.exists()
    resumed = collect(Pass(EncodedImages(space, images, 64, 2), ("oklab",), 2, checkpoint=checkpoint))
    assert resumed.resumed == 32
    assert collect(Pass(EncodedImages(space, images, 64, 2), ("oklab",), 2, checkpoint=checkpoint)).resumed == 64
    whole = collect(Pass(EncodedImages(space, images, 64, 2), ("oklab",), 2))
    torch.testing.assert_close(resumed.any.total.cross, whole.any.total.cross, rtol=1e-12, atol=1e-12)
    assert resumed.any.total.images == 64


def test_a_checkpoint_of_other_data_is_not_resumed(space: LatentSpace, tmp_path: Path) -> None:
    checkpoint = tmp_path / ".lift.moments"
    write_folds(checkpoint, {"oklab": FoldedMoments(32, 192)}, {"identity": "other", "part": "(0, 1)", "done": "8"})
    assert collect(Pass(demo_source(space, 16), ("oklab",), 2, checkpoint=checkpoint)).resumed == 0


def test_auto_stops_when_halves_agree(space: LatentSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    class Ears(engine.Silent):
        def note(self, text: str) -> None:
            heard.append(text)

    monkeypatch.setattr(engine, "CONVERGED_DEGREES", 8.0)
    monkeypatch.setattr(engine.Convergence.__init__, "__defaults__", (8.0,))
    collection = fit_pass(demo_source(space, 512), FitOptions(num_images="auto"), 2, observer=Ears())
    assert 64 < collection.any.total.images < 512
    assert "converged" in heard[-1]
    assert "stops below" in heard[0]


def test_angles_of_known_subspaces() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    turned = eye.clone()
    angle = math.radians(30)
    turned[:, 0] = math.cos(angle) * eye[:, 0] + math.sin(angle) * eye[:, 3]
    a, b = eye[:, :2], turned[:, :2]
    assert principal_angles(a, b) == pytest.approx([0, 30], abs=1e-5)
    assert energy_angle(a, b, torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64))) == pytest.approx(30)
    assert energy_angle(a, b, torch.diag(torch.tensor([0, 1.0, 0, 0, 0, 0], dtype=torch.float64))) == pytest.approx(
        0, abs=1e-5
    )
    assert lift_angle(a, b, torch.diag(torch.tensor([1.0, 0], dtype=torch.float64))) == pytest.approx(30)
    assert lift_angle(a, -a, torch.eye(2, dtype=torch.float64)) == pytest.approx(180)


def test_colour_auto_says_what_it_took_and_why(space: LatentSpace) -> None:
    lift = fitted(demo_source(space, 48), color="auto")
    assert "R^2 of pixels in oklab" in lift.figures["alignment"]["color_reason"]
    assert lift.color == fitted(demo_source(space, 48), color="oklab").color, "sRGB is not clearly better here"
    assert fitted(demo_source(space, 48), color="oklab-paper").color == Oklab()
    assert isinstance(fitted(demo_source(space, 48), color="srgb").color, SRGB)


@pytest.mark.parametrize("better", ["oklab", "srgb"])
def test_colour_auto_takes_a_clearly_better_space(better: str) -> None:
    folds = {}
    for name in ("oklab", "srgb"):
        z, x = tokens(100)
        folds[name] = FoldedMoments(tiny.RANK, tiny.DIM)
        for index in range(5):
            shown = x if name == better else torch.randn_like(x)
            folds[name].update(z, shown, torch.tensor([index]))
    assert fit_collected(Collection(folds), FitOptions(color="auto"), 2).color.name == better


# ------------------------------------------------------------------------------------------- verdict


class Shuffled(EncodedImages):
    """Spoiled: the latent channels of every image in another order."""

    def pairs(self, which: range) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        for places, latents, images in super().pairs(which):
            yield places, torch.stack([z[torch.randperm(len(z), generator=generator)] for z in latents]), images


class OneColour(DemoImages):
    """Spoiled: every image of one colour, its own."""

    def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        for place, image in super().images(resolution, multiple, which):
            yield place, image.float().mean((1, 2), keepdim=True).to(torch.uint8).expand(3, 64, 64).contiguous()


def other_vae() -> LatentSpace:
    """Spoiled: a VAE that never learned anything."""
    torch.manual_seed(3)
    config = AutoencoderKLFlux2.load_config(TINY_KLEIN, subfolder="vae")
    return LatentSpace(AutoencoderKLFlux2.from_config(config).eval().requires_grad_(False))


def test_verdict_tells_good_from_spoiled(space: LatentSpace) -> None:
    def judged(source: Any) -> dict[str, Any]:
        return fitted(source).figures["alignment"]["verdict"]

    def blamed(verdict: dict[str, Any]) -> set[str]:
        return {reason["figure"] for reason in verdict["reasons"] if reason["level"] == "poor"}

    good = judged(demo_source(space, 128))
    assert good["level"] == "good"
    assert good["advice"] == []
    assert any("colour" in text for text in good["mend"])
    shuffled = judged(Shuffled(space, DemoImages(96), 64, 2))
    assert shuffled["level"] == "poor"
    assert {"r2_pixels_linear", "r2_latents", "cosine"} <= blamed(shuffled)
    foreign = judged(demo_source(other_vae(), 96))
    assert foreign["level"] == "poor"
    assert "vae_psnr" in blamed(foreign)
    assert any("VAE" in advice for advice in foreign["advice"])
    few = judged(demo_source(space, 3))
    assert few["level"] == "poor"
    assert "halves_lift" in blamed(few)
    assert few["advice"] == ["use more images, or more varied ones"]
    plain = judged(EncodedImages(space, OneColour(96), 64, 2))
    assert plain["level"] == "poor"
    assert "halves_lift" in blamed(plain)


def test_one_image_and_one_colour_everywhere(space: LatentSpace, cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(liftkit.UsageError, match="one image cannot be held out"):
        fitted(demo_source(space, 1))
    from PIL import Image

    for index in range(3):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / f"{index}.png")
    source = EncodedImages(space, ImageFolder(tmp_path), 64, 2)
    with pytest.raises(liftkit.UsageError, match="one colour"):
        fitted(source)
    code, _, err = cli("fit", TINY_KLEIN, "--images", tmp_path, "-o", tmp_path / "l.safetensors", "--device", "cpu")
    assert code == 2
    assert "one colour" in err


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


def test_latents_of_the_model_itself(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red seven on flower petals\n\na cyan four on a temple roof\n")
    code, _, err = cli(
        "fit", TINY_KLEIN, "--latents", "model", "--prompts", tmp_path / "prompts.txt", "--num-images", 8,
        "-o", tmp_path / "lift.safetensors", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    source = Lift.load(tmp_path / "lift.safetensors").figures["alignment"]["source"]
    assert (source["source"], source["prompts"], source["used"]) == ("model samples", 2, 8)


def test_report_for_folders_and_lifts(cli: Cli, converted: dict[str, Path], tmp_path: Path) -> None:
    folder = converted["flux2"]
    page, figures = tmp_path / "r.html", tmp_path / "r.json"
    code, out, err = cli("report", folder, "--html", page, "--json", figures, "--compare", converted["sd3"])
    assert code == 0, err
    assert "verdict" in out
    assert "subspaces apart" in out
    data = json.loads(figures.read_text())
    assert data["schema"] == "liftkit.alignment/1"
    assert data["proof"]["exact"] < 1e-4
    text = page.read_text()
    for expected in ("Compared", "<svg", "var(--first)", "prefers-color-scheme: dark", "viewport", "Provenance"):
        assert expected in text
    assert not any(f'{name}="http' in text for name in ("src", "href"))
    code, out, _ = cli("report", folder / "lift.safetensors")
    assert code == 0
    assert "energy_captured" in out
    tiny.lift().save(tmp_path / "bare.safetensors")
    code, _, err = cli("report", tmp_path / "bare.safetensors", "--html", tmp_path / "bare.html")
    assert code == 0
    assert "carries no figures" in err
    for wrong, expected in ((tmp_path, "no converted folder"), (tmp_path / "none.safetensors", "cannot be read")):
        code, _, err = cli("report", wrong)
        assert code == 2
        assert expected in err


def test_documented_schema_is_the_real_one(converted: dict[str, Path]) -> None:
    documented = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    report = json.loads((converted["flux2"] / "alignment.json").read_text())
    alignment = report["alignment"]
    for table in (
        report,
        alignment,
        alignment["figures"],
        alignment["channels"],
        alignment["angles"],
        alignment["pictures"],
        alignment["verdict"],
    ):
        for key in table:
            assert f"`{key}`" in documented, key


def test_a_browser_shows_the_page(converted: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    shot = tmp_path / "page.png"
    quiet = [
        "--disable-gpu",
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
    ]
    subprocess.run(
        [browser, "--headless", *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,1600",
         f"--screenshot={shot}", (converted["flux2"] / "alignment.html").as_uri()],
        capture_output=True, timeout=90, check=True,
    )  # fmt: skip
    from PIL import Image

    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=float)
    assert pixels.std() > 10, "the page is not blank"
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200, "pictures are there"


def photographs(folder: Path, count: int) -> list[Path]:
    """Demo images as files."""
    from PIL import Image

    from liftkit.data import demo

    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(demo.image_at(index)[0]).save(path)
    return paths


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
        assert f"1 unreadable ({broken.name})" in err


def test_values_that_are_not_finite_name_the_image(space: LatentSpace, tmp_path: Path) -> None:
    class Breaks(EncodedImages):
        def pairs(self, which: range) -> Iterator[Any]:
            for places, latents, images in super().pairs(which):
                yield places, torch.where((places == 21)[:, None, None, None], torch.nan, latents), images

    checkpoint = tmp_path / ".lift.moments"
    with pytest.raises(liftkit.UsageError, match="image 21 of the source"):
        collect(Pass(Breaks(space, DemoImages(32), 64, 2), ("oklab",), 2, checkpoint=checkpoint))
    folds, told = read_folds(checkpoint)
    assert told["done"] == "16"
    assert folds["oklab"].total.images == 16, "what is counted as done is there, and nothing else"


def test_figures_are_held_out() -> None:
    """On tokens that have nothing to do with each other, no held-out map explains anything."""
    folded = FoldedMoments(tiny.RANK, tiny.DIM)
    z, x = torch.randn(5, 64, tiny.RANK), torch.randn(5, 64, tiny.DIM)
    folded.update(z, x, torch.arange(5))
    report = engine.alignment(folded, liftkit.fit_procrustes)
    for name in ("r2_latents", "r2_pixels_linear", "r2_pixels_lsq"):
        assert report["figures"][name]["value"] < 0.02, name
    assert max(report["channels"]["latents"]) < 0.05
