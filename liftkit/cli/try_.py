"""``liftkit try``: a page on this machine to try models on."""

from __future__ import annotations

from typing import Annotated

from liftkit.checkpoint.files import expanded
from liftkit.cli import console
from liftkit.options import Argument, Device, Option


def try_(
    folders: Annotated[
        list[str],
        Argument("Models to try: latent or converted folders, adapters, Hub ids, or `demo`.", "FOLDER", names="model"),
    ],
    base: Annotated[
        str,
        Option(
            "Latent model that adapters among the folders apply to: a folder, a Hub id, or `demo`.",
            "MODEL",
            names="model",
        ),
    ] = "demo",
    port: Annotated[
        int | None, Option("Port on this machine.", min=1, max=65_535, default="the first free one from 7860")
    ] = None,
    share: Annotated[
        bool, Option("Also make a public address, through Gradio's servers: anyone who has it can use the page.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Try models on a page in the browser.

    Several models stand side by side, from the same noise: give the latent base, its conversion and a finetune. The page
    is served on this machine alone and needs no network; Ctrl-C ends it. It needs Gradio: pip install 'liftkit[try]'.

    Example: liftkit try demo klein-pixel runs/photos/model
    """
    console.first_word(f"reading {', '.join(folders)}")
    from liftkit.checkpoint.folder import RECORD
    from liftkit.checkpoint.model import find_model
    from liftkit.playground.serve import check_gradio, free_port, serve

    check_gradio()
    free = free_port(port)
    # A folder that is no model is found before libraries load, which takes seconds.
    for folder in folders:
        if not (expanded(folder) / RECORD).is_file():
            find_model(folder)

    console.quiet_libraries()
    from liftkit.device import choose_device
    from liftkit.evaluate.entries import open_entry
    from liftkit.playground.shelf import Shelf

    chosen, why = choose_device(device)
    shelf = Shelf([open_entry(folder, base) for folder in folders], chosen)

    def ready(address: str, public: str | None) -> None:
        console.result(address=address, public=public, models=shelf.labels, device=chosen)
        where = f"{address} and {public}, which anyone can open" if public else address
        console.out.print(f"{', '.join(shelf.labels)} ({chosen}: {why}) at {where}; Ctrl-C ends it")

    serve(shelf, free, share, ready)
