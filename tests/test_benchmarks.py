"""benchmarks/gpu.py in tiny shapes on a CPU: every section measures, and nothing that goes wrong ends the others."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its modules: they are scripts side by side, and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # Compilation takes as long as all else; the slow test has it.
    compiled: list[Any] = []
    names = {"main": "gpu", "sections": "_gpu_sections", "model": "_gpu_model", "report": "_gpu_report"}
    names["steps"] = "_gpu_steps"
    found = SimpleNamespace(compiled=compiled, **{key: importlib.import_module(name) for key, name in names.items()})
    monkeypatch.setattr(found.sections, "compile_blocks", lambda model, **options: compiled.append(model))
    monkeypatch.setattr(found.steps, "compile_for_training", lambda model, *_, **options: compiled.append(model))
    return found


def measured(benchmark: SimpleNamespace, section: str, seconds: float = 300) -> list[Any]:
    rows: list[Any] = []
    benchmark.sections.run(section, benchmark.model.TINY, seconds, rows.append)
    return rows


@pytest.mark.parametrize(
    "section", ["sampling", "finetune-1024", "compiled-1024", "fit", pytest.param("convert", marks=pytest.mark.slow)]
)
def test_every_section_measures(section: str, gpu_benchmark: SimpleNamespace) -> None:
    rows = measured(gpu_benchmark, section)
    assert len(rows) >= 2
    assert all(row.section == section and row.ms for row in rows), [row.note for row in rows]
    json.dumps([asdict(row) for row in rows])
    ratios = [row for row in rows if row.ratio is not None]
    assert ratios
    assert len(gpu_benchmark.compiled) == {"sampling": 2, "compiled-1024": 3}.get(section, 0)
    if section.endswith("1024"):
        variants = gpu_benchmark.steps.VARIANTS[section.partition("-")[0]]
        assert [row.what for row in ratios] == [variant.title(16) for variant in variants]
        assert all(row.met == (row.ratio <= 1.02) and row.tflops > 0 and row.images_per_second > 0 for row in ratios)
    if section == "sampling":
        assert [row.what.rpartition(", ")[2] for row in ratios] == ["eager: pixel twin", "compiled: pixel twin"]


@pytest.mark.slow
def test_every_way_to_hold_the_base_has_its_row(gpu_benchmark: SimpleNamespace) -> None:
    rows = measured(gpu_benchmark, "memory")
    names = [row.what.partition("base ")[2] for row in rows]
    assert names[:4] == ["bfloat16", "int8", "nf4", "offload: blocks"]
    for row in (rows[0], rows[3], rows[names.index("bfloat16, float8 reference")]):
        assert row.ms, row.note
        assert row.peak_gb
        assert "estimated" in row.note
    # Where torchao and bitsandbytes are missing, their rows say so.
    assert all(row.ms or row.note for row in rows)


def test_operations_are_those_of_the_products(gpu_benchmark: SimpleNamespace) -> None:
    """klein 4B at 1024: near 6 N D, and no pass without work; twice a forward's attention in the backward."""
    found = gpu_benchmark.model.count_flops(gpu_benchmark.model.Scale(), 1024)
    tokens, hidden, blocks = 64 * 64 + 512, 3072, 25
    attention = 4 * tokens**2 * hidden * blocks
    assert found.tokens == tokens
    assert found.latent == found.reference < found.student < 1.05 * found.latent
    assert 0.9 < found.step / found.rule < 1.1
    assert attention < found.latent
    # Text and image have their own weights in double blocks, so that the rule counts too many products.
    assert 0.7 * found.rule / 3 < found.latent - attention < found.rule / 3
    assert found.backward > found.latent - attention + 2 * attention


def test_the_batch_is_halved_where_memory_ends(gpu_benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    steps = gpu_benchmark.steps._steps

    def full(scale: Any, side: int, batch: int, *more: Any) -> Any:
        tried.append(batch)
        if batch > 1:
            raise torch.cuda.OutOfMemoryError("full")
        return steps(scale, side, batch, *more)

    monkeypatch.setattr(gpu_benchmark.steps, "_steps", full)
    rows = [row for row in measured(gpu_benchmark, "finetune-512") if row.ratio is not None]
    assert tried == [2, 1] * 2
    assert all("batch 1" in row.note for row in rows)


def test_what_goes_wrong_is_a_row_and_what_has_no_time_is_left_out(
    gpu_benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error:\nunspecified launch failure")

    monkeypatch.setattr(gpu_benchmark.steps, "_steps", broken)
    rows = measured(gpu_benchmark, "finetune-512")
    assert [row.note for row in rows] == ["RuntimeError: batch 2: CUDA error: unspecified launch failure"] * 2
    assert [row.note for row in measured(gpu_benchmark, "finetune-512", seconds=-1)] == ["left out: no time"] * 2
    table = gpu_benchmark.report.table(rows).splitlines()
    assert len({len(line) for line in table}) == 1
    assert len(table) == 4


def test_a_section_that_takes_too_long_ends_and_the_next_ones_follow(
    gpu_benchmark: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "gpu.py"
    script.write_text(
        "import sys, time\n"
        "name, rows = sys.argv[2], sys.argv[4]\n"
        'open(rows, "a").write(\'{"section": "%s", "what": "first", "ms": 1.0}\\n\' % name)\n'
        "time.sleep(60) if name == 'fit' else sys.exit('broken' if name == 'convert' else 0)\n"
    )
    monkeypatch.setattr(gpu_benchmark.main, "__file__", str(script))
    gpu_benchmark.main.measure(["fit", "sampling", "convert"], 6.0, True, tmp_path / "gpu.json")
    record = json.loads((tmp_path / "gpu.json").read_text())
    found = [(row["section"], row["what"], row["note"]) for row in record["rows"]]
    assert found == [
        ("fit", "first", ""),
        ("fit", "the rest", f"not done within {6 * 35 / 165:.0f} s"),
        ("sampling", "first", ""),
        ("convert", "first", ""),
        ("convert", "the rest", "exit code 1: broken"),
    ]
    assert record["machine"]["torch"] == torch.__version__
    assert "exit code 1: broken" in capsys.readouterr().out


def test_a_step_is_profiled(
    gpu_benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("gpu_profile")
    monkeypatch.setattr(module, "SHOWN", 1000)
    monkeypatch.setattr(sys, "argv", ["gpu_profile.py", "--batch", "2", "--float8"])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("networks ")
    assert lines[1].endswith(" ms of operations")
    # The reference's products alone are in float8.
    assert any("aten::_scaled_mm" in line for line in lines)
    assert any("aten::mm" in line or "aten::addmm" in line for line in lines)


@pytest.mark.slow
def test_the_whole_command_runs_tiny(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--seconds", "900"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "gpu.json")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    wrong = [row for row in record["rows"] if row["ms"] is None or (row["goal"] == "passes" and row["met"] is False)]
    # Where torchao and bitsandbytes are missing, rows of memory say so.
    assert not [row for row in wrong if "is not installed" not in row["note"]]
    assert {row["section"] for row in record["rows"]} == {
        "tests", "sampling", "finetune-1024", "compiled-1024", "finetune-512", "compiled-512", "memory",
        "memory-9b", "fit", "convert"
    }  # fmt: skip
    assert "| section" in done.stdout


def test_the_table_of_all_benchmarks_says_what_is_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("_table")
    rows = [
        module.Row("convert / cp", 2.0, 1.9, "s", 1.05, 1.0, at_least=True),
        module.Row("a step / its networks", 1.0, 1.2, "s", 1.2, 1.1, note="1 thread"),
        module.Row("first word", None, 0.3, "s", 0.3, 0.5),
    ]
    lines = module.table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns stand below each other"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["what", "floor", "ours", "ratio", "goal", "", "note"]
    assert [row[5] for row in cells[2:]] == ["met", "MISSED", "met"]
    assert cells[2][4] == "at least 1"
    assert cells[4] == ["first word", "", "0.3 s", "", "at most 0.5 s", "met", ""]
    module.finish(rows, tmp_path / "rows.json")
    assert "MISSED" in capsys.readouterr().out
    assert module.read(tmp_path / "rows.json") == rows
    module.save(rows, module.machine(), tmp_path / "results" / "cpu.json")
    found = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert [row["met"] for row in found["rows"]] == [True, False, True]
    assert found["versions"].keys() >= {"torch", "blake3", "python"}
    assert found.keys() >= {"commit", "processor", "processors", "memory", "date", "load"}


def test_a_benchmark_that_fails_or_hangs_is_named_and_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("benchmarks.__main__")
    good = '[{"what": "w", "floor": 2.0, "ours": 3.0, "unit": "s", "ratio": 1.5, "goal": 1.1, "note": ""}]'
    write = f"import sys; open(sys.argv[sys.argv.index('--rows') + 1], 'w').write({good!r})"
    for name, text in {
        "breaks": "import sys; sys.exit(3)",
        "hangs": "import time; time.sleep(60)",
        "works": write,
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(bench, "QUICK", {"breaks": [], "hangs": [], "works": []})
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "PATIENCE", 3)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results" / "cpu.json")
    assert bench.measure() == 1
    said = capsys.readouterr().out
    assert "| w    | 2 s   | 3 s  | 1.500 | at most 1.1 | MISSED |" in said
    assert "not measured: breaks, which ended with 3" in said
    assert "not measured: hangs, which took more than 3 seconds" in said
    kept = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert [row["met"] for row in kept["rows"]] == [False]
    assert kept["failed"].keys() == {"breaks", "hangs"}
    assert kept["versions"]["torch"] == torch.__version__
