"""Training on pairs of models whose text encoders read each prompt together with the picture that is edited."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

import liftkit
from liftkit.checkpoint.model import ModelFolder
from liftkit.data import demo
from liftkit.data.captioned import CaptionedFolder
from liftkit.data.training import TrainingData
from liftkit.errors import UsageError
from liftkit.finetune import encoders
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.run import finetune
from liftkit.finetune.sketch import text_tokens_of_pictures
from liftkit.finetune.step import Objective
from liftkit.models.registry import architecture
from tests.training import few_steps
from tests.training_data import Encoders, digits_from_digits, pairs, training
from tests.zoo import ZOO
from tests.zoo.specimen import draw, picture

EDIT, PLUS, JOY = (
    "QwenImageTransformer2DModel-edit",
    "QwenImageTransformer2DModel-edit-plus",
    "JoyImageEditTransformer3DModel",
)


def read(prompts: list[str], pictures: list[Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of one prompt that follow from its letters and from the colors of pictures: no encoder of gigabytes."""
    (prompt,) = prompts
    seen = [torch.tensor(list(each.resize((2, 2)).getdata())).float().view(1, 12) / 255 for each in pictures or []]
    text = draw(len(prompt) + 3, 24, seed=len(prompt))
    rows = torch.cat([*(each.repeat(1, 2) for each in seen), text])[None]
    return rows, torch.ones(rows.shape[:2], dtype=torch.long)


def stubbed(name: str, shown: list[Any] | None = None) -> Any:
    """The stock pipeline of a specimen, which reads by :func:`read`.

    Args:
        name: of the specimen.
        shown: receives the pictures that the encoder is shown.
    """
    pipeline = ZOO[name].build()

    def seen(prompt: Any, image: Any = None, *args: Any, images: Any = None, **more: Any) -> Any:
        image = images if image is None else image
        many = image if isinstance(image, list) or image is None else [image]
        if shown is not None:
            shown.extend(many or [])
        return read([prompt] if isinstance(prompt, str) else prompt, many)

    if name == JOY:
        pipeline.encode_prompt_multiple_images = lambda prompt, **given: seen(prompt, **given)
        pipeline.vae_image_processor.get_default_height_width = lambda image, *args: (64, 64)
    else:
        pipeline._get_qwen_prompt_embeds = seen
    return pipeline


@torch.no_grad()
@pytest.mark.parametrize("name", [EDIT, PLUS, JOY])
def test_prompts_and_references_are_those_of_the_stock_pipeline(name: str) -> None:
    """What the encoder is shown, what it makes of it, and where the references stand."""
    specimen, shown = ZOO[name], []
    side = 8 * specimen.factor
    pipeline = stubbed(name, shown)
    flow, calls = liftkit.open_flow(pipeline.transformer), []
    forward = pipeline.transformer.forward
    pipeline.transformer.forward = lambda **given: calls.append(given) or forward(**given)
    noise, pictures = draw(1, 4, 8, 8), [picture(side, side), picture(side, side, seed=4)][: 2 if name == PLUS else 1]
    asked = {"width": side, "height": side, "num_inference_steps": 1, "output_type": "latent", **specimen.plain}
    with specimen.around(side, side):
        image = pictures if len(pictures) > 1 else pictures[0]
        pipeline(prompt="as at night", image=image, latents=flow.pipeline_state(noise), **asked)
        theirs = [each.size for each in shown]
        given = specimen.spec.prompts_beside(pipeline, "as at night", pictures)
    assert [each.size for each in shown] == 2 * theirs
    assert torch.equal(calls[0]["encoder_hidden_states"][0], given["encoder_hidden_states"])
    state = calls[0]["hidden_states"]
    if name == JOY:
        clean = state[:, :-1].squeeze(3)
    else:
        clean = liftkit.unpatchify(state[:, 16:].unflatten(1, (-1, 16)).flatten(0, 1), 2, 8, 8, "cpq")[None]
    flow.velocity(noise, torch.ones(1), **{key: value[None] for key, value in given.items()}, references=clean)
    assert torch.equal(calls[1]["hidden_states"], state)
    assert calls[1].get("img_shapes") == calls[0].get("img_shapes")


def test_embeddings_are_kept_by_prompt_and_picture(tmp_path: Path) -> None:
    """One prompt with two pictures is two, another run finds both, and prompts of images from nothing are read alone."""
    folder = pairs(tmp_path / "data", 6, line0=None)
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(re.sub(r"edit \d", "edit", lines))
    asked: list[tuple[str, float]] = []

    def read_pair(prompt: str, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        asked.append((prompt, images[0].float().mean().item()))
        tokens = torch.full((len(prompt) + 4, 4), asked[-1][1])
        return {"encoder_hidden_states": tokens, "mask": torch.ones(len(tokens), dtype=torch.bool)}

    def read_alone(prompts: list[str]) -> dict[str, torch.Tensor]:
        shape = (len(prompts), 3)
        return {"encoder_hidden_states": -torch.ones(*shape, 4), "mask": torch.ones(shape, dtype=torch.bool)}

    def prepared() -> TrainingData:
        data = training(CaptionedFolder(folder, "reference"), cache=tmp_path / "cache", ready=False, batch_size=5)
        data.prepare(Encoders().image, "vae", lambda: read_alone, "text", None, ["more"], lambda: read_pair)
        return data

    data = prepared()
    # Five pairs with the caption and the empty prompt, and the prompt of previews with the first one.
    assert len(asked) == len(set(asked)) == 11
    for step in range(4):
        batch = data.batch(step)
        assert batch.prompts["encoder_hidden_states"].shape == (5, 8, 4)
        for row, caption in enumerate(batch.captions):
            own = -1.0 if batch.references is None else batch.references[row].float().mean().item()
            count = 3 if batch.references is None else len(caption) + 4
            expected = torch.cat([torch.full((count, 4), own), torch.zeros(8 - count, 4)])
            assert torch.equal(batch.prompts["encoder_hidden_states"][row], expected)
            assert batch.prompts["mask"][row].sum() == count
    step = data.first_pairs()
    assert torch.equal(data.prompts(["more"], step)["encoder_hidden_states"][0, 0], batch_mean(data, step))
    assert prepared().digest == data.digest
    assert len(asked) == 11, "nothing is read twice"


@pytest.mark.parametrize("every", [False, True])
def test_references_that_go_away_before_they_are_embedded_are_left_out(tmp_path: Path, every: bool) -> None:
    """Their latents are cached by then: images that are made from them are counted as lost, and the run is that of the others."""
    folder = pairs(tmp_path / "data", 6)

    def read_pair(prompt: str, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": torch.full((len(prompt) + 4, 4), images[0].float().mean().item())}

    def make_after_loss() -> Any:
        for file in (folder / "before").glob("*" if every else "2.png"):
            file.unlink()
        return read_pair

    def prepared(cache: str, make_pair_encoder: Callable[[], Any]) -> TrainingData:
        data = training(CaptionedFolder(folder, "reference"), cache=tmp_path / cache, ready=False, batch_size=2)
        encoders = Encoders()
        data.prepare(encoders.image, "vae", encoders.prompt, "text", None, ["more"], make_pair_encoder)
        return data

    if every:
        with pytest.raises(UsageError, match=r"none of its 6 images can be read .*made from pictures"):
            prepared("cache", make_after_loss)
        return
    data = prepared("cache", make_after_loss)
    assert data.tally.used == 5
    assert data.tally.left_out["made from pictures that cannot be read"] == {"after/2.png": None}
    seen = {caption for step in range(20) for caption in data.batch(step).captions}
    assert seen - {""} == {f"edit {index}" for index in (0, 1, 3, 4, 5)}
    assert prepared("anew", lambda: read_pair).digest == data.digest


@pytest.mark.parametrize(
    ("pipeline", "patch", "most", "size", "references", "expected"),
    [
        ("QwenImageEditPipeline", 14, 12845056, (1024, 1024), 1, 1369),  # 37 x 37 squares of 28 pixels
        ("QwenImageEditPipeline", 14, 12845056, (64, 64), 1, 1369),  # enlarged to a megapixel
        ("QwenImageEditPipeline", 14, 12845056, (512, 1024), 1, 26 * 51),
        ("QwenImageEditPipeline", 14, 784 * 100, (1024, 1024), 1, 100),
        ("QwenImageEditPlusPipeline", 14, 12845056, (1024, 1024), 3, 3 * 14 * 14),
        ("QwenImagePipeline", 14, 12845056, (1024, 1024), 1, 0),  # reads prompts alone
        ("JoyImageEditPipeline", 16, 16777216, (1024, 1024), 1, 1024),
    ],
)
def test_a_dry_run_counts_the_tokens_of_pictures_that_are_read_with_prompts(
    tmp_path: Path, pipeline: str, patch: int, most: int, size: tuple[int, int], references: int, expected: int
) -> None:
    """As many as the processor makes of what the encoder is shown."""
    name = JOY if pipeline.startswith("Joy") else EDIT.removesuffix("-edit")
    (tmp_path / "processor").mkdir()
    kept = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch, "merge_size": 2}
    (tmp_path / "processor" / "preprocessor_config.json").write_text(
        json.dumps({**kept, "min_pixels": 3136, "max_pixels": most})
    )
    index = {
        "_class_name": pipeline,
        "transformer": ["diffusers", name],
        "processor": ["transformers", "Qwen2_5_VLProcessor"],
    }
    folder, spec = ModelFolder(tmp_path, "here", index), architecture(name)
    sizes = {(size, references), ((32, 32), 0)}
    assert text_tokens_of_pictures(folder, spec, sizes) == expected
    if expected:
        reader = AutoImageProcessor.from_pretrained(tmp_path / "processor")
        height, width = spec.shown_beside(pipeline, *size)
        grid = reader(images=[Image.new("RGB", (width, height))] * references, return_tensors="pt")["image_grid_thw"]
        assert grid.prod(dim=1).sum() // 4 == expected


def test_without_a_processor_a_dry_run_counts_no_pictures(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, "here", {"_class_name": "QwenImageEditPipeline"})
    assert text_tokens_of_pictures(folder, architecture(EDIT.removesuffix("-edit")), {((64, 64), 1)}) == 0


def batch_mean(data: TrainingData, step: int | None) -> torch.Tensor:
    """Of the first reference of a step, as often as a token has numbers."""
    references = data.batch(step or 0).references
    assert references is not None
    return references[0].float().mean().expand(4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits made from other digits, all with one prompt, and conversions."""
    root = tmp_path_factory.mktemp("together")
    digits_from_digits(root / "photos")
    for name in (EDIT, JOY):
        ZOO[name].build().save_pretrained(root / f"latent-{name}")
        liftkit.convert(
            str(root / f"latent-{name}"), root / name, images="demo", num_images=32, resolution=64, device="cpu",
            proof="projections",
        )  # fmt: skip
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", [EDIT, JOY])
def test_pairs_train_and_go_on_exactly(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, cli: Callable[..., tuple[int, str, str]]
) -> None:
    """The cache holds embeddings by prompt and picture, previews among them, and a second run finds them there."""
    monkeypatch.chdir(place)
    read_by = [0]

    def text_side(folder: Any, device: str, pictures: bool = False) -> Any:
        assert pictures, "no prompt is read alone"
        read_by[0] += 1
        return stubbed(name)

    monkeypatch.setattr(encoders, "load_text_side", text_side)
    seen: list[tuple[list[tuple[int, int]], torch.Tensor]] = []
    stock = Objective.__call__

    def spied(self: Objective, batch: Any, *given: Any) -> Any:
        seen.append((batch.indices, batch.prompts["encoder_hidden_states"]))
        return stock(self, batch, *given)

    monkeypatch.setattr(Objective, "__call__", spied)
    sources = [{"kind": "folder", "path": "photos", "reference_column": "reference"}]
    shared = {
        "model": name, "data__sources": sources, "data__prompt_dropout": 0.0, "data__cache": f"cache-{name}",
        "trainable__rank": 2, "data__resolution": 64, "optimizer__multipliers": {},
    }  # fmt: skip
    previews = {"every": 2, "count": 3, "steps": 2, "prompts": ["one more digit"]}
    finetune(load_recipe("tiny-klein", few_steps(f"whole-{name}", **shared, previews=previews)))
    assert (place / f"whole-{name}" / "previews" / "step-0000002.png").is_file()
    by_image = {place: row for places, rows in seen for place, row in zip(places, rows)}
    assert len(by_image) > 1
    first, other, *_ = by_image.values()
    assert first.shape == other.shape
    assert not torch.equal(first, other), "one prompt, two pictures"
    finetune(load_recipe("tiny-klein", few_steps(f"begun-{name}", **shared, previews=previews)))
    assert read_by == [1]
    code, _, err = cli("finetune", "--resume", f"begun-{name}/checkpoints/step-0000001", "-o", f"on-{name}")
    assert code == 0, err
    ends = [
        load_file(place / f"{run}-{name}" / "checkpoints" / "step-0000002" / "parameters.safetensors")
        for run in ("whole", "on")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("references", "why"),
    [
        (["1.png", "2.png"], r"reference_column: QwenImageEditPipeline takes 1 at most, and 0.png is made from 2"),
        ("1.png", r"no .*processor"),
    ],
)
def test_too_many_references_and_a_model_without_a_processor_are_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, references: Any, why: str
) -> None:
    monkeypatch.chdir(place)
    for index in range(3 if isinstance(references, list) else 2):
        Image.fromarray(demo.image_at(index)[0]).save(tmp_path / f"{index}.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "x", "reference": references}))
    sources = [{"kind": "folder", "path": str(tmp_path), "reference_column": "reference"}]
    changes = {"data__sources": sources, "data__resolution": 64, "optimizer__multipliers": {}, "batch_size": 1}
    with pytest.raises(UsageError, match=why):
        finetune(load_recipe("tiny-klein", few_steps("none", model=EDIT, **changes)))
