"""How strong a LoRA is where its tensors do not say: peft's ``adapter_config.json``, and the copy of it that diffusers puts
into a file's metadata.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liftkit.checkpoint.header import no_duplicates, shown
from liftkit.checkpoint.model import read_json
from liftkit.errors import UsageError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
METADATA = "lora_adapter_metadata"
_KINDS = ("LORA", "LOHA", "LOKR")
# These change the base weights when they begin, so that B A alone is not what was learned.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "mica", "lora_ga")
_SAFE_PATTERN = re.compile(r"(?:[\w.^$\\*+\[\]|(-]|\(\?:|\)(?![*+]))+")


@dataclass(frozen=True)
class Strength:
    """Ranks and alphas of one config.

    Args:
        where: what to call the config in messages.
        rank: of modules without one of their own.
        alpha: likewise.
        ranks: by pattern of module.
        alphas: likewise.
        rslora: whether alpha is divided by the root of the rank.
        loads: whether peft can make its modules of the config: without the names of its targets it cannot.
    """

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    loads: bool = False

    def scale(self, module: str, rank: int | None = None) -> float:
        """What a module's product is multiplied by.

        Args:
            module: its name in the file, without peft's prefix.
            rank: of its tensors; None where they do not show it.

        Raises:
            UsageError: if the config has another rank for it.
        """
        stated = self.ranks.get(_pattern(self.ranks, module), self.rank)
        if rank is not None and stated != rank:
            raise UsageError(
                f"{self.where}: rank {stated} for module {shown(module)}, its tensors have {rank}; do the files belong together?"
            )
        alpha = self.alphas.get(_pattern(self.alphas, module), self.alpha)
        return alpha / (math.sqrt(stated) if self.rslora else stated)


def folder_strength(path: Path, *, dora: bool) -> Strength:
    """That of ``adapter_config.json``.

    Args:
        path: of the config.
        dora: whether the weights beside it have magnitudes.

    Raises:
        UsageError: if it is no config of a LoRA, LoHa or LoKr that can be read without its trainer.
    """
    config = read_json(path)
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind not in _KINDS:
        raise UsageError(
            f"{path}: {shown(kind, 40)}, not LoRA: liftkit reads LoRA, LoHa, LoKr and differences; merge it with peft first"
        )
    if config.get("use_dora") and not dora:
        raise UsageError(f"{path}: use_dora is set, the weights beside it have no magnitudes; are the files complete?")
    begins = str(config.get("init_lora_weights", "")).lower()
    if begins.startswith(_CHANGES_BASE):
        raise UsageError(
            f"{path}: init_lora_weights is {shown(begins, 40)}, which changes the base weights as well; convert it to "
            "a plain LoRA with peft (path_initial_model_for_weight_conversion) first"
        )
    if config.get("bias", "none") != "none":
        raise UsageError(f"{path}: bias is {shown(str(config['bias']), 40)}: trained biases cannot be in a LoRA file")
    return _strength(str(path), config, "alpha" if kind != "LORA" and "alpha" in config else "lora_alpha")


def metadata_strength(path: Path, metadata: Mapping[str, str]) -> dict[str, Strength]:
    """Those of a file's metadata as diffusers writes them, by component; empty if there are none.

    Raises:
        UsageError: if they cannot be read.
    """
    if METADATA not in metadata:
        return {}
    where = f"{path}: metadata {METADATA}"
    try:
        content = json.loads(metadata[METADATA], object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no valid JSON ({error}); save the LoRA again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{where}: expected a JSON object, found {type(content).__name__}; save the LoRA again")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, dot, name = key.partition(".")
        parts.setdefault(component if dot else "transformer", {})[name if dot else key] = value
    return {component: _strength(where, config, "lora_alpha") for component, config in parts.items() if config}


def _strength(where: str, config: Mapping[str, Any], alpha: str) -> Strength:
    def number(key: str, value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
        if not good or not math.isfinite(value):
            raise UsageError(f"{where}: {key} should be a number, found {shown(str(value), 40)}")
        return float(value)

    def rank(key: str, value: Any) -> int:
        if number(key, value) != int(value) or value < 1:
            raise UsageError(f"{where}: {key} should be a whole number from 1, found {value}")
        return int(value)

    def table(key: str, read: Any) -> dict[str, Any]:
        found = config.get(key) or {}
        if not isinstance(found, dict):
            raise UsageError(f"{where}: {key} should be a table, found {type(found).__name__}")
        for pattern in found:
            _check_pattern(where, key, pattern)
        return {pattern: read(f"{key}[{shown(pattern, 60)}]", value) for pattern, value in found.items()}

    return Strength(
        where=where,
        rank=rank("r", config.get("r", 8)),
        alpha=number(alpha, config.get(alpha, 8)),
        ranks=table("rank_pattern", rank),
        alphas=table("alpha_pattern", number),
        rslora=bool(config.get("use_rslora", False)),
        loads=bool(config.get("target_modules")),
    )


def _check_pattern(where: str, key: str, pattern: str) -> None:
    """Raise unless a pattern can be searched for in no time, whoever wrote it."""
    try:
        fine = len(pattern) <= 200 and _SAFE_PATTERN.fullmatch(pattern) and sum(map(pattern.count, "*+")) <= 2
        re.compile(pattern)
    except re.error:
        fine = None
    if not fine:
        raise UsageError(f"{where}: {key} has a pattern that is no name of modules, {shown(pattern, 60)}")


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that names a module, as peft finds it: the end of the name, from a dot on."""
    return next((each for each in patterns if re.match(rf"(.*\.)?({each})$", module)), module)
