"""The loopback Hub answers the real client as the Hub does, also when a test lets something go wrong."""

import hashlib
import http.client

import pytest

PUSH = """
api.create_repo(sys.argv[2], exist_ok=True)
say(api.upload_folder(folder_path=sys.argv[1], repo_id=sys.argv[2]).oid)
"""


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def paths_asked(hub):
    return [f"{entry['method']} {entry['path'].split('?')[0]}" for entry in hub.log()]


def send(hub, method, path, **headers):
    """Answer and content of a request by hand."""
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.url.rpartition(":")[2]), timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


# -- pushing


@pytest.mark.parametrize("lfs", [["*.safetensors"], []])
def test_a_pushed_folder_loads_with_the_same_weights_in_both_upload_modes(hub, ask, trained, lfs):
    hub.reset()
    hub.upload_mode(lfs)
    repo = f"alice/mode-{len(lfs)}"
    oid = ask(PUSH, trained, repo)
    tree = hub.tree(repo)
    assert tree["main"]["commit"] == oid
    expected = {path.name: sha256(path) for path in trained.iterdir()}
    assert {**expected, ".gitattributes": tree["main"]["files"][".gitattributes"]} == tree["main"]["files"]
    assert any(path.startswith("PUT /_lfs/") for path in paths_asked(hub)) == bool(lfs)
    code = """
        import torch, vitreg_hf
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
        model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
        local = AutoModelForImageClassification.from_pretrained(sys.argv[2])
        equal = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), local.state_dict().values()))
        size = AutoImageProcessor.from_pretrained(sys.argv[1]).size["height"]
        say([equal, size, pipeline(model=sys.argv[1]).task])
    """
    assert ask(code, repo, trained) == [True, 32, "image-classification"]


def test_push_to_hub_of_transformers_works(hub, ask, trained):
    hub.reset()
    code = """
        import vitreg_hf
        from transformers import AutoImageProcessor, AutoModelForImageClassification
        AutoModelForImageClassification.from_pretrained(sys.argv[1]).push_to_hub("lab/of-transformers", private=True)
        AutoImageProcessor.from_pretrained(sys.argv[1]).push_to_hub("lab/of-transformers")
        say(api.model_info("lab/of-transformers").private)
    """
    assert ask(code, trained) is True
    files = hub.tree("lab/of-transformers")["main"]["files"]
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= files.keys()


def test_an_unchanged_push_makes_no_commit_and_sends_no_weights(hub, ask, trained, pushed):
    before = hub.tree(pushed)
    assert ask(PUSH, trained, pushed) == before["main"]["commit"]
    assert hub.tree(pushed) == before
    assert not [path for path in paths_asked(hub) if path.startswith("PUT ") or "/commit/" in path]


def test_a_commit_adds_replaces_and_deletes_at_once_or_not_at_all(hub, ask, pushed):
    code = """
        def commit(*operations):
            return api.create_commit(sys.argv[1], operations, commit_message="change")
        add = lambda path, content: CommitOperationAdd(path, content)
        commit(add("code/a.py", b"a"), add("code/b.py", b"b"), add("results.json", b"{}"))
        refused = failure(commit, add("new.txt", b"new"), CommitOperationDelete("missing.txt"))
        file_as_folder = failure(commit, add("results.json/below", b"x"))
        commit(CommitOperationDelete("code/", is_folder=True), CommitOperationDelete("training_curve.png"))
        say([refused, file_as_folder])
    """
    refused, file_as_folder = ask(code, pushed)
    assert refused == ["RemoteEntryNotFoundError", 404]
    assert file_as_folder == ["BadRequestError", 400]
    files = hub.tree(pushed)["main"]["files"]
    assert files["results.json"] == hashlib.sha256(b"{}").hexdigest()
    assert not {"training_curve.png", "code/a.py", "code/b.py", "new.txt"} & files.keys()


def test_content_that_is_not_what_was_announced_is_refused_and_not_kept(hub, ask, pushed):
    code = """
        def announced(sha256):
            operation = CommitOperationAdd("other.safetensors", b"content")
            operation.upload_info.sha256 = sha256
            return operation
        corrupted = failure(api.create_commit, sys.argv[1], [announced(bytes(32))], commit_message="corrupted")
        never_sent = announced(bytes(31) + b"1")
        never_sent._is_uploaded, never_sent._upload_mode = True, "lfs"
        say([corrupted, failure(api.create_commit, sys.argv[1], [never_sent], commit_message="never sent")])
    """
    before = hub.tree(pushed)
    corrupted, never_sent = ask(code, pushed)
    assert corrupted[0] == "RuntimeError"  # what the client makes of a refused upload
    assert never_sent == ["BadRequestError", 400]
    statuses = [entry["status"] for entry in hub.log() if entry["method"] == "PUT"]
    assert statuses == [400]
    assert hub.tree(pushed) == before
    assert not list((hub.root / "unfinished").iterdir())


CARDS = {
    "---\nlicense: mit\n---\n# Fine\n": None,
    "# No metadata\n": "empty or missing",
    "---\ntags: [vision]\n---\n": "license",
    "---\nlicense: [mit\n---\n": "ValueError",
    "---\n- a list\n---\n": "ValueError",
    "---\nlicense: my own\n---\n": "ValueError",
    "---\nlicense: mit\npipeline_tag: image-clasification\n---\n": "ValueError",
    "---\nlicense: mit\nmodel-index:\n- name: a\n  results:\n  - task: {type: x}\n---\n": "ValueError",
}


@pytest.mark.parametrize(("card", "expected"), CARDS.items())
def test_the_metadata_of_a_card_are_checked(hub, ask, card, expected):
    code = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            error = failure(api.create_commit, "alice/cards", [CommitOperationAdd("README.md", sys.argv[1].encode())],
                            commit_message="card")
        say([error, [str(one.message) for one in caught if "README.md" in str(one.message)]])
    """
    ask("say(api.create_repo('cards', exist_ok=True))")
    error, warned = ask(code, card)
    assert error == (["ValueError", None] if expected == "ValueError" else None)
    assert bool(warned) == (expected in ("empty or missing", "license"))
    assert not warned or expected in warned[0]


def test_a_card_that_nobody_checked_is_not_committed(ask, pushed):
    code = """
        api._validate_yaml = lambda *_, **__: None
        add = [CommitOperationAdd("README.md", b"---\\nlicense: my own\\n---\\n")]
        say(failure(api.create_commit, sys.argv[1], add, commit_message="card"))
    """
    assert ask(code, pushed) == ["BadRequestError", 400]


# -- references


def test_branches_tags_and_pull_requests_hold_what_was_committed_to_them(hub, ask, pushed):
    code = """
        repo = sys.argv[1]
        first = api.model_info(repo).sha
        api.create_branch(repo, branch="dev/x")
        on_branch = api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=repo, revision="dev/x")
        api.create_tag(repo, tag="v1.0", revision="dev/x")
        later = api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=repo, revision="dev/x")
        pull = api.upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id=repo, create_pr=True)
        read = lambda revision: Path(api.hf_hub_download(repo, "a.txt", revision=revision)).read_text()
        refs = api.list_repo_refs(repo, include_pull_requests=True)
        again = [failure(api.create_branch, repo, branch="dev/x"), failure(api.create_tag, repo, tag="v1.0")]
        missing = [failure(read, "main"), failure(read, "nowhere")]
        missing.append(failure(api.create_branch, repo, branch="b", revision="no"))
        say([pull.pr_revision, [read(r) for r in ("dev/x", "v1.0", "refs/pr/1", on_branch.oid, later.oid[:8])],
             [[r.name, r.target_commit] for r in refs.branches + refs.tags + refs.pull_requests], again, missing,
             [d.num for d in api.get_repo_discussions(repo)], first, on_branch.oid, later.oid, pull.oid])
    """
    answer = ask(code, pushed)
    pull_revision, contents, refs, again, missing, pulls, first, on_branch, later, pull = answer
    assert (pull_revision, pulls) == ("refs/pr/1", [1])
    assert contents == ["2", "1", "3", "1", "2"]
    assert refs == [["dev/x", later], ["main", first], ["v1.0", on_branch], ["refs/pr/1", pull]]
    assert again == [["HfHubHTTPError", 409]] * 2
    names = [name for name, _ in missing]
    assert names == ["RemoteEntryNotFoundError", "RevisionNotFoundError", "RevisionNotFoundError"]
    assert hub.tree(pushed)["commits"] == {"main": 2, "dev/x": 4, "refs/pr/1": 3}


def test_references_and_repositories_can_be_deleted(hub, ask, pushed):
    code = """
        repo = sys.argv[1]
        api.create_branch(repo, branch="b"); api.create_tag(repo, tag="t")
        api.delete_branch(repo, branch="b"); api.delete_tag(repo, tag="t")
        refs = api.list_repo_refs(repo)
        left = [r.name for r in refs.branches + refs.tags]
        refused = [failure(api.delete_branch, repo, branch="main"), failure(api.delete_tag, repo, tag="t")]
        api.delete_repo(repo)
        say([left, refused, api.repo_exists(repo), failure(api.delete_repo, repo)[0]])
    """
    left, refused, exists, again = ask(code, pushed)
    assert left == ["main"]
    assert refused == [["HfHubHTTPError", 403], ["RevisionNotFoundError", 404]]
    assert (exists, again) == (False, "RepositoryNotFoundError")
    assert hub.tree(pushed) == {}


def test_a_stale_parent_and_an_unknown_revision_are_refused(hub, ask, pushed):
    code = """
        repo, add = sys.argv[1], lambda text: [CommitOperationAdd("a.txt", text)]
        parent = api.model_info(repo).sha
        api.create_commit(repo, add(b"1"), commit_message="one", parent_commit=parent)
        stale = failure(api.create_commit, repo, add(b"2"), commit_message="two", parent_commit=parent)
        pull = api.create_commit(repo, add(b"3"), commit_message="three", parent_commit=parent, create_pr=True)
        unknown = failure(api.create_commit, repo, add(b"4"), commit_message="four", revision="nowhere")
        say([stale, unknown, pull.pr_num])
    """
    stale, unknown, pull = ask(code, pushed)
    assert (stale, unknown, pull) == (["HfHubHTTPError", 412], ["RevisionNotFoundError", 404], 1)
    assert hub.tree(pushed)["commits"] == {"main": 3, "refs/pr/1": 3}


# -- reading


def test_trees_paths_and_commits_are_listed(hub, ask, trained, pushed):
    code = """
        repo = sys.argv[1]
        api.upload_file(path_or_fileobj=b"1", path_in_repo="code/deep/a.py", repo_id=repo, commit_message="code")
        rows = lambda **settings: [[type(e).__name__, e.path] for e in api.list_repo_tree(repo, **settings)]
        weights, = api.get_paths_info(repo, ["model.safetensors", "missing"], expand=True)
        info = api.model_info(repo, files_metadata=True)
        say([rows(), rows(recursive=True, path_in_repo="code"), failure(lambda: rows(path_in_repo="nowhere")),
             weights.lfs.sha256, weights.last_commit.title, [c.title for c in api.list_repo_commits(repo)],
             [s.lfs.size for s in info.siblings if s.lfs], [r.metric_type for r in info.card_data.eval_results]])
    """
    answer = ask(code, pushed)
    top, below, missing, weights, title, titles, sizes, metrics = answer
    assert ["RepoFolder", "code"] in top
    assert not [path for _, path in top if "/" in path]
    assert below == [["RepoFolder", "code/deep"], ["RepoFile", "code/deep/a.py"]]
    assert missing == ["RemoteEntryNotFoundError", 404]
    assert weights == sha256(trained / "model.safetensors")
    assert title == titles[1]
    assert titles == ["code", "Upload folder using huggingface_hub", "initial commit"]
    assert sizes == [(trained / "model.safetensors").stat().st_size]
    assert "accuracy" in metrics


def test_that_a_file_is_missing_is_remembered_by_the_client(ask, pushed):
    code = """
        from huggingface_hub import try_to_load_from_cache
        missing = failure(api.hf_hub_download, sys.argv[1], "missing.json")
        say([missing, type(try_to_load_from_cache(sys.argv[1], "missing.json")).__name__])
    """
    assert ask(code, pushed) == [["RemoteEntryNotFoundError", 404], "object"]


def test_an_interrupted_download_goes_on_where_it_was(hub, ask, trained, pushed):
    code = """
        from huggingface_hub.file_download import http_get
        with open(sys.argv[2], "ab") as file:
            http_get(sys.argv[3], file, resume_size=file.tell(), expected_size=int(sys.argv[4]))
        say(None)
    """
    content = (trained / "model.safetensors").read_bytes()
    part = hub.root / "part"
    part.write_bytes(content[:5000])
    ask(code, pushed, part, f"{hub.url}/{pushed}/resolve/main/model.safetensors", len(content))
    assert part.read_bytes() == content
    assert [entry["status"] for entry in hub.log()] == [206]


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [("bytes=0-3", 206, slice(0, 4)), ("bytes=7-", 206, slice(7, None)), ("bytes=-5", 206, slice(-5, None))],
)
def test_a_part_of_a_file_is_sent(hub, trained, pushed, wanted, status, part):
    answer, content = send(hub, "GET", f"/{pushed}/resolve/main/config.json", Range=wanted)
    whole = (trained / "config.json").read_bytes()
    assert (answer.status, content) == (status, whole[part])
    first = whole.index(whole[part])
    assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(content) - 1}/{len(whole)}"


def test_what_lies_behind_the_end_of_a_file_cannot_be_sent(hub, pushed):
    answer, _ = send(hub, "GET", f"/{pushed}/resolve/main/config.json", Range="bytes=99999-")
    assert (answer.status, answer.headers["Content-Range"][:8]) == (416, "bytes */")
