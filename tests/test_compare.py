"""``liftkit compare``: tied noise, controls, verdicts, the cache, and what it says of bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from liftkit.conversion.execute import convert
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import UsageError
from liftkit.evaluate import controls, entries, figures, plan, tied
from liftkit.evaluate.compare import compare
from liftkit.evaluate.comparison import Comparison
from liftkit.evaluate.figures import FIGURES, Score
from liftkit.evaluate.metrics import METRICS
from liftkit.evaluate.plan import prepare
from liftkit.evaluate.real import open_real
from liftkit.lift import Lift
from liftkit.options import CompareOptions, Guidance, SampleOptions
from tests import tiny

Cli = Callable[..., tuple[int, str, str]]
COUNT = 8


class Painter:
    """Stands for pipelines: records who starts from what, and paints the noise itself, less of it in pixels."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str], Tensor, SampleOptions]] = []
        self.fail_after: int | None = None

    def load(self, folder: Any, device: str) -> str:
        return folder.name

    def sample(self, loaded: str, prompts: list[str], options: SampleOptions, noise: Tensor) -> Tensor:
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        self.calls.append((loaded, prompts, noise, options))
        shade = torch.tensor([len(prompt) / 40 for prompt in prompts]).view(-1, 1, 1, 1)
        strength = 0.2 if noise.shape[1] == 3 else 0.4
        side = options.height or 1
        return (shade + strength * torch.randn(len(prompts), 3, side, side)).clamp(-1, 1)

    def noise(self, channels: int) -> Tensor:
        """Of pixel models (3 channels), or of latent ones."""
        return torch.cat([noise for _, _, noise, _ in self.calls if noise.shape[1] == channels])


@pytest.fixture(autouse=True)
def _quick_two_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the learned test, which takes seconds: it sees noise alone."""

    def accuracy(images: Tensor, reference: Tensor, **choices: Any) -> float:
        return 0.5 + min(0.5, (images.float().std() - reference.float().std()).abs().item())

    for module in (figures, controls):
        monkeypatch.setattr(module, "two_sample_accuracy", accuracy)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    found = Painter()
    monkeypatch.setattr(entries, "load_pipeline", found.load)
    monkeypatch.setattr(tied, "sample", found.sample)
    return found


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 16 x 16 with captions, one too small and one broken among them."""
    root = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(0)
    for index in range(3 * COUNT):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((16, 16), Image.Resampling.BICUBIC).save(root / f"{index:02d}.png")
        (root / f"{index:02d}.txt").write_text(f"picture {'x' * index}")
    Image.new("RGB", (8, 8)).save(root / "small.png")
    (root / "broken.png").write_bytes(b"no picture")
    return root


@pytest.fixture
def options(model_folders: dict[str, Path], converted: dict[str, Path], captioned: Path) -> CompareOptions:
    return CompareOptions(
        base=str(model_folders["flux2"]),
        pixels=(str(converted["flux2"]),),
        real=str(captioned),
        count=COUNT,
        batch_size=3,
        device="cpu",
        quick=True,
    )


def test_rows_stand_in_order_and_missing_controls_keep_their_place(painter: Painter, options: CompareOptions) -> None:
    found = compare(options)
    assert [row.key for row in found.rows] == [
        "real", "vae", "base", "unsharp", "noise", "continued", "scratch", "pixel-1",
    ]  # fmt: skip
    assert [row.key for row in found.rows if row.score is None] == ["continued", "scratch"]
    assert found.verdicts[0].missing == ["continued", "scratch"]
    assert not found.verdicts[0].claims
    images = next(each for each in found.real["tallies"] if each["what"] == "images")
    names = [name for each in images["left_out"] for name in each["examples"]]
    assert len(names) > 0
    assert set(names) <= {"small.png", "broken.png"}
    assert any(names[0] in note for note in found.notes)
    assert found.real["reference"] == 2 * COUNT


def test_all_models_start_from_the_same_noise(
    painter: Painter, options: CompareOptions, converted: dict[str, Path]
) -> None:
    """Pixels at eps, latents at A^T eps; image i from seed + i, whatever the batch."""
    lift = Lift.load(converted["flux2"] / "lift.safetensors")
    compare(replace(options, continued=options.base, scratch=options.pixels[0], seed=5))
    eps = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5 + i)) for i in range(COUNT)])
    assert torch.equal(painter.noise(3), eps)
    assert torch.allclose(painter.noise(tiny.CHANNELS), lift.lower(eps))


def test_samples_are_kept_and_an_interrupted_run_goes_on(
    painter: Painter, options: CompareOptions, tmp_path: Path
) -> None:
    options = replace(options, cache=tmp_path / "cache")
    painter.fail_after = 4
    with pytest.raises(KeyboardInterrupt):
        compare(options)
    painter.fail_after = None
    first = compare(options)
    assert sum(len(prompts) for _, prompts, _, _ in painter.calls) == 2 * COUNT, "nothing was sampled twice"
    painter.fail_after = 0
    assert compare(options).to_dict()["rows"] == first.to_dict()["rows"]
    painter.fail_after = None
    compare(replace(options, seed=1))
    assert sum(len(prompts) for _, prompts, _, _ in painter.calls) == 4 * COUNT


def test_another_model_is_another_sample(
    painter: Painter, options: CompareOptions, converted: dict[str, Path], tmp_path: Path
) -> None:
    """The cache goes by content: a folder that was trained on is sampled again, one that was renamed is not."""
    options = replace(options, cache=tmp_path / "cache")
    compare(options)
    moved = tmp_path / "moved"
    shutil.copytree(converted["flux2"], moved)
    before = len(painter.calls)
    compare(replace(options, pixels=(str(moved),)))
    assert len(painter.calls) == before
    config = moved / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"shift": 2.0', '"shift": 3.0'))
    compare(replace(options, pixels=(str(moved),)))
    assert {name for name, *_ in painter.calls[before:]} == {"moved"}


def test_damaged_scores_are_made_again(painter: Painter, options: CompareOptions, tmp_path: Path) -> None:
    options = replace(options, cache=tmp_path)
    first = compare(options).to_dict()
    for file in tmp_path.glob("*.json"):
        file.write_text("{")
    assert compare(options).to_dict()["rows"] == first["rows"]


def test_steps_for_all_or_for_each(painter: Painter, options: CompareOptions) -> None:
    compare(replace(options, steps=(3, 7), guidance=Guidance(2.0)))
    assert {(model, chosen.steps) for model, _, _, chosen in painter.calls} == {("flux2", 3), ("flux2", 7)}
    assert {chosen.guidance for _, _, _, chosen in painter.calls} == {Guidance(2.0)}


def test_labels() -> None:
    first = entries.Entry("a/best", "best", None, None, lambda device: None, lambda: "")  # type: ignore[arg-type, return-value]
    assert entries.labels([first, replace(first, name="other")], []) == ["best", "other"]
    assert entries.labels([first, first], []) == ["best (1)", "best (2)"]
    assert entries.labels([first, first], ["one", "two"]) == ["one", "two"]
    with pytest.raises(UsageError, match="--label: 1 given for 2"):
        entries.labels([first, first], ["one"])


def test_what_does_not_fit_is_said_before_anything_is_sampled(
    painter: Painter,
    options: CompareOptions,
    model_folders: dict[str, Path],
    converted: dict[str, Path],
    tmp_path: Path,
) -> None:
    empty, prompts = tmp_path / "empty", tmp_path / "prompts.txt"
    empty.mkdir()
    prompts.write_text("\n")
    latent, pixel = str(model_folders["flux2"]), str(converted["flux2"])
    for changes, message in (
        ({"quick": False, "count": 511}, "-n 511: Frechet distances of fewer than 512"),
        ({"base": pixel}, "a pixel model; a latent pipeline is expected"),
        ({"pixels": (latent,)}, "a latent model; only the first is the latent base"),
        ({"pixels": ()}, "no pixel model"),
        ({"pixels": (str(tmp_path / "none"),)}, "no such folder"),
        ({"continued": pixel}, "--continued .*: a pixel model"),
        ({"steps": (1, 2, 3)}, "--steps: 3 given; give one for all models, or 2"),
        ({"resolution": 18}, "--resolution 18: not a multiple of the 4 pixels"),
        ({"real": "demo"}, "--real demo: its images are 64 x 64, the models' 16 x 16"),
        ({"real": str(tmp_path / "none")}, "--real .*none: no such folder"),
        ({"real": str(empty)}, "no image files"),
        ({"count": 16}, "24 images of at least 16 x 16 pixels; 32 are needed"),
        ({"prompts": prompts}, "holds no prompt"),
        ({"prompts": tmp_path / "none.txt"}, "no such file"),
        ({"device": "abacus"}, "--device abacus"),
        ({"cache": prompts}, "--cache .*: is a file; give a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            compare(replace(options, **changes))
    assert not painter.calls


def test_another_family_s_pixels_are_refused(options: CompareOptions, tmp_path: Path) -> None:
    """A lift for other tokens ties no noise of this base."""
    odd = tmp_path / "odd"
    shutil.copytree(options.pixels[0], odd)
    basis = torch.linalg.qr(torch.randn(tiny.DIM, tiny.RANK // 2, dtype=torch.float64))[0]
    Lift(basis, 1.0, patch_size=tiny.PATCH, latent_patch=tiny.LATENT_PATCH).save(odd / "lift.safetensors")
    with pytest.raises(UsageError, match="compare a pixel model with its own base"):
        prepare(replace(options, pixels=(str(odd),)))


def test_images_without_a_caption_take_the_empty_prompt_and_one_note_counts_them(
    painter: Painter, options: CompareOptions, captioned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(captioned, folder)
    whole = open_real(str(folder), COUNT, 16, 0, None)
    assert whole.silent == ()
    for text in list(whole.prompts[:3]):
        (folder / f"{text.count('x'):02d}.txt").unlink()
    found = compare(replace(options, real=str(folder)))
    assert painter.calls[0][1] + painter.calls[1][1] == ["", "", "", *whole.prompts[3:6]]
    note = "Real images without a caption: 3 of the 8 that give the prompts, such as "
    assert [each.startswith(note) for each in found.notes].count(True) == 1
    assert found.real["without_caption"] == 3
    for file in folder.glob("*.txt"):
        file.unlink()
    real = open_real(str(folder), COUNT, 16, 0, None)
    assert (real.prompts, len(real.silent)) == (("",) * COUNT, COUNT)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    real = open_real(str(folder), COUNT, 16, 0, tmp_path / "prompts.txt")
    assert (real.prompts, real.silent) == (("one", "two") * 4, ())
    assert real.scenes is None
    # The reader of captions stops where what looks like captions is of no use, as training does.
    (folder / "captions.csv").write_text("file;title\n00.png;a cat\n")
    with pytest.raises(UsageError, match=r"no image has a caption, though there is .*captions.csv"):
        open_real(str(folder), COUNT, 16, 0, None)


def test_the_real_sets_are_disjoint_and_belong_to_their_prompts() -> None:
    real = open_real("demo", COUNT, 64, 0, None)
    assert len(real.reference) == 1024
    assert real.scenes is not None
    assert [scene.prompt for scene in real.scenes] == list(real.prompts)
    shown = {image.numpy().tobytes() for image in real.shown}
    assert not shown & {image.numpy().tobytes() for image in real.reference}


def test_samples_that_are_not_finite_are_refused(
    painter: Painter, options: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied, "sample", lambda *given, **choices: torch.full((3, 3, 16, 16), float("nan")))
    with pytest.raises(UsageError, match="not finite"):
        compare(options)


def judged(found: Comparison, name: str, **values: float) -> Comparison:
    """A comparison with other values of one figure, by row."""
    rows = [
        replace(row, score=Score({**row.score.figures, name: values[row.key.replace("-", "_")]}, row.score.spectrum))
        if row.score is not None
        else row
        for row in found.rows
    ]
    return replace(found, rows=rows)


def test_bold_is_what_models_painted_best(painter: Painter, options: CompareOptions) -> None:
    found = judged(
        compare(options), "patch_frechet", real=0.01, vae=0.02, base=0.5, unsharp=0.2, noise=0.21, pixel_1=0.9
    )
    assert found.best("patch_frechet") == {"unsharp", "noise"}, "level within the tolerance; real images paint nothing"
    assert found.best("digit") == set()


def test_the_command_prints_writes_and_claims_nothing(
    painter: Painter, cli: Cli, options: CompareOptions, tmp_path: Path
) -> None:
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    arguments = ["--real", options.real, "-n", COUNT, "--quick", "--device", "cpu", "--label", "<mine>"]
    code, out, err = cli(
        "compare", options.base, *options.pixels, *arguments, "--html", page, "--json", data, "--cache", tmp_path / "c"
    )
    assert code == 0, err
    empty = {"digit", "color", "background", "oracle_frechet", "texture_frechet", "patch_frechet"}
    assert {name for name in FIGURES if name not in out} == empty | set(METRICS), "published ones were not asked for"
    assert not re.search(r"continued|scratch", out.partition("laplacian")[0]), "no columns of what was not given"
    assert "laplacian        closer to 1" in out
    assert re.search(r"No figure of <mine> improves on|<mine> improves on all given controls in", out)
    assert "control not given: network from random weights (--scratch FOLDER)" in err
    found = json.loads(data.read_text())
    assert found["schema"] == "liftkit.comparison/1"
    assert [row["label"] for row in found["rows"]][-1] == "<mine>"
    assert set(found["rows"][0]["figures"]) == set(FIGURES)
    assert found["rows"][-1]["figures"]["two_sample"] is not None
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3 * COUNT, "real, base and pixel model of every prompt shown"
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "<mine>" not in text
    assert "&lt;mine&gt;" in text
    assert "--continued" in text
    assert text.count("controls that were not given: latent base, continued, network from random weights.") in (1, 2)
    heads = re.findall(r"<th class=\"number[^>]*>(.*?)</th>", text.partition("<h2>Figures</h2>")[2])
    assert heads[:3] == ["&lt;mine&gt;", "real images", "real through the VAE"], "pixel models go first"
    assert not set(heads) & {"latent base, continued", "network from random weights"}
    assert "Frechet distance" not in text.partition("<h2>Figures</h2>")[2].partition("Provenance")[0]
    cells = re.findall(r'<td class="number[^>]*>', text.partition("<h2>Figures</h2>")[2])
    assert all('data-label="' in cell for cell in cells), "on a phone each value stands beside the name of its column"
    assert 'href="#glossary"' in text
    assert text.count('id="glossary"') == 1
    assert text.count("better: closer to 1</small>") == 4
    assert "16 real images that no setting was tuned on" in text
    assert "Spectra over those of real images" in text


def test_bad_outputs_are_refused_before_the_work(
    painter: Painter, cli: Cli, options: CompareOptions, tmp_path: Path
) -> None:
    for target in (tmp_path / "page.txt", tmp_path / "none" / "page.html"):
        code, _, err = cli("compare", options.base, *options.pixels, "--html", target, "--quick")
        assert code == 2
        assert len([line for line in err.splitlines() if not line.endswith(" ...")]) == 1
    code, _, err = cli("compare", options.base, *options.pixels, "-n", 100)
    assert code == 2
    assert "--quick" in err
    assert not painter.calls


def test_the_demo_through_its_real_pipelines(cli: Cli, tmp_path: Path) -> None:
    """An untrained conversion keeps the digits, loses colors and shows its patches; the base does neither."""
    convert(str(TINY_KLEIN), tmp_path / "pixel", images="demo", num_images=16, device="cpu")
    data = tmp_path / "data.json"
    arguments = ("--quick", "-n", COUNT, "--steps", 8, "--guidance-start", 0.125, "--device", "cpu", "--json", data)
    code, _, err = cli("compare", "demo", tmp_path / "pixel", *arguments)
    assert code == 0, err
    found = json.loads(data.read_text())
    assert {"scale": 4.0, "start": 0.125}.items() <= found["settings"]["guidance"].items()
    rows = {row["key"]: row["figures"] for row in found["rows"]}
    assert rows["base"]["color"] == 1.0
    assert rows["pixel-1"]["color"] < 0.9
    assert rows["base"]["patch_grid"] < 2.0 < rows["pixel-1"]["patch_grid"]
    assert plan.QUICK == 64
