"""Training on pairs: images beside those that they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import liftkit
from liftkit.asymflow import calibrate
from liftkit.data.captioned import CaptionedFolder
from liftkit.data.heldout import split
from liftkit.errors import UsageError
from liftkit.finetune import watch
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.run import finetune
from liftkit.finetune.sources import training_data
from liftkit.finetune.step import Objective
from tests import tiny
from tests.training import few_steps
from tests.training_data import Encoders, Notes, assert_same, digits_from_digits, pairs, picture, prepare, training

Cli = Callable[..., tuple[int, str, str]]


def seed_of(image: torch.Tensor) -> int:
    """Of :func:`picture`, which an image is."""
    known = (seed for start in (100, 200) for seed in range(start, start + 20))
    return next(
        seed
        for seed in known
        if torch.equal(image, torch.tensor(picture(seed).getdata()).view(16, 16, 3).movedim(2, 0))
    )


def test_each_image_stands_beside_what_it_was_made_from(tmp_path: Path) -> None:
    source = CaptionedFolder(pairs(tmp_path / "data"), "reference")
    assert len(source) == 8
    assert sorted(source.tally.left_out["references of others"]) == [f"before/{number}.png" for number in range(8)]
    data = training(source, cache=tmp_path / "cache")
    for step in range(4):
        batch = data.batch(step)
        assert batch.references is not None
        assert batch.reference_latents is not None
        assert batch.references.shape == (4, 1, 3, 16, 16)
        assert batch.reference_latents.shape == (4, 1, 3, 8, 8)
        for image, reference in zip(batch.images, batch.references):
            assert seed_of(image) - seed_of(reference[0]) == 100
        expected = Encoders().encode(liftkit.color.to_signed(batch.references.flatten(0, 1)))
        torch.testing.assert_close(batch.reference_latents.flatten(0, 1), expected, atol=1e-3, rtol=0)
        assert batch.rows(slice(1, 3)).references.equal(batch.references[1:3])


def test_images_with_other_numbers_of_references_are_in_other_steps(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", 12, line0=None, line1="", line2=["before/2.png", "before/3.png"], line3=[])
    notes = Notes()
    data = training(CaptionedFolder(folder, "reference"), cache=tmp_path / "cache", ready=False)
    prepare(data, Encoders(), observer=notes)
    assert "data: 9 images are made from others, 5 from prompts alone" in notes.notes
    seen = {}
    for step in range(40):
        batch = data.batch(step)
        count = 0 if batch.references is None else batch.references.shape[1]
        seen.setdefault(count, set()).update(index for _, index in batch.indices)
    assert {count: len(found) for count, found in seen.items()} == {0: 5, 1: 8, 2: 1}


def test_other_processes_other_runs_and_held_out_images_see_the_same(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", 10)
    first = training(CaptionedFolder(folder, "reference"), cache=tmp_path / "cache")
    again = training(CaptionedFolder(folder, "reference"), cache=tmp_path / "cache", workers=0)
    assert first.digest == again.digest
    for step, batch in enumerate(again.prefetch(0, 3)):
        assert_same(first.batch(step), batch)
        assert torch.equal(first.batch(step).references, batch.references)
        halves = [first.batch(step, part).references for part in (slice(0, 2), slice(2, 4))]
        assert torch.equal(torch.cat(halves), batch.references)
    picture(999).save(folder / "before" / "3.png")
    assert training(CaptionedFolder(folder, "reference"), cache=tmp_path / "cache").digest != first.digest
    kept, apart, _ = split([(CaptionedFolder(folder, "reference"), 1.0)], 4, 0)
    for part in (*kept, *apart):
        batch = training(part, cache=tmp_path / "cache").batch(0)
        assert batch.references is not None


def test_what_is_wrong_with_a_reference_is_counted_and_named(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", 10, line0="before/none.png", line1="../elsewhere.png")
    (folder / "before" / "2.png").write_text("no picture")
    whole = (folder / "before" / "3.png").read_bytes()
    (folder / "before" / "3.png").write_bytes(whole[: len(whole) // 2])
    data = training(CaptionedFolder(folder, "reference"), cache=tmp_path / "cache", ready=False)
    tally = prepare(data, Encoders())
    # Two pictures that no line names any more are images like others.
    assert tally.used == 8
    left = {reason: sorted(names) for reason, names in tally.left_out.items()}
    assert left["made from pictures that are not there"] == ["after/0.png", "after/1.png"]
    assert left["made from pictures that cannot be read"] == ["after/2.png", "after/3.png"]
    assert tally.found == 20


def test_a_reference_that_went_away_gives_the_row_to_another(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data")
    data = training(CaptionedFolder(folder, "reference"), cache=tmp_path / "cache", batch_size=8)
    (folder / "before" / "5.png").unlink()
    batch = data.batch(0)
    assert "after/5.png" in str(data.tally.left_out)
    assert all(seed_of(image) - seed_of(other[0]) == 100 for image, other in zip(batch.images, batch.references))


def test_columns_have_any_name_and_tables_may_be_csv(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", 2, "source image")
    source = CaptionedFolder(folder, "source image")
    assert [source.made_from(index) for index in range(2)] == [(0,), (1,)]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text,from\nafter/1.png,an edit,before/0.png\n")
    source = CaptionedFolder(folder, "from")
    assert {source.label(index): source.made_from(index) for index in range(len(source))}["after/1.png"] == (0,)
    with pytest.raises(UsageError, match="no line of metadata has a 'reference'"):
        CaptionedFolder(folder, "reference")


def test_a_picture_with_a_caption_of_its_own_is_also_trained_on(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", 3)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "before/1.png", "text": "as it was"}')
    source = CaptionedFolder(folder, "reference")
    assert [source.label(index) for index in range(len(source))] == [
        "after/0.png", "after/1.png", "after/2.png", "before/1.png",
    ]  # fmt: skip


# What the network is shown.


@torch.no_grad()
def test_references_stand_where_the_stock_pipeline_puts_them() -> None:
    pipeline = tiny.flux2_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    flow, seen = liftkit.open_flow(pipeline.transformer), []
    forward = pipeline.transformer.forward
    pipeline.transformer.forward = lambda **given: seen.append(given) or forward(**given)
    images = [picture(seed, 64, 64) for seed in (1, 2)]
    noise = torch.randn(1, 4, 32, 32)
    prompts = tiny.prompt_arguments("flux2")
    pipeline(
        **prompts, image=images, latents=flow.pipeline_state(noise), num_inference_steps=1, guidance_scale=1.0,
        height=64, width=64, output_type="latent",
    )  # fmt: skip
    theirs = seen[0]
    tokens = theirs["hidden_states"][:, 256:]
    references = liftkit.unpatchify(tokens.view(2, 256, -1), 2, 32, 32)[None]
    sigma, text = torch.ones(1), prompts["prompt_embeds"]
    flow.velocity(noise, sigma, encoder_hidden_states=text, references=references)
    ours = seen[-1]
    assert torch.equal(ours["hidden_states"], theirs["hidden_states"])
    assert torch.equal(ours["img_ids"].long(), theirs["img_ids"].long())


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "QwenImageTransformer2DModel-edit",
        "JoyImageEditTransformer3DModel",
    ],
)
def test_the_twin_sees_references_as_the_latent_network_does(name: str) -> None:
    """u in the subspace is that of the latent model (Eq. 17), and the references count."""
    from tests.zoo import ZOO

    specimen = ZOO[name]
    latent, lift = specimen.transformer().double(), specimen.lift()
    flow, twin = liftkit.open_flow(latent), liftkit.open_flow(liftkit.convert_transformer(latent, lift))
    sigma = torch.tensor([0.6], dtype=torch.float64)
    gain, tau = calibrate(sigma, lift.scale)
    given = specimen.spec.conditioning(latent.config, 1, torch.Generator().manual_seed(0))
    given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    side = lift.patch_size
    x, reference, other = (torch.randn(1, 3, 2 * side, 3 * side, dtype=torch.float64) for _ in range(3))
    u = twin.velocity(x, sigma, **given, references=reference[:, None])
    v = flow.velocity(
        gain.view(-1, 1, 1, 1) * lift.lower(x), tau, **given, references=lift.lower(reference)[:, None] / lift.scale
    )
    expected = lift.scale * gain * v + (1 - lift.scale * gain) / sigma * lift.lower(x)
    torch.testing.assert_close(lift.lower(u), expected, atol=1e-6, rtol=1e-6)
    assert (twin.velocity(x, sigma, **given, references=other[:, None]) - u).abs().max() > 1e-3


def trainee_of(name: str, pipeline: str) -> Any:
    """What the check of a source looks at: a network of the zoo, and the class of its pipeline."""
    from tests.zoo import ZOO

    transformer = ZOO[name].transformer()
    folder = SimpleNamespace(index={"_class_name": pipeline}, name="x")
    return SimpleNamespace(transformer=transformer, spec=liftkit.open_flow(transformer).architecture, folder=folder)


@pytest.mark.parametrize(
    ("name", "pipeline", "why"),
    [
        ("SD3Transformer2DModel", "StableDiffusion3Pipeline", "takes no reference images"),
        ("FluxTransformer2DModel", "FluxPipeline", "takes no reference images"),
        ("QwenImageTransformer2DModel", "QwenImagePipeline", "takes no reference images"),
    ],
)
def test_a_pipeline_that_cannot_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixel_klein: Path, name: str, pipeline: str, why: str
) -> None:
    """Before any work, and which can."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pixel").symlink_to(pixel_klein)
    pairs(tmp_path / "photos")
    source = {"kind": "folder", "path": str(tmp_path / "photos"), "reference_column": "reference"}
    recipe = load_recipe("tiny-klein", few_steps("run", data__sources=[source]))
    known = (
        "Flux2KleinPipeline, Flux2Pipeline, FluxKontextPipeline, JoyImageEditPipeline, QwenImageEditPipeline, "
        "QwenImageEditPlusPipeline"
    )
    with pytest.raises(
        UsageError, match=rf"reference_column: {pipeline} {why}.*; pipelines that can: {known}; leave it out"
    ):
        training_data(recipe, trainee_of(name, pipeline), tmp_path, Notes())


def test_references_that_are_read_with_the_prompt_are_not_mirrored(tmp_path: Path) -> None:
    """Embeddings are kept of pictures as they are."""
    pairs(tmp_path)
    source = {"kind": "folder", "path": str(tmp_path), "reference_column": "reference"}
    mirrored = {"data__flip": 0.5, "objective__loss": "flow"}
    recipe = load_recipe("tiny-klein", few_steps("run", model="demo", data__sources=[source], **mirrored))
    trainee = trainee_of("QwenImageTransformer2DModel-edit", "QwenImageEditPipeline")
    with pytest.raises(UsageError, match=r"data\.flip: 0\.5 would mirror references that QwenImageEditPipeline reads"):
        training_data(recipe, trainee, tmp_path, Notes())


# The whole.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pixel_klein: Path) -> Path:
    """Digits made from other digits, and a model."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "pixel").symlink_to(pixel_klein)
    digits_from_digits(root / "photos")
    return root


def test_training_sees_references_and_goes_on_exactly(place: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(place)
    seen: list[tuple[float, float]] = []
    stock = Objective.__call__

    def both(self: Objective, batch: Any, *given: Any) -> Any:
        found = stock(self, batch, *given)
        if not seen:
            with torch.no_grad(), torch.random.fork_rng():
                swapped = [each.flip(0) for each in (batch.references, batch.reference_latents)]
                other = stock(self, type(batch)(*[getattr(batch, name) for name in (
                    "images", "latents", "prompts", "captions", "indices")], *swapped), *given)  # fmt: skip
            seen.append((found.student.item(), other.student.item()))
        return found

    monkeypatch.setattr(Objective, "__call__", both)
    sources = [{"kind": "folder", "path": "photos", "reference_column": "reference"}]
    finetune(load_recipe("tiny-klein", few_steps("whole", data__sources=sources, steps=3)))
    assert abs(seen[0][0] - seen[0][1]) > 1e-4 * seen[0][0], "the loss follows the references"
    code, _, err = cli("finetune", "--resume", "whole/checkpoints/step-0000002", "-o", "parts")
    assert code == 0, err
    ends = [
        load_file(place / run / "checkpoints" / "step-0000003" / "parameters.safetensors") for run in ("whole", "parts")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_previews_edit_the_references_of_the_data(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt beside what its image was made from, shown with and without the prompt."""
    monkeypatch.chdir(place)
    seen: list[dict[str, torch.Tensor]] = []
    stock = watch.preview

    def spied(flow: Any, conditioning: dict[str, torch.Tensor], *more: Any) -> torch.Tensor:
        painted = stock(flow, conditioning, *more)
        swapped = {**conditioning, "references": -conditioning["references"]}
        assert not torch.equal(painted, stock(flow, swapped, *more))
        seen.append(conditioning)
        return painted

    monkeypatch.setattr(watch, "preview", spied)
    sources = [{"kind": "folder", "path": "photos", "reference_column": "reference"}]
    previews = {"every": 1, "count": 3, "steps": 2}
    finetune(load_recipe("tiny-klein", few_steps("seen", data__sources=sources, steps=1, previews=previews)))
    assert seen[0]["references"].shape == (3, 1, 3, 64, 64)
    assert (place / "seen" / "previews" / "step-0000001.png").is_file()


def test_a_dry_run_counts_references(place: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(place)
    sources = [{"kind": "folder", "path": "photos", "reference_column": "reference"}]
    code, out, err = cli("finetune", "tiny-klein", "--dry-run", *few_steps("dry", data__sources=sources))
    assert code == 0, err
    assert "4 are made from others, 0 from prompts alone" in out
