"""What the hub's many ways of saying no mean for a user, in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import errors as hub

from lm_saes.errors import LanguageModelError


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException, name: str, what: str) -> LanguageModelError:
    """The error that says why `what` ("the model", "the tokenizer") of `name` could not be loaded, and what to do about it."""
    causes = list(_causes(error))
    page = f"https://huggingface.co/{name}"

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return LanguageModelError(f"{name} brings its own code; read it at {page} and set trust_remote_code=True if you trust it")
    if Path(name).is_dir():
        return LanguageModelError(f"the folder {name} does not hold {what} that can be loaded: {message}")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        return LanguageModelError(f"there is no folder {name}; give a folder that holds {what}, a name on the hub such as 'gpt2', or 'demo'")
    if any_of(hub.GatedRepoError):
        return LanguageModelError(f"{name} is gated: ask for access at {page}, then pass your token (HF_TOKEN=... or `hf auth login`)")
    if any_of(hub.RevisionNotFoundError):
        return LanguageModelError(f"{name} has no such revision; the branches and tags it has are at {page}/tree/main")
    if any_of(hub.RepositoryNotFoundError, hub.HFValidationError):
        return LanguageModelError(f"no model '{name}' at {page} and no such folder; if it is private, pass a token (HF_TOKEN=... or `hf auth login`)")
    if any_of(hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, ConnectionError) or "couldn't connect" in message.lower():
        return LanguageModelError(
            f"{what} of {name} is not in the local cache and the hub ({page}) was not reached: go online "
            "(HF_HUB_OFFLINE unset, local_files_only=False) or give the path of a folder"
        )
    return LanguageModelError(f"cannot load {what} of {name} ({page}): {message}")
