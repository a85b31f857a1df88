"""The proof on the projections alone, and numbers that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import liftkit
from liftkit.checkpoint import parts
from liftkit.checkpoint.rewrite import torch_dtype
from liftkit.errors import ProofError, UsageError
from liftkit.models import surgery
from tests.big_models import Cli, convert, manifest, shards, spoil

__all__ = ["shards"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_two_proofs_agree(
    dtype: str, architecture: str, model_folders: dict[str, Path], lift_file: Path, tmp_path: Path
) -> None:
    on = {
        kind: convert(model_folders[architecture], tmp_path / kind, lift_file, proof=kind, dtype=dtype).proof
        for kind in ("model", "projections")
    }
    assert on["projections"].exact < 1e-5
    assert on["model"].exact < 1e-4
    assert {proof.dtype for proof in on.values()} == {"float32" if dtype == "auto" else "bfloat16"}
    if dtype == "bfloat16":
        assert 1e-4 < on["projections"].stored < 1e-1
    for name in ("transformer", "latent", "lift.safetensors"):
        same = [manifest(tmp_path / kind) for kind in on]
        assert {k: v for k, v in same[0].items() if k.startswith(name)} == {
            k: v for k, v in same[1].items() if k.startswith(name)
        }


def turned(weight: torch.Tensor, basis: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (basis.flip(0) @ weight.reshape(weight.shape[0], -1).double()).reshape(-1, *weight.shape[1:]).to(dtype)


@pytest.mark.parametrize("where", ["product", "order", "scale", "basis"])
def test_wrong_surgery_fails_the_proof_on_the_projections(
    where: str,
    architecture: str,
    model_folders: dict[str, Path],
    lift_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mistakes that the surgery makes consistently, so that comparing stored tensors with products finds nothing."""
    honest = surgery.token_order
    if where == "product":
        monkeypatch.setattr(surgery, "lift_output", turned)
    elif where == "order":
        monkeypatch.setattr(surgery, "token_order", lambda c, p, order, fold=1: honest(c, p, order, fold).flip(0))
    elif where == "scale":
        monkeypatch.setattr(surgery, "lift_input", lambda w, b, d: 1.01 * w.new_tensor(1.0) * _input(w, b, d))
    else:
        monkeypatch.setattr(surgery, "native_basis", lambda lift, order: lift.basis.double().roll(1, 0))
    with pytest.raises(ProofError, match="the proof failed"):
        convert(model_folders[architecture], tmp_path / "out", lift_file)
    assert not (tmp_path / "out").exists()


_input = surgery.lift_input


def test_blocks_of_a_product_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = torch.linalg.qr(torch.randn(48, 16, dtype=torch.float64))[0]
    wide, conv = torch.randn(70, 16), torch.randn(70, 4, 2, 2)
    whole = [surgery.lift_input(each, basis) for each in (wide, conv)] + [surgery.lift_output(wide.T, basis)]
    monkeypatch.setattr(surgery, "ROWS", 32)
    parts = [surgery.lift_input(each, basis) for each in (wide, conv)] + [surgery.lift_output(wide.T, basis)]
    assert [each.shape for each in parts] == [(70, 48), (70, 12, 2, 2), (48, 70)]
    for one, other in zip(whole, parts):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert surgery.lift_output(torch.randn(16), basis, torch.bfloat16).dtype == torch.bfloat16
    torch.testing.assert_close(whole[0].double(), wide.double() @ basis.T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["x_embedder.weight", "proj_out.weight"])
def test_projections_that_are_not_finite_are_named_before_anything_is_done(
    name: str, value: float, cli: Cli, shards: Path, lift_file: Path, tmp_path: Path
) -> None:
    where = spoil(shards, name, (3, 2), value)
    code, _, err = cli("convert", shards, "--lift", lift_file, "-o", tmp_path / "out", "--dry-run")
    assert code == 2
    assert f"{where}: tensor '{name}': 1 of" in err
    assert "NaN or infinite" in err


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_other_tensors_that_are_not_finite_are_found_on_the_way(
    value: float, cli: Cli, shards: Path, lift_file: Path, tmp_path: Path
) -> None:
    name = "transformer_blocks.0.ff.linear_in.weight"
    where = spoil(shards, name, (-1, -1), value)
    code, _, err = cli("convert", shards, "--lift", lift_file, "-o", tmp_path / "out", "--proof", "projections")
    assert code == 2
    assert f"transformer/{where}: tensor '{name}' holds NaN or infinite numbers" in err
    assert not list(tmp_path.glob("*out*"))


def test_copying_finds_them_where_no_fit_comes_before_it(
    shards: Path, lift_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liftkit.conversion.plan.check_files", lambda headers: pytest.fail("read twice"))
    name = "transformer_blocks.0.ff.linear_in.weight"
    where = spoil(shards, name, (-1, -1), float("nan"))
    with pytest.raises(UsageError, match=f"transformer/{where}: tensor '{name}' holds NaN or infinite numbers"):
        liftkit.convert(str(shards), tmp_path / "out", lift=lift_file, device="cpu", proof="projections")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
def test_every_pattern_of_bits_is_known_for_finite_or_not(dtype: str) -> None:
    kind = torch_dtype(dtype)
    size = kind.itemsize
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (4096, size), dtype=torch.uint8, generator=generator)
    # Random exponents are rarely the highest: set all of their bits in half of the elements.
    raw[::2, -2:] |= torch.tensor([0xF0, 0x7F], dtype=torch.uint8)[-min(size, 2) :]
    numbers = raw.flatten().view(kind)
    expected = numbers.double().isfinite()
    assert 0 < expected.sum() < len(expected)
    data = raw.numpy().tobytes()
    found = [parts.is_finite(memoryview(data)[i * size : (i + 1) * size], dtype) for i in range(len(expected))]
    assert found == expected.tolist()
    kept = raw[expected].numpy().tobytes()
    assert parts.is_finite(memoryview(kept), dtype)
    assert parts.is_finite(memoryview(data), "I8")


@pytest.mark.parametrize(
    ("name", "said"), [("norm_out.linear.weight", "holds 1e+10"), ("x_embedder.weight", "can hold")]
)
def test_numbers_that_the_wanted_dtype_cannot_hold_are_named(
    name: str, said: str, cli: Cli, shards: Path, lift_file: Path, tmp_path: Path
) -> None:
    spoil(shards, name, 3, 1e10)
    arguments = (
        "convert",
        shards,
        "--lift",
        lift_file,
        "-o",
        tmp_path / "out",
        "--proof",
        "projections",
        "--device",
        "cpu",
    )
    code, _, err = cli(*arguments, "--dtype", "float16")
    assert code == 2
    assert f"tensor '{name}'" in err
    assert said in err
    assert "bfloat16 or float32" in err
    assert not (tmp_path / "out").exists()
    assert cli(*arguments, "--dtype", "float32")[0] == 0
