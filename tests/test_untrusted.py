"""Fuzzers of the files that liftkit writes and others may have changed: each is read as it should be, or refused on one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.record import read_record
from liftkit.embedded import TINY_PIXEL
from liftkit.errors import UsageError
from liftkit.fit.folds import FoldedMoments, read_folds, write_folds
from liftkit.fit.job import merge
from liftkit.fit.moments import TokenMoments
from liftkit.lift import Lift
from liftkit.models.adapter import Adapter
from liftkit.options import FitOptions
from liftkit.report.data import Report
from liftkit.report.pages import alignment_page

FAST = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SLOW = settings(FAST, max_examples=4000)
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.just("<script>x</script>"),
    st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
    st.sampled_from([1e300, -1e300, 0, 0.0, -1, float("nan"), float("inf"), [], {}, "\x1b[2J", 10**400]),
)  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lift with all figures and pictures."""
    from liftkit.fit.job import FitJob, prepare, run
    from liftkit.progress import Silent

    path = tmp_path_factory.mktemp("lift") / "lift.safetensors"
    run(prepare(FitJob(("demo",), FitOptions(images="demo", num_images=16, device="cpu"), path)), Silent())
    return path


def one_line(read: Callable[[], Any]) -> Any:
    """What a reader gives, or None where it refuses on one line; anything else that is raised is a fault."""
    try:
        return read()
    except UsageError as error:
        text = str(error)
        assert "\n" not in text, text
        assert len(text) < 1500, text[:300]
        return None


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in plain data."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, child in items:
        found += places(child, (*path, key))
    return found


def changed(value: Any, place: tuple[Any, ...], new: Any, drop: bool) -> Any:
    """Plain data with one place changed, or gone."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if drop:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return copy


def _lift_description(fitted: Path, tmp_path: Path, data: st.DataObject) -> None:
    tensors, text = load_file(fitted), read_header(fitted).metadata["lift"]
    description = json.loads(text)
    place = data.draw(st.sampled_from(places(description)))
    odd = changed(description, place, data.draw(ODD), data.draw(st.booleans()))
    save_file(tensors, tmp_path / "odd.safetensors", {"lift": json.dumps(odd)})
    lift = one_line(lambda: Lift.load(tmp_path / "odd.safetensors"))
    if lift is not None:
        page = alignment_page(Report("odd", lift))
        assert "<script" not in page
        assert "\x1b" not in page
        lift.save(tmp_path / "again.safetensors")


@FAST
@given(st.data())
def test_descriptions_of_lifts(fitted: Path, tmp_path: Path, data: st.DataObject) -> None:
    _lift_description(fitted, tmp_path, data)


@pytest.mark.parametrize("place", ["pictures", "source", "pictures.psnr_vae", "pictures.spread"])
@pytest.mark.parametrize("drop", [True, False])
def test_what_may_be_left_out_of_a_lift_is(place: str, drop: bool, fitted: Path, tmp_path: Path) -> None:
    description = json.loads(read_header(fitted).metadata["lift"])
    odd = changed(description, ("figures", "alignment", *place.split(".")), None, drop)
    save_file(load_file(fitted), tmp_path / "odd.safetensors", {"lift": json.dumps(odd)})
    assert "How well latents and pixels align" in alignment_page(Report("odd", Lift.load(tmp_path / "odd.safetensors")))


@pytest.mark.slow
@settings(SLOW, max_examples=1200)
@given(st.data())
def test_descriptions_of_lifts_for_long(fitted: Path, tmp_path: Path, data: st.DataObject) -> None:
    _lift_description(fitted, tmp_path, data)


DTYPES = [
    torch.int8,
    torch.bool,
    torch.int64,
    torch.uint8,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.float64,
]
BASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rank 0": lambda a: a[:, :0], "no rows": lambda a: a[:0], "a vector": lambda a: a[:, 0], "three axes": lambda a: a[None],
    "rank over D": lambda a: torch.eye(len(a), len(a) + 4), "NaN": lambda a: a * float("nan"), "infinite": lambda a: a / 0,
    "not orthonormal": lambda a: 2 * a, "zero": lambda a: 0 * a, "transposed": lambda a: a.T.contiguous(),
    "scalar": lambda a: a[0, 0],
    "huge": lambda a: a * 1e30, "odd rank": lambda a: a[:, :31], **{str(d): lambda a, d=d: a.to(d) for d in DTYPES[:6]},
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_odd_bases_are_refused(name: str, fitted: Path, tmp_path: Path) -> None:
    tensors = load_file(fitted)
    odd = BASES[name](tensors["basis"]).contiguous()
    save_file({**tensors, "basis": odd}, tmp_path / "odd.safetensors", {"lift": read_header(fitted).metadata["lift"]})
    with pytest.raises(UsageError, match=r"odd\.safetensors: ") as found:
        Lift.load(tmp_path / "odd.safetensors")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "picture",
    [torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.uint8), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)],
)
def test_odd_pictures_are_refused(picture: torch.Tensor, fitted: Path, tmp_path: Path) -> None:
    tensors, metadata = load_file(fitted), {"lift": read_header(fitted).metadata["lift"]}
    save_file({**tensors, "picture.image": picture}, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(UsageError, match="picture 'image'"):
        Lift.load(tmp_path / "odd.safetensors")
    save_file({**tensors, "other": picture}, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(UsageError, match="unknown tensor 'other'"):
        Lift.load(tmp_path / "odd.safetensors")
    save_file(tensors, tmp_path / "odd.safetensors", {"lift": " " * (9 << 20) + metadata["lift"]})
    with pytest.raises(UsageError, match="characters of"):
        Lift.load(tmp_path / "odd.safetensors")


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    found = FoldedMoments(4, 12)
    for index in range(10):
        tokens = torch.randn(1, 9, 12, generator=generator)
        found.update(tokens[..., :4].contiguous(), tokens, torch.tensor([index]))
    path = tmp_path_factory.mktemp("folds") / "m.safetensors"
    write_folds(path, {"oklab": found}, {"part": "1/1", "identity": "x", "latent_patch": "2"})
    found.total.save(path.with_name("total.safetensors"))
    return path


ODD_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8": lambda t: t.to(torch.int8), "float32": lambda t: t.float(), "complex": lambda t: t.to(torch.complex64),

    "NaN": lambda t: t * float("nan"), "infinite": lambda t: t + float("inf"),
    "1e300": lambda t: torch.full_like(t, 10).double() ** 300,
    "negative": lambda t: -t, "empty": lambda t: t.flatten()[:0], "scalar": lambda t: t.flatten()[0], "flat": lambda t: t.flatten(),

    "longer": lambda t: torch.cat([t, t]) if t.ndim else t[None].repeat(2), "transposed": lambda t: t.mT if t.ndim > 1 else t[None],
}  # fmt: skip


@FAST
@given(st.data())
def test_moments(folds: Path, tmp_path: Path, data: st.DataObject) -> None:
    for path in (folds, folds.with_name("total.safetensors")):
        read: Callable[[Path], Any] = read_folds if path is folds else TokenMoments.load
        tensors, metadata = load_file(path), dict(read_header(path).metadata)
        name, kind = data.draw(st.sampled_from(sorted(tensors))), data.draw(st.sampled_from(sorted(ODD_TENSORS)))
        tensors[name] = ODD_TENSORS[kind](tensors[name]).contiguous()
        if data.draw(st.booleans()):
            key = data.draw(st.sampled_from(sorted(metadata)))
            metadata[key] = data.draw(
                st.text(max_size=20) | st.sampled_from(["0", "-1", "9" * 40, "9/8", "0/0", "1/999999"])
            )
        if data.draw(st.booleans()):
            del tensors[data.draw(st.sampled_from(sorted(tensors)))]
        save_file(tensors, tmp_path / "odd.safetensors", metadata)
        one_line(partial(read, tmp_path / "odd.safetensors"))
        if read is read_folds:
            one_line(lambda: merge((tmp_path / "odd.safetensors",), FitOptions()))


def test_sound_moments_are_read(folds: Path) -> None:
    assert (
        read_folds(folds)[0]["oklab"].total.count == TokenMoments.load(folds.with_name("total.safetensors")).count == 90
    )


@FAST
@given(st.data())
def test_records_and_adapters(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    for name in ("adapter.safetensors", "lift.safetensors"):
        if not (folder / name).exists():
            (folder / name).symlink_to(TINY_PIXEL / name)
    record = json.loads((TINY_PIXEL / "liftkit.json").read_text())
    record |= {"source": {"model": "a", "class": "b"}, "proof": None, "finetune": {"recipe": {"trainable": {}}}}
    place = data.draw(st.sampled_from([place for place in places(record) if len(place) < 4]))
    odd = changed(record, place, data.draw(ODD), data.draw(st.booleans()))
    (folder / "liftkit.json").write_text(json.dumps(odd))
    one_line(lambda: read_record(folder))
    one_line(lambda: Adapter.load(folder))


@pytest.mark.parametrize("odd", [torch.tensor([float("nan")]), torch.tensor([1]), torch.tensor([float("inf")])])
def test_numbers_of_adapters_are_finite(odd: torch.Tensor, tmp_path: Path) -> None:
    for name in ("liftkit.json", "lift.safetensors"):
        (tmp_path / name).write_bytes((TINY_PIXEL / name).read_bytes())
    save_file({**load_file(TINY_PIXEL / "adapter.safetensors"), "odd": odd}, tmp_path / "adapter.safetensors")
    with pytest.raises(UsageError, match=r"adapter\.safetensors: tensor 'odd'"):
        Adapter.load(tmp_path)
