"""Publishing a folder on the Hub: only when asked for, private unless asked otherwise, by huggingface_hub's own client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liftkit.checkpoint.files import reason
from liftkit.checkpoint.folder import tree_size
from liftkit.checkpoint.model import hub_errors
from liftkit.errors import LiftkitError, UsageError
from liftkit.progress import Observer, Silent


def check_push(repo: str, private: bool = True) -> None:
    """Raise, before any work is done, unless a folder could be pushed. Nothing is sent but the question.

    Args:
        repo: ``organization/name``, or a name of one's own.
        private: whether it is meant to be.

    Raises:
        UsageError: if the name will not do, there is no token, the client is offline, or a public repository is there
            already though a private one is meant.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push {repo}: no name of a Hub repository ({reason(error)})") from error
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"--push {repo}: HF_HUB_OFFLINE is set; unset it to push")
    if get_token() is None:
        raise UsageError(f"--push {repo}: no token; set HF_TOKEN to one that may write, or run: hf auth login")
    _check_visibility(repo, private)


def push(folder: str | Path, repo: str, private: bool = True, observer: Observer | None = None) -> str:
    """Push a folder, with the model card that is in it, to a model repository of the Hub; it is made if need be.

    Args:
        folder: what to push, whole.
        repo: see :func:`check_push`.
        private: make the repository private.
        observer: shows the progress.

    Returns:
        The address of the repository.

    Raises:
        UsageError: see :func:`check_push`; or there is no such folder, or no card in it.
        LiftkitError: if the Hub refuses; the folder stays as it is.
    """
    place, observer = Path(folder), observer or Silent()
    if not (place / "README.md").is_file():
        raise UsageError(f"{folder}: no model card (README.md) in it; push a folder that liftkit made")
    check_push(repo, private)
    size = tree_size(place)
    with observer.stage(f"push: {repo}", size, "bytes") as advance, _plain_errors(repo, place):
        api = _api()
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=place, repo_id=made.repo_id, commit_message="Made with liftkit")
        advance(size)
    return str(made)


def _check_visibility(repo: str, private: bool) -> None:
    """Raise if a private push would end in a public repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    api = _api()
    with _plain_errors(repo):
        name = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
        try:
            public = not api.model_info(name).private
        except RepositoryNotFoundError:
            return
    if public and private:
        raise UsageError(f"--push {repo}: this repository is public; pass --public to publish there, or choose another")


def _api() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi()


@contextmanager
def _plain_errors(repo: str, folder: Path | None = None) -> Iterator[None]:
    """Whatever the client raises, on one line."""
    try:
        yield
    except hub_errors() as error:
        after = f"; {folder} stays as it is, and goes by: hf upload {repo} {folder}" if folder else ""
        raise LiftkitError(f"--push {repo}: the Hub did not do it ({reason(error)}){after}") from error
