"""Serve the page on this machine, and on no other unless asked."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liftkit.errors import LiftkitError, UsageError
from liftkit.interrupt import stopped_by

if TYPE_CHECKING:
    from liftkit.playground.shelf import Shelf

HOST, PORT, MORE = "127.0.0.1", 7860, 100
"""Where it is served, the first port that is tried, and how many after it."""
MISSING = "gradio, which the page is made with, is not installed; pip install 'liftkit[try]'"


def check_gradio() -> None:
    """Raise unless the page can be made.

    Raises:
        UsageError: if Gradio is missing.
    """
    # Read while it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if find_spec("gradio") is None:
        raise UsageError(f"liftkit try: {MISSING}")


def free_port(wanted: int | None) -> int:
    """The port that is wanted, or the first free one.

    Raises:
        UsageError: if it is in use.
        LiftkitError: if there is no free one.
    """
    for port in [wanted] if wanted is not None else range(PORT, PORT + MORE):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                if wanted is not None:
                    raise UsageError(
                        f"--port {port}: cannot be used ({error.strerror}); take another, or leave it out for a free one"
                    ) from error
            else:
                return port
    raise LiftkitError(
        f"the ports {PORT} to {PORT + MORE - 1} are all in use; end what uses them, or give another --port"
    )


def serve(shelf: Shelf, port: int, share: bool, ready: Callable[[str, str | None], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        shelf: the models.
        port: a free one, see :func:`free_port`.
        share: make a public address for it too, through Gradio's servers.
        ready: called with the address here, and the public one.

    Raises:
        LiftkitError: if it cannot be served or shared.
    """
    check_gradio()
    with tempfile.TemporaryDirectory(prefix="liftkit-try-") as folder:
        # Pictures and uploads lie here, and Gradio copies nothing elsewhere.
        os.environ["GRADIO_TEMP_DIR"] = folder
        served, address, public = launch(shelf, port, share, Path(folder))
        try:
            if share and not public:
                raise LiftkitError(
                    "--share: no public address could be made; is the network reachable? The page works without"
                )
            ready(address, public)
            threading.Event().wait()
        except KeyboardInterrupt as end:
            # Ctrl-C is how a page ends; other signals end the program as they end any.
            if stopped_by(end) not in (None, signal.SIGINT):
                raise
        finally:
            served.close(verbose=False)


def launch(shelf: Shelf, port: int, share: bool, folder: Path) -> tuple[Any, str, str | None]:
    """The running page, its address and its public one; for arguments see :func:`serve`."""
    from liftkit.playground.layout import style, theme
    from liftkit.playground.page import Page

    page = Page(shelf, folder).blocks
    page.queue(default_concurrency_limit=1, max_size=16)
    try:
        _, address, public = page.launch(
            server_name=HOST,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            inline=False,
            inbrowser=False,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            theme=theme(),
            css=style(),
        )
    except OSError as error:
        raise LiftkitError(f"the page cannot be served on {HOST}:{port} ({error})") from error
    return page, address, public
