"""Single files in the original layout: written here by the inverse of diffusers' mapping, imported as a diffusers folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import liftkit
from liftkit.checkpoint.folder import manifest
from liftkit.checkpoint.misplaced import misplaced
from liftkit.errors import UsageError
from liftkit.formats import single_file
from liftkit.formats.kinds import kind_of
from tests import tiny
from tests.converting import failed
from tests.original_layout import original
from tests.test_pipelines import load

Cli = Callable[..., tuple[int, str, str]]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def file(architecture: str, model_folders: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / f"{architecture}-original.safetensors"
    save_file(original(architecture, load_file(model_folders[architecture] / WEIGHTS)), path)
    return path


@pytest.fixture
def config(architecture: str, model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """The folder of the same model; its own transformer's weights are not needed."""
    folder = Path(shutil.copytree(model_folders[architecture], tmp_path / "config"))
    (folder / WEIGHTS).unlink()
    return folder


def test_a_single_file_becomes_the_folder_that_it_came_from(
    architecture: str, file: Path, config: Path, model_folders: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    code, out, err = cli("import", file, "--config", config, "-o", tmp_path / "folder")
    assert code == 0, err
    assert f"liftkit convert {tmp_path / 'folder'}" in out
    expected, found = load_file(model_folders[architecture] / WEIGHTS), load_file(tmp_path / "folder" / WEIGHTS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    for path in sorted(config.rglob("*")):
        if path.is_file():
            assert (tmp_path / "folder" / path.relative_to(config)).read_bytes() == path.read_bytes()
    record = json.loads((tmp_path / "folder" / "liftkit.json").read_text())
    assert record["source"] == {"file": file.name, "config": "config"}
    listed = manifest(tmp_path / "folder")
    listed.pop("liftkit.json")
    assert record["digests"] == listed
    assert load(tmp_path / "folder").transformer.state_dict().keys() == expected.keys()


def test_what_was_imported_converts(architecture: str, file: Path, config: Path, tmp_path: Path) -> None:
    single_file.import_checkpoint(file, str(config), tmp_path / "folder", shards="link")
    tiny.lift().save(tmp_path / "lift.safetensors")
    done = liftkit.convert(
        str(tmp_path / "folder"), tmp_path / "pixel", lift=tmp_path / "lift.safetensors", device="cpu", proof_steps=1
    )
    assert done.proof.exact < 1e-3


def test_dtypes_stay_and_files_with_diffusers_names_are_taken_too(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    state = {key: tensor.bfloat16() for key, tensor in load_file(model_folders["flux2"] / WEIGHTS).items()}
    for index, variant in enumerate((state, original("flux2", state))):
        save_file(variant, tmp_path / "file.safetensors")
        single_file.import_checkpoint(
            tmp_path / "file.safetensors", str(model_folders["flux2"]), tmp_path / f"folder{index}"
        )
        found = load_file(tmp_path / f"folder{index}" / WEIGHTS)
        assert all(torch.equal(tensor, found[key]) for key, tensor in state.items())


def test_a_vae_in_the_file_is_left_out_and_said_so(cli: Cli, model_folders: dict[str, Path], tmp_path: Path) -> None:
    state = original("sd3", load_file(model_folders["sd3"] / WEIGHTS))
    more = {"first_stage_model.decoder.conv_in.weight": torch.zeros(2), "text_encoders.clip_l.x": torch.zeros(1)}
    save_file({**state, **more}, tmp_path / "all.safetensors")
    code, _, err = cli("import", tmp_path / "all.safetensors", "--config", model_folders["sd3"], "-o", tmp_path / "out")
    assert code == 0, err
    assert "left out: 1 of a VAE (first_stage_model.decoder.conv_in.weight); 1 of a text encoder (text_encoders" in err


def test_what_is_no_checkpoint_of_the_model_is_named(
    cli: Cli, model_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    state = original("flux2", load_file(model_folders["flux2"] / WEIGHTS))
    path, output, config = tmp_path / "file.safetensors", tmp_path / "out", model_folders["flux2"]
    cases: list[tuple[dict[str, Tensor | None], tuple[str, ...]]] = [
        ({"img_in.weight": None}, ("1 tensors are missing", "'x_embedder.weight'")),
        ({"img_in.weight": torch.zeros(32, 8)}, ("'x_embedder.weight' is (32, 8)", "(32, 16)", "config of this model")),
        ({"img_in.input_scale": torch.ones(1)}, ("quantized: scaled 8 bits", "'img_in.input_scale'")),
        ({"img_in.bias": torch.zeros(32)}, ("1 tensors are unknown", "'x_embedder.bias'")),
        ({"double_blocks.0.img_attn.strange.weight": torch.zeros(1)}, ("not in the original layout", "strange")),
    ]
    for changes, expected in cases:
        save_file({key: tensor for key, tensor in {**state, **changes}.items() if tensor is not None}, path)
        failed(cli("import", path, "--config", config, "-o", output), "file.safetensors", *expected)
    save_file(state, path)
    failed(cli("import", path, "-o", output), "is a checkpoint", "--config MODEL")
    failed(cli("import", path, "--config", model_folders["sd3"], "-o", output), "not in the original layout of SD3")
    failed(cli("import", path, "--config", converted["flux2"], "-o", output), "a pixel model")
    failed(cli("import", path, "--config", config, "--base", config, "-o", output), "--base: means nothing")
    failed(cli("import", path, "--config", tmp_path / "nothing", "-o", output), "no such folder")
    failed(cli("convert", path, "--images", "demo", "-o", output), "a single file", "liftkit import")
    path.write_bytes(path.read_bytes()[:-4])
    failed(cli("import", path, "--config", config, "-o", output), "truncated")
    assert not output.exists()


def test_a_file_in_diffusers_names_is_judged_by_them(
    architecture: str, cli: Cli, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """One tensor missing or more than the model has: that one is named, not what a mapping of names makes of the others."""
    state, config = load_file(model_folders[architecture] / WEIGHTS), model_folders[architecture]
    path, output = tmp_path / "file.safetensors", tmp_path / "out"
    for gone in ("transformer_blocks.0.attn.to_q.weight", "proj_out.weight"):
        save_file({key: tensor for key, tensor in state.items() if key != gone}, path)
        failed(cli("import", path, "--config", config, "-o", output), f"1 tensors are missing, such as '{gone}'")
    save_file({**state, "transformer_blocks.0.strange.weight": torch.zeros(1)}, path)
    failed(
        cli("import", path, "--config", config, "-o", output), "1 tensors are unknown", "'transformer_blocks.0.strange"
    )
    shard = tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors"
    save_file(dict(list(state.items())[:9]), shard)
    failed(cli("import", shard, "--config", config, "-o", output), "tensors are missing", "it is one of 3 files")
    assert not output.exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none_are_not_imported(
    value: float, cli: Cli, file: Path, config: Path, tmp_path: Path
) -> None:
    state = load_file(file)
    name = next(key for key in state if key.endswith("weight"))
    whole = state[name].clone()
    state[name].view(-1)[3] = value
    save_file(state, file)
    failed(cli("import", file, "--config", config, "-o", tmp_path / "out"), f"{file}: tensor {name!r} holds NaN")
    save_file({**state, name: whole}, file)
    vae = config / "vae" / "diffusion_pytorch_model.safetensors"
    broken = load_file(vae)
    broken["decoder.conv_in.bias"].view(-1)[0] = value
    save_file(broken, vae)
    failed(cli("import", file, "--config", config, "-o", tmp_path / "out"), "vae", "'decoder.conv_in.bias' holds NaN")
    assert not (tmp_path / "out").exists()


OTHER_FILES = {
    "a VAE": [
        ("decoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight", "bn.running_mean"),
        ("decoder.up.0.block.0.conv1.weight", "encoder.down.0.block.0.norm1.weight", "quant_conv.bias"),
        ("decoder.layers.1.conv.0.weight", "encoder.layers.0.weight"),
        ("decoder.1.weight", "decoder.3.conv.0.weight"),
        ("conv1.weight", "decoder.upsamples.0.residual.0.gamma", "encoder.downsamples.0.residual.2.weight"),
    ],
    "a text encoder": [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "text_projection.weight", "logit_scale"),
        ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.patch_embed.weight"),
        ("token_embedding.weight", "transformer.resblocks.0.mlp.c_fc.weight", "positional_embedding"),
    ],
    "a ControlNet": [
        ("controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"),
        ("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
        ("control_model.input_hint_block.0.weight", "control_model.zero_convs.0.0.weight"),
    ],
    "an IP-Adapter": [("image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight")],
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_other_parts_of_a_model_alone_are_named(
    what: str, cli: Cli, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    for names in OTHER_FILES[what]:
        save_file({name: torch.zeros(2, 2) for name in names}, path)
        for command in (("import", path, "--config", model_folders["flux2"]), ("convert", path, "--images", "demo")):
            failed(cli(*command, "-o", tmp_path / "out"), f"{what} alone, no transformer")


FULL = torch.zeros(32, 16)
QUANTIZED = {
    "8-bit floats (F8_E4M3)": {"img_in.weight": FULL.to(torch.float8_e4m3fn)},
    "8-bit floats (F8_E5M2)": {"img_in.weight": FULL.to(torch.float8_e5m2)},
    "8-bit floats (F8_E8M0)": {"img_in.scales": torch.ones(2).to(torch.float8_e8m0fnu)},
    "scaled 8 bits": {"img_in.weight": FULL.to(torch.float8_e4m3fn), "img_in.scale_weight": torch.ones(())},
    "scaled by ComfyUI": {"img_in.comfy_quant": torch.zeros(9, dtype=torch.uint8)},
    "nvfp4": {"img_in.weight": FULL[:, :8].to(torch.uint8), "img_in.weight_scale_2": torch.ones(())},
    "bitsandbytes 4 bits": {
        "img_in.weight": FULL[:1].to(torch.uint8),
        "img_in.weight.quant_state.bitsandbytes__nf4": FULL,
    },
    "bitsandbytes 8 bits": {"img_in.weight": FULL.to(torch.int8), "img_in.SCB": FULL},
    "GPTQ or AWQ": {"img_in.qweight": FULL.to(torch.int32), "img_in.qzeros": FULL.to(torch.int32)},
    "SVDQuant": {"img_in.lora_down": FULL, "img_in.wscales": FULL},
    "integers (I8)": {"img_in.weight": FULL.to(torch.int8)},
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("options", [(), ("--config",)])
def test_quantized_files_are_refused_by_their_kind(
    kind: str, options: tuple[str, ...], cli: Cli, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    path, given = tmp_path / "file.safetensors", [*options, *(model_folders["flux2"] for _ in options)]
    state = {"txt_in.weight": FULL, "final_layer.norm.scale": FULL, **QUANTIZED[kind]}
    save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    failed(cli("import", path, *given, "-o", tmp_path / "out"), f"file.safetensors: quantized: {kind}", "'img_in.")
    assert not (tmp_path / "out").exists()


def test_quantized_parts_of_others_do_not_matter(model_folders: dict[str, Path], tmp_path: Path) -> None:
    state = original("flux2", load_file(model_folders["flux2"] / WEIGHTS))
    text = {
        "text_encoders.qwen.weight": FULL.to(torch.float8_e4m3fn),
        "text_encoders.qwen.scale_weight": torch.ones(()),
    }
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in state.items()} | text, tmp_path / "all.sft")
    done = single_file.import_checkpoint(tmp_path / "all.sft", str(model_folders["flux2"]), tmp_path / "out")
    assert (done.tally.used, done.tally.lost) == (len(state), 2)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_a_quantized_folder_is_refused_before_any_work(
    component: str, cli: Cli, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folders["flux2"], tmp_path / "model"))
    weights = folder / component / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({key: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for key, t in state.items()}, weights)
    failed(
        cli("convert", folder, "--images", "demo", "-o", tmp_path / "out"),
        "quantized: 8-bit floats (F8_E4M3)",
        component,
    )


def test_one_tensor_under_two_names_is_named(cli: Cli, model_folders: dict[str, Path], tmp_path: Path) -> None:
    save_file(
        {"img_in.weight": FULL, "model.diffusion_model.img_in.weight": FULL.clone()}, tmp_path / "file.safetensors"
    )
    failed(
        cli("import", tmp_path / "file.safetensors", "--config", model_folders["flux2"], "-o", tmp_path / "out"),
        "'model.diffusion_model.img_in.weight' are the same one",
    )


LORA = {
    "transformer.x_embedder.lora_A.weight": torch.zeros(2, 16),
    "transformer.x_embedder.lora_B.weight": torch.zeros(32, 2),
}


def test_files_in_the_wrong_place_are_shown_the_way(
    cli: Cli, model_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    lora, one, base, picture = (
        tmp_path / "style.safetensors",
        tmp_path / "one.sft",
        converted["flux2"],
        tmp_path / "a.png",
    )
    save_file(LORA, lora)
    save_file({"img_in.weight": FULL}, one)
    way, inner = "liftkit import {} --base CONVERTED", model_folders["flux2"] / WEIGHTS
    sample = ("-p", "a", "-n", 1, "-o", picture)
    failed(cli("sample", base, "--adapter", lora, *sample), "LoRA in a single file", way.format(lora))
    failed(cli("sample", lora, *sample), way.format(lora))
    failed(cli("convert", lora, "--images", "demo", "-o", tmp_path / "out"), way.format(lora))
    failed(cli("verify", lora), way.format(lora))
    failed(cli("export", lora, "--format", "adapter", "-o", tmp_path / "out"), way.format(lora))
    code, _, err = cli("finetune", "tiny-klein", f"model={lora}", "-o", tmp_path / "out")
    assert (code, way.format(lora) in err) == (2, True)
    failed(cli("import", one, "--base", base, "-o", tmp_path / "out"), "is a checkpoint", "--config MODEL")
    failed(cli("convert", one, "--images", "demo", "-o", tmp_path / "out"), f"liftkit import {one} --config MODEL")
    failed(
        cli("convert", inner, "--images", "demo", "-o", tmp_path / "out"),
        f"a file of the model {model_folders['flux2']}",
    )
    failed(
        cli("import", tmp_path / "stile.safetensors", "--base", base, "-o", tmp_path / "out"), f"did you mean {lora}?"
    )
    failed(cli("sample", base, "--adapter", tmp_path / "stile.safetensors", *sample), f"did you mean {lora}?")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    failed(
        cli("sample", base, "--adapter", tmp_path / "peft", *sample), "it holds a LoRA", way.format(tmp_path / "peft")
    )
    failed(cli("convert", tmp_path / "peft", "--images", "demo", "-o", tmp_path / "out"), way.format(tmp_path / "peft"))
    save_file({"img_in.oft_blocks": FULL}, lora)
    failed(cli("import", lora, "-o", tmp_path / "out"), "OFT")
    save_file({}, one)
    failed(cli("import", one, "-o", tmp_path / "out"), "it is empty")


NAMES = st.sampled_from(
    ("img_in.weight", "model.diffusion_model.img_in.weight", "joint_blocks.9.x", "vae.x", "a")
) | st.text(max_size=9)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(("F32", "BF16", "F4", "F8_E8M0", "I64", "X"))
        | st.none()
        | st.lists(st.integers(), max_size=1),
        "shape": st.lists(st.integers(-1, 4) | st.just(2**60), max_size=3) | st.text(max_size=2),
        "data_offsets": st.tuples(st.integers(-1, 64), st.integers(-1, 64)) | st.none(),
    }
)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.dictionaries(NAMES, ENTRIES | st.integers(), max_size=3).map(json.dumps).map(str.encode)
    | st.binary(max_size=40),
    payload=st.binary(max_size=64),
    lie=st.integers(-2, 2) | st.just(2**62),
)
def test_any_bytes_are_a_file_or_an_error(header: bytes, payload: bytes, lie: int, tmp_path: Path) -> None:
    """Never another error, a hang or an allocation of what a header promises."""
    path = tmp_path / "file.safetensors"
    path.write_bytes(max(0, len(header) + lie).to_bytes(8, "little") + header + payload)
    for read in (kind_of, misplaced):
        try:
            read(str(path))
        except UsageError as error:
            assert "\n" not in str(error)
            assert str(path) in str(error)
