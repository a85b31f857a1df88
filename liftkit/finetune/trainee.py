"""What a recipe trains: the transformer of a folder, which of its weights learn, and its frozen reference."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from liftkit.checkpoint.files import read_safetensors
from liftkit.checkpoint.model import ModelFolder
from liftkit.errors import UsageError
from liftkit.finetune.float8 import give_float8
from liftkit.finetune.network import Network, original_modules
from liftkit.finetune.opening import opening_columns
from liftkit.finetune.quantize import quantize_base
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.repa import attach, load_encoder
from liftkit.finetune.stages import default_modules
from liftkit.lift import Lift
from liftkit.models.detail_head import HEAD, DetailHead, add_head, in_head
from liftkit.models.load import load_component
from liftkit.models.mixin import SPACE
from liftkit.models.registry import architecture, is_lifted
from liftkit.models.spec import Architecture
from liftkit.models.surgery import RawChannels, native_basis

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass
class Trainee:
    """The network of a run before anything is wrapped.

    Args:
        folder: where it comes from.
        spec: its architecture.
        transformer: in memory; only what learns asks for gradients.
        lift: A and s; None in latent space.
        network: student and reference in one module.
        learns: paths of modules trained in full and with LoRA.
    """

    folder: ModelFolder
    spec: Architecture
    transformer: Any
    lift: Lift | None
    network: Network
    learns: dict[str, list[str]]

    @property
    def head(self) -> DetailHead | None:
        """The transformer's detail head, if it has one."""
        return getattr(self.transformer, HEAD, None)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by name in the transformer."""
        return {name: each for name, each in self.transformer.named_parameters() if each.requires_grad}


def open_trainee(recipe: Recipe, folder: ModelFolder) -> Trainee:
    """Load the transformer of a folder and prepare it for a recipe, on the CPU.

    Frozen weights are in the precision of the run, what learns in float32.

    Raises:
        UsageError: if the folder is of the wrong space, or the recipe names modules that are not there.
    """
    name = folder.class_of("transformer") or ""
    spec = architecture(name)
    check_space(recipe, folder, name)
    transformer = _load(recipe, folder, name)
    lift = Lift.load(folder.path / "lift.safetensors") if recipe.space == "pixel" else None
    tensors: Mapping[str, Tensor] = {}
    if recipe.objective.loss == "asymflow":
        tensors = read_safetensors(folder.path / "latent" / "reference.safetensors")[0]
    return make_trainee(recipe, folder, spec, transformer, lift, tensors)


def make_trainee(
    recipe: Recipe,
    folder: ModelFolder,
    spec: Architecture,
    transformer: Any,
    lift: Lift | None,
    tensors: Mapping[str, Tensor],
    *,
    sketch: bool = False,
) -> Trainee:
    """Prepare a transformer in memory for a recipe.

    Args:
        folder: where it comes from.
        spec: its architecture.
        transformer: without gradients, frozen weights in the precision of the run.
        lift: A and s; None in latent space.
        tensors: the source's projections and output norm by name, for the loss asymflow.
        sketch: of tensors without memory; what would have to be computed or fetched has a stand-in.

    Raises:
        UsageError: if the recipe names modules that are not there.
    """
    originals: dict[str, nn.Module] | None = None
    frozen = None
    if recipe.objective.loss == "asymflow":
        originals = original_modules(transformer, tensors)
        if recipe.trainable.mode == "full":
            # Base weights that learn cannot be shared with what must not change.
            frozen = copy.deepcopy(transformer).to(COMPUTE[recipe.precision]).eval()
            frozen.detail_head = None
    _give_head(recipe, transformer)
    pretrained = dict(transformer.named_modules())
    if recipe.objective.repa:
        attach(transformer, load_encoder(recipe.objective.repa_encoder).config.hidden_size, recipe.seed)
    learns = _choose(recipe, spec, transformer)
    if originals is not None and frozen is None:
        # Whatever learns in full is exchanged, or the reference would learn with it.
        missing = [path for path in learns["full"] if path not in originals]
        originals |= {path: copy.deepcopy(pretrained[path]).to(COMPUTE[recipe.precision]) for path in missing}
    if recipe.base.quantize != "none":
        quantize_base(transformer, recipe.base.quantize, learns["full"], sketch=sketch)
    if recipe.objective.reference_precision == "float8":
        give_float8(frozen if frozen is not None else transformer)
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        if getattr(transformer, HEAD, None) is not None:
            transformer.detail_head.checkpointing = True
    trainee = Trainee(folder, spec, transformer, lift, Network(transformer, originals, frozen), learns)
    open_complement(trainee, recipe.trainable.open, recipe.seed, sketch=sketch)
    return trainee


def _give_head(recipe: Recipe, transformer: Any) -> None:
    """The detail head of a recipe, unless the transformer has it already.

    Raises:
        UsageError: if it has another one, or can have none.
    """
    wanted, there = recipe.trainable.head, getattr(transformer, HEAD, None)
    if wanted is None:
        return
    if there is None:
        add_head(transformer, wanted.channels, wanted.depth, recipe.seed)
    elif there.shape != wanted.model_dump():
        raise UsageError(
            f"trainable.head: {wanted.model_dump()}: the model has one already, of {there.shape}; leave trainable.head out, and "
            "that one learns on"
        )


@torch.no_grad()
def open_complement(trainee: Trainee, strength: float, seed: int, *, sketch: bool = False) -> None:
    """Show the network what lies outside of the subspace; see :mod:`liftkit.finetune.opening`.

    Raises:
        UsageError: if an input projection does not learn.
    """
    if trainee.lift is None or strength == 0.0:
        return
    for projection in trainee.spec.inputs:
        weight = trainee.transformer.get_submodule(projection.path).weight
        if not weight.requires_grad:
            raise UsageError(
                f"trainable.open: {strength}: {projection.path} does not learn, so that what is opened would be lost; "
                "add it to trainable.modules, or set trainable.open to 0"
            )
        if sketch:
            continue  # What is opened are values.
        basis = native_basis(trainee.lift, projection.order)
        raw = RawChannels(trainee.spec, projection, "input", trainee.lift.latent_patch)
        flat = weight.flatten(1)
        noisy = raw.places(flat.shape[1], trainee.lift.dim)[0].to(weight.device)
        added = opening_columns(flat[:, noisy].double(), basis, strength, seed)
        flat[:, noisy] += added.to(weight.dtype)
        weight.copy_(flat.reshape(weight.shape))


def check_space(recipe: Recipe, folder: ModelFolder, name: str) -> None:
    """Raise unless a folder has what the recipe trains in.

    Raises:
        UsageError: saying what to do instead.
    """
    pixel = is_lifted(name) and folder.config("transformer").get(SPACE, "pixel") == "pixel"
    if recipe.space == "pixel" and is_lifted(name) and not pixel:
        raise UsageError(f"model: {folder.source}: a model of latents; set space: latent")
    if recipe.space == "pixel" and not pixel:
        raise UsageError(
            f"model: {folder.source}: a latent model; convert it first: liftkit convert {folder.source} --images ... -o OUT"
        )
    if recipe.space == "latent" and pixel:
        raise UsageError(
            f"model: {folder.source}: a pixel model, and the recipe says space: latent; give the latent one"
        )
    if recipe.objective.loss == "asymflow" and not (folder.path / "latent").is_dir():
        raise UsageError(
            f"model: {folder.path / 'latent'}: missing; the loss asymflow needs it: convert the model again, or set "
            "objective.loss to flow for a model that was made from nothing"
        )


def _load(recipe: Recipe, folder: ModelFolder, name: str) -> Any:
    full = recipe.trainable.mode == "full"
    dtype = torch.float32 if full else COMPUTE[recipe.precision]
    transformer = load_component(folder, "transformer", dtype)
    if recipe.init == "random":
        torch.manual_seed(recipe.seed)
        fresh = type(transformer).from_config(transformer.config)
        if is_lifted(name):
            fresh.lift = transformer.lift
        transformer = fresh
    return transformer.requires_grad_(False)


def _choose(recipe: Recipe, spec: Architecture, transformer: nn.Module) -> dict[str, list[str]]:
    """Switch on what learns; the paths by kind."""
    chosen = recipe.trainable
    if chosen.mode == "full":
        transformer.requires_grad_(True)
        return {"full": [""], "lora": []}
    modules = dict(transformer.named_modules())
    alone = chosen.mode == "head"
    full = [] if alone else list(chosen.modules or default_modules(spec))
    if alone or (getattr(transformer, HEAD, None) is not None and HEAD not in full):
        full.append(HEAD)
    if alone and getattr(transformer, HEAD, None) is None:
        raise UsageError("trainable.mode: head: the model has none; add one with trainable.head")
    for path in full:
        if path not in modules:
            raise UsageError(f"trainable.modules: {path}: no such module in {spec.name}{_near(path, modules)}")
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and not in_head(name)]
    targets = [] if alone else match_targets(list(chosen.targets or spec.adapters), linear, spec.name)
    twice = [name for name in targets if any(name == path or name.startswith(f"{path}.") for path in full)]
    if twice:
        raise UsageError(
            f"trainable.targets: {twice[0]} is trained in full already (trainable.modules); take it from one"
        )
    if targets:
        add_lora(transformer, targets, chosen.rank, chosen.alpha or chosen.rank, chosen.dropout, recipe.seed)
    for path in full:
        transformer.get_submodule(path).requires_grad_(True)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return {"full": full, "lora": targets}


def match_targets(patterns: list[str], names: list[str], where: str) -> list[str]:
    """Module names that patterns mean, each matched against whole names.

    Raises:
        UsageError: if a pattern matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(
                f"trainable.targets: {pattern}: no linear layer of {where} is called so{_near(pattern, names)}"
            )
        found |= dict.fromkeys(matched)
    return list(found)


def add_lora(transformer: Any, targets: list[str], rank: int, alpha: float, dropout: float, seed: int) -> None:
    """LoRA of peft on exactly these modules: B = 0, A from ``seed``."""
    from peft import LoraConfig

    # Names in a list would match as suffixes: proj_out would hit every block's.
    exact = "|".join(re.escape(name) for name in targets)
    torch.manual_seed(seed)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=f"({exact})"))


def _near(name: str, names: Any) -> str:
    near = get_close_matches(name.replace("*", "0"), [each for each in names if each], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
