"""The detail head: in pipelines, files and adapters, among reference tokens, in runs that go on, and where none can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import liftkit
from liftkit.conversion.audit import audit
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import UsageError
from liftkit.finetune.run import finetune
from liftkit.formats.adapters import fuse
from liftkit.formats.asymflow_limits import check_exportable, export_problem
from liftkit.models.adapted import load_pixel_pipeline
from liftkit.models.adapter import Adapter
from liftkit.models.detail_head import HEAD, KEY, DetailHead, add_head, head_shape
from liftkit.models.registry import architecture
from liftkit.models.velocity import lifted_forward
from tests.test_conformance import deviation, models, pixel_pipeline, run
from tests.test_going_on import assert_same_run
from tests.training import Watch, rows
from tests.zoo import ZOO

SMALL = "trainable.head={channels: 8, depth: 3}"
QUICK = ("steps=2", "previews.every=0", "validation.every=0", "objective.adversarial=0")
Cli = Callable[..., tuple[int, str, str]]


def awake(head: DetailHead, seed: int = 3) -> DetailHead:
    """Random numbers where it begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (head.layers[-1].weight, head.film.weight):
            weight.normal_(std=0.3, generator=generator)
    return head


def test_the_equation_is_that_of_the_estimate_and_needs_no_division() -> None:
    head = awake(DetailHead(8, 3))
    x, u = torch.randn(2, 2, 3, 16, 24)
    for level in (0.0, 0.01, 1.0):
        sigma = torch.full((2,), level)
        changed = head(x, u, sigma)
        assert changed.isfinite().all()
        h = u - changed
        torch.testing.assert_close(x - level * changed, (x - level * u) + level * h)
    assert h.abs().max() > 0.01


def test_it_sees_over_the_border_of_a_patch_and_stays_near() -> None:
    head = awake(DetailHead(8, 3))
    x, u, sigma = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32), torch.tensor([0.4])
    other = u.clone()
    other[..., 16] += 1.0
    changed = (head(x, other, sigma) - head(x, u, sigma)).abs().amax((0, 1, 2)) > 0
    changed[16] = True
    # Three convolutions at half resolution reach six pixels, and the pair that a pixel is in.
    assert changed.nonzero().flatten().tolist() == list(range(10, 24))


def test_half_precision_moves_it_and_leaves_its_numbers() -> None:
    _, twin, _ = models(ZOO["Flux2Transformer2DModel"])
    head = awake(add_head(twin, 8, 3))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    twin.to(torch.bfloat16)
    assert twin.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([0.5])).dtype == torch.float32


@pytest.mark.parametrize(
    "config", [{"channels": 0, "depth": 4}, {"channels": 8, "depth": 1}, {"channels": 8.0, "depth": 3}]
)
def test_shapes_that_are_none_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a whole number from"):
        DetailHead(**config)


@pytest.mark.parametrize(
    "name", ["Flux2Transformer2DModel", "Ideogram4Transformer2DModel", "QwenImage21Transformer2DModel", "Krea2Transformer2DModel",
             "NucleusMoEImageTransformer2DModel", "Lumina2Transformer2DModel"]
)  # fmt: skip
def test_stock_pipelines_run_with_it(name: str) -> None:
    specimen = ZOO[name]
    lift = specimen.lift()
    pipeline = pixel_pipeline(specimen, specimen.build(), lift)
    noise = torch.randn(1, 3, *(each * lift.patch_size for each in specimen.grid))
    found = []
    for change in (lambda model: None, lambda model: add_head(model, 8, 3), lambda model: awake(model.detail_head)):
        for part in ("transformer", *specimen.spec.companions):
            change(pipeline.components[part])
        found.append(torch.as_tensor(run(specimen, pipeline, noise, 2)[0]))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "SD3Transformer2DModel"])
def test_theorem_1_holds_with_a_head_that_learned_nothing(name: str) -> None:
    latent, twin, lift = models(ZOO[name])
    head = add_head(twin, 8, 3).to(latent.dtype)
    assert deviation(ZOO[name], latent, twin, lift) < 1e-9
    awake(head)
    assert deviation(ZOO[name], latent, twin, lift) > 1e-3


def references(name: str, pipeline_arguments: Callable[[int], dict[str, Any]], *, before: bool) -> None:
    """Reference tokens beside noisy ones keep their velocity, and the noisy ones get what their image gets alone."""
    spec, D = architecture(name), 12 * 16
    config = {"lift_dim": D, "lift_rank": 16, "lift_scale": 1.0, "patch_size": 1, "in_channels": D, "out_channels": D}
    rows, columns = 3, 4
    noisy, clean = torch.randn(2, rows * columns, D), torch.randn(2, 6, D)
    answers = torch.randn(2, rows * columns, D), torch.randn(2, 6, D)
    order = (lambda a, b: [b, a]) if before else (lambda a, b: [a, b])
    arguments = {
        spec.state: torch.cat(order(noisy, clean), 1),
        spec.time: torch.tensor([0.3, 0.7]),
        **pipeline_arguments(rows * 10 + columns),
    }
    head = awake(DetailHead(8, 3))

    def call(**given: Any) -> tuple[Tensor]:
        return (torch.cat(order(*answers), 1),)

    def keep(u: Tensor, x: Tensor, sigma: Tensor, scale: float) -> Tensor:
        return u

    with torch.no_grad():
        plain, changed = (
            lifted_forward(spec, config, keep, torch.float32, call, arguments, refine)[0] for refine in (None, head)
        )
    place = slice(6, None) if before else slice(None, rows * columns)
    rest = slice(None, 6) if before else slice(rows * columns, None)
    assert torch.equal(plain[:, rest], changed[:, rest])
    fold = 8 // spec.latent_patch(config)

    def image(tokens: Tensor) -> Tensor:
        patch = spec.latent_patch(config)
        return nn.functional.pixel_shuffle(
            liftkit.unpatchify(tokens, patch, rows * patch, columns * patch, spec.state_order), fold
        )

    with torch.no_grad():
        wanted = head(image(noisy), image(answers[0]), torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(image(changed[:, place]), wanted)


def test_reference_tokens_stay_out() -> None:
    def flux2(_: int) -> dict[str, Any]:
        image = torch.cartesian_prod(torch.tensor([0]), torch.arange(3), torch.arange(4), torch.tensor([0]))
        reference = torch.cartesian_prod(torch.tensor([10]), torch.arange(2), torch.arange(3), torch.tensor([0]))
        return {"img_ids": torch.cat([image, reference]).expand(2, -1, -1)}

    references("Flux2Transformer2DModel", flux2, before=False)
    references("FluxTransformer2DModel", lambda _: {"img_ids": flux2(0)["img_ids"][0, :, :3]}, before=False)
    references("QwenImageTransformer2DModel", lambda _: {"img_shapes": [[(1, 3, 4), (1, 2, 3)]] * 2}, before=False)
    references("QwenImage21Transformer2DModel", lambda _: {"img_shapes": [[(1, 2, 3), (1, 3, 4)]] * 2}, before=True)


def test_ids_that_were_rounded_are_refused_and_not_painted_elsewhere() -> None:
    ids = torch.cartesian_prod(torch.tensor([0]), torch.arange(512, 520), torch.arange(4))
    found = architecture("FluxTransformer2DModel").token_grid({"img_ids": ids})
    assert found == (1, 8, 4)
    with pytest.raises(UsageError, match="do not tell the rows"):
        architecture("FluxTransformer2DModel").token_grid({"img_ids": ids.to(torch.bfloat16)})


def test_a_run_with_a_head_goes_on_to_the_last_bit_and_leaves_a_whole_folder(make: Any, tmp_path: Path) -> None:
    whole = finetune(make("whole", SMALL)).result
    recipe = make("parts", SMALL)
    finetune(recipe, observer=Watch(lambda step: (recipe.output / "stop").touch() if step == 4 else None))
    assert finetune(recipe, resume="latest").outcome.step == 6
    assert whole is not None
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    last = tmp_path / "parts" / "checkpoints" / "step-0000006"
    assert f"{HEAD}.layers.2.weight/exp_avg" in load_file(last / "optimizer.safetensors")
    assert audit(whole).ok
    transformer = DiffusionPipeline.from_pretrained(whole, dtype=torch.bfloat16).transformer
    assert transformer.config[KEY] == {"channels": 8, "depth": 3}
    learned = load_file(last / "average.safetensors")
    for name, value in transformer.detail_head.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, learned[f"{HEAD}.{name}"])
    assert transformer.detail_head.layers[-1].weight.abs().max() > 0
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        Flux2Transformer2DModel.from_pretrained(whole / "transformer")


def test_a_head_at_zero_has_the_first_loss_of_a_run_without_and_other_shapes_cannot_go_on(
    make: Any, tmp_path: Path
) -> None:
    a, b = (
        rows(finetune(make(name, *QUICK, *more)).trainer.folder.path)
        for name, more in (("without", ()), ("with", (SMALL,)))
    )
    assert a[0]["loss"] == b[0]["loss"]
    assert a[1]["loss"] != b[1]["loss"]
    for change in ("trainable.head={channels: 9, depth: 3}", "trainable.head=null"):
        with pytest.raises(UsageError, match=r"trainable\.head"):
            finetune(make("with", *QUICK, change, "steps=3"), resume="latest")


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_adapters_carry_it_to_latent_and_pixel_bases(
    make: Any, mode: str, pixel_klein: Path, cli: Cli, tmp_path: Path
) -> None:
    more = (*QUICK, SMALL, f"trainable.mode={mode}", "optimizer.name=adamw")
    model = finetune(make("model", *more)).result
    adapter = finetune(make("adapter", *more, "save=adapter")).result
    assert model is not None
    assert adapter is not None
    assert Adapter.load(adapter).head == {"channels": 8, "depth": 3}
    whole = DiffusionPipeline.from_pretrained(model).transformer.state_dict()
    for number, base in enumerate((TINY_KLEIN, pixel_klein)):
        applied = load_pixel_pipeline(DiffusionPipeline.from_pretrained(base), Adapter.load(adapter)).transformer
        fused = fuse(adapter, str(base), tmp_path / f"fused-{number}").output
        merged = DiffusionPipeline.from_pretrained(fused).transformer.state_dict()
        assert audit(fused).ok
        assert applied.state_dict().keys() == merged.keys() == whole.keys()
        for name, value in whole.items():
            if name.startswith(HEAD):
                assert torch.equal(applied.state_dict()[name], value)
                assert torch.equal(merged[name], value)
    # A head learns on without being asked for, and none is lost on the way to an adapter.
    again = finetune(make("again", *QUICK, f"model={model}", "optimizer.name=adamw", "save=adapter")).result
    assert again is not None
    assert Adapter.load(again).head == {"channels": 8, "depth": 3}
    assert any(not torch.equal(Adapter.load(again).full[name], whole[name]) for name in whole if name.startswith(HEAD))
    code, _, err = cli(
        "finetune", tmp_path / "again.yaml", "--dry-run", f"model={model}", "trainable.head={}", "output=other"
    )
    assert code == 2
    assert "has one already" in err
    if mode == "lora":
        code, _, err = cli("export", model, "--base", TINY_KLEIN, "--format", "adapter", "-o", tmp_path / "exported")
        assert code == 0, err
        assert Adapter.load(tmp_path / "exported").head == {"channels": 8, "depth": 3}
        code, _, err = cli("export", adapter, "--format", "asymflow-adapter", "-o", tmp_path / "theirs")
        assert code == 2
        assert "no place for a detail head" in err or "oklab-paper" in err


def test_sharded_bases_get_it_in_their_index(pixel_klein: Path, make: Any, tmp_path: Path) -> None:
    base = tmp_path / "sharded"
    pipeline = DiffusionPipeline.from_pretrained(pixel_klein)
    pipeline.save_pretrained(base, max_shard_size="1MB")
    for name in ("latent", "lift.safetensors", "liftkit.json"):
        (base / name).symlink_to(pixel_klein / name)
    adapter = finetune(make("adapter", *QUICK, SMALL, "save=adapter", "optimizer.name=adamw")).result
    assert adapter is not None
    fused = fuse(adapter, str(base), tmp_path / "fused").output
    index = json.loads((fused / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = {file: load_file(fused / "transformer" / file) for file in set(index["weight_map"].values())}
    assert len(files) > 1
    assert all(name in files[file] for name, file in index["weight_map"].items())
    assert sum(name.startswith(HEAD) for name in index["weight_map"]) == 8
    total = sum(value.nbytes for tensors in files.values() for value in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert DiffusionPipeline.from_pretrained(fused).transformer.detail_head is not None


def test_half_a_head_is_refused(make: Any, tmp_path: Path) -> None:
    adapter = finetune(make("adapter", *QUICK, SMALL, "save=adapter")).result
    assert adapter is not None
    file = adapter / "adapter.safetensors"
    tensors = load_file(file)
    del tensors[f"{HEAD}.layers.1.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UsageError, match="not all of a detail head is there"):
        fuse(adapter, str(TINY_KLEIN), tmp_path / "fused")
    assert head_shape({"proj_out.weight": (3, 3)}) is None


def test_the_authors_format_says_that_it_has_no_place_for_one() -> None:
    specimen = ZOO["Flux2Transformer2DModel"]
    tensors = {f"{HEAD}.{name}": value for name, value in DetailHead(8, 3).state_dict().items()}
    adapter = Adapter(tensors, None, specimen.lift(), specimen.spec.lifted_name, "tiny", {})
    with pytest.raises(UsageError, match="no place for a detail head"):
        check_exportable(adapter)
    assert "no place for a detail head" in export_problem(specimen.spec.lifted_name, specimen.lift().color, [HEAD])


def test_what_is_computed_again_in_the_backward_pass_has_the_same_gradients() -> None:
    head = awake(DetailHead(8, 3))
    x, u, sigma = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9])
    found = []
    for head.checkpointing in (False, True):
        head.zero_grad()
        head(x, u, sigma).square().mean().backward()
        found.append([each.grad.clone() for each in head.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_dry_run_says_what_it_costs(make: Any, cli: Cli, tmp_path: Path) -> None:
    make("dry", *QUICK)
    code, out, err = cli("finetune", tmp_path / "dry.yaml", "--dry-run", "trainable.head={}")
    assert code == 0, err
    assert "detail head" in out
    assert f"{sum(each.numel() for each in DetailHead().parameters()):,} numbers" in out


def test_latent_models_get_none(make: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trainable\.head works on pixels"):
        make("latent", SMALL, "space=latent", "objective.loss=flow", "objective.adversarial=0", "model=demo")
