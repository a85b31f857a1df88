"""The sections of benchmarks/gpu.py: each measures, and adds rows as it goes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convert
import torch
from _gpu_memory import memory, memory_9b
from _gpu_model import (
    Scale,
    call_arguments,
    compile_options,
    count_flops,
    device,
    fresh,
    latent_transformer,
    peak_gb,
    random_lift,
    rate,
    timed,
)
from _gpu_report import ROOT, Add, Row, one_line, recorded
from _gpu_steps import VARIANTS, finetuning
from torch import Tensor

from liftkit.color import to_signed
from liftkit.data.images import batches as image_batches
from liftkit.finetune.network import compile_blocks
from liftkit.fit.pairs import EncodedImages
from liftkit.fit.stream import Pass, collect
from liftkit.models.latents import LatentSpace
from liftkit.models.surgery import convert_transformer
from liftkit.tally import Tally

SAMPLING_GOAL = 1.02


def run(section: str, scale: Scale, seconds: float, add: Add) -> None:
    """Measure one section.

    Args:
        section: a key of ``BUDGETS``.
        scale: how large models are.
        seconds: that there are; what may not end in time is left out.
        add: takes each row.
    """
    end = time.monotonic() + seconds
    kind, _, side = section.partition("-")
    if kind in ("finetune", "compiled"):
        sides = sorted(scale.resolutions, reverse=True)
        finetuning(section, scale, sides[0 if side == "1024" else 1], end, add, VARIANTS[kind])
    elif kind == "memory":
        (memory_9b if side == "9b" else memory)(scale, end, add)
    else:
        {"tests": gpu_tests, "sampling": sampling, "fit": fit, "convert": conversion}[section](scale, end, add)


def in_turns(rounds: int, one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their quotients, other / one."""
    pairs = [(timed(one), timed(other)) for _ in range(rounds)]
    first, second = (statistics.median(column) for column in zip(*pairs))
    return first, second, statistics.median(b / a for a, b in pairs)


# ------------------------------------------------------------------------------------------------ 1: tests


class Results:
    """A plugin of pytest that makes each test a row when it ends."""

    def __init__(self, add: Add) -> None:
        self.add = add

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        passed = None if report.skipped else report.passed
        text = "" if report.passed else str(report.longrepr[2] if report.skipped else report.longrepr.reprcrash.message)
        name, note = report.nodeid.rpartition("::")[2], f"{report.outcome}: {text}" if text else ""
        self.add(Row("tests", name, ms=1000 * report.duration, goal="passes", met=passed, note=one_line(note)))


def gpu_tests(scale: Scale, end: float, add: Add) -> None:
    """The tests marked ``gpu``."""
    with recorded("tests", "pytest -m gpu", add):
        import pytest

        # Libraries of other versions warn of other things; here that is no failure.
        options = ["-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
        code = pytest.main(
            [str(ROOT / "tests" / "test_gpu.py"), *options, f"--gpu-device={device().type}"], [Results(add)]
        )
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(f"pytest ended with {code!r}")


# ------------------------------------------------------------------------------------------------ 2: sampling


@torch.no_grad()
def sampling(scale: Scale, end: float, add: Add) -> None:
    """A step of the latent transformer and of its pixel twin, one image; then the same, compiled."""
    with recorded("sampling", "plain product", add):
        add(_product(scale))
    side, where = max(scale.resolutions), device()
    flops = count_flops(scale, side).latent
    latent = latent_transformer(scale, where)
    lift = random_lift(scale)
    twin = convert_transformer(latent, lift)
    narrow, wide = (call_arguments(scale, side, size, where, torch.bfloat16) for size in (lift.rank, lift.dim))
    stock_step, pixel_step = lambda: latent(**narrow), lambda: twin(**wide)
    for how in ("eager", "compiled"):
        with recorded("sampling", f"step at {side}, {how}", add):
            begun = time.monotonic()
            if how == "compiled":
                compile_blocks(latent, **compile_options())
                compile_blocks(twin, **compile_options())
            for _ in range(3):
                stock_step()
                pixel_step()
            timed(stock_step)
            note = f"first steps {time.monotonic() - begun:.0f} s" if how == "compiled" else ""
            stock, pixel, ratio = in_turns(4 * scale.rounds, stock_step, pixel_step)
            title = f"step at {side}, {how}"
            add(Row("sampling", f"{title}: latent", ms=1000 * stock, peak_gb=peak_gb(), **rate(flops, stock)))
            goal = {"goal": f"at most {SAMPLING_GOAL}", "met": ratio <= SAMPLING_GOAL}
            measured = {"ms": 1000 * pixel, "ratio": ratio, "peak_gb": peak_gb(), **rate(flops, pixel)}
            add(Row("sampling", f"{title}: pixel twin", **measured, **goal, note=note))


def _product(scale: Scale) -> Row:
    """What a plain product of large matrices reaches on this device: no network does better."""
    side = scale.square
    a, b = torch.randn(2, side, side, device=device()).bfloat16()
    for _ in range(3):
        a @ b
    seconds = statistics.median(timed(lambda: a @ b) for _ in range(10))
    return Row("sampling", f"product of {side} x {side}, bf16", ms=1000 * seconds, **rate(2.0 * side**3, seconds))


# ------------------------------------------------------------------------------------------------ 3: fit, conversion


class RandomImages:
    """Images in memory: see :class:`liftkit.data.images.ImageSource`."""

    def __init__(self, count: int, side: int) -> None:
        self.all, self.tally = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8), Tally("images")

    def __len__(self) -> int:
        return len(self.all)

    def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[tuple[int, Tensor]]:
        for place in which if which is not None else range(len(self)):
            yield place, self.all[place]

    def describe(self) -> dict[str, Any]:
        return {"source": "random numbers"}


def fit(scale: Scale, end: float, add: Add) -> None:
    """The fit's pass beside its floor, the VAE encoding the same images, in float32 as a fit has it."""
    from diffusers import AutoencoderKLFlux2

    side = min(scale.resolutions)
    with recorded("fit", f"pass at {side}", add):
        with device():
            vae = AutoencoderKLFlux2(**scale.vae).eval().requires_grad_(False)
        space, source = LatentSpace(vae), RandomImages(scale.images, side)
        pairs = EncodedImages(space, source, side, 2)

        def encode() -> None:
            for _, images in image_batches(source.images(side, pairs.side), 4):
                space.encode(to_signed(images.to(device())))

        gather = lambda: collect(Pass(pairs, ("oklab",), 2))
        encode()
        gather()
        fresh()
        alone, passed, ratio = in_turns(scale.rounds, encode, gather)
        each = {"images_per_second": len(source) / alone, "peak_gb": peak_gb()}
        add(Row("fit", f"encoding {len(source)} images at {side}", ms=1000 * alone, **each))
        each["images_per_second"] = len(source) / passed
        add(Row("fit", f"pass over {len(source)} images at {side}", ms=1000 * passed, ratio=ratio, **each))


def conversion(scale: Scale, end: float, add: Add) -> None:
    """A conversion of files beside `cp` of them, each in a process of its own."""
    with recorded("convert", scale.conversion, add), tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        source.mkdir()
        make = [sys.executable, convert.__file__, "--role", "make", "--size", scale.conversion, str(source)]
        subprocess.run(make, check=True)
        os.sync()
        size = sum(path.stat().st_size for path in (source / "transformer").iterdir())
        runs: dict[str, list[dict[str, float]]] = {"cp": [], "liftkit convert": []}
        for turn in range(max(scale.rounds - 2, 1) + 1):
            begun = time.monotonic()
            found = {role: convert.measure(role, source, source.with_name("out")) for role in runs}
            took = time.monotonic() - begun
            # The first round brings files and libraries into the cache; it counts where there is no time for another.
            if turn or begun + 2.5 * took > end:
                for role, run in found.items():
                    runs[role].append(run)
            if begun + 2.5 * took > end:
                break
        pairs = list(zip(*([run["seconds"] for run in each] for each in runs.values())))
        ratio = statistics.median(ours / floor for floor, ours in pairs)
        for role, each in runs.items():
            seconds = statistics.median(run["seconds"] for run in each)
            row = Row("convert", f"{role}, {size / 1e9:.2f} GB", ms=1000 * seconds)
            row.note = f"{size / seconds / 1e9:.2f} GB/s"
            if role != "cp":
                row.ratio, row.peak_gb = ratio, max(run["peak"] for run in each) / 1e9
                row.note += "; peak of the process"
            add(row)
