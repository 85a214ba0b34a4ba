"""What a client killed at any request, before or after the Hub acted on it, has begun, the same command completes."""

import json
from typing import Any

import pytest

PUSH = """
import json, sys
from vitreg_hf.hub.publish import publish
publish(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""
PUSHES: dict[str, dict[str, Any]] = {
    "main": {},
    "branch and tag": {"revision": "dev/x", "tag": "v1.0", "private": True},
    "pull request": {"create_pr": True},
}


def state_of(hub, repo):
    """All contents of a repository and how many commits they took; ids of commits, which hold the time, as names."""
    tree = hub.tree(repo)
    names = {branch["commit"]: name for name, branch in tree.items() if name not in ("tags", "commits")}
    tags = {name: (names[tag["commit"]], tag["files"]) for name, tag in tree["tags"].items()}
    contents = {name: branch["files"] for name, branch in tree.items() if name in names.values()}
    return contents, tags, tree["commits"]


@pytest.mark.parametrize("kind", ["stall_before", "stall_after"])
@pytest.mark.parametrize("case", PUSHES)
def test_killed_at_any_request_and_run_again(hub, client, trained, tmp_path, case, kind):
    """Each repository begins as a new one; its name is as long as that of the clean one, and so is its card."""
    prefix = f"{kind.removeprefix('stall_')}{list(PUSHES).index(case)}"
    arguments = json.dumps(PUSHES[case])

    def push_again(repo):
        done = client.run(PUSH, trained, repo, arguments, home=tmp_path)
        assert done.returncode == 0, done.stderr

    def comparable(repo):
        """The state, without what the name of the repository changes: the card, and nothing else."""
        contents, tags, commits = state_of(hub, repo)
        for files in (*contents.values(), *(files for _, files in tags.values())):
            if "README.md" in files:
                digest = files["README.md"]
                text = (hub.root / "blobs" / digest[:2] / digest).read_text()
                assert f'"{repo}"' in text
                files["README.md"] = text.split("<!-- vitreg_hf card")[0].replace(repo, "REPOSITORY")
        return contents, tags, commits

    hub.reset()
    push_again(f"alice/{prefix}-clean")
    requests, clean = len(hub.log()), comparable(f"alice/{prefix}-clean")
    assert requests > 10
    for number in range(1, requests + 1):
        repo = f"alice/{prefix}-at{number:03}"
        hub.reset()
        hub.fault(number, kind)
        job = client.start(PUSH, trained, repo, arguments, home=tmp_path)
        assert hub.wait_fault(), f"request {number} of {requests} did not come"
        job.kill()
        assert job.wait().returncode == -9
        hub.reset()
        push_again(repo)
        assert comparable(repo) == clean, f"killed at request {number} of {requests}"
