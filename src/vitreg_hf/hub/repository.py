# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What is on the Hub already: a repository's branches, tags, files and open pull requests."""

from dataclasses import dataclass

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from vitreg_hf.hub.connection import failures
from vitreg_hf.hub.contents import Contents, changes

MAIN = "main"


@dataclass(frozen=True)
class Repository:
    """A repository as it was when it was looked up.

    Attributes:
        private: whether only its owners see it.
        branches: name -> id of the last commit.
        tags: names.
    """

    private: bool
    branches: dict[str, str]
    tags: frozenset[str]

    def head(self, branch: str) -> str:
        """The last commit of a branch, or that of `main` for one that does not exist and would start there."""
        return self.branches.get(branch) or self.branches[MAIN]


@dataclass(frozen=True)
class PullRequest:
    """An open pull request."""

    url: str
    revision: str
    commit: str


def look_up(api: HfApi, repo_id: str) -> Repository | None:
    """The repository of an id; None if there is none, or none that the token may see.

    Raises:
        PublishError: if the Hub does not say.
    """
    with failures(f"looking at {repo_id}"):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return None
        references = api.list_repo_refs(repo_id)
    branches = {branch.name: branch.target_commit for branch in references.branches}
    return Repository(bool(info.private), branches, frozenset(tag.name for tag in references.tags))


def commit_of(api: HfApi, repo_id: str, revision: str) -> str:
    """Id of the commit that a branch, tag or pull request stands on; raises PublishError."""
    with failures(f"looking at {revision} of {repo_id}"):
        return str(api.model_info(repo_id, revision=revision).sha)


def files_at(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """Path -> size and fingerprint of every file of a commit; raises PublishError."""
    with failures(f"listing the files of {repo_id}"):
        tree = list(api.list_repo_tree(repo_id, recursive=True, revision=commit))
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def pull_request_with(api: HfApi, repo_id: str, author: str, contents: Contents) -> PullRequest | None:
    """An open pull request of this author after which the repository would hold the contents; raises PublishError."""
    with failures(f"looking at the pull requests of {repo_id}"):
        asked = api.get_repo_discussions(
            repo_id, author=author, discussion_type="pull_request", discussion_status="open"
        )
        found = [one for one in asked if one.is_pull_request and one.status == "open" and one.author == author]
    for one in found:
        revision = f"refs/pr/{one.num}"
        commit = commit_of(api, repo_id, revision)
        if not changes(contents, files_at(api, repo_id, commit)):
            return PullRequest(one.url, revision, commit)
    return None
