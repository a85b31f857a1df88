"""The verdict, pictures and their figures, and the report in its three forms."""

from __future__ import annotations

import html
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2

import liftkit
from liftkit.color import to_signed
from liftkit.data.images import DemoImages
from liftkit.embedded import TINY_KLEIN
from liftkit.fit import engine, gallery
from liftkit.fit.alignment import AffineMap
from liftkit.fit.engine import fit_pass
from liftkit.fit.pairs import EncodedImages
from liftkit.models.latents import LatentSpace
from liftkit.options import FitOptions
from liftkit.report.data import picture_rows
from liftkit.tokens import patchify
from tests import tiny
from tests.klein import demo_source, fitted, latent_space

Cli = Callable[..., tuple[int, str, str]]


class Shuffled(EncodedImages):
    """Spoiled: the latent channels of every image in another order."""

    def pairs(self, which: range) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        for places, latents, images in super().pairs(which):
            yield places, torch.stack([z[torch.randperm(len(z), generator=generator)] for z in latents]), images


class OneColor(DemoImages):
    """Spoiled: every image of one color, its own."""

    def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        for place, image in super().images(resolution, multiple, which):
            yield place, image.float().mean((1, 2), keepdim=True).to(torch.uint8).expand(3, 64, 64).contiguous()


def other_vae() -> LatentSpace:
    """Spoiled: a VAE that never learned anything."""
    torch.manual_seed(3)
    config = AutoencoderKLFlux2.load_config(TINY_KLEIN, subfolder="vae")
    return LatentSpace(AutoencoderKLFlux2.from_config(config).eval().requires_grad_(False))


def test_verdict_tells_good_from_spoiled() -> None:
    def judged(source: Any) -> dict[str, Any]:
        return fitted(source).figures["alignment"]["verdict"]

    def blamed(verdict: dict[str, Any]) -> set[str]:
        return {reason["figure"] for reason in verdict["reasons"] if reason["level"] == "poor"}

    good = judged(demo_source(96))
    assert good["level"] == "good"
    assert good["advice"] == []
    assert any("color" in text for text in good["mend"])
    shuffled = judged(Shuffled(latent_space(), DemoImages(96), 64, 2))
    assert shuffled["level"] == "poor"
    assert {"r2_pixels_linear", "alignment_kept", "vae_psnr"} <= blamed(shuffled)
    foreign = judged(demo_source(96, other_vae()))
    assert foreign["level"] == "poor"
    assert {"r2_pixels_linear", "vae_psnr"} <= blamed(foreign)
    assert any("VAE" in advice for advice in foreign["advice"])
    few = judged(demo_source(3))
    assert few["level"] == "poor"
    assert blamed(few) == {"alignment_kept"}
    assert few["advice"] == ["Use more images, or more varied ones, than these 3."]
    plain = judged(EncodedImages(latent_space(), OneColor(96), 64, 2))
    assert plain["level"] == "poor"
    assert "pixel_detail" in blamed(plain)
    assert "Fit on images with detail, such as photographs." in plain["advice"]


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
    wanted = ("Compared", "<svg", "var(--first)", "prefers-color-scheme: dark", "viewport", "Provenance")
    reasons = [reason["meaning"] for reason in data["alignment"]["verdict"]["reasons"]]
    assert len(reasons) > 3
    for expected in (*wanted, "What it rests on", *map(html.escape, reasons)):
        assert expected in text
    assert not any(f'{name}="http' in text for name in ("src", "href"))
    code, out, _ = cli("report", folder / "lift.safetensors")
    assert code == 0
    assert "energy_captured" in out
    tiny.lift().save(tmp_path / "bare.safetensors")
    code, _, err = cli("report", tmp_path / "bare.safetensors", "--html", tmp_path / "bare.html")
    assert code == 0
    assert "carries no figures" in err
    for wrong, expected in ((tmp_path, "no converted folder"), (tmp_path / "none.safetensors", "no such file")):
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
        alignment["channels"]["spread"],
        alignment["angles"],
        alignment["pictures"],
        alignment["pictures"]["spread"],
        alignment["pictures"]["psnr"],
        alignment["pictures"]["patch_grid"],
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


def test_pictures_are_held_out_fold_by_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fold's images are seen through a lift that was fitted without them."""
    asked: list[gallery.HeldOut] = []

    def spy(source: Any, folds: Any) -> gallery.Gallery | None:
        asked.extend(folds)
        return gallery.make_gallery(source, asked)

    monkeypatch.setattr(engine, "make_gallery", spy)
    source = demo_source(23)
    lift = fitted(source)
    pictures = lift.figures["alignment"]["pictures"]
    assert [list(fold.places) for fold in asked] == [list(range(fold, 23, 5)) for fold in range(5)]
    assert (pictures["count"], pictures["folds"]) == (23, 5)
    assert {len(row) for row in lift.pictures.values()} == {gallery.SHOWN}
    for fold in asked:
        others = [place for place in range(23) if place not in fold.places]
        z, x = [], []
        for places, latents, images in source.pairs(range(23)):
            keep = torch.isin(places, torch.tensor(others))
            z.append(patchify(latents, 2)[keep])
            x.append(patchify(fold.lift.color.encode(images), 8)[keep])
        moments = liftkit.TokenMoments(32, 192)
        moments.update(torch.cat(z), torch.cat(x))
        torch.testing.assert_close(fold.lift.basis, liftkit.fit_procrustes(moments).basis, rtol=0, atol=1e-4)


def test_figures_of_pictures_are_means_over_folds_with_their_spread() -> None:
    source, lift = demo_source(12), fitted(demo_source(24), color="oklab-paper")
    linear = AffineMap(0.9 * lift.scale * lift.basis.T, torch.zeros(192))
    folds = [gallery.HeldOut(lift, linear, places) for places in (range(5), range(5, 12))]
    both, alone = gallery.make_gallery(source, folds), [gallery.make_gallery(source, [fold]) for fold in folds]
    for figure in ("psnr", "psnr_vae", "patch_grid"):
        for name, value in both.figures[figure].items():
            a, b = (each.figures[figure][name] for each in alone)
            assert value == pytest.approx((a + b) / 2)
            assert both.figures["spread"][figure][name] == pytest.approx(abs(a - b) / 2**0.5)
            assert alone[0].figures["spread"][figure][name] == 0
    _, latents, images = next(source.pairs(range(5)))
    rows = gallery.render(source, lift, linear, latents, images)
    assert alone[0].figures["psnr_vae"]["lift"] == pytest.approx(
        gallery.psnr(rows["lift"], source.space.decode(latents)).mean().item(), abs=1e-3
    )
    assert alone[0].figures["psnr"]["vae"] == pytest.approx(
        gallery.psnr(source.space.decode(latents), to_signed(images)).mean().item(), abs=1e-3
    )
    assert gallery.make_gallery(source, [gallery.HeldOut(lift, linear, range(0))]) is None


def test_psnr_and_patch_grid_of_known_pictures() -> None:
    dark, light = torch.full((2, 3, 16, 16), -1.0), torch.full((2, 3, 16, 16), 1.0)
    assert gallery.psnr(light, dark).tolist() == pytest.approx([0, 0])
    assert gallery.psnr(dark + 0.2, dark).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert gallery.psnr(dark, dark).tolist() == pytest.approx([126, 126], abs=0.1)
    assert gallery.patch_grid_ratio(gallery.border_energies(dark, 8)) == pytest.approx(1), "plain images have no grid"
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    assert gallery.patch_grid_ratio(gallery.border_energies(ramp, 8)) == pytest.approx(1, abs=1e-4)
    steps = 0.1 * ramp
    steps[..., 8:] += 1.0
    assert gallery.patch_grid_ratio(gallery.border_energies(steps, 8)) > 100


def test_lifts_of_earlier_versions_are_reported(cli: Cli, tmp_path: Path) -> None:
    """They lack spreads of pictures and PSNR against the VAE; what they have is shown."""
    lift = fitted(demo_source(24))
    lift.save(tmp_path / "new.safetensors")
    pictures = lift.figures["alignment"]["pictures"]
    shown = f"{pictures['psnr']['lift']:.1f} ± {pictures['spread']['psnr']['lift']:.1f} dB"
    against = f"{pictures['psnr_vae']['lift']:.1f} ± {pictures['spread']['psnr_vae']['lift']:.1f} dB"
    for key in ("spread", "psnr_vae", "folds"):
        del pictures[key]
    lift.save(tmp_path / "old.safetensors")
    for name, expected, missing in (
        ("new", (shown, against, "±"), ()),
        ("old", (f"{pictures['psnr']['lift']:.1f} dB",), (shown, against)),
    ):
        page = tmp_path / f"{name}.html"
        code, out, err = cli("report", tmp_path / f"{name}.safetensors", "--html", page)
        assert code == 0, err
        for text in expected:
            assert text in page.read_text()
            assert text in out
        for text in missing:
            assert text not in page.read_text()
            assert text not in out
    assert len(picture_rows(pictures)) == len(gallery.ROWS)


@pytest.mark.parametrize(
    ("r2", "words"),
    [
        ([0.9, 0.2, 0.5], "The lift carries lightness best, green-red worst"),
        ([0.9, 0.2, 0.0], "The lift carries lightness best, blue-yellow not at all"),
        ([-0.6, 0.1, -3.0], "The lift carries green-red best, blue-yellow not at all"),
        ([0.0, -0.1, -0.2], "The lift carries no color channel"),
    ],
)
def test_color_channels_that_a_lift_carries_or_does_not_are_named(r2: list[float], words: str) -> None:
    from liftkit.report.pages import carried

    assert carried(("lightness", "green-red", "blue-yellow"), r2) == words


def test_the_page_says_which_channel_is_not_carried() -> None:
    from liftkit.report.data import Report
    from liftkit.report.pages import alignment_page

    source = demo_source(16)
    lift = engine.fit_collected(fit_pass(source, FitOptions(), 2), FitOptions(), 2)
    assert lift.color.name == "oklab"
    lift.figures["alignment"]["channels"] |= {"colors_lift": [0.9, -3.0, -0.6], "spread": {}}
    assert "The lift carries lightness best, green-red not at all" in alignment_page(Report("lift", lift))


def test_labels_make_no_formulas_and_no_markup() -> None:
    from liftkit.report.charts import chart, plain_label

    with chart("<script>alert(1)</script>") as (plot, result):
        plot.plot([1, 2], [1, 10], label=plain_label("a $\\frac{1$ <b>&\x1b"))
        plot.set_yscale("log")
        plot.legend()
    assert "<script" not in result[0]
    assert "<b>&" not in result[0].split("</figcaption>")[1]
    assert "\x1b" not in result[0]
    assert "mathdefault" not in re.sub("<!--.*?-->", "", result[0])


def test_the_page_links_to_its_glossary_which_is_that_of_the_docs() -> None:
    from liftkit.report.data import Report
    from liftkit.report.glossary import GLOSSARY, formula
    from liftkit.report.pages import alignment_page

    page = alignment_page(Report("lift", tiny.lift()))
    assert 'href="#glossary"' in page
    assert 'id="glossary"' in page
    docs = (Path(__file__).parents[1] / "docs" / "how-it-works.md").read_text()
    for symbol, meaning in GLOSSARY.items():
        assert f"| {symbol} | {meaning} |" in docs
        assert f"<td>{formula(symbol)}</td>" in page


def test_formulas_are_set_and_explained_and_all_else_is_text() -> None:
    from liftkit.report.glossary import symbols

    found = symbols("Lift `s A^T x_0` of <b>")
    assert "s A<sup>T</sup> x<sub>0</sub>" in found
    for name in (
        "<b>s</b>: scale of the lift",
        "<b>A</b>: basis of the subspace",
        "<b>x<sub>0</sub></b>: a pixel token",
    ):
        assert name in found
    assert found.endswith("of &lt;b&gt;")
    assert symbols("R^2 of A") == "R^2 of A", "outside of backticks nothing is a formula"
    assert symbols("`q < 1`") == "q &lt; 1", "what has no symbol of the glossary has nothing to explain"
