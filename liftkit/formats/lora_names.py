"""Modules by every name that trainers give them: diffusers' own, the authors' own, and either with underscores for dots.

Trainers of a model in the authors' layout see fused matrices (query, key and value) and a modulation whose halves are the
other way round; the rows of a LoRA's B go the way of the matrix' rows, and its A is shared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from liftkit.models.spec import Architecture

_DOTTED = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model."),
    *("module.", "_orig_mod.", "pipe.", "dit."),  # of wrappers: parallel, compiled, a whole pipeline's
)
# Of attention processors: diffusers' until 2023, and XLabs', who number the image's and the text's.
_PROCESSOR = re.compile(r"(.*)\.processor\.(\w+?)_lora([12]?)")
_STREAMS = {"1": "img_attn.", "2": "txt_attn.", "": ""}
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_", "lora_")
_MOST_PREFIXES = 3
_TEXT = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te|lycoris_te|text_encoder|te\d?[._]|text_model|clip_|t5|conditioner|cond_stage_model)"
)
_EMBEDDING = re.compile(r"bundle_emb|emb_params|string_to_(?:param|token)|clip_[lg]$|t5xxl$")
_OTHERS = (
    ("Stable Diffusion 1, 2 or XL", r"(?:down|up|mid|input|output|middle)_blocks?[._]"),
    ("FLUX.1 or HunyuanVideo", r"double_blocks[._]\d+[._](?:img|txt)_mod|single_blocks[._]\d+[._]modulation|proj_mlp"),
    ("FLUX.2", r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj|ff_context[._]linear"),
    ("FLUX.1 or FLUX.2", r"double_blocks[._]|single_blocks[._]"),
    ("Stable Diffusion 3", r"joint_blocks[._]"),
    ("Qwen-Image", r"(?:img|txt)_(?:mlp[._]net|mod[._])"),
    ("Wan", r"blocks[._]\d+[._](?:self_attn|cross_attn|ffn)"),
    ("Lumina or Z-Image", r"layers[._]\d+[._](?:attention|feed_forward|adaLN)"),
    ("FLUX.1, FLUX.2 or Stable Diffusion 3 in diffusers' names", r"(?:single_)?transformer_blocks[._]\d+[._]"),
)


@dataclass(frozen=True)
class Place:
    """Where rows of a matrix in a file are in the transformer.

    Args:
        module: of the transformer.
        part: which of ``parts`` groups of the file's rows it has.
        parts: how many modules share the file's matrix.
        swapped: whether the halves of the rows are the other way round there.
    """

    module: str
    part: int = 0
    parts: int = 1
    swapped: bool = False

    def rows(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """The module's rows of a tensor, whose groups have ``sizes`` rows."""
        own = tensor.split(sizes)[self.part]
        return own.roll(own.shape[0] // 2, 0) if self.swapped else own


class ModuleNames:
    """The modules of a transformer with matrices, by every name.

    Args:
        architecture: of the transformer.
        shapes: of its tensors, by name; those of the latent model for the projections.
    """

    def __init__(self, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = {
            name.removesuffix(".weight"): shape
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) > 1
        }
        self.biases = {name.removesuffix(".bias") for name in shapes if name.endswith(".bias")}
        self.places: dict[str, tuple[Place, ...]] = {}
        for name, places in self._spellings(architecture):
            self.places.setdefault(name, places)
            self.places.setdefault(name.replace(".", "_"), places)

    def find(self, stem: str) -> tuple[Place, ...] | None:
        """Where a module of a file is, by its name there with its prefixes; None if the transformer has no such module."""
        processor = _PROCESSOR.fullmatch(stem)
        if processor is not None:
            above, module, number = processor.groups()
            stem = f"{above}.{_STREAMS[number]}{module}{'.0' if module == 'to_out' else ''}"
        for _ in range(_MOST_PREFIXES + 1):
            if stem in self.places:
                return self.places[stem]
            prefix = next((each for each in (*_DOTTED, *_UNDERSCORED) if stem.startswith(each)), None)
            if prefix is None:
                return None
            stem = stem.removeprefix(prefix)
        return None

    def width(self, module: str) -> int:
        """Numbers that a module takes in."""
        return prod(self.shapes[module][1:])

    def height(self, module: str) -> int:
        """Numbers that a module gives out."""
        return self.shapes[module][0]

    def _spellings(self, architecture: Architecture) -> Iterator[tuple[str, tuple[Place, ...]]]:
        for module in self.shapes:
            yield module, (Place(module),)
        for original, modules in architecture.original.items():
            pattern = re.compile(re.escape(modules[0]).replace(r"\*", r"(\d+)"))
            for match in filter(None, map(pattern.fullmatch, self.shapes)):
                number = match[1] if pattern.groups else ""
                found = [module.replace("*", number) for module in modules]
                places = tuple(
                    Place(each, part, len(found), self._swapped(original, each)) for part, each in enumerate(found)
                )
                yield original.replace("*", number), places
                if len(places) > 1:
                    # OneTrainer counts the parts of a fused matrix.
                    yield from (
                        (f"{original.replace('*', number)}.{place.part}", (Place(place.module),)) for place in places
                    )

    def _swapped(self, original: str, module: str) -> bool:
        """The authors' modulation gives shift before scale, where there are no more than these two; diffusers' after."""
        two = self.height(module) == 2 * self.width(module)
        return "adaLN_modulation" in original and module.endswith(".linear") and two


def of_text(stem: str) -> bool:
    """Whether a name is that of a module of a text encoder."""
    return _TEXT.match(stem) is not None


def of_embedding(key: str) -> bool:
    """Whether a key is that of a textual inversion, which some trainers put beside a LoRA."""
    return _EMBEDDING.match(key) is not None


def seems_for(stems: Iterable[str]) -> str:
    """The model that names of modules are of, as far as they tell; empty if they do not."""
    names = [stem[:1000] for stem in stems]
    for model, pattern in _OTHERS:
        if any(re.search(pattern, name) for name in names):
            return model
    return ""
