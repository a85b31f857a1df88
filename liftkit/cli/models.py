"""``liftkit models``: what is supported, and what was proved of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from liftkit.cli import console

if TYPE_CHECKING:
    from liftkit.models.catalog import Supported


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="CLASS",
            help="Transformer class of diffusers, to see all that is known of it.",
            show_default="all of them",
        ),
    ] = None,
) -> None:
    """List the models that can be converted, with proofs.

    Models are named by the class of their transformer; each has its pipelines, its VAE and r / P / D: the numbers in a latent
    token, the side of a pixel token, the numbers in it. Proofs were made on tiny random models of each class: Theorem 1 on the
    transformer alone (bare), through the stock pipeline with plain guidance (pipeline), and a short finetune (finetune).

    Example: liftkit models FluxTransformer2DModel
    """
    from liftkit.models.catalog import catalog, supported

    found = catalog() if name is None else [supported(name)]
    console.result(models=[each.to_dict() for each in found])
    if name is not None:
        console.table(found[0].name, _rows(found[0]))
        return
    console.table(
        f"{len(found)} transformer classes: r / P / D, VAE, proofs", [(each.name, _line(each)) for each in found]
    )
    console.out.print("liftkit models CLASS says more of one")


def _line(each: Supported) -> str:
    return ", ".join([each.size, *([each.vae] if each.vae else []), " + ".join(each.proved) or "not proved"])


def _rows(each: Supported) -> list[tuple[str, str]]:
    rows = [
        ("pipelines", ", ".join(each.pipelines) or "none in diffusers"),
        ("VAE", each.vae or "unknown"),
        ("r / P / D", f"{each.size}: numbers in a latent token, side of a pixel token, numbers in it"),
    ]
    rows += [(f"proved: {proof}", how) for proof, how in each.proved.items()]
    return rows + [(f"not proved: {proof}", why) for proof, why in each.missing.items()]
