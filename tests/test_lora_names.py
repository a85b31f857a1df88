"""Keys of LoRA files: what is read, named or left out, whatever they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from liftkit.errors import UsageError
from tests.converting import failed
from tests.lora_runs import ALPHA, IMAGE, QUERY, A, B, Cli, rand


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({A: None}, "has no lora_A.weight"),
        ({B: None}, "has no lora_B.weight"),
        ({A: None, B: None, ALPHA: torch.tensor(1.0)}, "alpha has no LoRA"),
        ({A: rand(3, 32)}, "ranks differ"),
        ({A: rand(0, 32), B: rand(32, 0)}, "are 0"),
        ({A: rand(2, 31)}, "expected to take 32 numbers, found 31"),
        ({A: torch.full((2, 32), math.inf)}, "NaN or infinite"),
        ({A: torch.ones(2, 32, dtype=torch.int64)}, "dtype int64"),
        ({A: torch.ones(64)}, "expected a matrix"),
        ({ALPHA: torch.tensor(0.0)}, "alpha is 0"),
        ({ALPHA: torch.tensor(math.nan)}, "alpha is nan"),
        ({ALPHA: torch.ones(3)}, "alpha should be one number"),
        (
            {
                f"diffusion_model.{QUERY}.lora_down.weight": rand(2, 32),
                f"diffusion_model.{QUERY}.lora_up.weight": rand(32, 2),
            },
            "which is meant?",
        ),
        ({A.replace(".weight", ".default.weight"): rand(2, 32)}, "same part twice"),
        ({f"transformer.{QUERY}.hada_w1_a": rand(32, 2)}, "both LoRA and LoHa"),
        ({"transformer.x_embedder.hada_w1_a": rand(32, 2)}, "a LoHa without hada_w1_b"),
        ({"transformer.x_embedder.lokr_w1": rand(4, 2)}, "a LoKr has lokr_w2"),
        ({f"transformer.{QUERY}.oft_blocks": rand(4, 8, 8)}, "OFT"),
        ({f"transformer.{QUERY}.ia3_l": rand(32)}, "IA3"),
        ({f"transformer.{QUERY}.lora_mid.weight": rand(2, 2, 3, 3)}, "Tucker"),
        ({"transformer.transformer_blocks.0.attn.norm_q.diff": rand(16)}, "not in this transformer"),
        ({"transformer.x_embedder.diff": rand(32)}, "cannot be in a LoRA file"),
        ({"transformer.proj_out.weight": rand(16, 32)}, "whole weights (modules_to_save)"),
        ({"something.else": rand(2)}, "no part of a LoRA"),
        (
            {"lora_unet_double_blocks_7_img_attn_qkv.lora_down.weight": rand(2, 32)},
            "1 of 2 modules are not in this transformer",
        ),
    ],
)
def test_what_cannot_be_is_named(
    changes: dict[str, Tensor | None], expected: str, cli: Cli, converted: dict[str, Path], tmp_path: Path
) -> None:
    state: dict[str, Tensor | None] = {A: rand(2, 32), B: rand(32, 2), **changes}
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "style.safetensors")
    output = tmp_path / "out.safetensors"
    failed(
        cli("import", tmp_path / "style.safetensors", "--base", converted["flux2"], "-o", output),
        "style.safetensors",
        expected,
    )
    assert not output.exists()


def test_what_is_left_out_is_counted(cli: Cli, converted: dict[str, Path], tmp_path: Path) -> None:
    extra = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": rand(2, 3),
        "bundle_emb.cat.string_to_param.*": rand(1, 3),
    }
    save_file({A: rand(2, 32), B: rand(32, 2), **extra}, tmp_path / "style.safetensors")
    output = tmp_path / "out.safetensors"
    code, out, err = cli("--json", "import", tmp_path / "style.safetensors", "--base", converted["flux2"], "-o", output)
    assert code == 0, err
    tally = json.loads(out)["tally"]
    assert (tally["found"], tally["used"], [each["count"] for each in tally["left_out"]]) == (4, 2, [1, 1])
    assert "2 of 4 keys used" in err
    save_file(extra, tmp_path / "style.safetensors")
    failed(
        cli("import", tmp_path / "style.safetensors", "--base", converted["flux2"], "-o", tmp_path / "no.safetensors"),
        "nothing here is for the transformer",
        "lora_te1",
    )


STEMS = (
    QUERY,
    f"transformer.{QUERY}",
    f"lora_unet_{IMAGE.replace('.', '_')}",
    f"diffusion_model.{IMAGE}",
    "x_embedder",
    "proj_out",
    "lora_te1_x",
    "text_encoder.x",
    "\x1b[31m",
    "",
)
ENDS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_down.weight",
    "lora_up.weight",
    "alpha",
    "dora_scale",
    "diff",
    "diff_b",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "lokr_w1",
    "lokr_w2_a",
    "lokr_w2_b",
    "lora_B.bias",
    "weight",
    "oft_blocks",
)
SHAPES = ((), (1,), (32,), (2, 32), (32, 2), (96, 2), (2, 16), (16, 2), (0, 32), (2, 32, 1, 1), (32, 1), (32, 32))
KEYS = st.tuples(st.sampled_from(STEMS), st.sampled_from(ENDS)).map(".".join) | st.text(min_size=1, max_size=20)
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value, dtype=torch.float32).to(dtype),
    st.sampled_from(SHAPES),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.bool)),
    st.sampled_from((0.0, 1.0, -0.5, math.nan)),
)
METADATA = (
    st.none()
    | st.text(max_size=30)
    | st.dictionaries(
        st.sampled_from(("transformer.r", "transformer.lora_alpha", "transformer.rank_pattern", "r")),
        st.integers(-3, 3) | st.text(max_size=3) | st.none() | st.floats(),
    ).map(json.dumps)
)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(KEYS, TENSORS, min_size=1, max_size=6), metadata=METADATA)
def test_any_set_of_keys_is_read_or_named(
    state: dict[str, Tensor], metadata: str | None, converted: dict[str, Path], tmp_path: Path
) -> None:
    """Never another error, and never an output after one."""
    from liftkit.formats.lora import import_lora

    output = tmp_path / "out.safetensors"
    output.unlink(missing_ok=True)
    save_file(state, tmp_path / "style.safetensors", None if metadata is None else {"lora_adapter_metadata": metadata})
    try:
        done = import_lora(tmp_path / "style.safetensors", str(converted["flux2"]), output)
    except UsageError as error:
        assert not output.exists()
        assert "\x1b" not in str(error)
        assert "\n" not in str(error)
    else:
        assert done.tally.found == len(state)
        assert done.modules
        assert all(tensor.isfinite().all() for tensor in load_file(output).values())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(key=st.text(max_size=60) | KEYS | st.tuples(KEYS, KEYS).map(".".join))
def test_any_name_is_a_part_or_is_none(key: str) -> None:
    from liftkit.checkpoint.contents import kinds_of_change, part_of
    from liftkit.checkpoint.header import shown

    part: Any = part_of(key)
    assert part is None or (key.startswith(part.stem) and part.stem)
    assert isinstance(kinds_of_change([key]), list)
    assert "\n" not in shown(key)


def test_a_lora_that_changes_nothing_is_noted(converted: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    rows, columns = 32, 32
    state = {
        f"transformer.{QUERY}.lora_A.weight": rand(2, columns),
        f"transformer.{QUERY}.lora_B.weight": rand(rows, 2),
    }
    for name, factor in (("trained", 1.0), ("fresh", 0.0)):
        state[f"transformer.{QUERY}.lora_B.weight"] *= factor
        save_file(state, tmp_path / f"{name}.safetensors")
        source, output = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-out.safetensors"
        code, out, err = cli("import", source, "--base", converted["flux2"], "-o", output)
        assert code == 0, err
        assert ("this LoRA changes nothing" in out + err) == (name == "fresh")
