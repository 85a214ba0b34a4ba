"""Commits to the loopback Hub: their lines, and what these make of the files of a repository."""

import base64
import binascii
import json
from typing import Any

from loopback_store import Files, Refused, Repository, Store, git_oid, lfs_pointer

Operation = tuple[str, dict[str, Any]]


def commit_lines(text: str) -> tuple[dict[str, Any], list[Operation]]:
    """Header and operations of the body of a commit."""
    fields = {"file": {"path", "content", "encoding"}, "lfsFile": {"path", "algo", "oid"}}
    fields |= {"header": {"summary"}, "deletedFile": {"path"}, "deletedFolder": {"path"}}
    lines = []
    for line in text.splitlines():
        try:
            parsed = json.loads(line)
            key, value = parsed["key"], parsed["value"]
            missing = fields[key] - value.keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(400, f"Invalid line in a commit: {line[:100]}") from error
        if missing:
            raise Refused(400, f"A line {key} in a commit lacks {', '.join(sorted(missing))}")
        lines.append((key, value))
    if not lines or [key for key, _ in lines if key == "header"] != [lines[0][0]] or not lines[0][1]["summary"]:
        raise Refused(400, "A commit begins with a header that has a summary")
    return lines[0][1], lines[1:]


def apply_operations(store: Store, repository: Repository, base: str, operations: list[Operation]) -> Files:
    """Files after a commit on top of another one; the repository itself stays as it is."""
    files: Files = dict(repository["commits"][base]["files"])
    for key, value in operations:
        path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
        if key == "file":
            files[path] = store.add_blob(_decoded(path, value["content"]))
        elif key == "lfsFile":
            files[path] = _uploaded(repository, path, value)
        else:
            _delete(files, path, is_folder=key == "deletedFolder")
    check_no_file_is_a_folder(files)
    return files


def _decoded(path: str, content: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise Refused(400, f"The content of {path} is no base64") from error


def _uploaded(repository: Repository, path: str, value: dict[str, Any]) -> dict[str, Any]:
    oid, size = value["oid"], repository["lfs"].get(value["oid"])
    if size is None or value.get("size", size) != size:
        raise Refused(400, f"{path} points to a file in LFS that was not uploaded")
    return {"sha256": oid, "size": size, "oid": git_oid(lfs_pointer(oid, size)), "lfs": True}


def _delete(files: Files, path: str, is_folder: bool) -> None:
    gone = [one for one in files if (one.startswith(f"{path}/") if is_folder else one == path)]
    if not gone:
        raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    for one in gone:
        del files[one]


def check_path(path: Any) -> str:
    """Refuse what git cannot hold or what leaves the repository."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..", ".git") for part in parts) or "\\" in path or "\0" in path:
        raise Refused(400, f"Invalid path in a commit: {path!r}")
    return path


def check_no_file_is_a_folder(files: Files) -> None:
    for path in files:
        parts = path.split("/")
        for length in range(1, len(parts)):
            if "/".join(parts[:length]) in files:
                raise Refused(400, f"{'/'.join(parts[:length])} would be a file and a folder")
