"""Every architecture of the zoo, held to the same suite: Theorem 1 bare and through the stock pipeline, files, reference, LoRA,
captions, a finetune. ``make test`` runs the bare theorem for all and the rest for one family of each layout."""

from __future__ import annotations

import functools
import inspect
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import liftkit
from liftkit.conversion.tied import TiedRun, relative
from liftkit.finetune import encoders
from liftkit.finetune.network import Network, blocks_of, compile_for_training, connect, original_modules
from liftkit.finetune.trainee import default_modules, match_targets
from liftkit.models import registry
from liftkit.models.autoencoder import Exact, PixelCode
from liftkit.models.detail_head import add_head
from liftkit.models.latents import LatentSpace
from liftkit.models.loaded import Loaded
from liftkit.models.spec import Architecture
from liftkit.playground.estimates import watched
from liftkit.progress import Silent
from tests.zoo import ZOO
from tests.zoo.specimen import Part, Specimen

QUICK = (
    "FluxTransformer2DModel",
    "Lumina2Transformer2DModel",
    "ZImageTransformer2DModel",
    "WanTransformer3DModel",
    "Kandinsky5Transformer3DModel",
)
"""One of each layout: what ``make test`` runs the whole suite for."""


def specimens(part: Part | None = None) -> Any:
    """The specimens that a part of the suite is for, as a parameter."""
    with_pipeline = {name for name, each in ZOO.items() if each.pipeline is not None}
    able = with_pipeline if part in ("pipeline", "convert", "finetune", "prompts") else set(ZOO)
    chosen = [(name, each) for name, each in ZOO.items() if name in able and part not in each.without]
    marks = {name: () if part is None or name in QUICK else (pytest.mark.slow,) for name, _ in chosen}
    return pytest.mark.parametrize(
        "specimen", [pytest.param(each, id=name, marks=marks[name]) for name, each in chosen]
    )


def test_every_architecture_has_a_specimen() -> None:
    assert {each.architecture for each in ZOO.values()} == set(liftkit.architectures())


def test_the_quick_ones_have_all_layouts_and_are_excused_from_nothing() -> None:
    # JoyImage alone has its state in items, and edits pictures.
    assert {ZOO[name].spec.layout.value for name in QUICK} == {"tokens", "image", "list", "video", "channels_last"}
    assert not [name for name in QUICK if ZOO[name].without]


def deviation(specimen: Specimen, latent: Any, twin: Any, lift: liftkit.Lift) -> float:
    """Of a tied run of both, in float64."""
    run = TiedRun(specimen.spec, dict(latent.config), lift, steps=5, seed=0, dtype=latent.dtype)
    with torch.no_grad(), specimen.float64():
        return run.deviation(liftkit.open_flow(twin), run.sample_latent(liftkit.open_flow(latent)))


def models(specimen: Specimen, scale: float = 1.7) -> tuple[Any, Any, liftkit.Lift]:
    """A latent model and its twin, in float64."""
    lift = specimen.lift(scale)
    latent = specimen.transformer().double()
    return latent, liftkit.convert_transformer(latent, lift), lift


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@specimens()
@pytest.mark.parametrize("scale", [0.4, 2.4])
def test_theorem_1_holds(specimen: Specimen, scale: float) -> None:
    assert deviation(specimen, *models(specimen, scale)) < 1e-9


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@specimens()
def test_a_fresh_detail_head_changes_no_bit_and_a_learned_one_is_given_the_image(specimen: Specimen) -> None:
    latent, twin, _ = models(specimen)
    flow = liftkit.open_flow(twin)
    conditioning = specimen.spec.conditioning(latent.config, 2, torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, *(each * flow.token_side for each in specimen.spec.proof_grid), dtype=latent.dtype)
    sigma = torch.tensor([0.3, 0.8], dtype=latent.dtype)
    with torch.no_grad(), specimen.float64():
        bare = flow.velocity(x, sigma, **conditioning)
        head = add_head(twin, 8, 3).to(latent.dtype)
        assert torch.equal(flow.velocity(x, sigma, **conditioning), bare)
        nn.init.normal_(head.layers[-1].weight)
        nn.init.normal_(head.film.weight)
        wanted = head(x, bare, sigma)
        assert relative(flow.velocity(x, sigma, **conditioning), wanted) < 1e-6
        assert relative(bare, wanted) > 0.1


@pytest.mark.slow
@specimens()
def test_each_kind_of_block_compiles_and_says_the_same(specimen: Specimen) -> None:
    """Traced as for a run; what a compiler would make of the graphs is its own matter."""
    twin = liftkit.convert_transformer(specimen.transformer(), specimen.lift())
    flow, graphs = liftkit.open_flow(twin), list[Any]()
    conditioning = specimen.spec.conditioning(twin.config, 1, torch.Generator().manual_seed(0))
    x = torch.randn(1, 3, *(each * flow.token_side for each in specimen.spec.proof_grid))
    sigma = torch.tensor([0.4])

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = flow.velocity(x, sigma, **conditioning)
        torch.compiler.reset()
        compile_for_training(twin, torch.device("cpu"), backend=backend)
        torch.testing.assert_close(flow.velocity(x, sigma, **conditioning), expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) >= len({type(block) for block in blocks_of(twin)}) > 0


@specimens("save")
def test_a_saved_twin_is_loaded_as_it_was_and_the_stock_class_refuses_it(specimen: Specimen, tmp_path: Path) -> None:
    latent = specimen.transformer()
    twin = liftkit.convert_transformer(latent, specimen.lift())
    twin.save_pretrained(tmp_path)
    again = type(twin).from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in twin.state_dict().items())
    stored = json.loads((tmp_path / "config.json").read_text())
    for key in filter(latent.config.__contains__, specimen.spec.channel_keys):
        assert again.config[key] == twin.config[key]
        assert stored[key] == latent.config[key]
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        type(latent).from_pretrained(tmp_path)


@specimens("reference")
def test_the_reference_is_the_latent_model_and_the_student_learns(specimen: Specimen) -> None:
    latent = specimen.transformer()
    twin = liftkit.convert_transformer(latent, specimen.lift())
    before = dict(vars(twin))
    student, reference = connect(twin, Network(twin, original_modules(twin, latent.state_dict())))
    assert reference is not None
    flow, side = liftkit.open_flow(latent), specimen.patch
    conditioning = specimen.spec.conditioning(latent.config, 2, torch.Generator().manual_seed(0))
    shape, sigma = [each * side for each in specimen.spec.proof_grid], torch.tensor([0.3, 0.8])
    x = torch.randn(2, flow.channels, *shape)
    with torch.no_grad():
        wanted = flow.velocity(x, sigma, **conditioning)
        assert relative(reference.velocity(x, sigma, **conditioning), wanted) < 1e-5
    assert dict(vars(twin)) == before
    y = torch.randn(2, 3, *(each * specimen.factor for each in shape))
    student.velocity(y, sigma, **conditioning).square().mean().backward()
    assert twin.get_submodule(specimen.spec.inputs[0].path).weight.grad.abs().sum() > 0


def pixel_pipeline(specimen: Specimen, latent: Any, lift: liftkit.Lift) -> Any:
    """The stock pipeline of the twin; the latent one gets a scheduler of the same kind."""
    parts = dict(latent.components)
    for name in ("transformer", *specimen.spec.companions):
        parts[name] = liftkit.convert_transformer(parts[name], lift)
    name = type(latent.scheduler).__name__
    kind = getattr(diffusers, name if name.startswith("Asym") else f"Asym{name}")
    if "FlowMatch" not in name:
        latent.scheduler = kind.from_config(latent.scheduler.config)
    parts["scheduler"] = kind.from_config({**latent.scheduler.config, "lift_scale": lift.scale})
    parts["vae"] = liftkit.PixelAutoencoder.from_lift(lift)
    pipeline = type(latent)(**parts, **specimen.options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(specimen: Specimen, pipeline: Any, noise: Tensor, steps: int, **more: Any) -> Any:
    """The stock pipeline from given noise, (B, 3, H, W) or (B, C, h, w); B counts the images of all states."""
    flow = liftkit.open_flow(pipeline.transformer)
    height, width = (side if flow.is_pixel else side * specimen.factor for side in noise.shape[-2:])
    specimen.prepare(pipeline, height, width)
    count = len(noise) // specimen.images
    latents = flow.pipeline_state(noise)
    if specimen.images > 1:
        latents = latents.reshape(count, -1, latents.shape[-1])
    size = {"height": height, "width": width}
    known = inspect.signature(type(pipeline).__call__).parameters
    arguments = {**specimen.call(count), **specimen.spec.call, "output_type": "np", **more}
    arguments |= {name: value for name, value in size.items() if name in known}
    with specimen.around(height, width):
        return pipeline(latents=latents, num_inference_steps=steps, **arguments)


def encode_as_the_twin(vae: Any, spec: Architecture, lift: liftkit.Lift) -> None:
    """Make a latent pipeline's VAE encode a picture to the latents inside of what its pixel twin sees: ``A^T x / s``."""
    space, pixels = LatentSpace(vae, spec.latent_statistics), liftkit.PixelAutoencoder.from_lift(lift)

    def encode(images: Tensor, *args: Any, **more: Any) -> PixelCode:
        frames = images.squeeze(2) if space.family.video else images
        x = torch.nn.functional.pixel_shuffle(pixels.encode(frames).latent, lift.fold)
        latents = lift.lower(x) / lift.scale
        mean, std = space.statistics(vae, latents)
        raw = latents * std + mean
        raw = raw.unsqueeze(2) if space.family.video else raw
        return PixelCode(latent_dist=Exact(raw), latent=raw)

    vae.encode = encode


def _keep_steps(scheduler: Any, kept: list[Tensor]) -> None:
    """Not all pipelines take a callback."""
    stock = scheduler.step

    @functools.wraps(stock)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        kept.append(result[0])
        return result

    scheduler.step = step


def tied_pipelines(specimen: Specimen, exactly: bool = False, **more: Any) -> float:
    """How far a stock pipeline's last pixel state is from the lift of its last latents.

    Args:
        specimen: of the zoo.
        exactly: rescale guided velocities inside the subspace.
        more: arguments of the pipeline.
    """
    lift, latent = specimen.lift(), specimen.build()
    pixel = pixel_pipeline(specimen, latent, lift)
    rows, columns = specimen.grid
    encode_as_the_twin(latent.vae, specimen.spec, lift)
    shape = specimen.images, 3, rows * lift.patch_size, columns * lift.patch_size
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found, shapes = [], []
    for pipeline, start in ((latent, lift.lower(noise)), (pixel, noise)):
        kept: list[Tensor] = []
        _keep_steps(pipeline.scheduler, kept)
        call = {**specimen.call(1), **specimen.spec.call, **more}
        rescaling = liftkit.guided(pipeline, **call) if exactly else nullcontext()
        with rescaling:
            output = run(specimen, pipeline, start, 4, **more)
        images = output.frames if hasattr(output, "frames") else output[0]
        shapes.append(np.array(images).shape)
        flow = liftkit.open_flow(pipeline.transformer)
        height, width = rows * specimen.patch, columns * specimen.patch
        state = kept[-1].float()
        if specimen.images > 1:
            state = state.reshape(specimen.images, -1, state.shape[-1])
        found.append(flow.state_of_pipeline(state, height, width))
    z, folded = found
    x = torch.nn.functional.pixel_shuffle(folded, specimen.factor)
    assert shapes[0][:-1] == shapes[1][:-1], (
        "all but the colors: a latent Qwen-Image 2.1 shows opacity, pixels have none"
    )
    lifted = lift.raise_tokens(liftkit.patchify(z, specimen.patch))
    return relative(x, liftkit.unpatchify(lifted, lift.patch_size, *x.shape[-2:]))


@specimens("pipeline")
def test_the_stock_pipeline_obeys_theorem_1(specimen: Specimen) -> None:
    assert tied_pipelines(specimen, **specimen.plain) < 1e-3


@specimens("pipeline")
@pytest.mark.parametrize("pixels", [False, True], ids=["latent", "pixel"])
def test_the_last_denoised_estimate_is_the_picture(specimen: Specimen, pixels: bool) -> None:
    """``liftkit try`` shows estimates of each step: of every layout, sign and clock the last one is where the sampler arrives."""
    lift, latent = specimen.lift(), specimen.build()
    pipeline = pixel_pipeline(specimen, latent, lift) if pixels else latent
    rows, columns = specimen.grid
    height, width = rows * lift.patch_size, columns * lift.patch_size
    noise = torch.randn(specimen.images, 3, height, width, generator=torch.Generator().manual_seed(1))
    found: list[tuple[float, Tensor]] = []
    model = Loaded(pipeline, height)
    with watched(model, lambda at, estimate: found.append((at.sigma, estimate())), height, width):
        output = run(specimen, pipeline, noise if pixels else lift.lower(noise), 3)
    assert "step" not in vars(pipeline.scheduler)
    if type(pipeline).__name__ in model.flow.architecture.several:
        assert not found, "several pictures of one prompt have no estimate"
        return
    levels = [sigma for sigma, _ in found]
    assert len(levels) == 3
    assert levels == sorted(levels, reverse=True)
    assert 0.0 < levels[-1] < levels[0] <= 1.0
    images = torch.as_tensor(output.frames if hasattr(output, "frames") else output[0]).squeeze()
    last = found[-1][1].squeeze(0).permute(1, 2, 0) / 2.0 + 0.5
    assert (images[..., :3] - last).abs().max() < 2e-3
    assert (found[0][1] - found[-1][1]).abs().max() > 1e-2


@specimens("pipeline")
def test_a_pipeline_that_rescales_its_guidance_obeys_theorem_1(specimen: Specimen) -> None:
    if specimen.spec.rescale is None:
        pytest.skip("its pipelines do not rescale")
    plain = tied_pipelines(specimen)
    exact = tied_pipelines(specimen, exactly=True)
    assert exact < 1e-3
    assert exact < plain / 10


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@specimens("lora")
def test_a_lora_of_the_latent_model_lifts(specimen: Specimen) -> None:
    latent, twin, lift = models(specimen)
    spec = specimen.spec
    names = [name for name, module in twin.named_modules() if isinstance(module, nn.Linear)]
    targets = match_targets(list(spec.adapters), names, spec.name)
    assert targets
    assert not set(targets) & set(default_modules(spec))
    targets += [each.path for each, _ in spec.projections]
    exact = "|".join(name.replace(".", r"\.") for name in targets)
    config = peft.LoraConfig(r=2, target_modules=f"({exact})", init_lora_weights=False)
    for model in (latent, twin):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, model)
    state = peft.get_peft_model_state_dict(latent)
    peft.set_peft_model_state_dict(twin, liftkit.lift_lora(state, spec, lift))
    assert deviation(specimen, latent, twin, lift) < 1e-9


@specimens("prompts")
def test_prompts_one_by_one_are_prompts_together(specimen: Specimen) -> None:
    pipeline, spec = specimen.build(), specimen.spec
    for name, stub in specimen.stubs.items():
        setattr(pipeline, name, stub)
    texts = ["a", "a cat, and more than sixteen letters", "a dog"]
    together = spec.prompts(pipeline, texts, None)
    alone = [spec.prompts(pipeline, [text], None) for text in texts]
    joined = {name: torch.cat([each[name] for each in alone]) for name in together}
    assert {name: value.shape for name, value in joined.items()} == {name: v.shape for name, v in together.items()}
    flow = liftkit.open_flow(pipeline.transformer)
    grid = [each * flow.token_side for each in spec.proof_grid]
    x, sigma = torch.randn(3, flow.channels, *grid), torch.full((3,), 0.5)
    with torch.no_grad():
        one, other = (flow.velocity(x, sigma, **given) for given in (together, joined))
    assert relative(one, other) < 1e-4


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Conversions by name, made once."""
    made: dict[str, Path] = {}

    def convert(specimen: Specimen) -> Path:
        if specimen.name not in made:
            root = tmp_path_factory.mktemp(specimen.name)
            specimen.build().save_pretrained(root / "latent")
            liftkit.convert(
                str(root / "latent"), root / "pixel", images="demo", num_images=32, resolution=64, device="cpu"
            )
            made[specimen.name] = root / "pixel"
        return made[specimen.name]

    return convert


@specimens("convert")
def test_a_folder_is_converted_verified_and_sampled(specimen: Specimen, converted: Any) -> None:
    folder = converted(specimen)
    liftkit.verify(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(specimen.missing))
    pipeline.set_progress_bar_config(disable=True)
    side = specimen.factor * specimen.patch
    output = run(specimen, pipeline, torch.randn(specimen.images, 3, *(each * side for each in specimen.grid)), 2)
    assert np.isfinite(np.array(output.frames if hasattr(output, "frames") else output[0])).all()


RECIPE = """
model: {model}
output: {output}
data:
  sources: [{{kind: demo, count: 8}}]
  cache: {cache}
  workers: 1
  resolution: 64
steps: 2
batch_size: 2
precision: "no"
threads: 1
trainable: {{rank: 2}}
previews: {{every: 0}}
validation: {{every: 0}}
"""


@specimens("finetune")
def test_a_conversion_is_finetuned(
    specimen: Specimen, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liftkit.finetune.recipe_file import load_recipe
    from liftkit.finetune.run import finetune

    spec, config = specimen.spec, specimen.transformer().config

    def prompts(pipeline: Any, texts: list[str], length: int | None) -> dict[str, Tensor]:
        rows = [spec.conditioning(config, 1, torch.Generator().manual_seed(len(text))) for text in texts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    monkeypatch.setitem(registry._KNOWN, spec.name, replace(spec, prompts=prompts))
    monkeypatch.setattr(encoders, "load_text_side", lambda folder, device: SimpleNamespace(device=device))
    monkeypatch.setattr(encoders, "text_fingerprint", lambda folder, device: specimen.name)
    file = tmp_path / "recipe.yaml"
    names = {"model": converted(specimen), "output": tmp_path / "run", "cache": tmp_path / "cache"}
    file.write_text(RECIPE.format(**names))
    notes: list[str] = []
    observer = Silent()
    monkeypatch.setattr(observer, "note", notes.append)
    done = finetune(load_recipe(file, ()), observer=observer)
    assert done.trainer.step == 2
    beside = liftkit.open_flow(done.trainer.trainee.transformer).channels_beside
    assert bool(beside) == any("takes a picture beside the noise" in note for note in notes)
