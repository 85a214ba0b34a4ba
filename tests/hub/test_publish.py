"""`publish` against the loopback Hub: what arrives, in how many commits, and what failures are called."""

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import load_file, save_file

from vitreg_hf import ViTRegForImageClassification, ViTRegImageProcessor
from vitreg_hf.hub.connection import hub_connection
from vitreg_hf.hub.contents import contents_of
from vitreg_hf.hub.folder_checks import check_folder
from vitreg_hf.hub.publish import publish
from vitreg_hf.hub.remote_code import code_files

# Prints what `publish` returns, or the kind of error and its message; repeats of the client do not wait.
PUSH = """
import dataclasses, json, sys, time
from vitreg_hf.hub.publish import PublishError, check_access, publish
time.sleep = lambda seconds: None
call = {"publish": publish, "check_access": check_access}[sys.argv[1]]
try:
    result = call(*json.loads(sys.argv[2]), **json.loads(sys.argv[3]))
except (ValueError, PublishError) as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
else:
    told = {**dataclasses.asdict(result), "told": str(result)} if call is publish else result
    print(json.dumps(told))
"""
PLAIN = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "results.json"}
PLAIN |= {"training_curve.png"}


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "model"))


@pytest.fixture
def repo(hub, request) -> str:
    """An id that no other test uses, at a Hub without faults."""
    hub.reset()
    return f"alice/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"


@pytest.fixture
def push(client, folder, repo):
    """Publish `folder` to `repo` in a process of its own, which leaves the folder as it was."""

    def pushing(to=None, token="hf_alice", environment=None, **options):
        before = files_of(folder)
        arguments = json.dumps([str(folder), to or repo]), json.dumps(options)
        result = client.run(PUSH, "publish", *arguments, token=token, **(environment or {}))
        assert files_of(folder) == before, "publish changed the folder"
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return pushing


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(hub, tree, path, reference="main"):
    digest = tree[reference]["files"][path]
    return (hub.root / "blobs" / digest[:2] / digest).read_text()


def calls(hub, method, part):
    return [one for one in hub.log() if one["method"] == method and part in one["path"]]


def refused(result, kind, message):
    assert result.get("error") == kind, result
    assert re.search(message, result["message"]), result["message"]
    assert "\n" not in result["message"]


# What arrives


@pytest.mark.parametrize("lfs", [["*.safetensors"], []], ids=["lfs", "regular"])
def test_one_commit_holds_everything(hub, push, folder, repo, lfs):
    hub.upload_mode(lfs)
    for left_out in ("checkpoints/step1/optimizer.bin", "held_out/1.png", ".hidden.png", "x.unfinished", "notes.txt"):
        (folder / left_out).parent.mkdir(parents=True, exist_ok=True)
        (folder / left_out).write_bytes(b"x")
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "results.json").write_text("{}")
    (folder / "drawing.svg").write_text("<svg/>")
    result = push()
    tree = hub.tree(repo)
    expected = PLAIN | {"artifacts/results.json", "drawing.svg"}
    assert tree["main"]["files"].keys() == expected | {".gitattributes"}
    assert tree["commits"]["main"] == 2  # the Hub's own, and ours
    assert len(calls(hub, "POST", "/commit/")) == 1
    assert len(calls(hub, "PUT", "/_lfs/")) == len(lfs)
    for name in expected - {"README.md"}:
        assert tree["main"]["files"][name] == sha256(folder / name)
    assert set(result["files"]) == expected
    assert (result["changed"], result["commit"]) == (True, tree["main"]["commit"])
    assert result["size_bytes"] == sum((folder / name).stat().st_size for name in expected - {"README.md"}) + len(
        content(hub, tree, "README.md").encode()
    )
    assert result["url"] == f"{hub.url}/{repo}"
    assert result["told"].startswith(f"published {hub.url}/{repo} (8 files, ")


def test_the_same_again_makes_no_commit(hub, push, repo):
    push()
    before = hub.tree(repo)
    result = push()
    assert hub.tree(repo) == before
    assert not result["changed"]
    assert result["commit"] == before["main"]["commit"]
    assert result["told"].startswith("unchanged ")
    assert len(calls(hub, "POST", "/commit/")) == 1


def test_a_change_sends_only_what_changed(hub, push, folder, repo):
    push()
    uploads = len(calls(hub, "PUT", "/_lfs/"))
    (folder / "drawing.svg").write_text("<svg/>")
    assert push()["changed"]
    assert hub.tree(repo)["commits"]["main"] == 3
    assert len(calls(hub, "PUT", "/_lfs/")) == uploads
    assert hub.tree(repo)["main"]["files"]["drawing.svg"] == sha256(folder / "drawing.svg")


def test_weights_of_another_layout_go_in_the_same_commit(hub, push, client, folder, repo):
    push()
    old = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
names = ["pytorch_model.bin", "processor_config.json", "adapter_config.json", "model.fp16.safetensors", "own.txt"]
HfApi().create_commit(sys.argv[1], [CommitOperationAdd(name, b"{}") for name in names], commit_message="old")
"""
    assert client.run(old, repo).returncode == 0
    model = ViTRegForImageClassification.from_pretrained(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    shards = {path.name for path in folder.glob("model*")}
    gone = ["adapter_config.json", "model.safetensors", "processor_config.json", "pytorch_model.bin"]
    result = push()
    assert sorted(result["deleted"]) == gone
    assert result["told"].endswith(f"deleted   {', '.join(result['deleted'])}")
    others = {".gitattributes", "model.fp16.safetensors", "own.txt"}
    assert hub.tree(repo)["main"]["files"].keys() == PLAIN - {"model.safetensors"} | shards | others
    assert hub.tree(repo)["commits"]["main"] == 4

    for name in shards:
        (folder / name).unlink()
    (folder / "model.safetensors").write_bytes(whole)
    assert set(push()["deleted"]) == shards
    assert hub.tree(repo)["main"]["files"].keys() == PLAIN | others
    assert hub.tree(repo)["commits"]["main"] == 5


def test_results_of_another_model_do_not_stay(hub, push, folder, repo):
    push()
    (folder / "results.json").unlink()
    text = re.sub(r"\n<!-- vitreg_hf card .*", "", (folder / "README.md").read_text())
    (folder / "README.md").write_text(text.replace("alice/vitreg-pets", repo))
    assert push()["deleted"] == ["results.json"]


# Cards


def test_the_card_names_the_repository(hub, push, folder, repo):
    push(model_license="apache-2.0")
    text = content(hub, hub.tree(repo), "README.md")
    assert f'"{repo}"' in text
    assert "alice/vitreg-pets" not in text
    assert "license: apache-2.0" in text
    assert "alice/vitreg-pets" in (folder / "README.md").read_text()


def test_a_missing_card_is_rendered(hub, push, folder, repo):
    (folder / "README.md").unlink()
    push()
    assert f'"{repo}"' in content(hub, hub.tree(repo), "README.md")
    assert not (folder / "README.md").exists()


def test_an_edited_card_goes_as_it_is(hub, push, folder, repo):
    text = (folder / "README.md").read_text().replace("alice/vitreg-pets", repo) + "\nWritten by hand.\n"
    (folder / "README.md").write_bytes(text.replace("\n", "\r\n").encode())
    push()
    assert hub.tree(repo)["main"]["files"]["README.md"] == sha256(folder / "README.md")


def test_an_edited_card_that_loads_a_folder_is_refused(hub, push, folder, repo):
    text = (folder / "README.md").read_text().replace("alice/vitreg-pets", "outputs/mine") + "\nWritten by hand.\n"
    (folder / "README.md").write_text(text)
    result = push()
    assert result["error"] == "ValueError"
    assert "README.md: " in result["message"]
    assert "'outputs/mine'" in result["message"]
    assert hub.log() == []  # the Hub was not even asked who is publishing


def test_a_card_that_only_the_hub_refuses_makes_nothing(hub, push, folder, repo):
    text = (folder / "README.md").read_text().replace("alice/vitreg-pets", repo)
    (folder / "README.md").write_text(text.replace("library_name: transformers", "library_name: 7"))
    refused(push(), "ValueError", r"Expected a card that the Hub accepts in README.md, got: .*library_name")
    assert hub.tree(repo) == {}


# Options


def test_code_is_added_to_the_upload_alone(hub, push, folder, repo):
    result = push(with_code=True)
    tree = hub.tree(repo)
    code = {path.name for path in code_files()}
    assert set(result["files"]) == PLAIN | code
    assert tree["main"]["files"]["modeling_vitreg.py"] == sha256(next(p for p in code_files() if "modeling" in p.name))
    config, processor = (json.loads(content(hub, tree, f"{name}config.json")) for name in ("", "preprocessor_"))
    assert set(config["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"}
    backends = ["image_processing_pil_vitreg.ViTRegImageProcessorPil", "image_processing_vitreg.ViTRegImageProcessor"]
    assert processor["auto_map"] == {"AutoImageProcessor": backends}
    for file in {one.split(".")[0] for one in config["auto_map"].values()} | {"image_processing_vitreg"}:
        assert f"{file}.py" in code
    assert not list(folder.glob("*.py"))
    assert not push(with_code=True)["changed"]
    assert set(push()["deleted"]) == code  # which no config names any more
    assert set(hub.tree(repo)["main"]["files"]) == PLAIN | {".gitattributes"}


def test_code_is_what_save_pretrained_writes(folder, monkeypatch, tmp_path):
    for class_ in (ViTRegForImageClassification, ViTRegImageProcessor):
        monkeypatch.setattr(class_, "_auto_class", None)  # undone after the test: registering is global
    plain, saved = contents_of(check_folder(folder), "card", with_code=True), tmp_path / "saved"
    model, processor = (
        ViTRegForImageClassification.from_pretrained(folder),
        ViTRegImageProcessor.from_pretrained(folder),
    )
    ViTRegForImageClassification.register_for_auto_class("AutoModelForImageClassification")
    ViTRegImageProcessor.register_for_auto_class()
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    assert {name for name in plain if name.endswith(".py")} == {path.name for path in saved.glob("*.py")}
    assert plain["config.json"] == (saved / "config.json").read_bytes()
    assert plain["preprocessor_config.json"] == (saved / "preprocessor_config.json").read_bytes()
    # a folder saved with code gets it without being asked, and its configs are those it has
    assert check_folder(saved).has_code
    again = contents_of(check_folder(saved), "card", with_code=True)
    assert again["config.json"] == saved / "config.json"


def test_a_folder_saved_with_code_is_published_with_all_of_it(hub, push, folder, repo):
    saved = json.loads((folder / "config.json").read_text())
    one = {"AutoModelForImageClassification": "modeling_vitreg.ViTRegForImageClassification"}
    (folder / "config.json").write_text(json.dumps(saved | {"auto_map": one}))
    assert {path.name for path in code_files()} <= set(push()["files"])
    auto_map = json.loads(content(hub, hub.tree(repo), "config.json"))["auto_map"]
    assert auto_map.keys() > one.keys()


def test_a_private_repository(hub, push, repo):
    push(private=True)
    assert push(private=True)["changed"] is False
    refused(push(token="hf_bob"), "ValueError", f"Expected a repository that bob may make, bob/..., got {repo}")
    assert not push()["changed"]  # it keeps what it is


def test_a_public_repository_is_not_made_private(hub, push, repo):
    push()
    before = hub.tree(repo)
    refused(push(private=True), "ValueError", f"Expected a private repository, got {repo}, which everybody sees")
    assert hub.tree(repo) == before


@pytest.mark.parametrize("branch", ["dev", "dev/x"])
def test_a_branch_is_made_and_used_again(hub, push, folder, repo, branch):
    result = push(revision=branch)
    tree = hub.tree(repo)
    assert tree["main"]["files"].keys() == {".gitattributes"}
    assert tree[branch]["files"].keys() == PLAIN | {".gitattributes"}
    assert (result["revision"], result["url"]) == (branch, f"{hub.url}/{repo}/tree/{branch}")
    assert not push(revision=branch)["changed"]
    (folder / "drawing.svg").write_text("<svg/>")
    assert push(revision=branch)["changed"]
    assert hub.tree(repo)["commits"] == {"main": 1, branch: 3}


def test_a_tag_is_put_once(hub, push, folder, repo):
    result = push(tag="v1.0")
    assert result["tag"] == "v1.0"
    assert hub.tree(repo)["tags"]["v1.0"] == hub.tree(repo)["main"]
    assert not push(tag="v1.0")["changed"]  # a tag that is where it should be is fine
    assert push(tag="v1.0-again")["changed"] is False
    assert hub.tree(repo)["tags"].keys() == {"v1.0", "v1.0-again"}

    (folder / "drawing.svg").write_text("<svg/>")
    before, sent = hub.tree(repo), len(calls(hub, "POST", "/preupload/"))
    refused(push(tag="v1.0"), "ValueError", "Expected a new tag of .*, got 'v1.0', which stands on commit")
    assert (hub.tree(repo), len(calls(hub, "POST", "/preupload/"))) == (before, sent)
    push()
    refused(push(tag="v1.0"), "ValueError", "Expected a new tag")  # nothing to send, but the tag is elsewhere


def test_names_that_are_taken(hub, push, repo):
    push(tag="v1", revision="dev")
    refused(push(revision="v1"), "ValueError", "Expected a branch of .*, got 'v1', which is a tag of it")
    refused(push(tag="dev"), "ValueError", "Expected a new tag of .*, got 'dev', which is a branch of it")


def test_a_pull_request_is_not_doubled(hub, push, folder, repo):
    push()
    assert push(create_pr=True)["pull_request"] is None  # main has it already
    (folder / "drawing.svg").write_text("<svg/>")
    result = push(create_pr=True)
    tree = hub.tree(repo)
    assert result["pull_request"] == result["url"] == f"{hub.url}/{repo}/discussions/1"
    assert (result["revision"], result["commit"]) == ("refs/pr/1", tree["refs/pr/1"]["commit"])
    assert "drawing.svg" in tree["refs/pr/1"]["files"]
    assert "drawing.svg" not in tree["main"]["files"]

    again = push(create_pr=True)
    assert hub.tree(repo) == tree
    assert again == {**result, "changed": False, "told": again["told"]}
    (folder / "drawing.svg").write_text("<svg></svg>")
    assert push(create_pr=True)["revision"] == "refs/pr/2"


def test_others_may_only_open_pull_requests(hub, push, folder, repo):
    push()
    (folder / "drawing.svg").write_text("<svg/>")
    refused(push(token="hf_bob"), "PublishError", r"The Hub refused it, status 403 .* with a token that may do it")
    assert hub.tree(repo)["commits"] == {"main": 2}
    assert push(token="hf_bob", create_pr=True)["revision"] == "refs/pr/1"
    assert hub.tree(repo)["commits"] == {"main": 2, "refs/pr/1": 3}


def test_a_message_and_a_name_without_owner(hub, push, folder, client, repo):
    (folder / "README.md").unlink()
    result = push(to=repo.split("/")[1], message="First light")
    assert result["repo_id"] == repo
    code = "import sys; from huggingface_hub import HfApi; print(HfApi().list_repo_commits(sys.argv[1])[0].title)"
    assert client.run(code, repo).stdout.strip() == "First light"


WRONG = {
    "no name": ({"to": "alice/"}, "Expected an id of the Hub, NAME/MODEL or MODEL, got 'alice/'"),
    "a path": ({"to": "./outputs/pets"}, "Expected an id of the Hub"),
    "branch with a blank": ({"revision": "my branch"}, "Expected the name of a branch, .*'my branch'"),
    "branch above": ({"revision": "a/../b"}, "Expected the name of a branch"),
    "branch that is a commit": ({"revision": "0" * 40}, "Expected the name of a branch"),
    "request as a branch": ({"revision": "refs/pr/1"}, "Expected the name of a branch"),
    "tag with a colon": ({"tag": "v:1"}, "Expected the name of a tag"),
    "tag like the branch": ({"tag": "dev", "revision": "dev"}, "Expected different names for branch and tag"),
    "tag like main": ({"tag": "main"}, "Expected different names for branch and tag"),
    "request and branch": (
        {"create_pr": True, "revision": "dev"},
        "Expected create_pr, .*, or a branch or tag, got both",
    ),
    "request and tag": ({"create_pr": True, "tag": "v1"}, "Expected create_pr, .*, or a branch or tag, got both"),
    "empty message": ({"message": " "}, "Expected a message that says something"),
    "no time": ({"timeout_seconds": 0}, "Expected a positive number of seconds"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused_before_the_hub_is_asked(folder, case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        publish(
            folder, **{"repo_id": options.get("to", "alice/pets")} | {k: options[k] for k in options.keys() - {"to"}}
        )


def test_a_broken_folder_is_refused_before_the_hub_is_asked(hub, push, folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "classifier.bias": tensors["classifier.bias"] * torch.nan}, folder / "model.safetensors")
    (folder / "weights.bin").write_bytes(b"x")
    result = push()
    assert result["error"] == "ValueError"
    assert len(result["message"].splitlines()) == 3
    assert hub.log() == []


# Failures


def test_without_a_token(hub, push):
    refused(push(token=None), "PublishError", "there is no token: log in with `hf auth login`, or set HF_TOKEN")


def test_a_wrong_token(hub, push, repo):
    refused(push(token="hf_nobody"), "PublishError", "The Hub does not know this token, so no file was sent: make one")
    assert hub.tree(repo) == {}


def test_a_token_that_may_only_read(hub, push, repo):
    refused(push(token="hf_reader"), "PublishError", "The token of alice may only read, so no file was sent")
    assert hub.tree(repo) == {}


def test_a_token_in_the_call_comes_before_that_of_the_environment(hub, client, folder, repo):
    arguments = json.dumps([str(folder), repo]), json.dumps({"token": "hf_alice"})
    assert json.loads(client.run(PUSH, "publish", *arguments, token="hf_nobody").stdout)["changed"]


def test_somebody_elses_namespace(hub, push):
    refused(
        push(to="bob/pets"), "ValueError", r"Expected a repository that alice may make, alice/... or lab/..., got bob"
    )
    assert hub.tree("bob/pets") == {}


def test_offline(hub, push):
    refused(
        push(environment={"HF_HUB_OFFLINE": "1"}), "PublishError", "^HF_HUB_OFFLINE is set, so the Hub was not asked"
    )


NUMBER_OF_COMMIT = 13  # in the push to a new repository


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("status", {"status": 500}, "The Hub failed with status 500"),
        (
            "status",
            {"status": 403, "body": {"error": "no more room"}},
            r"The Hub refused it, status 403 \(no more room\)",
        ),
        ("status", {"status": 404}, "The Hub answered with status 404"),
        ("status", {"status": 412}, "The Hub has got another commit meanwhile, status 412,"),
        ("close_before", {}, "The connection to the Hub failed"),
        ("close_after", {}, "The connection to the Hub failed"),
        ("stall_before", {}, "The Hub did not answer in time"),
        ("stall_after", {}, "The Hub did not answer in time"),
    ],
)
def test_a_commit_that_fails_is_told_in_one_sentence_and_completed(hub, push, repo, kind, more, said):
    hub.fault(NUMBER_OF_COMMIT, kind, **more)
    result = push(timeout_seconds=2 if kind.startswith("stall") else 60)
    refused(result, "PublishError", f"^{said}.* while sending the commit to {repo}: the commit is not confirmed, ")
    assert result["message"].endswith("the same command completes it")
    assert hub.log()[-1]["path"].endswith("/commit/main")
    push()
    assert hub.tree(repo)["commits"] == {"main": 2}
    assert hub.tree(repo)["main"]["files"].keys() == PLAIN | {".gitattributes"}


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(hub, client, folder, repo):
    hub.fault(NUMBER_OF_COMMIT, "stall_before")
    job = client.start(PUSH, "publish", json.dumps([str(folder), repo]), "{}")
    assert hub.wait_fault()
    other = """
import sys
from huggingface_hub import HfApi
HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="README.md", repo_id=sys.argv[1])
"""
    assert client.run(other, repo).returncode == 0
    hub.release()
    refused(json.loads(job.wait().stdout), "PublishError", "^The Hub has got another commit meanwhile, status 412,")
    assert hub.tree(repo)["commits"] == {"main": 2}


@pytest.mark.parametrize("number", range(1, NUMBER_OF_COMMIT))
def test_a_hub_that_falls_silent_at_any_request_is_given_up(hub, push, repo, number):
    hub.fault(number, "stall_before", times=6)  # the client repeats most requests five times
    refused(push(timeout_seconds=0.15), "PublishError", "^The Hub did not answer in time while ")


@pytest.mark.parametrize("kind", ["status", "close_before"])
def test_what_fails_once_in_an_upload_is_repeated(hub, push, repo, kind):
    hub.fault(NUMBER_OF_COMMIT - 2, kind)
    assert push()["changed"]
    assert len(calls(hub, "PUT", "/_lfs/")) == 2


def test_a_tag_that_fails_is_told_with_its_commit(hub, push, repo):
    hub.fault(NUMBER_OF_COMMIT + 1, "status", status=500)
    result = push(tag="v1")
    commit = hub.tree(repo)["main"]["commit"]
    refused(result, "PublishError", f"while making the tag v1: commit {commit[:7]} is there without its tag")
    assert not push(tag="v1")["changed"]
    assert hub.tree(repo)["tags"].keys() == {"v1"}


def test_a_hub_that_is_not_there(hub, push, repo):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    refused(
        push(environment=environment), "PublishError", "The connection to the Hub failed .* while asking the Hub who"
    )


def test_ctrl_c_passes_through(hub, client, folder, repo):
    hub.fault(NUMBER_OF_COMMIT, "stall_before")
    job = client.start(PUSH, "publish", json.dumps([str(folder), repo]), "{}")
    assert hub.wait_fault()
    os.kill(job.pid, signal.SIGINT)
    assert job.wait().returncode == -signal.SIGINT
    assert hub.tree(repo)["commits"] == {"main": 1}


# Access before a training


def access(client, name, token="hf_alice"):
    result = client.run(PUSH, "check_access", json.dumps([name]), "{}", token=token)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("name", "complete"), [("pets", "alice/pets"), ("alice/pets", "alice/pets"), ("lab/pets", "lab/pets")]
)
def test_access_gives_the_full_name(hub, client, name, complete):
    hub.reset()
    assert access(client, name) == complete
    assert [one["path"] for one in hub.log()] == ["/api/whoami-v2"]


def test_access_is_refused(client):
    refused(access(client, "bob/pets"), "ValueError", "Expected a repository that alice may make")
    refused(access(client, "my pets"), "ValueError", "Expected an id of the Hub")
    refused(access(client, "pets", token="hf_reader"), "PublishError", "may only read")
    refused(access(client, "pets", token="hf_nobody"), "PublishError", "does not know this token")
    refused(access(client, "pets", token=None), "PublishError", "there is no token")


def test_the_clients_settings_are_restored():
    """A program's own client of the Hub, with its proxy for instance, is used, and is as it was afterwards."""
    made = []
    set_client_factory(lambda: made.append(default_client_factory()) or made[-1])
    try:
        with hub_connection(3):
            assert get_session() is made[-1]
            assert len(made[-1].event_hooks["request"]) == 2
        assert get_session() is made[-1]
        assert len(made) == 2
        assert len(made[-1].event_hooks["request"]) == 1
    finally:
        set_client_factory(default_client_factory)
