"""What the loopback Hub answers about one repository without changing it: pure functions of what is stored."""

from typing import Any

from loopback_store import (
    Files,
    Refused,
    Repository,
    commit_of,
    entries_below,
    file_entry,
    folder_entry,
    history,
    last_change,
    lfs_pointer,
    references,
)

Query = dict[str, list[str]]


def is_set(query: Query, name: str) -> bool:
    return query.get(name, ["false"])[-1].lower() in ("true", "1")


def list_references(repository: Repository, with_pulls: bool) -> dict[str, Any]:
    def rows(names: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"{kind}{n}", "targetCommit": oid} for n, oid in sorted(names.items())]

    tags = {name: tag["commit"] for name, tag in repository["tags"].items()}
    answer = {
        "branches": rows(repository["branches"], "refs/heads/"),
        "converts": [],
        "tags": rows(tags, "refs/tags/"),
    }
    if with_pulls:
        pulls = {name: oid for name, oid in references(repository).items() if name.startswith("refs/pr/")}
        answer["pullRequests"] = rows(pulls, "")
    return answer


def list_tree(repository: Repository, revision: str, folder: str, query: Query) -> list[dict[str, Any]]:
    oid = commit_of(repository, revision)
    files: Files = repository["commits"][oid]["files"]
    entries = entries_below(files, folder, is_set(query, "recursive"))
    if folder in files:
        entries = [file_entry(folder, files[folder])]
    if folder and not entries:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return _expanded(repository, oid, entries) if is_set(query, "expand") else entries


def paths_info(repository: Repository, revision: str, form: Query) -> list[dict[str, Any]]:
    """Entries of the paths that exist; the others are left out."""
    oid = commit_of(repository, revision)
    files: Files = repository["commits"][oid]["files"]
    entries = []
    for path in (one.strip("/") for one in form.get("paths", [])):
        if path in files:
            entries.append(file_entry(path, files[path]))
        elif any(other.startswith(f"{path}/") for other in files):
            entries.append(folder_entry(files, path))
    return _expanded(repository, oid, entries) if is_set(form, "expand") else entries


def _expanded(repository: Repository, oid: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    safe = {"status": "safe", "avScan": {"status": "safe"}, "pickleImportScan": None}
    for entry in entries:
        entry["lastCommit"] = last_change(repository, oid, entry["path"])
        if entry["type"] == "file":
            entry["securityFileStatus"] = safe
    return entries


def list_commits(repository: Repository, revision: str) -> list[dict[str, Any]]:
    """Commits, newest first."""
    return [
        {
            **{"id": oid, "title": commit["title"], "message": commit["message"], "date": commit["date"]},
            "authors": [{"user": commit["author"]}],
        }
        for oid, commit in history(repository, commit_of(repository, revision))
    ]


def list_discussions(repository: Repository) -> dict[str, Any]:
    """Pull requests, newest first, on one page; there are no other discussions here."""
    found = [
        {
            **{"num": int(number), "title": pull["title"], "author": {"name": pull["author"], "type": "user"}},
            **{"createdAt": pull["created"], "status": "open", "isPullRequest": True},
            "repo": {"name": repository["id"], "type": "model"},
        }
        for number, pull in repository["pulls"].items()
    ]
    return {"count": len(found), "start": 0, "discussions": found[::-1]}


def siblings(files: Files, with_blobs: bool) -> list[dict[str, Any]]:
    """Files as the description of a model lists them."""
    rows = []
    for path, file in sorted(files.items()):
        row: dict[str, Any] = {"rfilename": path}
        if with_blobs:
            row |= {"size": file["size"], "blobId": file["oid"]}
        if with_blobs and file["lfs"]:
            pointer = lfs_pointer(file["sha256"], file["size"])
            row["lfs"] = {"sha256": file["sha256"], "size": file["size"], "pointerSize": len(pointer)}
        rows.append(row)
    return rows


def whole_tree(repository: Repository) -> dict[str, Any]:
    """All branches, pull requests and tags with their files' sha256, and how many commits each reference has."""

    def content(oid: str) -> dict[str, Any]:
        files: Files = repository["commits"][oid]["files"]
        return {"commit": oid, "files": {path: file["sha256"] for path, file in sorted(files.items())}}

    heads = references(repository)
    return {
        **{name: content(oid) for name, oid in heads.items()},
        "tags": {name: content(tag["commit"]) for name, tag in repository["tags"].items()},
        "commits": {name: len(list(history(repository, oid))) for name, oid in heads.items()},
    }
