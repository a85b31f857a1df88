"""Where models are loaded: the only caller of ``from_pretrained``.

It knows what the libraries do not say: the variant of each component's weights, components that a pipeline goes without,
tensors that a file lacks (which the libraries fill with random numbers and a warning), and what they print.
"""

from __future__ import annotations

import importlib
import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from liftkit.checkpoint.components import LATENT_VAE, Component, read_component, read_vae
from liftkit.checkpoint.files import reason
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.rewrite import FLOATS, torch_dtype
from liftkit.checkpoint.weights import Weights, read_weights
from liftkit.errors import LiftkitError, UsageError
from liftkit.models.absent import absent
from liftkit.models.chat import limit_template


class MissingPackageError(UsageError):
    """A component needs a package that is not installed here."""


def load_pipeline(
    folder: ModelFolder, dtype: torch.dtype | None = None, *, without: tuple[str, ...] = (), device: str | None = None
) -> Any:
    """The stock pipeline of a folder, on the CPU unless a device is given.

    Args:
        folder: latent or converted.
        dtype: of the weights; modules that a library keeps in float32 stay there.
        without: components that are not loaded and not looked at.
        device: ``meta`` builds everything and reads no weight.

    Raises:
        UsageError: if a component is incomplete, or the libraries cannot load it.
    """
    from diffusers import DiffusionPipeline

    parts = [read_component(folder, name) for name in folder.components if name not in without]
    with _explained(folder.source), _quiet():
        loaded = {
            part.name: _load(part, dtype, device) for part in parts if part.library in ("diffusers", "transformers")
        }
        given = {**dict.fromkeys((*absent(folder), *without)), **loaded}
        return DiffusionPipeline.from_pretrained(folder.path, use_safetensors=True, **given)


def load_component(folder: ModelFolder, name: str, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    """One component of a folder, or the VAE that a converted one keeps of its source (:data:`LATENT_VAE`).

    Arguments as :func:`load_pipeline`.

    Raises:
        UsageError: if it is incomplete, or its library cannot load it.
    """
    part = read_component(folder, name)
    with _explained(folder.source), _quiet():
        return _load(part, dtype, device)


def load_latent_vae(folder: ModelFolder) -> Any:
    """The VAE of the latent model, in float32: a latent folder's own, or what a converted one keeps of its source."""
    return load_component(folder, LATENT_VAE if (folder.path / "latent").is_dir() else "vae", torch.float32)


def load_vae(path: Path) -> Any:
    """A VAE from a folder of its own or from a pipeline's, in float32.

    Raises:
        UsageError: if it is incomplete, or diffusers cannot load it.
    """
    with _explained(str(path)), _quiet():
        return _load(read_vae(path), torch.float32)


def load_transformers(path: Path, class_name: str) -> Any:
    """A model of transformers, in float32, or a tokenizer or processor, from a folder of its own.

    Raises:
        UsageError: if it is incomplete, or transformers cannot load it.
    """
    plain = "Tokenizer" in class_name or "Processor" in class_name
    weights = None if plain else read_weights(path, "transformers")
    with _explained(str(path)), _quiet():
        return _load(Component(path.name, "transformers", class_name, path, weights, {}), torch.float32)


def _load(part: Component, dtype: torch.dtype | None, device: str | None = None) -> Any:
    made = _class(part)
    if part.weights is None:
        loaded = made.from_pretrained(part.path)
        limit_template(loaded, part.path)
        return loaded
    more: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if device is not None:
        more["device_map"] = device
    if device == "meta" and dtype is None and part.library == "diffusers":
        # Without one it is float32, to which diffusers converts every weight, and reads it for that, before it lets go of it.
        more["dtype"] = _stored_dtype(part.weights)
    model, found = made.from_pretrained(
        part.path, variant=part.weights.variant, use_safetensors=True, output_loading_info=True, **more
    )
    _check_complete(part, found)
    if part.library == "transformers":
        _check_tokens(model, part.path)
    return model.eval()


def _stored_dtype(weights: Weights) -> torch.dtype | None:
    """The floating dtype of most of the weights' bytes, None where they have none."""
    sizes: Counter[str] = Counter()
    for header in weights.headers.values():
        for entry in header.tensors.values():
            sizes[entry.dtype] += entry.size if entry.dtype in FLOATS else 0
    return torch_dtype(max(sizes, key=sizes.__getitem__)) if sizes.total() else None


def _check_tokens(model: Any, where: Path) -> None:
    """Let a text encoder refuse tokens that it has no embedding of, which are those of another model's tokenizer."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return  # of pictures, not of tokens

    def check(module: torch.nn.Embedding, given: tuple[Any, ...]) -> None:
        ids = given[0] if given else None
        if isinstance(ids, torch.Tensor) and ids.numel() and ids.device.type != "meta":
            worst = int(ids.max()) if ids.max() >= module.num_embeddings else int(ids.min())
            if not 0 <= worst < module.num_embeddings:
                raise UsageError(
                    f"{where}: has embeddings of {module.num_embeddings} tokens, and its tokenizer gives number {worst}; are both "
                    "of the same model?"
                )

    if isinstance(table, torch.nn.Embedding):
        table.register_forward_pre_hook(check)


def _class(part: Component) -> Any:
    name = part.class_name
    if name == "AutoencoderTiny" and part.weights is not None and any(".pool." in key for key in part.weights.where):
        name = "AutoencoderTinyFlux2"  # what TAEF2 is saved as by the class that has no place for its pooled blocks
    # liftkit's own classes are attributes of diffusers too: liftkit.models._diffusers.
    made = getattr(importlib.import_module(part.library), name, None)
    if made is None or not hasattr(made, "from_pretrained"):
        raise UsageError(f"{part.path}: {part.library} has no class {part.class_name}; is the library recent enough?")
    return made


def _check_complete(part: Component, found: Mapping[str, Any]) -> None:
    """Raise if a library had to make up a tensor that the files lack or have in another shape."""
    missing = sorted(map(str, found["missing_keys"]))
    if missing:
        raise UsageError(
            f"{part.path}: {len(missing)} tensors of the {part.class_name} are missing, such as {missing[0]!r}; "
            "fetch the model again"
        )
    wrong = sorted(map(str, found["mismatched_keys"]))
    if wrong or found.get("error_msgs"):
        what = wrong[0] if wrong else " ".join(map(str, found["error_msgs"]))[:200]
        raise UsageError(f"{part.path}: not the weights of its config.json ({what}); fetch the model again")

    unknown = sorted(map(str, found["unexpected_keys"]))
    if unknown and part.class_name == "AutoencoderTiny":
        raise UsageError(
            f"{part.path}: {len(unknown)} tensors, such as {unknown[0]!r}, have no place in diffusers' AutoencoderTiny, and "
            "without them its latents would be wrong: is the config.json that of these weights?"
        )


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """What a library raises, as one line about the model.

    Their checks of configs and readers of tokenizers raise classes of their own, some straight from ``Exception``. What our
    own code raises is no matter of the files, but for values that it refuses.
    """
    try:
        yield
    except (LiftkitError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise MissingPackageError(f"{source}: cannot be loaded ({reason(error)[:300]})") from error
    except Exception as error:
        if _is_ours(error) and not isinstance(error, (ValueError, TypeError)):
            raise
        raise UsageError(f"{source}: cannot be loaded ({reason(error)[:300]}); check its files") from error


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised by a line of liftkit itself."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("liftkit.")


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' notices and bars off: they speak of classes that are ours on purpose, and of what is checked here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(logging.ERROR)
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
