"""What liftkit supports, and what was proved of each: a list that the project's own suite makes, plus what others registered.

The list is a file, ``assets/models.json``, written by ``python -m tools.model_table`` from the specimens of the conformance suite,
so that it names what the suite tests and nothing else. It can be read without torch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from liftkit.embedded import ASSETS
from liftkit.errors import UsageError
from liftkit.models import GROUP

if TYPE_CHECKING:
    from liftkit.models.spec import Architecture

FILE = ASSETS / "models.json"
PROOFS = ("bare", "pipeline", "finetune")
"""Of Theorem 1 on the transformer alone, of it through a stock pipeline with guidance, and of a short finetune."""


@dataclass(frozen=True)
class Supported:
    """One class of transformers.

    Args:
        name: the stock class of diffusers.
        pipelines: stock pipelines that run the pixel twin.
        vae: class of the autoencoder that its released models have; None where diffusers has no pipeline for it.
        rank: r, numbers in a latent token of the released models; None if registered from outside.
        patch: P, side of a pixel token.
        dim: D = 3 P^2, numbers in a pixel token.
        proved: how each of :data:`PROOFS` was shown, by name; a proof that is missing was not made.
        missing: why a proof was not made, by name.
    """

    name: str
    pipelines: tuple[str, ...] = ()
    vae: str | None = None
    rank: int | None = None
    patch: int | None = None
    dim: int | None = None
    proved: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """``r / P / D``."""
        return "unknown" if self.rank is None else f"{self.rank} / {self.patch} / {self.dim}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "pipelines": list(self.pipelines)}


def catalog() -> list[Supported]:
    """All supported classes, by name: those of the list, then those registered from outside, of which nothing is proved."""
    listed = {each["name"]: each for each in json.loads(FILE.read_text(encoding="utf-8"))}
    found = [Supported(**{**each, "pipelines": tuple(each["pipelines"])}) for each in listed.values()]
    outside = [spec for name, spec in _registered().items() if name not in listed]
    reason = dict.fromkeys(PROOFS, "registered from outside of liftkit")
    return sorted(found, key=lambda each: each.name) + [
        Supported(spec.name, pipelines=spec.pipelines, missing=reason) for spec in outside
    ]


def _registered() -> dict[str, Architecture]:
    """Architectures that may be others': none, without torch, where no package brings one and nobody registered any."""
    if "liftkit.models.registry" not in sys.modules and not entry_points(group=GROUP):
        return {}
    from liftkit.models.registry import architectures

    return architectures()


def supported(name: str) -> Supported:
    """One class, by its name, which may be that of its pixel twin.

    Raises:
        UsageError: if it is not supported; names the nearest, and where to read how one is added.
    """
    known = {each.name: each for each in catalog()}
    found = known.get(name) or known.get(name.removeprefix("Asym"))
    if found is None:
        from liftkit.models.registry import unknown

        raise UsageError(unknown(name, known))
    return found
