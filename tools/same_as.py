"""Compare what two revisions compute: ``python -m tools.same_as REV`` prints a table and exits with 1 at a difference.

The same commands run with the code of REV, checked out into a temporary git worktree, and with the working tree, on the
same inputs, seeds, recipe (REV's) and python environment. A key of recipes that is younger than REV and whose default computes
something else is given to the working tree alone: ``--set objective.reference_below=0``. Compared are

* the SHA-256 of every weight file and configuration that ``convert``, ``export``, ``import`` and ``finetune`` write,
* the losses of each of 16 steps of a finetune,
* every figure of ``fit``, ``verify`` and ``sample``,
* the names and types of all keys in every ``--json`` answer.

What only the working tree has (a new key, a new file) is counted, and is no difference.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 16
FIT = "--num-images 32 --seed 3 --device cpu"
FINETUNE = (
    f"finetune RECIPE model=klein steps={STEPS} batch_size=4 threads=1 precision=no data.workers=0 validation.every=8 "
    "previews.every=0 checkpoints.every=8 trackers=[] optimizer.warmup=2 ema.start=1"
)
LINES = {
    "convert klein": f"convert KLEIN --images demo {FIT} -o klein",
    "convert klein, adapter": "convert KLEIN --lift klein/lift.safetensors --save adapter -o adapter",
    "convert klein, authors' colors": "convert KLEIN --latents normal --color oklab-paper --proof projections "
    f"{FIT} -o paper",
    "convert sd3": f"convert SD3 --images IMAGES --dtype bfloat16 {FIT} -o sd3",
    "fit": f"fit KLEIN --images demo --scale lsq {FIT} -o lift.safetensors",
    "fit, jacobian": f"fit KLEIN --images demo --kind jacobian {FIT} -o jacobian.safetensors",
    "verify": "verify klein --source KLEIN",
    "verify sd3": "verify sd3 --source SD3",
    "report": "report klein",
    "finetune": f"{FINETUNE} -o run",
    "finetune, lora": f"{FINETUNE} trainable.mode=lora save=adapter -o lora",
    "finetune, dry run": f"{FINETUNE} -o dry --dry-run",
    "sample": "sample run/model -p 'a red 3' -n 2 --steps 4 --seed 1 --device cpu -o a.png",
    "sample, adapter": "sample KLEIN --adapter lora/adapter -p 'a 7' --steps 4 --device cpu -o b.png",
    "export": "export paper --format asymflow-adapter --base KLEIN -o exported",
    "import": "import exported --base KLEIN -o imported",
    "clean": "clean run --dry-run",
}
COMMANDS = {name: shlex.split(line) for name, line in LINES.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare what REV and the working tree compute.")
    parser.add_argument("revision", help="the git revision to compare the working tree with")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="commands whose name begins with one of these words"
    )
    parser.add_argument(
        "--reuse", action="store_true", help="take the measurement of REV from build/same_as if it is there"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe for the working tree's finetunes"
    )
    arguments = parser.parse_args()
    names = [name for name in COMMANDS if not arguments.only or name.startswith(tuple(arguments.only))]
    sha = _git("rev-parse", "--verify", f"{arguments.revision}^{{commit}}")
    tool = hashlib.sha256(Path(__file__).read_bytes() + repr(names).encode()).hexdigest()[:8]
    kept = ROOT / "build" / "same_as" / f"{sha}-{tool}.json"
    with tempfile.TemporaryDirectory(prefix="same-as-") as folder:
        inputs = _inputs(kept.parent / "inputs", sha)
        if arguments.reuse and kept.is_file():
            before = json.loads(kept.read_text(encoding="utf-8"))
        else:
            with _checkout(sha, Path(folder) / "revision") as tree:
                before = _measure(tree, inputs, names, Path(folder) / "work")
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(before), encoding="utf-8")
        after = _measure(ROOT, inputs, names, Path(folder) / "work", arguments.set)
    return _table(sha[:7], before, after)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _checkout(sha: str, folder: Path) -> Iterator[Path]:
    _git("worktree", "add", "--detach", str(folder), sha)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _inputs(folder: Path, sha: str) -> dict[str, str]:
    """What both revisions read, by the word that stands for it in the commands; always in the same place, for a lift keeps the
    path of its images."""
    sys.path.insert(0, str(ROOT))
    import torch

    from tests import tiny

    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(_git("show", f"{sha}:recipes/tiny-klein.yaml"), encoding="utf-8")
    return {
        "RECIPE": str(recipe),
        "KLEIN": str(ROOT / "liftkit" / "assets" / "tiny-klein"),
        "SD3": str(tiny.save(tiny.sd3_pipeline(), folder / "sd3")),
        "IMAGES": str(_images(folder / "images")),
    }


def _images(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(40):
        small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((20, 16 + index % 3 * 4), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


def _measure(
    tree: Path, inputs: dict[str, str], names: list[str], work: Path, keys: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Run the commands with the code in ``tree``, in a process of its own and in a folder that is always called the same."""
    with tempfile.TemporaryDirectory(prefix="same-as-job-") as jobs:
        job = {
            "inputs": inputs,
            "names": names,
            "keys": list(keys),
            "tree": str(tree),
        }
        (Path(jobs) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        work.mkdir()
        try:
            command = [sys.executable, str(Path(__file__).resolve()), "--job", str(Path(jobs) / "job.json")]
            subprocess.run(command, check=True, cwd=work, env=environment)
        finally:
            work.rename(work.with_name(f"work-{tree.name}"))
        return json.loads((Path(jobs) / "job.json").read_text(encoding="utf-8"))


def _run_job(path: Path) -> None:
    """The other process: run every command, and write what it made over the job's file."""
    job = json.loads(path.read_text(encoding="utf-8"))
    # The folder of this script came first on the path; its neighbors are no part of what is measured.
    sys.path.pop(0)
    import torch

    import liftkit
    from liftkit.cli import app

    if not Path(liftkit.__file__).is_relative_to(job["tree"]):
        raise SystemExit(f"the code of {job['tree']} was to be measured, and {liftkit.__file__} was imported")
    torch.set_num_threads(1)
    found = {}
    for name in job["names"]:
        print(f"  {Path(job['tree']).name}: {name}", file=sys.stderr, flush=True)
        before = set(Path().rglob("*"))
        words = COMMANDS[name] + (job["keys"] if name.startswith("finetune") else [])
        code, answer = _run(app.run, [job["inputs"].get(word, word) for word in words])
        found[name] = {"exit code": {"code": code}, "json keys": _schema(answer)}
        if name.startswith(("fit", "verify")) or code:
            found[name]["figures"] = _figures(answer)
        # The names of cached files are drawn; what they serve is in the losses.
        made = sorted(file for file in set(Path().rglob("*")) - before if file.is_file() and "cache" not in file.parts)
        found[name]["files"] = {str(file): digest for file in made if (digest := _digest(file))}
        if losses := [row for file in made if file.name == "log.jsonl" for row in _losses(file)]:
            found[name]["losses"] = {str(index): row for index, row in enumerate(losses)}
    path.write_text(json.dumps({name: parts for name, parts in found.items() if parts}), encoding="utf-8")


def _run(program: Any, arguments: list[str]) -> tuple[int, Any]:
    sys.argv = ["liftkit", "--json" if arguments[0] != "report" else "-q", *arguments]
    if arguments[0] == "report":
        sys.argv += ["--json", "report.json"]
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            program()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    text = Path("report.json").read_text(encoding="utf-8") if arguments[0] == "report" else out.getvalue()
    return code, json.loads(text)


def _schema(value: Any, at: str = "") -> dict[str, str]:
    """The type of every key, by its path; a list counts as its first element."""
    if isinstance(value, dict):
        return {path: kind for key, inner in value.items() for path, kind in _schema(inner, f"{at}.{key}").items()}
    if isinstance(value, list):
        return _schema(value[0], f"{at}[]") if value else {f"{at}[]": "empty"}
    return {at: type(value).__name__}


def _figures(value: Any, at: str = "") -> dict[str, Any]:
    """Every value, by its path, apart from places of files."""
    if isinstance(value, dict):
        pairs = [
            (f"{at}.{key}", inner)
            for key, inner in value.items()
            if key not in ("seconds", "output", "folder", "versions")
        ]
    elif isinstance(value, list):
        pairs = [(f"{at}[{index}]", inner) for index, inner in enumerate(value)]
    else:
        return {at: value}
    return {path: figure for where, inner in pairs for path, figure in _figures(inner, where).items()}


def _digest(file: Path) -> str | None:
    """The digest of weights, pictures and configurations; other files carry times and versions."""
    if file.suffix not in (".safetensors", ".png") and not file.name.endswith(("config.json", "index.json")):
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _losses(file: Path) -> list[dict[str, Any]]:
    """Each line of a run's log without what the machine's speed decides."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    timed = ("time", "second", "per_", "memory", "flops", "eta")
    return [{key: value for key, value in row.items() if not any(word in key for word in timed)} for row in rows]


def _table(sha: str, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> int:
    """Print one row for each command and part, and what differs below; 1 if anything does."""
    failed = 0
    print(f"{'command':32} {'compared':12} {'number':>6}  {sha} and the working tree")
    for name in before:
        for part in {**before[name], **after[name]}:
            old, new = before[name].get(part, {}), after[name].get(part, {})
            differing = [key for key in old if old[key] != new.get(key, "missing")]
            added = [key for key in new if key not in old]
            failed += bool(differing)
            verdict = f"{len(differing)} differ" if differing else "equal"
            print(f"{name:32} {part:12} {len(old):6}  {verdict}{f', {len(added)} more' if added else ''}")
            for key in differing[:8]:
                print(f"    {key}: {str(old.get(key, 'missing'))[:90]} -> {str(new.get(key, 'missing'))[:90]}")
    print(f"{failed} rows differ" if failed else "everything is equal")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        _run_job(Path(sys.argv[2]))
    else:
        raise SystemExit(main())
