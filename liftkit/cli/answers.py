"""What ``--json`` says, command by command: the keys of the object, and how the larger values are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liftkit.conversion.plan import Plan
    from liftkit.conversion.result import Conversion

ALWAYS = {
    "command": "that ran, such as `recipes list`; null if there was none",
    "ok": "whether the exit code is 0",
    "error": "what went wrong, a line each; only if `ok` is false",
    "exit_code": "of the program; only if `ok` is false",
}
REPORT = "the object of docs/report.md"
PUSHED = "address of the Hub repository; only with --push"
FOLDER = "the folder that was made"
TALLIES = (
    "accounts of images, lines of metadata and caption files: a list of `what`, `found`, `used`, `left_out` (a list of `reason`, "
    "`count`, `examples`) and `remarks` (of `remark`, `count`, `examples`)"
)
PLAN = (
    "what is to be done: `model`, `class`, `pipeline`, `output`, `rank`, `dim`, `patch_size`, `latent_patch`, `options` as they "
    "were resolved, `reasons` of automatic choices, `rewritten` (shapes by tensor name), `kept` (number of tensors), "
    "`transformer_bytes`, `needed_bytes`, `parts` (bytes by what takes them), `proof` (where it runs)"
)
CONVERTED = {
    "plan": PLAN,
    "output": FOLDER,
    "report": f"{REPORT}, with the proof",
    "tallies": TALLIES,
}
COMPARED = {"comparison": "the object of docs/compare.md"}

KEYS: dict[str, dict[str, str]] = {
    "convert": {"dry_run": "whether nothing was written; then there is the plan alone", **CONVERTED, "pushed": PUSHED},
    "fit": {
        "output": "the file that was written: the lift, or with --moments-out the moments",
        "report": f"{REPORT}; not with --moments-out",
        "images": "number of images",
        "resumed": "those of them that an interrupted run had seen",
        "tallies": TALLIES,
    },
    "init": {
        "output": "the folder that was made",
        "rank": "of the model",
        "dim": "numbers in a token",
        "parameters": "of the network",
    },
    "verify": {
        "folder": "that was looked at",
        "checks": "a list of `name`, `ok`, `detail` and `problems`, a list of lines",
    },
    "report": {
        "report": REPORT,
        "other": "the same of --compare; null without",
        "angles": "principal angles to the other's subspace in degrees, rising; null without, or where they have none",
    },
    "compare": COMPARED,
    "finetune": {
        "dry_run": "whether nothing was trained; then there are recipe and estimate alone",
        "recipe": "as it was resolved; only with --dry-run",
        "estimate": "the tables that --dry-run prints: by title, text by row; only with --dry-run",
        "output": "the run folder",
        "result": "the folder that was made; null if training was stopped",
        "stopped": "whether training was stopped before its last step (exit code 130)",
        "step": "steps done in all",
        "steps": "steps of the recipe",
        "seconds": "of this session",
        "seconds_per_step": "without validation, previews and checkpoints; null if there was no step",
        "images_per_second": "likewise",
        "tflops": "likewise; null where they were not counted",
        "peak_memory": "bytes: of the GPU, or of the process",
        "tallies": TALLIES,
        "pushed": PUSHED,
    },
    "clean": {
        "run": "its folder",
        "dry_run": "whether nothing was deleted",
        "files": "the files that were deleted, or would be",
        "bytes": "of them",
    },
    "sample": {
        "output": "the picture, or the folder of pictures",
        "files": "every picture that was written, the sheet last",
        "count": "number of images",
        "prompts": "of each image",
        "seeds": "of each image",
        "device": "that was taken",
    },
    "generate": {
        "output": "the dataset folder",
        "new": "number of images made by this run",
        "found": "number of images that an earlier run had made",
        "device": "that was taken",
    },
    "try": {
        "address": "of the page on this machine; the object is printed when the page has ended",
        "public": "its public address; null without --share",
        "models": "what the models were called",
        "device": "that was taken",
    },
    "import": {
        "kind": "`adapter`, `lora` or `checkpoint`",
        "output": "the folder that was made; for a LoRA, the file",
        "tally": "of a LoRA's keys or a checkpoint's tensors: `what`, `found`, `used`, and `left_out`, a list of `reason`, `count` "
        "and `examples`; not for an adapter",
        "pushed": PUSHED,
    },
    "export": {
        "format": "as --format",
        "output": FOLDER,
        "unknown_to_comfyui": "LoRA modules that ComfyUI's strict port does not know; for the authors' format alone",
        "pushed": PUSHED,
    },
    "demo": {
        **CONVERTED,
        **COMPARED,
        "finetuned": "the folder that was finetuned here; null with --quick",
        "picture": "the picture",
        "page": "the page",
    },
    "models": {
        "models": "a list of `name`, `pipelines`, `vae`, `rank`, `patch`, `dim`, `proved` (how) and `missing` (why not), by proof"
    },
    "doctor": {
        "liftkit": "version",
        "python": "version",
        "platform": "operating system and processor",
        "packages": "versions by name; null for one that is needed and not installed",
        "optional": "the same of what liftkit can use",
        "devices": "a list of `device`, `name`, `memory` and `free` (bytes or null), `compute` (of a CUDA device, or null)",
        "device": "what --device auto takes; null if torch is missing",
        "memory": "`total` and `available`, bytes",
        "disk": "for `here` and the Hub's `cache`: `path`, `free`, `total` (bytes), `writable`",
        "hub": "`cache` (a path), `offline`, `token` (where one is set; null if none is)",
        "threads": "`cpus`, `usable`, `torch`, `OMP_NUM_THREADS`",
        "problems": "a list of lines; empty if liftkit has all that it needs",
        "notes": "a list of lines",
    },
    "recipes list": {"recipes": "a list of `name`, `summary`, `path`"},
    "recipes show": {"name": "of the recipe", "path": "its file", "text": "its content"},
    "recipes copy": {"name": "of the recipe", "path": "the new file"},
}
"""Keys of the object beside those of :data:`ALWAYS`, and what they mean; after a failure some may be missing."""


def conversion_data(result: Conversion) -> dict[str, Any]:
    """What a conversion found, as plain data."""
    from liftkit.report.data import read_report

    report = read_report(result.output).to_dict()
    return {"output": result.output, "report": report, "tallies": [tally.to_json() for tally in result.tallies]}


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "model": plan.model.source,
        "class": plan.spec.name,
        "pipeline": plan.model.index["_class_name"],
        "output": plan.output,
        "rank": plan.rank,
        "dim": plan.dim,
        "patch_size": plan.side,
        "latent_patch": plan.latent_patch,
        "options": vars(plan.options),
        "reasons": plan.reasons,
        "rewritten": {name: list(entry.shape) for name, entry in plan.rewritten.items()},
        "kept": plan.kept,
        "transformer_bytes": plan.transformer_bytes,
        "needed_bytes": plan.needed_bytes,
        "parts": plan.parts,
        "proof": plan.proof,
        "limits": plan.limits,
        "files": plan.left_out.to_json(),
    }
