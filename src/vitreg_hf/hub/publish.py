# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From a folder to a repository on the Hub, in one commit.

Everything is checked before anything is sent, and what is there already is looked up before it is made. So a run that
was interrupted anywhere is completed by the same call again, and one that was not finds nothing to do.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import get_session, hf_raise_for_status

from vitreg_hf.hub.cards import readme_to_publish
from vitreg_hf.hub.connection import (
    SECONDS_OF_SILENCE,
    Account,
    PublishError,
    account_of,
    check_name,
    failures,
    full_id,
    hub_connection,
)
from vitreg_hf.hub.contents import Contents, changes, contents_of, size_of
from vitreg_hf.hub.folder_checks import CARD, check_folder
from vitreg_hf.hub.repository import MAIN, Repository, commit_of, files_at, look_up, pull_request_with
from vitreg_hf.version import __version__

__all__ = ["PublishError", "Published", "check_access", "publish"]

# A name that git, the Hub's addresses and `revision=` all take; a commit has 40 digits.
_REFERENCE = re.compile(r"(?!refs/|[0-9a-f]{40}$)(?!.*(\.\.|//|@\{|\.lock$|[/.]$))\w[\w./@+-]*", re.ASCII)


@dataclass(frozen=True)
class Published:
    """Where a model is on the Hub, and what was done to get it there.

    Attributes:
        repo_id: of the repository, with its owner.
        url: page to look at: of the repository, the branch or the pull request.
        commit: id of the commit that holds the files.
        revision: branch, or `refs/pr/1` and so on, for `from_pretrained(revision=...)`.
        files: paths of the model's files in the repository.
        deleted: paths that this commit removed.
        changed: whether a commit was made; if not, the files were there already.
        pull_request: address of the pull request, if one was asked for and needed.
        tag: on the commit, if one was asked for.
        size_bytes: of all files.
    """

    repo_id: str
    url: str
    commit: str
    revision: str
    files: tuple[str, ...]
    deleted: tuple[str, ...]
    changed: bool
    pull_request: str | None
    tag: str | None
    size_bytes: int

    def __str__(self) -> str:
        size = f"{len(self.files)} files, {self.size_bytes / 1e6:.1f} MB"
        tagged = f", tag {self.tag}" if self.tag else ""
        deleted = f"\ndeleted   {', '.join(self.deleted)}" if self.deleted else ""
        what = "published" if self.changed else "unchanged"
        return f"{what} {self.url} ({size}; commit {self.commit[:7]}{tagged}){deleted}"


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    with_code: bool = False,
    model_license: str | None = None,
    message: str | None = None,
    token: str | None = None,
    timeout_seconds: float = SECONDS_OF_SILENCE,
) -> Published:
    """Publish a trained model: weights, configs, card, results and pictures, as one commit. The folder stays as it is.

    Args:
        folder: as the examples or `save_pretrained` leave it.
        repo_id: `NAME/MODEL`, or `MODEL` under the account's own name; the repository is made if there is none.
        private: the repository is seen by its owners alone. One that exists has to be private already.
        revision: branch, made from `main` if there is none; None: `main`.
        create_pr: open a pull request against `main` instead, unless an open one has this content already.
        tag: on the commit.
        with_code: add the model's code, for `trust_remote_code=True`; always done for a folder saved with code.
        model_license: licence of the weights, as the Hub spells it; None: that of the card, else that of the results.
        message: of the commit.
        token: of the Hub; None: that of `hf auth login` or HF_TOKEN.
        timeout_seconds: longest silence of the Hub. Its client repeats most requests five times.

    Returns:
        What was published where.

    Raises:
        ValueError: for options that do not go together, a folder that is not fit to be published (with everything that
            is wrong), and a repository or tag that stands against it. Nothing was sent then.
        PublishError: if the Hub refuses or the connection fails. The same call completes what was begun.
    """
    _check_options(repo_id, revision, create_pr, tag, message)
    api, folder, branch = HfApi(token=token), Path(folder), revision or MAIN
    with hub_connection(timeout_seconds):
        account = None if "/" in repo_id else account_of(api)  # the card names the owner
        repo_id = repo_id if account is None else full_id(repo_id, account)
        model = check_folder(folder, repo_id, model_license)
        card = readme_to_publish(folder, repo_id, model_license)
        contents = contents_of(model, card, with_code or model.has_code)
        account = account or account_of(api)
        repository = look_up(api, repo_id)
        _check_repository(repository, repo_id, account, private, revision, tag)
        _check_card_online(api, card)
        if repository is None:
            repository = _create(api, repo_id, private)
        message = message or f"Publish with vitreg_hf {__version__}"
        if create_pr:
            return _open_pull_request(api, repo_id, repository, account, contents, message)
        return _commit(api, repo_id, repository, branch, tag, contents, message)


def check_access(repo_id: str, token: str | None = None) -> str:
    """Find out before a training whether its model may be published at the end.

    Args:
        repo_id: `NAME/MODEL`, or `MODEL` under the account's own name. There need not be such a repository.
        token: of the Hub; None: that of `hf auth login` or HF_TOKEN.

    Returns:
        The id with its owner.

    Raises:
        ValueError: for a name that the Hub does not allow or that belongs to somebody else.
        PublishError: without a token that may write, and if the Hub cannot be asked.
    """
    with hub_connection(SECONDS_OF_SILENCE):
        account = account_of(HfApi(token=token))
    complete = full_id(repo_id, account)
    _check_owner(complete, account)
    return complete


# What stands against it


def _check_options(repo_id: str, revision: str | None, create_pr: bool, tag: str | None, message: str | None) -> None:
    check_name(repo_id)
    for kind, name in (("branch", revision), ("tag", tag)):
        if name is not None and not _REFERENCE.fullmatch(name):
            raise ValueError(f"Expected the name of a {kind}, letters, digits and ./@+_-, got {name!r}")
    if create_pr and (revision or tag):
        raise ValueError(
            "Expected create_pr, which is to main and has nothing to tag yet, or a branch or tag, got both"
        )
    if tag is not None and tag == (revision or MAIN):
        raise ValueError(f"Expected different names for branch and tag, got {tag!r} for both")
    if message is not None and not message.strip():
        raise ValueError(f"Expected a message that says something, got {message!r}")


def _check_repository(
    repository: Repository | None,
    repo_id: str,
    account: Account,
    private: bool,
    revision: str | None,
    tag: str | None,
) -> None:
    if repository is None:
        _check_owner(repo_id, account)
        return
    if private and not repository.private:
        advice = "publish without private, or make it private in its settings first"
        raise ValueError(f"Expected a private repository, got {repo_id}, which everybody sees already: {advice}")
    if revision in repository.tags:
        raise ValueError(f"Expected a branch of {repo_id}, got {revision!r}, which is a tag of it")
    if tag in repository.branches:
        raise ValueError(f"Expected a new tag of {repo_id}, got {tag!r}, which is a branch of it")


def _check_owner(repo_id: str, account: Account) -> None:
    owner = repo_id.split("/")[0]
    if owner not in account.namespaces:
        allowed = " or ".join(f"{name}/..." for name in account.namespaces)
        raise ValueError(f"Expected a repository that {account.name} may make, {allowed}, got {repo_id}")


def _check_card_online(api: HfApi, card: str) -> None:
    """Let the Hub judge the metadata before anything is made: a commit with a wrong card is refused as a whole.

    Asked directly: `ModelCard.validate` asks huggingface.co whatever HF_ENDPOINT says, before huggingface_hub 2.
    """
    with failures(f"letting the Hub check {CARD}"):
        asked = {"repoType": "model", "content": card}
        answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=asked)
        if answer.status_code != 400:
            hf_raise_for_status(answer)
            return
        refused = " ".join(str(one.get("message")) for one in answer.json()["errors"])
    raise ValueError(f"Expected a card that the Hub accepts in {CARD}, got: {refused}")


# What is made


def _create(api: HfApi, repo_id: str, private: bool) -> Repository:
    with failures(f"making {repo_id}"):
        visibility = private or None  # None: what the owner has chosen for new repositories
        api.create_repo(repo_id, private=visibility, exist_ok=True)
    repository = look_up(api, repo_id)
    if repository is None:
        raise PublishError(f"The Hub made {repo_id} and does not find it: nothing was sent, try again")
    return repository


def _commit(
    api: HfApi, repo_id: str, repository: Repository, branch: str, tag: str | None, contents: Contents, message: str
) -> Published:
    head = repository.head(branch)
    operations = changes(contents, files_at(api, repo_id, head))
    tagged = commit_of(api, repo_id, tag) if tag in repository.tags and tag is not None else None
    if tagged is not None and (tagged != head or operations):
        raise ValueError(f"Expected a new tag of {repo_id}, got {tag!r}, which stands on commit {tagged[:7]} already")
    if branch not in repository.branches:
        with failures(f"making the branch {branch} of {repo_id}"):
            api.create_branch(repo_id, branch=branch, revision=head, exist_ok=True)
    address = f"{api.endpoint}/{repo_id}"
    url = address if branch == MAIN else f"{address}/tree/{quote(branch)}"
    published = _published(repo_id, url, head, branch, contents)
    if operations:
        with failures(f"sending the commit to {repo_id}", "the commit is not confirmed"):
            made = api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=head)
        published = replace(published, commit=made.oid, changed=True, deleted=_deleted(operations))
    if tag is not None and tagged is None:
        with failures(f"making the tag {tag}", f"commit {published.commit[:7]} is there without its tag"):
            api.create_tag(repo_id, tag=tag, revision=published.commit)
    return replace(published, tag=tag)


def _open_pull_request(
    api: HfApi, repo_id: str, repository: Repository, account: Account, contents: Contents, message: str
) -> Published:
    head = repository.head(MAIN)
    operations = changes(contents, files_at(api, repo_id, head))
    published = _published(repo_id, f"{api.endpoint}/{repo_id}", head, MAIN, contents)
    if not operations:
        return published
    if found := pull_request_with(api, repo_id, account.name, contents):
        return replace(_at_request(published, found.url, found.revision), commit=found.commit)
    with failures(f"opening a pull request of {repo_id}", "the pull request is not confirmed"):
        made = api.create_commit(repo_id, operations, commit_message=message, create_pr=True, parent_commit=head)
    published = _at_request(published, str(made.pr_url), str(made.pr_revision))
    return replace(published, commit=made.oid, changed=True, deleted=_deleted(operations))


def _published(repo_id: str, url: str, commit: str, revision: str, contents: Contents) -> Published:
    """What is so if nothing has to be done."""
    return Published(repo_id, url, commit, revision, tuple(contents), (), False, None, None, size_of(contents))


def _at_request(published: Published, url: str, revision: str) -> Published:
    return replace(published, url=url, pull_request=url, revision=revision)


def _deleted(operations: Sequence[CommitOperationAdd | CommitOperationDelete]) -> tuple[str, ...]:
    return tuple(one.path_in_repo for one in operations if isinstance(one, CommitOperationDelete))
