"""The authors' adapter format: read as it is described, written so that what is read again is the same."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file

import liftkit
from liftkit.color import Oklab
from liftkit.conversion.audit import audit
from liftkit.errors import UsageError
from liftkit.formats.adapters import fuse, keep, open_adapter
from liftkit.formats.asymflow_adapter import write_asymflow_adapter
from liftkit.formats.asymflow_limits import COMFYUI, export_problem, unknown_to_comfyui
from liftkit.formats.exporting import export_adapter
from liftkit.models.adapter import LORA_A, LORA_B, Adapter
from tests import tiny
from tests.adapters import random_adapter
from tests.converting import failed
from tests.test_pipelines import load

Cli = Callable[..., tuple[int, str, str]]
THEIRS = ("--format", "asymflow-adapter")
HIDDEN, SCALE, WEIGHTS = 32, 2.4375, "diffusion_pytorch_model.safetensors"
LORA = {
    "transformer_blocks.0.ff.linear_in": (6 * HIDDEN, HIDDEN, 5),
    "single_transformer_blocks.0.attn.to_out": (HIDDEN, 4 * HIDDEN, 2),
}
"""Module: rows, columns, rank."""


def their_tensors() -> dict[str, np.ndarray]:
    """A random adapter for the tiny klein, as the format is described: nothing of liftkit's takes part."""
    rng = np.random.default_rng(3)
    tensors = {
        "x_embedder.weight": rng.normal(size=(HIDDEN, tiny.DIM)) * 0.2,
        "proj_out.weight": rng.normal(size=(tiny.DIM, HIDDEN)) * 0.2,
        "norm_out.linear.weight": rng.normal(size=(2 * HIDDEN, HIDDEN)) * 0.2,
        "proj_buffer": np.linalg.qr(rng.normal(size=(tiny.DIM, tiny.RANK)))[0],
        "scale_buffer": np.array(SCALE),
    }
    for module, (rows, columns, rank) in LORA.items():
        tensors[f"{module}.lora_A.weight"] = rng.normal(size=(rank, columns)) * 0.2
        tensors[f"{module}.lora_B.weight"] = rng.normal(size=(rows, rank)) * 0.2
    return {name: value.astype("<f4", order="C") for name, value in tensors.items()}


def write_theirs(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """Bytes by hand: length, JSON, numbers."""
    folder.mkdir()
    header, position = {}, 0
    for name, value in tensors.items():
        end = position + value.nbytes
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(
        struct.pack("<Q", len(raw)) + raw + b"".join(value.tobytes() for value in tensors.values())
    )
    content = {"_class_name": "AsymFlux2Transformer2DModel", "patch_size": tiny.PATCH, "base_rank": tiny.RANK, **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_theirs(tmp_path_factory.mktemp("authors") / "theirs", their_tensors())


@pytest.fixture(scope="module")
def klein(model_folders: dict[str, Path]) -> Path:
    return model_folders["flux2"]


@pytest.fixture(scope="module")
def merged(theirs: Path, klein: Path) -> Path:
    """The authors' adapter in a model folder of ours; not to be changed."""
    done = fuse(theirs, str(klein), theirs.parent / "merged")
    assert done.proof is not None
    return done.output


@pytest.fixture(scope="module")
def pixel(klein: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion in the paper's colors, as the format needs it; not to be changed."""
    place = tmp_path_factory.mktemp("paper")
    tiny.lift().save(place / "lift.safetensors")
    liftkit.convert(str(klein), place / "pixel", lift=place / "lift.safetensors", device="cpu", proof_steps=1)
    return place / "pixel"


def their_velocity(base: Path, x: torch.Tensor, sigma: float, text: torch.Tensor) -> torch.Tensor:
    """What their model says of an image: their weights in the stock class with pixel tokens, and the paper's equations."""
    tensors = {name: torch.from_numpy(value).double() for name, value in their_tensors().items()}
    latent = Flux2Transformer2DModel.from_pretrained(base, subfolder="transformer").double()
    state = {**latent.state_dict(), **{name: tensors[name] for name in tensors if "lora" not in name}}
    a, s = state.pop("proj_buffer"), state.pop("scale_buffer").item()
    for module in LORA:
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        state[f"{module}.weight"] = state[f"{module}.weight"] + product
    model = Flux2Transformer2DModel(**{**latent.config, "in_channels": tiny.DIM, "out_channels": None})
    model.double().load_state_dict(state)
    patch, (rows, columns) = tiny.PATCH, (side // tiny.PATCH for side in x.shape[-2:])
    tokens = torch.stack(
        [
            torch.cat([x[0, c, i * patch + p, j * patch : (j + 1) * patch] for c in range(3) for p in range(patch)])
            for i in range(rows)
            for j in range(columns)
        ]
    )[None]
    ids = torch.tensor([[0, i, j, 0] for i in range(rows) for j in range(columns)])[None]
    text_ids = torch.tensor([[0, 0, 0, i] for i in range(text.shape[1])])[None]
    k = 1 / (s + (1 - s) * sigma)
    with torch.no_grad():
        u_cal = model(k * tokens, text, torch.tensor([k * sigma]).double(), ids, text_ids, return_dict=False)[0]
    inside, outside = a @ a.T, torch.eye(tiny.DIM).double() - a @ a.T
    u = s * k * u_cal @ inside + (1 - s * k) / sigma * tokens @ inside + (tokens + s * u_cal) @ outside / sigma
    image = torch.zeros_like(x)
    for n, token in enumerate(u[0]):
        i, j = divmod(n, columns)
        image[0, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = token.reshape(3, patch, patch)
    return image


@pytest.mark.parametrize("way", ["fused", "kept"])
def test_an_imported_adapter_says_what_theirs_does(
    way: str, theirs: Path, merged: Path, klein: Path, tmp_path: Path
) -> None:
    if way == "fused":
        transformer = load(merged).transformer.double()
    else:
        keep(theirs, str(klein), tmp_path / "out")
        transformer = liftkit.load_adapter(load(klein), tmp_path / "out").transformer.double()
    assert transformer.config.lift_scale == SCALE
    x, text = torch.randn(1, 3, 12, 20).double(), torch.randn(1, 7, 24).double()
    for sigma in (0.9, 0.4, 0.05):
        expected, time = their_velocity(klein, x, sigma, text), torch.tensor([sigma]).double()
        with torch.no_grad():
            found = liftkit.open_flow(transformer).velocity(x, time, encoder_hidden_states=text)
        # The stock class takes the sine of its time in float32.
        assert ((found - expected).abs().max() / expected.abs().max()).item() < 5e-5


def test_there_and_back_is_the_same_bits(theirs: Path, klein: Path, tmp_path: Path) -> None:
    keep(theirs, str(klein), tmp_path / "ours")
    export_adapter(str(tmp_path / "ours"), tmp_path / "back", "asymflow-adapter")
    before, after = load_file(theirs / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.items() >= json.loads((theirs / "config.json").read_text()).items()
    ours, again = Adapter.load(tmp_path / "ours"), open_adapter(tmp_path / "back")
    assert ours.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(value, again.tensors[name]) for name, value in ours.tensors.items())
    assert ours.lift is not None
    assert again.lift is not None
    assert torch.equal(ours.lift.basis, again.lift.basis)
    assert ours.lift.scale == again.lift.scale == SCALE
    assert ours.base == "flux2"


def test_our_alpha_goes_into_b(pixel: Path, tmp_path: Path) -> None:
    for alpha, exact in ((3.0, True), (6.0, True), (2.0, False)):
        ours = random_adapter(pixel, alpha)
        write_asymflow_adapter(ours, tmp_path / "theirs", "# card\n", {}, overwrite=True)
        back = open_adapter(tmp_path / "theirs")
        assert back.alpha == 3.0
        for module, (down, up) in ours.pairs.items():
            assert torch.equal(back.pairs[module][0], down)
            expected = up.double() * alpha / 3.0
            assert (back.pairs[module][1].double() - expected).abs().max() <= (0 if exact else 1e-7)


def test_a_plain_conversion_is_an_adapter_without_lora(pixel: Path, klein: Path, tmp_path: Path) -> None:
    done = export_adapter(str(pixel), tmp_path / "theirs", "asymflow-adapter")
    assert done.residual is None
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    assert tensors.keys() == {
        "x_embedder.weight",
        "proj_out.weight",
        "norm_out.linear.weight",
        "proj_buffer",
        "scale_buffer",
    }
    # In (channel, row, column) order on both sides: W_in A^T and A W_out by the book.
    source, a = load_file(klein / "transformer" / WEIGHTS), tensors["proj_buffer"].double()
    for name, product in (
        ("x_embedder.weight", source["x_embedder.weight"].double() @ a.T),
        ("proj_out.weight", a @ source["proj_out.weight"].double()),
    ):
        assert torch.allclose(tensors[name].double(), product, atol=1e-6)
    assert tensors["scale_buffer"].item() == np.float32(done.adapter.lift.scale)  # type: ignore[union-attr]


def test_a_finetuned_folder_gives_its_lora_back(
    theirs: Path, merged: Path, klein: Path, cli: Cli, tmp_path: Path
) -> None:
    code, out, err = cli("export", merged, "--base", klein, "-o", tmp_path / "back", *THEIRS)
    assert code == 0, err
    assert "LoRA on 2 modules" in out
    assert "left out" in out
    before, after = load_file(theirs / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    for name in before:
        if "lora" not in name:
            assert torch.equal(before[name], after[name])
    for module in LORA:
        product, found = ((t[f"{module}{LORA_B}"] @ t[f"{module}{LORA_A}"]) for t in (before, after))
        assert torch.allclose(product, found, atol=1e-5)


def test_more_than_the_rank_that_is_known_is_not_dropped_in_silence(
    merged: Path, klein: Path, cli: Cli, tmp_path: Path
) -> None:
    failed(cli("export", merged, "-o", tmp_path / "x", *THEIRS), "give --base")
    copy = Path(shutil.copytree(merged, tmp_path / "copy"))
    record = json.loads((copy / "liftkit.json").read_text())
    (copy / "liftkit.json").write_text(json.dumps({**record, "finetune": {"rank": 4}}))
    failed(cli("export", copy, "--base", klein, "-o", tmp_path / "x", *THEIRS), "more than rank 4", "--rank N")
    (copy / "liftkit.json").write_text(json.dumps({**record, "finetune": {}}))
    failed(cli("export", copy, "--base", klein, "-o", tmp_path / "x", *THEIRS), "no recipe says by which rank")
    code, _, err = cli("export", copy, "--base", klein, "--rank", 4, "-o", tmp_path / "lossy", *THEIRS)
    assert code == 0, err
    assert max(len(down) for down, _ in open_adapter(tmp_path / "lossy").pairs.values()) == 4


def test_what_was_trained_in_full_is_refused_with_the_reason(
    pixel: Path, klein: Path, cli: Cli, tmp_path: Path
) -> None:
    pixel = Path(shutil.copytree(pixel, tmp_path / "copy"))
    path = pixel / "transformer" / WEIGHTS
    state = load_file(path)
    state["transformer_blocks.0.attn.norm_q.weight"] = state["transformer_blocks.0.attn.norm_q.weight"] + 1
    save_file(state, path)
    record = json.loads((pixel / "liftkit.json").read_text())
    (pixel / "liftkit.json").write_text(json.dumps({**record, "finetune": {}}))
    failed(cli("export", pixel, "--base", klein, "-o", tmp_path / "x", *THEIRS), "norm_q", "trained in full")
    assert not (tmp_path / "x").exists()


def test_an_adapter_that_trained_less_takes_the_rest_from_its_base(pixel: Path, klein: Path, tmp_path: Path) -> None:
    ours = random_adapter(pixel)
    kept = {
        name: tensor for name, tensor in ours.tensors.items() if name != "norm_out.linear.weight" and "proj" not in name
    }
    down, up = torch.randn(3, HIDDEN) * 0.1, torch.randn(tiny.DIM, 3) * 0.1
    pairs = {f"proj_out{LORA_A}": down, f"proj_out{LORA_B}": up}
    Adapter({**kept, **pairs}, 3.0, ours.lift, ours.transformer, "tiny", {}).save(tmp_path / "ours", "# card\n")
    with pytest.raises(UsageError, match=r"it holds proj_out.weight, the adapter does not: give --base"):
        export_adapter(str(tmp_path / "ours"), tmp_path / "x", "asymflow-adapter")
    applied = liftkit.load_adapter(load(klein), tmp_path / "ours").transformer.state_dict()
    for base in (klein, pixel):
        target = tmp_path / f"theirs-{base.name}"
        export_adapter(str(tmp_path / "ours"), target, "asymflow-adapter", base=str(base))
        again = liftkit.load_adapter(load(klein), target).transformer.state_dict()
        assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in applied.items())


@pytest.mark.parametrize("width", ["bfloat16", "bfloat16 in float32"])
def test_a_basis_that_was_rounded_is_kept_as_it_is_stored(
    width: str, theirs: Path, klein: Path, tmp_path: Path
) -> None:
    theirs = Path(shutil.copytree(theirs, tmp_path / "theirs"))
    path = theirs / WEIGHTS
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file({n: t.float() for n, t in tensors.items()} if "float32" in width else tensors, path)
    lift = open_adapter(theirs).lift
    assert lift is not None
    assert 1e-4 < lift.orthonormality() < 1e-2
    assert torch.equal(lift.basis, tensors["proj_buffer"].float())
    assert audit(fuse(theirs, str(klein), tmp_path / "out").output).ok


def test_without_an_output_norm_it_is_the_base_s_own(klein: Path, cli: Cli, tmp_path: Path) -> None:
    """As of a training that left it alone; a merged folder has the base's, and goes out again with it."""
    kept = {name: tensor for name, tensor in their_tensors().items() if not name.startswith("norm_out")}
    source = write_theirs(tmp_path / "source", kept)
    code, out, err = cli("import", source, "--base", klein, "-o", tmp_path / "merged")
    assert code == 0, err
    assert "the base's own" in out
    base = load(klein).transformer.state_dict()["norm_out.linear.weight"]
    assert torch.equal(load(tmp_path / "merged").transformer.state_dict()["norm_out.linear.weight"], base)
    keep(source, str(klein), tmp_path / "kept")
    with pytest.raises(UsageError, match=r"it holds norm_out.linear.weight, the adapter does not: give --base"):
        export_adapter(str(tmp_path / "kept"), tmp_path / "out", "asymflow-adapter")
    export_adapter(str(tmp_path / "kept"), tmp_path / "out", "asymflow-adapter", base=str(klein))
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert found.keys() == their_tensors().keys()
    assert torch.equal(found["norm_out.linear.weight"].float(), base.float())


@pytest.mark.parametrize("form", ["basis_rank", "no config", "lone file", "prefixed"])
def test_adapters_in_every_form_that_people_have(
    form: str, theirs: Path, klein: Path, cli: Cli, tmp_path: Path
) -> None:
    source, tensors = tmp_path / "source", their_tensors()
    if form == "prefixed":
        tensors = {f"transformer.{name}": value for name, value in tensors.items()}
    write_theirs(source, tensors, base_rank=..., basis_rank=tiny.RANK)
    if form in ("no config", "lone file"):
        (source / "config.json").unlink()
    if form == "lone file":
        source = (source / WEIGHTS).rename(tmp_path / "asymflux2_klein.safetensors")
    found, expected = open_adapter(source), open_adapter(theirs)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())
    code, _, err = cli("import", source, "--base", klein, "-o", tmp_path / "kept", "--keep-adapter")
    assert code == 0, err


def test_the_config_holds_the_base_s_own_numbers(theirs: Path, klein: Path, tmp_path: Path) -> None:
    keep(theirs, str(klein), tmp_path / "kept")
    export_adapter(str(tmp_path / "kept"), tmp_path / "out", "asymflow-adapter")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    base = Flux2Transformer2DModel.load_config(klein, subfolder="transformer")
    sizes = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim",
             "timestep_guidance_channels", "guidance_embeds", "mlp_ratio", "axes_dims_rope", "rope_theta", "eps")  # fmt: skip
    assert {key: config[key] for key in sizes} == {key: base[key] for key in sizes}
    stated = {"in_channels": 3, "num_timesteps": 1, "sigma_min": 1e-4, "patch_size": tiny.PATCH}
    assert stated.items() <= config.items()
    assert config["base_rank"] == config["basis_rank"] == tiny.RANK


def test_what_was_exported_here_is_sampled_as_it_was(theirs: Path, pixel: Path, tmp_path: Path) -> None:
    assert open_adapter(theirs).provenance["sampling"]["shift"] == 17.0
    export_adapter(str(pixel), tmp_path / "out", "asymflow-adapter")
    assert "sampling" not in open_adapter(tmp_path / "out").provenance


def test_modules_outside_of_those_that_comfyui_knows_are_named(theirs: Path) -> None:
    adapter = open_adapter(theirs)
    assert len(COMFYUI) == 58
    assert unknown_to_comfyui(adapter) == []
    more = {f"transformer_blocks.0.attn.to_q{half}": torch.zeros(2, 2) for half in (LORA_A, LORA_B)}
    outside = Adapter({**adapter.tensors, **more}, None, adapter.lift, adapter.transformer, "", {})
    assert unknown_to_comfyui(outside) == ["transformer_blocks.0.attn.to_q"]


def test_it_must_be_whole_and_fit(theirs: Path, klein: Path, cli: Cli, tmp_path: Path) -> None:
    tensors = their_tensors()
    wide = np.zeros((3, 3), "<f4")
    number = {"base_rank": "many"}
    cases: list[tuple[dict[str, np.ndarray | None], dict[str, Any], tuple[str, ...]]] = [
        ({"scale_buffer": None}, {}, ("tensor 'scale_buffer' is missing",)),
        ({"proj_out.weight": None}, {}, ("tensor 'proj_out.weight' is missing",)),
        ({"norm_out.linear.weight": wide}, {}, ("'norm_out.linear.weight'", "expected (64, 32), found (3, 3)")),
        ({"proj_buffer": tensors["proj_buffer"] * 1.01}, {}, ("'proj_buffer'", "not orthonormal")),
        ({"scale_buffer": np.array(-1.0, "<f4")}, {}, ("scale must be a positive number",)),
        ({"transformer_blocks.0.attn.to_q.weight": wide}, {}, ("1 tensors are neither", "attn.to_q.weight")),
        ({f"{next(iter(LORA))}{LORA_B}": None}, {}, ("has no lora_B.weight beside it",)),
        ({f"x.y{LORA_A}": wide, f"x.y{LORA_B}": wide}, {}, ("'x.y.weight'", "none of that name", "right base")),
        ({}, {"patch_size": 8}, ("patch_size: expected 4", "found 8")),
        ({}, {"basis_rank": 8}, ("basis_rank: expected 16", "found 8")),
        ({}, number, ("base_rank", "found 'many'")),
        ({"scale_buffer": None, "proj_buffer": None}, {}, ("no adapter",)),
    ]
    for changes, config, expected in cases:
        broken = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        write_theirs(tmp_path / "broken", broken, **config)
        failed(cli("import", tmp_path / "broken", "--base", klein, "-o", tmp_path / "out"), *expected)
    failed(cli("import", theirs, "-o", tmp_path / "out"), "--base MODEL")
    failed(cli("import", theirs, "--base", klein, "--config", klein, "-o", tmp_path / "out"), "--config: means nothing")
    failed(cli("import", tmp_path / "nothing", "--base", klein, "-o", tmp_path / "out"), "no such folder")
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_the_plan_and_the_export_say_whether_the_colors_fit(
    model_folders: dict[str, Path], image_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    given = ("convert", model_folders["flux2"], "--images", image_folder, "-o", tmp_path / "pixel", "--device", "cpu")
    for color, said in (((), "to asymflow-adapter: yes"), (("--color", "oklab"), "not to asymflow-adapter: it means")):
        code, out, err = cli(*given, "--dry-run", *color)
        assert code == 0, err
        assert said in out
    code, _, err = cli(*given, "--color", "oklab", "--proof", "projections")
    assert code == 0, err
    failed(cli("export", tmp_path / "pixel", "-o", tmp_path / "x", *THEIRS), "wrong colors", "--color oklab-paper")


def test_what_a_recipe_trains_can_be_exported_or_the_reason_is_known() -> None:
    pixel = "AsymFlux2Transformer2DModel"
    assert export_problem(pixel, Oklab(), ["x_embedder", "proj_out", "norm_out"]) == ""
    assert "trained in full" in export_problem(pixel, Oklab(), [""])
    assert "context_embedder" in export_problem(pixel, Oklab(), ["context_embedder"])
    assert "oklab-paper" in export_problem(pixel, Oklab((0.5, 0.0, 0.0), 0.1), ["proj_out"])
    assert pixel in export_problem("AsymSD3Transformer2DModel", Oklab(), [])


def test_another_class_is_not_exported(converted: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    failed(cli("export", converted["sd3"], "-o", tmp_path / "x", *THEIRS), "AsymSD3Transformer2DModel")
    random_adapter(converted["sd3"]).save(tmp_path / "sd3", "# card\n")
    failed(cli("export", tmp_path / "sd3", "-o", tmp_path / "x", *THEIRS), "AsymSD3Transformer2DModel")


def test_imports_through_the_command_line(theirs: Path, klein: Path, cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("import", theirs, "--base", klein, "-o", tmp_path / "kept", "--keep-adapter")
    assert code == 0, err
    assert "LoRA on 2 modules" in out
    code, out, err = cli("import", tmp_path / "kept", "--base", klein, "-o", tmp_path / "pixel")
    assert code == 0, err
    assert "scale 2.4375" in out
    assert json.loads((tmp_path / "pixel" / "liftkit.json").read_text())["scale"] == SCALE
    failed(cli("import", theirs, "--base", klein, "-o", tmp_path / "kept", "--keep-adapter"), "exists already")
    code, _, err = cli("import", theirs, "--base", klein, "-o", tmp_path / "kept", "--keep-adapter", "--overwrite")
    assert code == 0, err
