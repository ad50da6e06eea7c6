"""Hub errors: converts exceptions of the Hub's client into a CapsuleError that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CapsuleError
from .read import CONFIG_FILE

DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (
    HFValidationError,
    *(e for e in HfHubHTTPError.__bases__ if issubclass(e, Exception)),
)
UPLOAD_ERRORS: tuple[type[Exception], ...] = (RuntimeError, ValueError, *DOWNLOAD_ERRORS)


@contextmanager
def download_errors(name: str, revision: str | None) -> Iterator[None]:
    """Convert exceptions of a download into a CapsuleError that says what to do."""
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except CapsuleError:
        raise
    except GatedRepoError as error:
        raise CapsuleError(
            f"{name} is gated: ask for access at {constants.ENDPOINT}/{name}, then log in with `hf auth login` or set"
            " HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise CapsuleError(
            f"no capsule {name!r}: there is no such directory here, no shipped capsule of that name, and no such"
            f" repository on the Hub ({constants.ENDPOINT}) that you can see. Check the name; if it is private, log in"
            " with `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise CapsuleError(
            f"the repository {name} on the Hub has no revision {revision!r}: give a branch, tag or commit of it."
        ) from error
    except LocalEntryNotFoundError as error:
        cause = f"the Hub ({constants.ENDPOINT}) gave no usable answer ({_one_line(error.__cause__ or error)})"
        reason = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else cause
        raise CapsuleError(
            f"no capsule {name!r}{at}: there is no such directory here, it is not wholly in this machine's cache, and"
            f" {reason}. Load it once with a connection, or name a directory."
        ) from error
    except EntryNotFoundError as error:
        raise CapsuleError(
            f"the repository {name} on the Hub is not a capsule{at}: it has no {CONFIG_FILE}."
        ) from error
    except DOWNLOAD_ERRORS as error:
        raise CapsuleError(
            f"cannot download {name}{at} from the Hub ({constants.ENDPOINT}): {_one_line(error)}"
        ) from error


@contextmanager
def upload_errors(repo_id: str) -> Iterator[None]:
    """Convert exceptions of an upload into a CapsuleError that says what to do."""
    try:
        yield
    except CapsuleError:
        raise
    except LocalTokenNotFoundError as error:
        raise CapsuleError(
            f"cannot push to {repo_id}: you are not logged in. Run `hf auth login` or set HF_TOKEN."
        ) from error
    except UPLOAD_ERRORS as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise CapsuleError(
                f"cannot push to {repo_id}: the Hub ({constants.ENDPOINT}) does not let you write there (HTTP"
                f" {status}). Log in with `hf auth login` or set HF_TOKEN, with a token that may write to this"
                " organisation or user."
            ) from error
        raise CapsuleError(f"cannot push to {repo_id} on the Hub ({constants.ENDPOINT}): {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
