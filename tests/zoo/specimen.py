"""What a specimen is, and what the families' modules build theirs from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import torch
from PIL import Image
from torch import Tensor

from liftkit.lift import Lift
from liftkit.models.registry import architecture
from liftkit.models.spec import Architecture
from tests import tiny
from tests.zoo.float64 import Float64

Part = Literal["save", "reference", "pipeline", "convert", "lora", "finetune", "prompts"]
"""Parts of the suite that a specimen may be excused from; none is from the bare Theorem 1."""


def draw(*shape: int, seed: int = 5) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def euler_scheduler() -> Any:
    """The scheduler of most."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)


def no_call(count: int) -> dict[str, Any]:
    """No arguments."""
    return {}


@dataclass(frozen=True)
class Specimen:
    """A tiny model of one architecture.

    Args:
        architecture: name of the stock class.
        config: of the transformer.
        pipeline: name of the stock pipeline's class; None where diffusers has none.
        vae: makes the autoencoder.
        call: arguments of the pipeline for a number of images, with random prompt embeddings; neither latents nor sizes nor steps.
        factor: of the VAE.
        patch: of a token, on the VAE's grid.
        channels: of the latents.
        grid: rows and columns of tokens in the pipeline's test.
        missing: components of the pipeline that are None.
        components: further components, made anew at each call.
        scheduler: makes the scheduler.
        options: further arguments of the pipeline's class.
        prepare: sets what a tiny pipeline needs before it is called, ``(pipeline, height, width)``.
        around: a context for calls of the pipeline, ``(height, width)``: some know sizes near a megapixel alone.
        images: that a state of the pipeline has (layers).
        stubs: replacements of pipeline methods that read prompts by encoders, by name, so that ``prompts`` of the entry can be run.
        plain: arguments of the call without which the pipeline's guidance rescales the velocity.
        float32: the stock class computes parts in float32 whatever its weights are (Kandinsky 5, Qwen-Image 2.1).
        remark: on the proof through its pipeline, for ``liftkit models``.
        without: parts of the suite that it is excused from, with the reason.
        variant: distinguishes several specimens of one architecture.
    """

    architecture: str
    config: Mapping[str, Any]
    pipeline: str | None = None
    vae: Callable[[], Any] | None = None
    call: Callable[[int], dict[str, Any]] = no_call
    factor: int = 2
    patch: int = 2
    channels: int = 4
    grid: tuple[int, int] = (8, 4)
    missing: tuple[str, ...] = ("text_encoder", "tokenizer")
    components: Callable[[], dict[str, Any]] = dict
    scheduler: Callable[[], Any] = euler_scheduler
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any, int, int], None] = lambda pipeline, height, width: None
    around: Callable[[int, int], AbstractContextManager[Any]] = lambda height, width: nullcontext()
    images: int = 1
    stubs: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)
    float32: bool = False
    remark: str = ""
    without: Mapping[Part, str] = field(default_factory=dict)
    variant: str = ""

    @property
    def name(self) -> str:
        """Of the architecture, and of the variant if there is one."""
        return f"{self.architecture}-{self.variant}" if self.variant else self.architecture

    @property
    def spec(self) -> Architecture:
        """The entry under test."""
        return architecture(self.architecture)

    def lift(self, scale: float = 1.7) -> Lift:
        """A random lift that fits."""
        side = self.factor * self.patch
        shape = (3 * side**2, self.channels * self.patch**2)
        random = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return Lift(torch.linalg.qr(random)[0], scale, patch_size=side, latent_patch=self.patch)

    def float64(self) -> AbstractContextManager[Any]:
        """A context in which a model with weights in float64 computes in float64 throughout."""
        return Float64() if self.float32 else nullcontext()

    def transformer(self) -> Any:
        """The stock transformer, random weights in every layer."""
        return tiny._alive(getattr(diffusers, self.architecture)(**self.config))

    def build(self) -> Any:
        """The stock pipeline, seeded."""
        assert self.pipeline is not None
        assert self.vae is not None
        torch.manual_seed(0)
        parts = {**dict.fromkeys(self.missing), **self.components(), **self.options}
        vae = self.vae()
        pipeline = getattr(diffusers, self.pipeline)(
            scheduler=self.scheduler(), vae=vae, transformer=self.transformer(), **parts
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def prompts(name: str, *shape: int, count: int) -> dict[str, Tensor]:
    """Random embeddings (count, ...) of a name, and their negatives."""
    return {name: draw(count, *shape), f"negative_{name}": draw(count, *shape, seed=6)}


def picture(width: int = 24, height: int = 16, seed: int = 3) -> Image.Image:
    """A picture to edit, of random colors."""
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.byte().numpy())


def masked(count: int, width: int = 24, mask: str = "prompt_attention_mask") -> dict[str, Any]:
    """Embeddings of seven tokens with masks of ones, and their negatives."""
    ones = torch.ones(count, 7, dtype=torch.long)
    return {**prompts("prompt_embeds", 7, width, count=count), mask: ones, f"negative_{mask}": ones}


def speller() -> Any:
    """A tokenizer with a token for each letter, of a class that is saved and loaded."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "<pad>": 2, **{chr(32 + number): 3 + number for number in range(61)}}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="<unk>", bos_token="<s>", pad_token="<pad>", model_max_length=512
    )


MMDIT = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 8)}
"""Sizes that transformers like FLUX.1's share."""
