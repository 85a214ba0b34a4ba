"""A Hub on loopback that the real `huggingface_hub` client talks to, as its own process.

    python tests/hub/loopback_hub.py --root DIR [--port 0]

prints `READY http://127.0.0.1:PORT` and serves until it is killed; a server started again on the same folder has the
same repositories. Tokens: `hf_alice` (writes for alice and the organisation lab), `hf_reader` (alice, may only read),
`hf_bob`. Tests steer it under `/_control/`: settings, a log of requests, and faults of the n-th request
(see `loopback_server`). It knows models only, and LFS but not Xet: for files in LFS, clients need
HF_HUB_DISABLE_XET=1.
"""

import argparse
import json
import re
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from loopback_answers import (
    is_set,
    list_commits,
    list_discussions,
    list_references,
    list_tree,
    paths_info,
    siblings,
    whole_tree,
)
from loopback_cards import check_card, metadata_of, tags_of
from loopback_commits import apply_operations, check_path, commit_lines
from loopback_rights import caller_of, downloadable, expect_write_token, owns, readable, whoami, writable
from loopback_server import Answer, Request, serve
from loopback_store import (
    Files,
    Refused,
    Repository,
    Store,
    add_commit,
    check_reference,
    commit_of,
    git_oid,
    open_pull,
    set_head,
)

_NAME = re.compile(r"[A-Za-z0-9](?!.*(--|\.\.))[A-Za-z0-9._-]{0,95}(?<!\.git)(?<![.-])")
_VERBS = (
    *("revision", "preupload", "commit", "refs", "tree", "commits", "paths-info", "branch", "tag", "settings"),
    *("auth-check", "discussions"),
)


class Hub:
    """Answers requests from the repositories of a store."""

    def __init__(self, root: Path):
        self.store = Store(root)
        self.lfs_patterns = ["*.safetensors"]

    def answer(self, request: Request) -> Answer:
        """Find the call that a request makes, with the rights of its token."""
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        caller = caller_of(request)
        if parts[0] == "_lfs":
            return self.receive_lfs(request, "/".join(parts[1:-1]), parts[-1])
        if parts[:2] == ["api", "whoami-v2"]:
            return whoami(request, caller)
        if parts[:2] == ["api", "validate-yaml"]:
            return _validate(request.json())
        if parts[:2] == ["api", "repos"] and len(parts) == 3:
            return self.change_repositories(request, caller, parts[2])
        if parts[:2] == ["api", "models"] and len(parts) > 2:
            return self.model_call(request, caller, parts[2:])
        for length in (1, 2):
            if parts[length : length + 1] == ["resolve"] and len(parts) > length + 2:
                return self.resolve(request, caller, parts[:length], parts[length + 1], "/".join(parts[length + 2 :]))
        if "/".join(parts[-4:-1]) == "info/lfs/objects" and len(parts) in (5, 6):
            return self.lfs_call(request, caller, [*parts[:-5], parts[-5].removesuffix(".git")], parts[-1])
        raise Refused(404, f"The loopback Hub has no {request.method} {request.path}")

    # -- repositories

    def change_repositories(self, request: Request, caller: str | None, what: str) -> Answer:
        body = request.json()
        if what not in ("create", "delete") or body.get("type", "model") not in (None, "model"):
            raise Refused(400, "The loopback Hub creates and deletes models only")
        caller = expect_write_token(request, caller)
        owner, name = body.get("organization") or caller, body.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise Refused(400, f"Invalid name of a repository: {name!r}")
        repo_id = f"{owner}/{name}"
        if what == "delete":
            writable(self.store, request, caller, [owner, name])
            self.store.delete(repo_id)
            return Answer(200, {})
        if not owns(caller, repo_id):
            raise Refused(403, f"{caller} has no right to create a model under the namespace {owner}")
        place = {"url": f"{request.base}/{repo_id}", "id": repo_id, "name": repo_id}
        try:
            self.store.create(repo_id, body.get("visibility") == "private" or bool(body.get("private")), caller)
        except Refused as refused:
            return Answer(refused.status, {**place, "error": refused.message})
        return Answer(200, place)

    def model_call(self, request: Request, caller: str | None, parts: list[str]) -> Answer:
        """What is asked of one repository; its id has one or two parts."""
        length = 1 if len(parts) > 1 and parts[1] in _VERBS else 2
        names, verb, rest = parts[:length], "".join(parts[length : length + 1]), parts[length + 1 :]
        method, revision = request.method, rest[0] if rest else "main"
        read = partial(readable, self.store, caller, names)
        write = partial(writable, self.store, request, caller, names)
        to_pull = "create_pr" in request.query or revision.startswith("refs/pr/")
        answer: Any = {}
        match method, verb:
            case "GET", "" | "revision":
                answer = self.model_info(read(), revision, request.query)
            case "GET", "auth-check":
                write() if rest == ["write"] else downloadable(self.store, caller, names)
            case "GET", "refs":
                answer = list_references(read(), "include_prs" in request.query)
            case "GET", "tree":
                answer = list_tree(read(), revision, "/".join(rest[1:]), request.query)
            case "GET", "commits":
                answer = list_commits(read(), revision)
            case "GET", "discussions" if not rest:
                answer = list_discussions(read())
            case "POST", "paths-info":
                answer = paths_info(read(), revision, parse_qs(request.text()))
            case "POST", "preupload":
                answer = self.preupload(write(to_pull=to_pull), revision, request.json())
            case "POST", "commit":
                answer = self.commit(request, str(caller), write(to_pull=to_pull)["id"], revision)
            case "POST" | "DELETE", "branch" | "tag" if rest:
                self.change_reference(request, write()["id"], verb, rest[0])
            case "PUT", "settings":
                self.set(write()["id"], request.json())
            case _:
                raise Refused(404, f"The loopback Hub has no {method} {request.path}")
        return Answer(200, answer)

    def set(self, repo_id: str, wanted: dict[str, Any]) -> None:
        with self.store.changing(repo_id) as repository:
            if "visibility" in wanted:
                repository["private"] = wanted["visibility"] == "private"
            repository.update({key: wanted[key] for key in ("private", "gated", "grant") if key in wanted})

    def change_reference(self, request: Request, repo_id: str, verb: str, name: str) -> None:
        """Make or delete a branch or tag."""
        with self.store.changing(repo_id) as repository:
            known = repository["branches" if verb == "branch" else "tags"]
            if request.method == "DELETE":
                if (verb, name) == ("branch", "main"):
                    raise Refused(403, "The branch main cannot be deleted")
                if known.pop(name, None) is None:
                    raise Refused(404, f"There is no {verb} {name}", "RevisionNotFound")
                return
            body = request.json()
            new, start = (name, body.get("startingPoint", "main")) if verb == "branch" else (body.get("tag"), name)
            if check_reference(new) in known:
                raise Refused(409, f"Reference already exists: {verb} {new}")
            oid = commit_of(repository, start)
            known[new] = oid if verb == "branch" else {"commit": oid, "message": body.get("message", "")}

    def model_info(self, repository: Repository, revision: str, query: dict[str, list[str]]) -> dict[str, Any]:
        sha = commit_of(repository, revision)
        commit = repository["commits"][sha]
        try:
            metadata = metadata_of(self._text(commit["files"], "README.md")) or {}
        except ValueError:
            metadata = {}
        try:
            config = json.loads(self._text(commit["files"], "config.json"))
        except ValueError:
            config = {}
        return {
            "_id": git_oid(repository["id"].encode())[:24],
            **{"id": repository["id"], "modelId": repository["id"], "author": repository["id"].split("/")[0]},
            **{"sha": sha, "lastModified": commit["date"], "createdAt": repository["created"]},
            **{"private": repository["private"], "gated": repository["gated"], "disabled": False},
            **{"downloads": 0, "likes": 0, "tags": tags_of(metadata), "cardData": metadata},
            **{key: metadata[key] for key in ("pipeline_tag", "library_name", "model-index") if key in metadata},
            "config": {key: config[key] for key in ("architectures", "model_type", "auto_map") if key in config},
            "siblings": siblings(commit["files"], is_set(query, "blobs")),
        }

    def _text(self, files: Files, path: str) -> str:
        return self.store.blob(files[path]["sha256"]).read_text(errors="replace") if path in files else ""

    # -- uploads

    def preupload(self, repository: Repository, revision: str, body: dict[str, Any]) -> dict[str, Any]:
        """How each file is to come, and what is there already."""
        there: Files = repository["commits"][commit_of(repository, revision)]["files"]
        answer = []
        for file in body["files"]:
            path, old = check_path(file["path"]), there.get(file["path"])
            lfs = file["size"] > 0 and any(fnmatch(path, pattern) for pattern in self.lfs_patterns)
            oid = None if old is None else old["sha256"] if old["lfs"] else old["oid"]
            mode = "lfs" if lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_call(self, request: Request, caller: str | None, names: list[str], call: str) -> Answer:
        """LFS batch (which files must be sent) and verify (whether one arrived)."""
        repository = writable(self.store, request, caller, names, to_pull=True)  # a pull request may be about to come
        body, stored = request.json(), repository["lfs"]
        if call == "verify":
            if stored.get(body["oid"]) != body["size"]:
                raise Refused(400, f"No object {body['oid']} of {body['size']} bytes was uploaded")
            return Answer(200, {})
        base = f"{request.base}/{repository['id']}"
        objects = []
        for item in body["objects"]:
            item = {"oid": item["oid"], "size": item["size"]}
            if not re.fullmatch(r"[0-9a-f]{64}", item["oid"]):
                item["error"] = {"code": 422, "message": "The oid must be a sha256"}
            elif stored.get(item["oid"]) != item["size"]:
                upload = f"{request.base}/_lfs/{repository['id']}/{item['oid']}"
                verify = f"{base}.git/info/lfs/objects/verify"
                item["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(item)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def receive_lfs(self, request: Request, repo_id: str, oid: str) -> Answer:
        """Content of an LFS file; as with signed links of a storage, there is no token."""
        if request.method != "PUT" or self.store.find(repo_id) is None:
            raise Refused(404, "No such place for an upload")
        if request.body_sha256 != oid:
            raise Refused(400, f"The content has the sha256 {request.body_sha256}, not {oid}")
        self.store.add_lfs(repo_id, oid, request.take_body())
        return Answer(200, "")

    def commit(self, request: Request, caller: str, repo_id: str, revision: str) -> dict[str, Any]:
        """Apply all operations of a commit, or none."""
        header, operations = commit_lines(request.text())
        with self.store.changing(repo_id) as repository:
            to_pull, parent = "create_pr" in request.query, header.get("parentCommit")
            head = commit_of(repository, revision)
            if parent is not None:
                parent = commit_of(repository, parent)
            if parent not in (None, head) and not to_pull:
                raise Refused(412, "A commit has been made since the parent commit: look at it and try again")
            base = parent or head
            files = apply_operations(self.store, repository, base, operations)
            if any(key == "file" and value["path"] == "README.md" for key, value in operations):
                _expect_valid_card(self._text(files, "README.md"))
            summary, pull_url = header["summary"], None
            oid = add_commit(repository, base, files, summary, header.get("description", ""), caller)
            if to_pull:
                number = open_pull(repository, oid, summary, caller)
                pull_url = f"{request.base}/{repo_id}/discussions/{number}"
            else:
                set_head(repository, revision, oid)
        url = f"{request.base}/{repo_id}/commit/{oid}"
        return {"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": "", "pullRequestUrl": pull_url}

    # -- downloads

    def resolve(self, request: Request, caller: str | None, names: list[str], revision: str, path: str) -> Answer:
        if request.method not in ("GET", "HEAD"):
            raise Refused(405, "Files are only read here")
        repository = downloadable(self.store, caller, names)
        sha = commit_of(repository, revision)
        headers = {"X-Repo-Commit": sha}
        file = repository["commits"][sha]["files"].get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{file["sha256"] if file["lfs"] else file["oid"]}"'
        if file["lfs"]:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file["size"])}
        return Answer(200, self.store.blob(file["sha256"]), headers)

    # -- control

    def control(self, what: str, body: dict[str, Any], query: dict[str, list[str]]) -> Any:
        """What tests ask of the repositories; None for what is not known here."""
        if what == "settings":
            self.set(body["repo"], body)
            return {}
        if what == "upload_mode":
            self.lfs_patterns = body["lfs"]
            return {}
        if what == "tree":
            repository = self.store.find(query["repo"][0])
            return {} if repository is None else whole_tree(repository)
        return None


def _validate(body: dict[str, Any]) -> Answer:
    if not isinstance(body.get("content"), str):
        raise Refused(400, "Expected the text of a card as content")
    errors, warnings = check_card(body["content"])
    answer = {"errors": [{"message": one} for one in errors], "warnings": [{"message": one} for one in warnings]}
    return Answer(400 if errors else 200, answer)


def _expect_valid_card(content: str) -> None:
    errors, _ = check_card(content)
    if errors:
        raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of the repositories")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    options = parser.parse_args()
    serve(Hub(options.root), options.port)


if __name__ == "__main__":
    main()
