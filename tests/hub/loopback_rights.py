"""Who may do what on the loopback Hub."""

from loopback_server import Answer, Request
from loopback_store import Refused, Repository, Store

ORGANISATIONS = {"lab": ["alice"]}
TOKENS = {"hf_alice": ("alice", "write"), "hf_reader": ("alice", "read"), "hf_bob": ("bob", "write")}


def readable(store: Store, caller: str | None, names: list[str]) -> Repository:
    """The repository of an id, if the caller may know of it; an id without an owner belongs to the caller."""
    names = [caller, *names] if len(names) == 1 and caller else names
    repository = store.find("/".join(names))
    if repository is None or (repository["private"] and not owns(caller, repository["id"])):
        if caller is None:
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        raise Refused(404, "Repository not found", "RepoNotFound")
    return repository


def downloadable(store: Store, caller: str | None, names: list[str]) -> Repository:
    """The repository of an id, if the caller may have its files."""
    repository = readable(store, caller, names)
    if not repository["gated"] or owns(caller, repository["id"]) or caller in repository["grant"]:
        return repository
    restricted = f"Access to model {repository['id']} is restricted"
    if caller is None:
        raise Refused(401, f"{restricted}. You must have access to it and be authenticated to access it.", "GatedRepo")
    raise Refused(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")


def writable(
    store: Store, request: Request, caller: str | None, names: list[str], to_pull: bool = False
) -> Repository:
    """The repository of an id, if the caller may write to it; anybody may open a pull request."""
    repository = readable(store, caller, names)
    caller = expect_write_token(request, caller)
    if not to_pull and not owns(caller, repository["id"]):
        raise Refused(403, f"{caller} has no right to write to {repository['id']}: open a pull request instead")
    return repository


def caller_of(request: Request) -> str | None:
    """User of the token of a request; None without a token."""
    header = request.headers.get("Authorization")
    if header is None:
        return None
    token = header.removeprefix("Bearer ")
    if token not in TOKENS:
        raise Refused(401, "Invalid credentials in Authorization header")
    request.role = TOKENS[token][1]
    return TOKENS[token][0]


def owns(caller: str | None, repo_id: str) -> bool:
    owner = repo_id.split("/")[0]
    return caller is not None and (caller == owner or caller in ORGANISATIONS.get(owner, []))


def expect_write_token(request: Request, caller: str | None) -> str:
    """The caller, if the token may write at all."""
    if caller is None:
        # over http, other than https, clients read only this code as a repository that is not there for them
        code = None if request.path.startswith("/api/repos/") else "RepoNotFound"
        raise Refused(401, "Invalid username or password.", code)
    if request.role != "write":
        raise Refused(403, "This token may only read: use one with the role write")
    return caller


def whoami(request: Request, caller: str | None) -> Answer:
    if caller is None:
        raise Refused(401, "Invalid username or password.")
    organisations = [{"type": "org", "name": name} for name, members in ORGANISATIONS.items() if caller in members]
    token = {"displayName": "loopback", "role": request.role}
    answer = {"type": "user", "id": caller, "name": caller, "fullname": caller, "orgs": organisations}
    return Answer(200, {**answer, "auth": {"type": "access_token", "accessToken": token}})
