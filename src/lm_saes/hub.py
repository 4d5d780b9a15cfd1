"""The Hugging Face hub: folders fetched from it and put there, and what its many ways of saying no mean for a user, in one line each.

Only configurations and weights are fetched, and nothing in them is run. Tokens are the hub client's business (HF_TOKEN, `hf auth login`) and are never written anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import errors as hub

from lm_saes.errors import LanguageModelError, LmSaesError

_REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<folder>[\w.-]+(/[\w.-]+)*))?")


def split_name(name: str) -> tuple[str, str] | None:
    """`org/repo` and the folder of `"org/repo:folder"` (empty without one); `None` where the name cannot be one on the hub, or is meant as a
    local path: absolute, relative with dots, or beside things that exist here."""
    match = _REPOSITORY.fullmatch(name)
    if match is None or name.startswith(".") or ".." in name or (":" not in name and Path(name).parent.is_dir()):
        return None
    return match["repo"], match["folder"] or ""


def fetch(name: str, files: Sequence[str], what: str, error: type[LmSaesError], token: str | None = None) -> Path:
    """The local folder with `files` of `"org/repo:folder"`, downloaded into the hub client's cache if need be.

    Raises:
        error: there is no such repository, it is gated, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    parts = split_name(name)
    assert parts is not None
    repo, folder = parts
    patterns = [f"{folder}/{file}" if folder else file for file in files]
    try:
        snapshot = snapshot_download(repo, allow_patterns=patterns, token=token)
    except Exception as failure:  # the client raises errors of several trees; all of them are said in one line
        raise explain(failure, repo, what, error) from None
    return Path(snapshot) / folder


def upload(source: Path, repo_id: str, folder: str, token: str | None, private: bool, error: type[LmSaesError]) -> None:
    """Put the files of a local folder at `folder` of a repository, which is made if need be.

    Raises:
        error: the token is missing or not allowed to, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=source, path_in_repo=folder or ".")
    except Exception as failure:  # as in `fetch`
        raise explain(failure, repo_id, "the repository", error) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException, name: str, what: str, kind: type[LmSaesError] = LanguageModelError) -> LmSaesError:
    """The error that says why `what` ("the model", "the tokenizer") of `name` could not be loaded, and what to do about it."""
    causes = list(_causes(error))
    page = f"https://huggingface.co/{name}"

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return kind(f"{name} brings its own code; read it at {page} and set trust_remote_code=True if you trust it")
    if Path(name).is_dir():
        return kind(f"the folder {name} does not hold {what} that can be loaded: {message}")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        return kind(f"there is no folder {name}; give a folder that holds {what}, a name on the hub such as 'gpt2', or 'demo'")
    if any_of(hub.GatedRepoError):
        return kind(f"{name} is gated: ask for access at {page}, then pass your token (HF_TOKEN=... or `hf auth login`)")
    if any_of(hub.RevisionNotFoundError):
        return kind(f"{name} has no such revision; the branches and tags it has are at {page}/tree/main")
    if any_of(hub.RepositoryNotFoundError, hub.HFValidationError):
        return kind(f"no repository '{name}' at {page} and no such folder; if it is private, pass a token (HF_TOKEN=... or `hf auth login`)")
    if any_of(hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, ConnectionError) or "couldn't connect" in message.lower():
        return kind(
            f"{what} of {name} is not in the local cache and the hub ({page}) was not reached: go online "
            "(HF_HUB_OFFLINE unset, local_files_only=False) or give the path of a folder"
        )
    return kind(f"cannot load {what} of {name} ({page}): {message}")
