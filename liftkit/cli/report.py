"""``liftkit report``: read how well latents and pixels align."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from liftkit.cli import console
from liftkit.cli.convert import lift_rows
from liftkit.options import Argument, ReportOptions

if TYPE_CHECKING:
    from liftkit.report.data import Report


def report(
    path: Annotated[Path, Argument("Converted folder, or a lift (.safetensors).", "FOLDER", names="path")],
    *,
    options: ReportOptions,
) -> None:
    """Show how well latents and pixels align.

    There is a verdict, there are figures, and a page with pictures.

    Example: liftkit report klein-pixel --html report.html
    """
    console.first_word(f"reading {path}")
    console.hold_report(options.html, options.json)
    from liftkit.report.data import read_report
    from liftkit.report.pages import alignment_page

    found = read_report(path)
    other = read_report(options.compare) if options.compare is not None else None
    console.result(report=found.to_dict(), other=other and other.to_dict(), angles=None)
    _print(found)
    if other is not None:
        _print_comparison(found, other)
    console.write_report(options.html, lambda: alignment_page(found, other), options.json, found.to_dict())


def _print(found: Report) -> None:
    console.table(found.name, lift_rows(found.lift))
    if found.alignment is None:
        console.note("this lift carries no figures of alignment: it was imported, or is a subspace of free rank")
        return
    rows = [
        (name, f"{entry['value']:.4f} ± {entry['spread']:.4f} held out, {entry['fitted']:.4f} fitted")
        for name, entry in found.alignment["figures"].items()
    ]
    angles = found.alignment["angles"]
    rows.append(("angle to PCA", f"{angles['pca_energy']:.2f} degrees, weighted by energy"))
    rows.append(
        ("angle of halves", f"{angles['halves_energy']:.2f} degrees of subspaces, {angles['halves_lift']:.2f} of maps")
    )
    console.table("Figures", rows)
    if found.alignment["pictures"]:
        from liftkit.report.data import picture_rows

        pictures = found.alignment["pictures"]
        shown = [
            (
                row.name,
                (f"{row.psnr}, " if row.psnr else "")
                + (f"{row.psnr_vae} against the VAE, " if row.psnr_vae else "")
                + f"patch-grid ratio {row.patch_grid}",
            )
            for row in picture_rows(pictures)
        ]
        console.table(f"Pictures ({pictures['count']}, held out)", shown)
    if found.proof:
        console.table("Proof", [("deviation", f"{found.proof['exact']:.1e}, {found.proof['stored']:.1e} as stored")])


def _print_comparison(found: Report, other: Report) -> None:
    from liftkit.report.data import compare

    result = compare(found, other)
    console.result(angles=result["angles"])
    rows = [(name, f"{first}  |  {second}") for name, first, second in result["rows"]]
    if result["angles"]:
        rows.append(("subspaces apart", f"{result['angles'][0]:.1f} to {result['angles'][-1]:.1f} degrees"))
    console.table(f"{found.name}  |  {other.name}", rows)
