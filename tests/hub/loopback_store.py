"""Repositories of the loopback Hub on disk: contents by their sha256, and one JSON file per repository.

A change is written to a temporary name and renamed, so that a server which is killed has the old or the new state.
Who may do what is not known here; `loopback_hub` asks for it.
"""

import copy
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_REFERENCE = re.compile(r"(?!refs/)(?!.*(\.\.|//|@\{|\.lock$|/$|\.$))[A-Za-z0-9][A-Za-z0-9._/@+-]*")
_PULL = "refs/pr/"

Repository = dict[str, Any]  # what its JSON file holds
Files = dict[str, dict[str, Any]]  # path -> {"sha256", "size", "oid", "lfs"}


class Refused(Exception):
    """A request that the Hub answers with an error: its status, what it says, and the code that clients read."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def git_oid(content: bytes, kind: str = "blob") -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git itself stores for a file that lies in LFS."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


class Store:
    """All repositories; every method may be called by several threads."""

    def __init__(self, root: Path):
        self.root = root
        self.lock = threading.RLock()
        shutil.rmtree(root / "unfinished", ignore_errors=True)  # of a server that was killed
        (root / "unfinished").mkdir(parents=True)
        self._repositories: dict[str, Repository] = {}
        for path in sorted(root.glob("repositories/*/*.json")):
            repository = json.loads(path.read_text())
            self._repositories[repository["id"]] = repository

    # -- contents

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256[:2] / sha256

    def add_blob(self, content: bytes) -> dict[str, Any]:
        """Store what came inside a commit, and return the entry of a file with it."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.blob(sha256).exists():
            write_whole(self.blob(sha256), content)
        return {"sha256": sha256, "size": len(content), "oid": git_oid(content), "lfs": False}

    def add_lfs(self, repo_id: str, sha256: str, uploaded: Path) -> None:
        """Take over an uploaded file whose content was found to be right."""
        size = uploaded.stat().st_size
        self.blob(sha256).parent.mkdir(parents=True, exist_ok=True)
        os.replace(uploaded, self.blob(sha256))
        with self.changing(repo_id) as repository:
            repository["lfs"][sha256] = size

    # -- repositories

    def find(self, repo_id: str) -> Repository | None:
        with self.lock:
            return self._repositories.get(repo_id)

    @contextmanager
    def changing(self, repo_id: str) -> Iterator[Repository]:
        """A copy to change; it replaces the repository on disk and in memory when the block ends without an error."""
        with self.lock:
            if repo_id not in self._repositories:
                raise Refused(404, "Repository not found", "RepoNotFound")
            changed = copy.deepcopy(self._repositories[repo_id])
            yield changed
            self._save(changed)

    def _save(self, repository: Repository) -> None:
        path = self.root / "repositories" / f"{repository['id']}.json"
        write_whole(path, json.dumps(repository).encode())
        self._repositories[repository["id"]] = repository

    def create(self, repo_id: str, private: bool, author: str) -> None:
        """Make a repository with one commit, as the Hub does."""
        with self.lock:
            if repo_id in self._repositories:
                raise Refused(409, "You already created this model repo")
            repository: Repository = {"id": repo_id, "private": private, "gated": False, "grant": [], "created": now()}
            repository.update({"branches": {}, "tags": {}, "pulls": {}, "commits": {}, "lfs": {}})
            files = {".gitattributes": self.add_blob(GIT_ATTRIBUTES)}
            repository["branches"]["main"] = add_commit(repository, None, files, "initial commit", "", author)
            self._save(repository)

    def delete(self, repo_id: str) -> None:
        with self.lock:
            del self._repositories[repo_id]
            (self.root / "repositories" / f"{repo_id}.json").unlink()

    def new_file(self) -> Path:
        """Path for an upload under way."""
        handle, name = tempfile.mkstemp(dir=self.root / "unfinished")
        os.close(handle)
        return Path(name)


# -- references


def references(repository: Repository) -> dict[str, str]:
    """Branches and pull requests, by the name under which a client commits to them."""
    pulls = {f"{_PULL}{number}": pull["head"] for number, pull in repository["pulls"].items()}
    return {**repository["branches"], **pulls}


def commit_of(repository: Repository, revision: str) -> str:
    """Id of the commit that a branch, tag, pull request or (short) id names."""
    heads = references(repository)
    name = revision.removeprefix("refs/heads/")
    if name in heads:
        return heads[name]
    tag = revision.removeprefix("refs/tags/")
    if tag in repository["tags"]:
        return repository["tags"][tag]["commit"]
    if re.fullmatch(r"[0-9a-f]{7,40}", revision):
        found = [oid for oid in repository["commits"] if oid.startswith(revision)]
        if len(found) == 1:
            return found[0]
    raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def set_head(repository: Repository, reference: str, oid: str) -> None:
    """Let a branch or pull request that exists end at another commit."""
    if reference.startswith(_PULL) and reference in references(repository):
        repository["pulls"][reference.removeprefix(_PULL)]["head"] = oid
    elif reference in repository["branches"]:
        repository["branches"][reference] = oid
    else:
        raise Refused(400, f"Commits go to a branch or a pull request, and {reference} is neither")


def open_pull(repository: Repository, oid: str, title: str, author: str) -> str:
    """Add a pull request and return its number."""
    number = str(len(repository["pulls"]) + 1)
    repository["pulls"][number] = {"head": oid, "title": title, "author": author, "created": now()}
    return number


def check_reference(name: Any) -> str:
    if not isinstance(name, str) or not _REFERENCE.fullmatch(name):
        raise Refused(400, f"Invalid name of a reference: {name!r}")
    return name


# -- commits


def add_commit(repository: Repository, parent: str | None, files: Files, title: str, message: str, author: str) -> str:
    """Record a commit, without letting a branch end at it, and return its id."""
    commit = {"parent": parent, "title": title, "message": message, "author": author, "date": now(), "files": files}
    unique = json.dumps([commit, len(repository["commits"]), time.time_ns()], sort_keys=True).encode()
    oid = git_oid(unique, "commit")
    repository["commits"][oid] = commit
    return oid


def history(repository: Repository, oid: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Commits from one back to the first."""
    while oid is not None:
        yield oid, repository["commits"][oid]
        oid = repository["commits"][oid]["parent"]


def last_change(repository: Repository, oid: str, path: str) -> dict[str, str]:
    """The commit that last changed a file or something below a folder."""

    def part(files: Files) -> dict[str, str]:
        return {name: f["sha256"] for name, f in files.items() if name == path or name.startswith(f"{path}/")}

    for found, commit in history(repository, oid):  # noqa: B007 -- the last one is used after the loop
        parent = commit["parent"]
        if parent is None or part(repository["commits"][parent]["files"]) != part(commit["files"]):
            break
    return {"id": found, "title": commit["title"], "date": commit["date"]}


def file_entry(path: str, file: dict[str, Any]) -> dict[str, Any]:
    """A file as lists of a tree give it."""
    entry = {"type": "file", "oid": file["oid"], "size": file["size"], "path": path}
    if file["lfs"]:
        pointer = lfs_pointer(file["sha256"], file["size"])
        entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": len(pointer)}
    return entry


def entries_below(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below a folder ("" is the root), sorted by path."""
    prefix = f"{folder}/" if folder else ""
    below = {path: file for path, file in files.items() if path.startswith(prefix)}
    folders = {path[: i + len(prefix)] for path in below for i, char in enumerate(path[len(prefix) :]) if char == "/"}
    entries = [file_entry(path, file) for path, file in below.items()] + [folder_entry(files, one) for one in folders]
    if not recursive:
        entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
    return sorted(entries, key=lambda entry: entry["path"])


def folder_entry(files: Files, folder: str) -> dict[str, Any]:
    below = [[path, file["oid"]] for path, file in sorted(files.items()) if path.startswith(f"{folder}/")]
    return {"type": "directory", "oid": git_oid(json.dumps(below).encode(), "tree"), "size": 0, "path": folder}
