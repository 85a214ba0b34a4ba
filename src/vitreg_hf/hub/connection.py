# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The connection to the Hub: how long it may be silent, who is asking, and what a failure is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import _http, validate_repo_id

# The Hub's client waits for ever by default. It repeats most of what fails five times.
SECONDS_OF_SILENCE = 60.0
# RuntimeError is what uploads wrap failures in; ValueError and KeyError come of answers that are none of the Hub's.
_FAILURES = (OSError, HTTPError, RuntimeError, ValueError, KeyError)


class PublishError(ConnectionError):
    """The Hub refused something or the connection to it failed; the message says what was done and what to do."""


@dataclass(frozen=True)
class Account:
    """Who a token belongs to.

    Attributes:
        name: of the user or organisation.
        namespaces: where it may have repositories: its own name and those of its organisations.
    """

    name: str
    namespaces: tuple[str, ...]


@contextmanager
def hub_connection(seconds: float) -> Iterator[None]:
    """While the block runs, the Hub's client gives up waiting for an answer after some seconds without a byte.

    Raises:
        ValueError: for a time that is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"Expected a positive number of seconds to wait for the Hub, got {seconds}")
    before: Any = _http._GLOBAL_CLIENT_FACTORY  # no public function gives it, and a program may have set its own

    def limit(request: Any) -> None:
        # not as the client's own timeout, which some calls of the library override with none
        given = request.extensions.get("timeout", {})
        limits = {kind: given.get(kind) or seconds for kind in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": limits}

    def limited() -> Any:
        client = before()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks.get("request", ()), limit]}
        return client

    set_client_factory(limited)
    try:
        yield
    finally:
        set_client_factory(before)


@contextmanager
def failures(doing: str, done: str = "no file was sent") -> Iterator[None]:
    """What fails in the block becomes one sentence.

    Args:
        doing: what the block does, to be read after "while".
        done: what has happened so far.

    Raises:
        PublishError: for whatever the Hub or the connection did.
    """
    try:
        yield
    except PublishError:
        raise
    except _FAILURES as error:
        rights = "with a token that may do it, " if _status(error) in (401, 403) else ""
        again = f"nothing in the folder was changed, and {rights}the same command completes it"
        raise PublishError(f"{_cause(error)} while {doing}: {done}, {again}") from error


def account_of(api: HfApi) -> Account:
    """Ask the Hub who the token of `api` belongs to.

    Raises:
        PublishError: without a token, for one that the Hub does not know, and for one that may only read.
    """
    try:
        with failures("asking the Hub who is publishing"):
            answer = api.whoami()
    except PublishError as error:
        cause = error.__cause__
        if isinstance(cause, LocalTokenNotFoundError):
            advice = "log in with `hf auth login`, or set HF_TOKEN"
            raise PublishError(f"The Hub wants to know who is publishing, and there is no token: {advice}") from cause
        if _status(cause) == 401:
            advice = "make one that may write at https://hf.co/settings/tokens, then `hf auth login` or set HF_TOKEN"
            raise PublishError(f"The Hub does not know this token, so no file was sent: {advice}") from cause
        raise
    role = answer.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        advice = "make one with the role write at https://hf.co/settings/tokens"
        raise PublishError(f"The token of {answer['name']} may only read, so no file was sent: {advice}")
    organisations = [one["name"] for one in answer.get("orgs", ())]
    return Account(answer["name"], (answer["name"], *organisations))


def full_id(repo_id: str, account: Account) -> str:
    """The id with its owner, which is the account if there is none in it.

    Raises:
        ValueError: for a name that the Hub does not allow.
    """
    complete = repo_id if "/" in repo_id else f"{account.name}/{repo_id}"
    check_name(complete)
    return complete


def check_name(repo_id: str) -> None:
    """Raise ValueError for an id that no repository can have."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"Expected an id of the Hub, NAME/MODEL or MODEL, got {repo_id!r}: {error}") from error


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause(error: BaseException) -> str:
    """One clause that says what went wrong, without addresses and headers."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _cause(error.__cause__)
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub was not asked"
    if isinstance(error, RepositoryNotFoundError):
        return "The Hub found no such repository, or none that this token may see,"
    if isinstance(error, HfHubHTTPError) and status is not None:
        said = " ".join((error.server_message or "").split())
        return f"The Hub {_refusal(status)}{f' ({said})' if said else ''}"
    kind = type(error).__name__
    if "Timeout" in kind:
        return "The Hub did not answer in time"
    if getattr(error, "filename", None):
        return f"Reading {error.filename} failed ({error.strerror})"  # type: ignore[attr-defined]  # an OSError
    return f"The connection to the Hub failed ({' '.join(str(error).split()) or kind})"


def _refusal(status: int) -> str:
    if status in (401, 403):
        return f"refused it, status {status}"
    if status == 412:
        return "has got another commit meanwhile, status 412,"
    return f"failed with status {status}" if status >= 500 else f"answered with status {status}"
