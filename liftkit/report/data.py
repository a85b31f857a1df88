"""A report as data: what ``alignment.json`` holds, with a stable schema (docs/report.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftkit.checkpoint.record import read_record
from liftkit.errors import UsageError
from liftkit.lift import Lift

SCHEMA = "liftkit.alignment/1"


@dataclass(frozen=True)
class Report:
    """A lift and what is known of it.

    Args:
        name: of the model, or of the lift's file.
        lift: with its figures and pictures.
        proof: of the conversion, where there was one.
        provenance: versions, options and source, where they are known.
    """

    name: str
    lift: Lift
    proof: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None

    @property
    def alignment(self) -> dict[str, Any] | None:
        """The figures of the fit, or None for a lift without (of free rank, or imported)."""
        return self.lift.figures.get("alignment")

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the schema of docs/report.md."""
        lift = self.lift
        return {
            "schema": SCHEMA,
            "name": self.name,
            "rank": lift.rank,
            "dim": lift.dim,
            "patch_size": lift.patch_size,
            "latent_patch": lift.latent_patch,
            "scale": lift.scale,
            "space": lift.space,
            "color": lift.color.to_dict() if lift.space == "pixel" else None,
            "fit": {key: value for key, value in lift.figures.items() if key != "alignment"},
            "alignment": self.alignment,
            "proof": self.proof,
            "provenance": self.provenance,
        }


def read_report(path: str | Path) -> Report:
    """The report of a converted folder or of a saved lift.

    Raises:
        UsageError: if it is neither.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "lift.safetensors").is_file():
            raise UsageError(
                f"{path}: no converted folder: lift.safetensors is missing; give what liftkit convert made"
            )
        lift = Lift.load(path / "lift.safetensors")
        record = read_record(path)
        provenance: dict[str, Any] = {key: record[key] for key in ("source", "options", "versions") if key in record}
        return Report(path.resolve().name, lift, record.get("proof"), provenance or None)
    return Report(path.stem, Lift.load(path))


@dataclass(frozen=True)
class PictureRow:
    """One way to see the images, each figure as text with its spread over folds; empty where there is none.

    Args:
        name: of the row, as in ``alignment.pictures``.
        psnr: in dB, against the image.
        psnr_vae: in dB, against the VAE's own reconstruction.
        patch_grid: the patch-grid ratio.
    """

    name: str
    psnr: str
    psnr_vae: str
    patch_grid: str


def picture_rows(pictures: dict[str, Any]) -> list[PictureRow]:
    """The figures of ``alignment.pictures``, row by row. Lifts of earlier versions lack spreads and ``psnr_vae``."""

    def shown(figure: str, name: str, digits: int, unit: str = "") -> str:
        value = (pictures.get(figure) or {}).get(name)
        spread = (pictures.get("spread") or {}).get(figure, {}).get(name)
        if value is None:
            return ""
        return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "") + unit

    return [
        PictureRow(name, shown("psnr", name, 1, " dB"), shown("psnr_vae", name, 1, " dB"), shown("patch_grid", name, 2))
        for name in pictures["patch_grid"]
    ]


SIDE_BY_SIDE = (
    "energy_captured", "r2_pixels", "r2_pixels_linear", "r2_latents", "cosine", "scale_gap",
)  # fmt: skip


def compare(a: Report, b: Report) -> dict[str, Any]:
    """Two lifts side by side.

    Returns:
        ``rows`` of (name, value of a, value of b) as text, and ``angles``, the principal angles between their
        subspaces in degrees, rising; None where their pixel tokens are not of the same size and color space.
    """
    from liftkit.lift import principal_angles

    rows = [
        ("kind", str(a.lift.figures.get("kind")), str(b.lift.figures.get("kind"))),
        ("space", a.lift.space, b.lift.space),
        ("color", *(each.lift.color.name if each.lift.space == "pixel" else "none" for each in (a, b))),
        ("rank", str(a.lift.rank), str(b.lift.rank)),
        ("scale", f"{a.lift.scale:.4f}", f"{b.lift.scale:.4f}"),
    ]
    if a.alignment and b.alignment:
        first, second = a.alignment["figures"], b.alignment["figures"]
        rows += [(name, f"{first[name]['value']:.4f}", f"{second[name]['value']:.4f}") for name in SIDE_BY_SIDE]
        rows.append(("verdict", a.alignment["verdict"]["level"], b.alignment["verdict"]["level"]))
    spaces = [(each.lift.dim, each.lift.space, each.lift.color.name) for each in (a, b)]
    same = spaces[0] == spaces[1]
    return {"rows": rows, "angles": principal_angles(a.lift.basis, b.lift.basis) if same else None}
