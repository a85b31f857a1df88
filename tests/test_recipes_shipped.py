"""The recipes that come with liftkit, the commands about them, and their documentation."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liftkit.errors import UsageError
from liftkit.finetune import shipped
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.shipped import shipped_recipes
from liftkit.finetune.step import with_shift_of
from tests import tiny
from tests.recipes import SMALL, keys, load, refused
from tests.zoo import ZOO

ROOT = Path(__file__).parents[1]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# The recipes that are shipped.


OPTION = re.compile(r"^( *)# (head|bands|trunk|- \{kind)", re.MULTILINE)
"""What recipes offer in comments."""


@pytest.mark.parametrize("name", ["flux2-klein-4b", "flux2-klein-9b", "sd3.5-medium"])
def test_options_in_comments_are_keys(name: str, tmp_path: Path) -> None:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert [found[1] for found in OPTION.findall(text)] == ["- {kind", "head", "trunk", "bands"]
    for folder in ("photos", "generated"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "options.yaml"
    file.write_text(OPTION.sub(r"\1\2", text))
    recipe = load_recipe(file, ("model=demo",))
    assert len(recipe.data.sources) == 2
    assert recipe.trainable.head is not None
    assert recipe.objective.bands is not None
    assert recipe.optimizer.trunk is not None


TRANSFORMERS = {
    "tiny-klein": "Flux2Transformer2DModel",
    "jit-tiny": "JiTTransformer2DModel",
    "jit-h16-imagenet": "JiTTransformer2DModel",
    "flux2-klein-4b": "Flux2Transformer2DModel",
    "flux2-klein-9b": "Flux2Transformer2DModel",
    "sd3.5-medium": "SD3Transformer2DModel",
    "flux1-dev": "FluxTransformer2DModel",
    "qwen-image": "QwenImageTransformer2DModel",
    "z-image": "ZImageTransformer2DModel",
    "sana-1.6b": "SanaTransformer2DModel",
    "tiny-flux2": "Flux2Transformer2DModel",
    "wan2.1-1.3b": "WanTransformer3DModel",
}
HERE = ("model=demo", "data.sources.0={kind: demo}")


def test_the_shipped_are_known() -> None:
    assert set(shipped_recipes()) == set(TRANSFORMERS)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_shipped_recipes_load_and_say_how_to_use_them(name: str) -> None:
    recipe = load_recipe(name, HERE)
    assert load(recipe.to_yaml()) == recipe
    text = shipped_recipes()[name].read_text()
    opening = text[: text.index("\nmodel:")]
    assert all(line.startswith("#") for line in opening.splitlines() if line)
    for word in ("Fetch:", "Launch:", "Override:"):
        assert word in opening
    assert re.search("accelerate launch|torchrun", opening)
    commands = re.findall(rf"liftkit finetune {re.escape(name)}\b([^\n]*)", opening)
    for command in commands:
        words = shlex.split(command.partition("  ")[0])
        overrides = [word for word in words if "=" in word and not word.startswith("data.sources.0.path")]
        load_recipe(name, (*overrides, *HERE))
    assert len(commands) >= 3


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_shipped_recipes_name_real_modules(name: str) -> None:
    from fnmatch import fnmatchcase

    recipe = load_recipe(name, HERE)
    modules = dict(ZOO[TRANSFORMERS[name]].transformer().named_modules())
    hits: set[str] = set()
    for pattern in recipe.trainable.targets or ():
        matched = {module for module in modules if fnmatchcase(module, pattern)}
        assert matched, pattern
        assert all(isinstance(modules[module], torch.nn.Linear) for module in matched), pattern
        hits |= matched
    whole = set(recipe.trainable.modules or ())
    assert whole | set(recipe.optimizer.multipliers) <= set(modules)
    assert not [module for module in hits if module in whole or module.startswith(tuple(f"{name}." for name in whole))]
    assert not [module for module in hits if ".attn." in module and not module.startswith("single_")]
    if name.startswith("flux2"):
        # METHOD: ff and ff_context linears, the timestep MLP and single blocks' attn.to_out, and no more.
        assert hits == {
            module
            for module in modules
            if isinstance(modules[module], torch.nn.Linear)
            and (".ff" in module or ".timestep_embedder." in module or re.match(r"single_.*\.attn\.to_out$", module))
        }


def test_klein_9b_has_the_settings_of_the_paper() -> None:
    recipe = load_recipe("flux2-klein-9b", HERE)
    learned, optimizer, noise = recipe.trainable, recipe.optimizer, recipe.noise
    assert (learned.mode, learned.rank, learned.dropout) == ("lora", 256, 0.05)
    assert (optimizer.name, optimizer.learning_rate, optimizer.multipliers) == ("adamw8bit", 1e-4, {"proj_out": 10})
    assert (optimizer.betas, optimizer.weight_decay, optimizer.warmup, optimizer.clip) == ((0.9, 0.95), 0, 100, 200)
    assert (recipe.batch_size, recipe.steps) == (256, 15_000)
    assert (noise.mean, noise.std, noise.shift) == (0, 1, 17)
    assert (recipe.ema.gamma, recipe.ema.start) == (7, 100)
    assert (recipe.objective.perceptual, recipe.objective.kappa) == ("lpips", 0.3)


def test_jit_h16_has_the_settings_of_the_paper() -> None:
    recipe = load_recipe("jit-h16-imagenet", ("data.sources.0={kind: demo}",))
    network, optimizer, noise, data = recipe.network, recipe.optimizer, recipe.noise, recipe.data
    assert (network.size, network.patch, network.resolution, network.rank) == ("H", 16, 256, 8)
    assert (network.color, network.num_images, data.flip, data.crop) == ("srgb", 10_000, 0.5, "adm")
    assert (optimizer.name, optimizer.learning_rate, optimizer.betas) == ("adamw", 2e-4, (0.9, 0.95))
    assert (optimizer.weight_decay, optimizer.clip, optimizer.decay) == (0, None, "constant")
    assert (recipe.batch_size, recipe.steps, optimizer.warmup) == (1024, 600 * 1251, 5 * 1251)
    assert (noise.mean, noise.std, noise.shift, data.prompt_dropout) == (0.8, 0.8, 1, 0.1)
    assert (recipe.ema.kind, recipe.ema.decay, recipe.ema.start) == ("constant", 0.9999, 0)
    assert (recipe.objective.loss, recipe.objective.weight, recipe.objective.sigma_floor) == ("flow", 1, 0.05)
    assert (recipe.precision, recipe.gradient_checkpointing, recipe.compile) == ("bf16", True, True)


def test_the_shift_of_sd35_comes_from_the_lift() -> None:
    recipe = load_recipe("sd3.5-medium", HERE)
    assert recipe.noise.latent_shift == 3
    lift = tiny.lift()
    lifted, latent = with_shift_of(lift, recipe), with_shift_of(None, recipe)
    assert (lifted.noise.shift, latent.noise.shift) == (3 * lift.scale, 3)
    assert lifted.model_copy(update={"noise": recipe.noise}) == recipe
    given = load_recipe("flux2-klein-9b", HERE)
    assert with_shift_of(lift, given) is given


def test_an_installed_package_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    built = tmp_path / "lib"
    command = ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(built)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=60)
    checkout = shipped_recipes()
    monkeypatch.setattr(shipped, "__file__", str(built / "liftkit" / "finetune" / "shipped.py"))
    installed = shipped_recipes()
    assert {name: path.read_bytes() for name, path in installed.items()} == {
        name: path.read_bytes() for name, path in checkout.items()
    }
    assert all(path.is_relative_to(built) for path in installed.values())


# The command line and the documentation.


def test_recipes_list_show_copy(cli: Cli) -> None:
    code, out, _ = cli("recipes", "list")
    assert code == 0
    for name, path in shipped_recipes().items():
        assert name in out
        assert path.read_text().splitlines()[0].lstrip("# ") in out
    assert cli("recipes", "show", "tiny-klein")[:2] == (0, shipped_recipes()["tiny-klein"].read_text())
    Path("folder").mkdir()
    for arguments, target in (
        ([], "tiny-klein.yaml"),
        (["mine.yaml"], "mine.yaml"),
        (["folder"], "folder/tiny-klein.yaml"),
    ):
        code, out, _ = cli("recipes", "copy", "tiny-klein", *arguments)
        assert (code, Path(target).read_bytes()) == (0, shipped_recipes()["tiny-klein"].read_bytes())
        assert f"liftkit finetune {target}" in out
    assert load_recipe("mine.yaml") == load_recipe("tiny-klein")


def test_recipes_that_are_not_there_and_targets_that_are(cli: Cli) -> None:
    Path("mine.yaml").write_text("precious")
    for arguments, expected in (
        (["show", "tiny-klien"], "did you mean tiny-klein?"),
        (["copy", "zzz"], "there are flux1-dev, flux2-klein-4b"),
        (["copy", "tiny-klein", "mine.yaml"], "exists already"),
        (["copy", "tiny-klein", "none/mine.yaml"], "no such folder"),
        (["copy", "tiny-klein", "mine.txt"], "ends in .yaml"),
    ):
        code, _, err = cli("recipes", *arguments)
        assert code == 2
        assert expected in err
    assert Path("mine.yaml").read_text() == "precious"
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]


def test_recipes_are_listed_at_once() -> None:
    program = """
import sys
sys.argv = ["liftkit", "recipes", "list"]
from liftkit.cli import app
try:
    app.run()
finally:
    print("heavy", sorted(set(sys.modules) & {"torch", "diffusers", "numpy", "yaml"}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip().endswith("heavy []"), done.stdout + done.stderr


def test_every_command_of_recipes_has_help() -> None:
    import typer

    from liftkit.cli.recipes import recipes

    for command in typer.main.get_command(recipes).commands.values():  # type: ignore[attr-defined]
        assert "Example: liftkit recipes" in command.help
        assert all(getattr(parameter, "help", "") or parameter.name == "help" for parameter in command.params)


def test_the_reference_of_keys_is_current() -> None:
    from tools.recipe_reference import MARK, PAGE, reference

    made = reference()
    assert PAGE.read_text().partition(MARK)[2].lstrip("\n") == made, "python -m tools.recipe_reference makes it anew"
    for path, _ in keys():
        assert f"`{path.rpartition('.')[2]}`" in made or f"### {path}" in made
    assert all(name in PAGE.read_text() for name in shipped_recipes())


def test_the_report_in_the_documentation_is_one() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    shown = re.search(r"```text\n(mine\.yaml: .*?)```", page, re.DOTALL)
    assert shown is not None
    text = f"{SMALL}stepz: 300\n\n\noptimizer:\n  learning_rate: -1e-3\n"
    Path("mine.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe("mine.yaml", ["objective.loss=flwo"])
    assert f"{caught.value}\n" == shown[1]


def test_text_of_problems_is_reported_as_it_is(cli: Cli) -> None:
    """Rich would take ``[x]`` for markup."""
    report = refused(f"{SMALL}trackers: [wandbb]\n")
    from liftkit.cli import console

    with console.err.capture() as captured:
        console.fail(report)
    assert "trackers: [wandbb]" in captured.get()
