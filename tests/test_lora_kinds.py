"""LoRA files as other trainers write them: names, kinds, strengths, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import liftkit
from liftkit.errors import UsageError
from liftkit.formats.lora_names import ModuleNames
from liftkit.lift import Lift
from liftkit.models.registry import architecture as spec_of
from tests import tiny
from tests.converting import failed
from tests.lora_runs import IMAGE, QUERY, Cli, rand
from tests.test_lora import NAMES, attach, tied
from tests.test_pipelines import load
from tests.test_single_file import original

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def product(found: dict[str, Tensor], module: str) -> Tensor:
    return found[f"transformer.{module}.lora_B.weight"].flatten(1) @ found[
        f"transformer.{module}.lora_A.weight"
    ].flatten(1)


@pytest.fixture
def run(converted: dict[str, Path], cli: Cli, tmp_path: Path) -> Run:
    """Import a file for the tiny FLUX.2; its tensors."""

    def imported(state: dict[str, Tensor]) -> dict[str, Tensor]:
        save_file(state, tmp_path / "style.safetensors")
        output = tmp_path / "out.safetensors"
        code, _, err = cli(
            "import", tmp_path / "style.safetensors", "--base", converted["flux2"], "-o", output, "--overwrite"
        )
        assert code == 0, err
        return load_file(output)

    return imported


def test_original_names_mean_the_rows_that_diffusers_itself_gives_them(architecture: str) -> None:
    model = tiny.TRANSFORMERS[NAMES[architecture]]()
    state = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    names = ModuleNames(spec_of(NAMES[architecture]), {key: tuple(tensor.shape) for key, tensor in state.items()})
    seen = set()
    for key, tensor in original(architecture, state).items():
        stem = key.removesuffix(".weight")
        if stem == key or tensor.ndim < 2:
            continue
        for spelling in (stem, f"lora_unet_{stem.removeprefix('model.diffusion_model.').replace('.', '_')}"):
            places = names.find(spelling)
            assert places is not None, spelling
            sizes = [names.height(place.module) for place in places] if len(places) > 1 else [len(tensor)]
            for place in places:
                assert torch.equal(place.rows(tensor, sizes), state[f"{place.module}.weight"]), spelling
                seen.add(place.module)
    assert seen == names.shapes.keys()


@pytest.mark.parametrize("dotted", [True, False])
@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "diffusion_model.",
        "transformer.",
        "base_model.model.",
        "unet.",
        "lora_unet_",
        "lora_transformer_",
        "lycoris_",
    ],
)
@pytest.mark.parametrize(
    ("down", "up"),
    [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_A.default", "lora_B.default")],
)
def test_every_spelling_is_the_same_lora(prefix: str, dotted: bool, down: str, up: str) -> None:
    from liftkit.checkpoint.contents import A, B, part_of

    shapes = {key: tuple(tensor.shape) for key, tensor in tiny.flux2_transformer().state_dict().items()}
    names = ModuleNames(spec_of(NAMES["flux2"]), shapes)
    for module, stem in (
        (QUERY, QUERY),
        ("proj_out", "final_layer.linear"),
        ("single_stream_modulation.linear", "single_stream_modulation.lin"),
    ):
        spelt = f"{prefix}{stem if dotted else stem.replace('.', '_')}"
        parts = [part_of(f"{spelt}.{half}.weight") for half in (down, up)]
        assert [part and part.name for part in parts] == [A, B]
        places = names.find(spelt)
        assert places is not None
        assert [place.module for place in places] == [module]


def test_names_of_attention_processors(run: Run) -> None:
    """diffusers' until 2023, ``attn.processor.to_q_lora``, and XLabs', ``double_blocks.0.processor.qkv_lora1``."""
    query, out = (rand(2, 32, seed=1), rand(32, 2, seed=2)), (rand(2, 32, seed=3), rand(32, 2, seed=4))
    above = "transformer.transformer_blocks.0.attn.processor"
    found = run(
        {f"{above}.to_q_lora.down.weight": query[0], f"{above}.to_q_lora.up.weight": query[1]}
        | {f"{above}.to_out_lora.down.weight": out[0], f"{above}.to_out_lora.up.weight": out[1]}
    )
    for module, (down, up) in (("to_q", query), ("to_out.0", out)):
        assert torch.allclose(product(found, f"transformer_blocks.0.attn.{module}"), up @ down, atol=1e-5)
    down, up = rand(4, 32), rand(96, 4)
    name = "double_blocks.0.processor.qkv_lora1"
    found = run({f"{name}.down.weight": down, f"{name}.up.weight": up})
    whole = torch.cat([product(found, f"transformer_blocks.0.attn.to_{each}") for each in "qkv"])
    assert torch.allclose(whole, up @ down, atol=1e-5)


def test_a_fused_matrix_is_split_and_alpha_goes_into_each(run: Run) -> None:
    down, up = rand(4, 32), rand(96, 4)
    name = f"lora_unet_{IMAGE.replace('.', '_')}"
    found = run({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)})
    whole = torch.cat([product(found, f"transformer_blocks.0.attn.to_{each}") for each in "qkv"])
    assert torch.allclose(whole, 0.5 * up @ down, atol=1e-5)


@pytest.mark.parametrize("alpha", [2.0, None])
def test_a_fused_matrix_in_groups_of_rows_is_what_each_group_says(alpha: float | None, run: Run) -> None:
    """By the rule of the trainer: rows of a group get alpha over the group's rank, times its own B A, and nothing of the others."""
    name = f"lora_unet_{IMAGE.replace('.', '_')}"
    pairs = [(rand(4, 32, seed=each), rand(32, 4, seed=10 + each)) for each in range(3)]
    state = {f"{name}.lora_down.{each}.weight": down for each, (down, _) in enumerate(pairs)}
    state |= {f"{name}.lora_up.{each}.weight": up for each, (_, up) in enumerate(pairs)}
    found = run(state if alpha is None else {**state, f"{name}.alpha": torch.tensor(alpha).bfloat16()})
    for each, (down, up) in zip("qkv", pairs):
        module = f"transformer_blocks.0.attn.to_{each}"
        assert torch.allclose(product(found, module), (alpha or 4.0) / 4.0 * up @ down, atol=1e-5)
        assert len(found[f"transformer.{module}.lora_A.weight"]) == 4


def test_groups_of_rows_are_all_counted(cli: Cli, converted: dict[str, Path], tmp_path: Path) -> None:
    name = f"lora_unet_{IMAGE.replace('.', '_')}"
    state = {f"{name}.lora_down.{each}.weight": rand(4, 32) for each in range(3)}
    state |= {f"{name}.lora_up.{each}.weight": rand(32, 4) for each in range(3)}
    save_file(state, tmp_path / "style.safetensors")
    output = tmp_path / "out.safetensors"
    code, out, err = cli("--json", "import", tmp_path / "style.safetensors", "--base", converted["flux2"], "-o", output)
    assert code == 0, err
    assert json.loads(out)["tally"]["used"] == 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_up.2": None}, "has groups lora_down 0, 1, 2 and lora_up 0, 1; each needs both"),
        ({"lora_up.1": None, "lora_down.1": None}, "has groups lora_down 0, 2 and lora_up 0, 2; each needs both"),
        ({"lora_up.1": rand(32, 8), "lora_down.1": rand(8, 32)}, "lora_down.1 is of shape (8, 32), which does not go"),
        ({"lora_up.1": rand(32, 3)}, "lora_up.1 is of shape (32, 3), which does not go with lora_down.0, (4, 32)"),
        ({"lora_down.0": rand(4), "lora_up.0": rand(4)}, "lora_down.0 is of shape (4,)"),
        ({"lora_up.2": rand(16, 4)}, "expected to give 96 numbers, found 80"),
    ],
)
def test_groups_of_rows_that_are_not_complete_are_named(
    changes: dict[str, Tensor | None], expected: str, cli: Cli, converted: dict[str, Path], tmp_path: Path
) -> None:
    name = f"lora_unet_{IMAGE.replace('.', '_')}"
    state: dict[str, Tensor | None] = {f"lora_down.{each}": rand(4, 32) for each in range(3)}
    state |= {**{f"lora_up.{each}": rand(32, 4) for each in range(3)}, **changes}
    whole = {f"{name}.{key}.weight": tensor for key, tensor in state.items() if tensor is not None}
    save_file(whole, tmp_path / "style.safetensors")
    base, output = converted["flux2"], tmp_path / "out.safetensors"
    failed(cli("import", tmp_path / "style.safetensors", "--base", base, "-o", output), "style.safetensors", expected)


def test_the_last_modulation_has_its_halves_the_other_way_round(run: Run) -> None:
    name, down, up = "diffusion_model.final_layer.adaLN_modulation.1", rand(2, 32), rand(64, 2)
    found = run({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    assert torch.allclose(product(found, "norm_out.linear"), torch.cat((up @ down).chunk(2)[::-1]), atol=1e-5)


def test_a_loha_is_the_same_product(run: Run) -> None:
    name = f"lycoris_{QUERY.replace('.', '_')}"
    for rank in (2, 8):
        a1, b1, a2, b2 = rand(32, rank), rand(rank, 32), rand(32, rank, seed=1), rand(rank, 32, seed=2)
        parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
        found = run({f"{name}.{part}": tensor for part, tensor in parts.items()})
        assert torch.allclose(product(found, QUERY), (a1 @ b1) * (a2 @ b2) / rank, atol=1e-4)
        assert len(found[f"transformer.{QUERY}.lora_A.weight"]) == min(rank**2, 32)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_a_lokr_is_the_same_product(first: bool, second: bool, run: Run) -> None:
    w1, w2 = (
        ((rand(4, 2), rand(2, 8)) if first else (rand(4, 8),)),
        ((rand(8, 2), rand(2, 4)) if second else (rand(8, 4),)),
    )
    parts = {}
    for name, factors in (("lokr_w1", w1), ("lokr_w2", w2)):
        parts |= (
            {f"{name}_{end}": each for end, each in zip("ab", factors)} if len(factors) == 2 else {name: factors[0]}
        )
    parts["alpha"] = torch.tensor(1.0)
    found = run({f"diffusion_model.{QUERY}.{part}": tensor for part, tensor in parts.items()})
    whole = torch.kron(
        math.prod(w1[1:], start=w1[0]) if len(w1) == 1 else w1[0] @ w1[1], w2[0] if len(w2) == 1 else w2[0] @ w2[1]
    )
    assert torch.allclose(product(found, QUERY), whole * (0.5 if first or second else 1.0), atol=1e-4)


def test_a_difference_is_the_same_matrix_on_a_projection_too(run: Run, converted: dict[str, Path]) -> None:
    lift = Lift.load(converted["flux2"] / "lift.safetensors")
    found = run({"diffusion_model.img_in.diff": rand(32, 16), f"diffusion_model.{IMAGE}.diff": rand(96, 32)})
    lifted = liftkit.lift_lora({"x_embedder.lora_A.weight": torch.eye(16)}, spec_of(NAMES["flux2"]), lift)
    assert torch.allclose(product(found, "x_embedder"), rand(32, 16) @ lifted["x_embedder.lora_A.weight"], atol=1e-5)
    assert torch.equal(product(found, "transformer_blocks.0.attn.to_k"), rand(96, 32)[32:64])


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_config_beside_a_file_of_other_names_is_its_strength(
    prefix: str, converted: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    folder, output = tmp_path / "peft", tmp_path / "out.safetensors"
    folder.mkdir()
    state = {f"{prefix}{QUERY}.lora_A.weight": rand(4, 32), f"{prefix}{QUERY}.lora_B.weight": rand(32, 4)}
    save_file(state, folder / "style.safetensors")
    alphas = {"^transformer_blocks\\.(?:0|1)\\.attn\\.(to_q|to_k)": 16}
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": alphas})
    )
    arguments = ("import", folder / "style.safetensors", "--base", converted["flux2"], "-o", output, "--overwrite")
    assert cli(*arguments)[0] == 0
    assert torch.allclose(product(load_file(output), QUERY), 4 * rand(32, 4) @ rand(4, 32), atol=1e-4)
    # Beside another file nobody knows whose it is.
    save_file(state, folder / "other.safetensors")
    code, _, err = cli(*arguments)
    assert code == 0
    assert "may be that of other.safetensors" in " ".join(err.split())
    assert torch.allclose(product(load_file(output), QUERY), rand(32, 4) @ rand(4, 32), atol=1e-4)


@pytest.mark.parametrize("targets", [True, False])
def test_metadata_stay_where_peft_can_load_by_them_and_are_folded_elsewhere(
    targets: bool, converted: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    stated = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}
    stated |= {"transformer.target_modules": ["to_q"]} if targets else {}
    state = {f"transformer.{QUERY}.lora_A.weight": rand(4, 32), f"transformer.{QUERY}.lora_B.weight": rand(32, 4)}
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(stated)})
    code, _, err = cli(
        "import", tmp_path / "a.safetensors", "--base", converted["flux2"], "-o", tmp_path / "b.safetensors"
    )
    assert code == 0, err
    pipe = load(converted["flux2"])
    pipe.load_lora_weights(tmp_path / "b.safetensors")
    delta = pipe.transformer.get_submodule(QUERY).get_delta_weight("default_0")
    assert torch.allclose(delta, 4 * rand(32, 4) @ rand(4, 32), atol=1e-4)


@pytest.mark.parametrize("prefix", ["module.", "transformer._orig_mod.", "pipe.dit."])
def test_prefixes_of_wrappers_are_passed_over(prefix: str, run: Run) -> None:
    found = run({f"{prefix}{QUERY}.lora_A.weight": rand(4, 32), f"{prefix}{QUERY}.lora_B.weight": rand(32, 4)})
    assert torch.allclose(product(found, QUERY), rand(32, 4) @ rand(4, 32), atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_folder_has_its_strengths(rslora: bool, converted: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    modules = {QUERY: (4, 32, 32), "transformer_blocks.0.attn.to_k": (2, 32, 32), "x_embedder": (4, 16, 32)}
    state = {}
    for module, (rank, width, height) in modules.items():
        state |= {
            f"base_model.model.{module}.lora_A.weight": rand(rank, width),
            f"base_model.model.{module}.lora_B.weight": rand(height, rank),
        }
    (tmp_path / "peft").mkdir()
    save_file(state, tmp_path / "peft" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"^x_embedder": 8},
        "use_rslora": rslora,
    }
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    code, _, err = cli("import", tmp_path / "peft", "--base", converted["flux2"], "-o", tmp_path / "out.safetensors")
    assert code == 0, err
    assert "adapter_config.json" in err
    found = load_file(tmp_path / "out.safetensors")
    for module, alpha in ((QUERY, 16), ("transformer_blocks.0.attn.to_k", 16)):
        rank, width, height = modules[module]
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        assert torch.allclose(product(found, module), scale * rand(height, rank) @ rand(rank, width), atol=1e-4)
    for change, expected in (
        ({"r": 5}, "rank 5"),
        ({"peft_type": "OFT"}, "'OFT', not LoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": "x"}, "r should be a number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "no name of modules"),
        ({"alpha_pattern": {"(a|a)*$": 1}}, "no name of modules"),
        ({"alpha_pattern": {"a?" * 30 + "a" * 30: 1}}, "no name of modules"),
    ):
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        failed(
            cli("import", tmp_path / "peft", "--base", converted["flux2"], "-o", tmp_path / "no.safetensors"),
            "adapter_config.json",
            expected,
        )
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft" / "adapter_model.bin")
    failed(
        cli("import", tmp_path / "peft", "--base", converted["flux2"], "-o", tmp_path / "no.safetensors"), "a pickle"
    )


def test_narrow_floats_and_odd_alphas_lose_nothing(run: Run) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        down, up = rand(3, 32).to(dtype), rand(32, 3).to(dtype)
        found = run(
            {
                f"transformer.{QUERY}.lora_A.weight": down,
                f"transformer.{QUERY}.lora_B.weight": up,
                f"transformer.{QUERY}.alpha": torch.tensor(1),
            }
        )
        expected = up.double() @ down.double() / 3
        found = {key: tensor.double() for key, tensor in found.items()}
        assert torch.allclose(product(found, QUERY), expected, rtol=1e-6, atol=1e-7)


def test_theorem_1_holds_with_a_dora_on_the_input(architecture: str) -> None:
    lift, spec = tiny.lift(scale=1.0), spec_of(NAMES[architecture])
    latent, source = (tiny.TRANSFORMERS[NAMES[architecture]]().double() for _ in range(2))
    state = {}
    for path in (QUERY, spec.inputs[0].path):
        weight = latent.get_submodule(path).weight
        rows, *columns = weight.shape
        state[f"transformer.{path}.lora_A.weight"] = rand(2, *columns).double()
        state[f"transformer.{path}.lora_B.weight"] = rand(rows, 2, *(1,) * (len(columns) - 1)).double()
        state[f"transformer.{path}.lora_magnitude_vector"] = 1.5 * weight.flatten(1).norm(dim=1).detach()
        if len(columns) > 1:
            state[f"transformer.{path}.lora_magnitude_vector"] = state[
                f"transformer.{path}.lora_magnitude_vector"
            ].reshape(1, -1, 1, 1)
    pixel = liftkit.convert_transformer(source, lift)
    plain = tied(architecture, lift, latent, pixel)
    attach(latent, state)
    assert tied(architecture, lift, latent, pixel) > 1e-2
    attach(pixel, liftkit.lift_lora(state, spec, lift))
    assert tied(architecture, lift, latent, pixel) < max(1e-9, 2 * plain)
    with pytest.raises(UsageError, match="DoRA on an output projection cannot be lifted"):
        liftkit.lift_lora({"proj_out.lora_magnitude_vector": torch.ones(16)}, spec, lift)


def test_kohyas_dora_is_loaded_as_one(run: Run, converted: dict[str, Path], tmp_path: Path) -> None:
    name = f"lora_unet_{IMAGE.replace('.', '_')}"
    found = run(
        {
            f"{name}.lora_down.weight": rand(2, 32),
            f"{name}.lora_up.weight": rand(96, 2),
            f"{name}.dora_scale": rand(96, 1).abs(),
        }
    )
    pipeline = load(converted["flux2"])
    pipeline.load_lora_weights(tmp_path / "out.safetensors")
    layer = pipeline.transformer.get_submodule("transformer_blocks.0.attn.to_v")
    assert torch.equal(layer.lora_magnitude_vector["default_0"].weight, rand(96, 1).abs()[64:].flatten())
    assert torch.equal(
        found["transformer.transformer_blocks.0.attn.to_v.lora_magnitude_vector"], rand(96, 1).abs()[64:].flatten()
    )
