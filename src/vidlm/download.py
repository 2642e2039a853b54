"""Hub repository -> a folder of the hub's cache, in bounded time, with errors that name the cause.

huggingface_hub waits without a limit for some of its answers; here every wait has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from vidlm.errors import HubUnreachable, ModelError, ModelNotFound

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WANTED = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt")
# A subfolder holds another copy of the model (onnx/, original/, checkpoint-500/), not a part.
UNWANTED = ("*/*", *(f"*{suffix}*" for suffix in PICKLES))


@dataclass(frozen=True)
class Wanted:
    """A repository at a revision, None for its main branch; `cached` allows no request."""

    name: str
    revision: str | None = None
    cached: bool = False

    def __str__(self) -> str:
        return f"{self.name!r} at revision {self.revision!r}" if self.revision else repr(self.name)


def snapshot(wanted: Wanted, *, cache_dir: Path | None, token: str | bool | None) -> Path:
    """The folder with the files of one commit. Raises what `vidlm.hub.resolve` says."""
    # Imported here: it costs hundreds of milliseconds, and a local folder needs none of it.
    from huggingface_hub import errors, snapshot_download

    # The transport's own errors (httpx, or a successor of it) without naming it.
    transport_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    try:
        with _bounded_waits():
            folder = snapshot_download(
                wanted.name,
                revision=wanted.revision,
                local_files_only=wanted.cached,
                cache_dir=cache_dir,
                token=token,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            )
    except (OSError, RuntimeError, errors.HFValidationError, transport_error) as error:
        _raise_for_hub(wanted, error)
    return Path(folder)


@contextmanager
def _bounded_waits() -> Iterator[None]:
    """Give every request of the hub library without a timeout that of HF_HUB_ETAG_TIMEOUT.

    `model_info` and the listing of files have none: a server that accepts the connection and never
    answers would hold the process for ever. Requests with a timeout of their own keep it.
    """
    from huggingface_hub import constants, get_session

    seconds = float(constants.HF_HUB_ETAG_TIMEOUT)

    def bound(request: Any) -> None:
        waits = request.extensions.get("timeout") or {}
        limits = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
        given = {kind: wait for kind, wait in waits.items() if wait is not None}
        request.extensions["timeout"] = {**limits, **given}

    hooks = get_session().event_hooks["request"]
    hooks.append(bound)
    try:
        yield
    finally:
        hooks.remove(bound)


def _raise_for_hub(wanted: Wanted, error: Exception) -> NoReturn:
    """Turn an error of the hub library into ours; the most specific of its classes come first."""
    from huggingface_hub import errors

    # The library hides a refused request behind "not in the cache" and keeps it as the cause.
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        raise ModelNotFound(
            f"model {wanted.name!r} is neither a folder nor a valid hub id ({error}); "
            "give an existing folder or an id of the form owner/name"
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise ModelNotFound(
            f"model {wanted.name!r} has no revision {wanted.revision!r}; give a branch, tag or "
            "commit that its page lists, or leave revision out"
        ) from error
    absent = isinstance(cause, errors.RepositoryNotFoundError) or (
        status == 404 and not isinstance(cause, errors.EntryNotFoundError)
    )
    if absent and not isinstance(cause, errors.GatedRepoError):
        raise ModelNotFound(
            f"model {wanted}: no folder of that name here, and no repository on {_endpoint()} that "
            "this account can see; check the spelling, and set HF_TOKEN if the repository is "
            "private"
        ) from error
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        raise ModelError(
            f"the hub gives no access to {wanted} ({_first_line(error)}); accept the licence on "
            "the repository's page if it is gated, and set HF_TOKEN to a token that may read it"
        ) from error
    if isinstance(error, OSError) and error.errno is not None and not _is_network(error):
        raise ModelError(
            f"model {wanted} could not be stored in the cache: {error}; free some space, or point "
            "HF_HOME or cache_dir at a folder that can be written to"
        ) from error
    reason, way_out = _out_of_reach(wanted, error, cause)
    raise HubUnreachable(
        f"model {wanted}: {reason}; {way_out}, pass a folder with its files, or try without "
        "weights: --model demo"
    ) from error


def _out_of_reach(wanted: Wanted, error: Exception, cause: BaseException | None) -> tuple[str, str]:
    """Why the files cannot be had now, and the first thing to do about it."""
    from huggingface_hub import errors

    uncached = isinstance(error, errors.LocalEntryNotFoundError)
    lacking = ", and the local cache does not hold all of its files" if uncached else ""
    if wanted.cached:
        return (
            f"the local cache does not hold all of its files ({_first_line(error)})",
            "leave local_files_only off to download it",
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, so it cannot be downloaded{lacking}",
            "unset HF_HUB_OFFLINE to download it",
        )
    if _is_timeout(cause):
        return (
            f"{_endpoint()} accepts no connection or sends no answer in time "
            f"({_first_line(cause or error)}){lacking}",
            "check the network or HF_ENDPOINT, raise HF_HUB_ETAG_TIMEOUT or "
            "HF_HUB_DOWNLOAD_TIMEOUT (seconds) where it is slow, set HF_HUB_OFFLINE=1 to use what "
            "is cached without asking",
        )
    return (
        f"it cannot be downloaded now from {_endpoint()} ({_first_line(cause or error)}){lacking}",
        "check the network, a proxy and HF_ENDPOINT",
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _is_network(error: OSError) -> bool:
    return isinstance(error, (ConnectionError, TimeoutError))


def _is_timeout(error: BaseException | None) -> bool:
    """Whether it is a timeout of Python's or of the transport's, whose classes end in Timeout."""
    return isinstance(error, TimeoutError) or (
        error is not None
        and any(kind.__name__ == "TimeoutException" for kind in type(error).__mro__)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
