"""Names of the authors' own code, held to what diffusers' converters of whole checkpoints do with them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils
from torch import Tensor

from liftkit.formats.lora_names import ModuleNames
from liftkit.models.families.flux1 import FLUX1
from liftkit.models.registry import architecture


class Checkpoint(dict[str, Tensor]):
    """Some tensors of a checkpoint; the others, norms and biases, are zeros for whoever takes them out."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key) if key in self else default[0] if default else torch.zeros(2)


LAYERS = {"num_layers": 1}
MODELS = {
    "FluxTransformer2DModel": ("flux", {**LAYERS, "num_single_layers": 1, "guidance_embeds": True}),
    "ChromaTransformer2DModel": ("chroma", {**LAYERS, "num_single_layers": 1}),
    "ZImageTransformer2DModel": ("z_image", {"n_layers": 1, "n_refiner_layers": 1}),
    "WanTransformer3DModel": ("wan", LAYERS),
    "Lumina2Transformer2DModel": ("lumina2", {**LAYERS, "num_refiner_layers": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_of_every_matrix_are_those_that_diffusers_makes_of_the_original(name: str) -> None:
    short, config = MODELS[name]
    with init_empty_weights():
        model = getattr(diffusers, name)(**config)
    # Converters know the released sizes and split rows alone: one column will do.
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    names = ModuleNames(architecture(name), shapes)
    originals = {each.replace("*", "0") for each in architecture(name).original}
    rows = {each: [names.height(place.module) for place in names.find(each) or ()] for each in originals}
    state = {each: torch.arange(sum(heights)).float()[:, None] for each, heights in rows.items() if heights}
    assert len(state) > len(originals) / 2  # Chroma has neither the embedders nor the modulation of FLUX.1
    convert = next(
        found
        for found in (
            getattr(single_file_utils, f"convert_{short}_transformer_checkpoint_to_diffusers", None),
            getattr(single_file_utils, f"convert_{short}_transformer_to_diffusers", None),
            getattr(single_file_utils, f"convert_{short}_to_diffusers", None),
        )
        if found is not None
    )
    biases = {
        f"{each}.bias": torch.zeros(len(tensor))
        for each, tensor in state.items()
        if all(f"{place.module}.bias" in shapes for place in names.find(each) or ())
    }
    found = convert(Checkpoint({f"{each}.weight": tensor for each, tensor in state.items()} | biases))
    for each, tensor in state.items():
        for spelling in (each, f"lora_unet_{each.replace('.', '_')}", f"diffusion_model.{each}"):
            places = names.find(spelling)
            assert places is not None
            for place in places:
                assert torch.equal(place.rows(tensor, rows[each]), found[f"{place.module}.weight"]), (spelling, place)


def test_processors_of_xlabs_are_the_attention_of_each_stream() -> None:
    with init_empty_weights():
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    names = ModuleNames(FLUX1, {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
    for theirs, ours in {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
        "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
        "diffusion_model.single_blocks.0.processor.proj_lora": "single_blocks.0.linear2",
    }.items():
        assert names.find(theirs) == names.find(ours) is not None
    single = names.find("single_blocks.0.processor.qkv_lora") or ()
    assert [place.module.rpartition(".")[2] for place in single] == ["to_q", "to_k", "to_v"]
