"""The loopback Hub fails where it is told to and keeps what it holds; jobs are like processes of their own."""

import hashlib
import http.client
import json

import pytest

COMMIT = """
import sys
from huggingface_hub import HfApi
commit = HfApi().upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=sys.argv[1])
print(commit.oid)
"""
NUMBER_OF_COMMIT = 2  # the request after preupload


@pytest.fixture
def connection(hub):
    """A connection that is kept from one request to the next."""
    kept = http.client.HTTPConnection("127.0.0.1", int(hub.url.rpartition(":")[2]), timeout=60)
    yield kept
    kept.close()


def answer_of(connection, method, path, body=None, **headers):
    connection.request(method, path, body, {"Authorization": "Bearer hf_alice", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read()


def has_commit(hub, repo):
    return "new.txt" in hub.tree(repo)["main"]["files"]


# -- faults


def test_requests_are_counted_from_the_last_reset(hub, client, pushed):
    assert client.run(COMMIT, pushed).returncode == 0
    rows = [[row["number"], row["method"], row["path"].rpartition("/models")[2], row["status"]] for row in hub.log()]
    assert rows == [[1, "POST", f"/{pushed}/preupload/main", 200], [2, "POST", f"/{pushed}/commit/main", 200]]
    hub.reset()
    assert hub.log() == []


@pytest.mark.parametrize(("kind", "is_done"), [("close_before", False), ("close_after", True)])
def test_a_dropped_connection_reaches_the_client(hub, client, pushed, kind, is_done):
    hub.fault(NUMBER_OF_COMMIT, kind)
    result = client.run(COMMIT, pushed)
    assert result.returncode == 1
    assert "RemoteProtocolError" in result.stderr
    assert hub.wait_fault(0)
    assert hub.log()[-1]["status"] == 499
    assert has_commit(hub, pushed) == is_done


def test_a_status_is_answered_without_the_work(hub, client, pushed):
    hub.fault(NUMBER_OF_COMMIT, "status", status=507, body={"error": "The disk is full"})
    result = client.run(COMMIT, pushed)
    assert result.returncode == 1
    assert "507" in result.stderr
    assert "The disk is full" in result.stderr
    assert not has_commit(hub, pushed)


def test_a_fault_can_last(hub, ask):
    hub.reset()
    hub.fault(2, "status", status=500, times=2)
    assert ask("say([(failure(api.whoami) or [0, 200])[1] for _ in range(4)])") == [200, 500, 500, 200]


@pytest.mark.parametrize(("kind", "is_done"), [("stall_before", False), ("stall_after", True)])
def test_a_client_killed_while_it_is_stalled_leaves_the_old_or_the_new_state(hub, client, pushed, kind, is_done):
    hub.fault(NUMBER_OF_COMMIT, kind)
    job = client.start(COMMIT, pushed)
    assert hub.wait_fault()
    assert hub.log()[-1]["status"] is None
    assert has_commit(hub, pushed) == is_done
    job.kill()
    assert job.wait().returncode == -9
    hub.release()  # too late: nobody waits for the answer
    hub.reset()  # waits for what is under way
    assert has_commit(hub, pushed) == is_done


@pytest.mark.parametrize("kind", ["stall_before", "stall_after"])
def test_a_released_request_goes_on(hub, client, pushed, kind):
    hub.fault(NUMBER_OF_COMMIT, kind)
    job = client.start(COMMIT, pushed)
    assert hub.wait_fault()
    hub.release()
    result = job.wait()
    assert result.returncode == 0
    assert hub.tree(pushed)["main"]["commit"] == result.stdout.strip()


def test_a_reset_drops_what_is_stalled(hub, client, pushed):
    hub.fault(NUMBER_OF_COMMIT, "stall_before")
    job = client.start(COMMIT, pushed)
    assert hub.wait_fault()
    hub.reset()
    assert "RemoteProtocolError" in job.wait().stderr
    assert not has_commit(hub, pushed)


def test_a_fault_that_cannot_be_is_refused(hub):
    with pytest.raises(RuntimeError, match="Expected a kind"):
        hub.fault(1, "explode")


# -- connections


def test_a_connection_is_kept_after_errors_and_bodies_in_pieces(hub, connection, pushed):
    content = b"x" * 3000
    oid = hashlib.sha256(2 * content).hexdigest()
    assert answer_of(connection, "POST", "/api/repos/create", b"{" * 5000)[0] == 400
    socket = connection.sock
    assert answer_of(connection, "POST", "/nothing/here", content)[0] == 404
    assert answer_of(connection, "HEAD", f"/{pushed}/resolve/main/config.json") == (200, b"")
    assert answer_of(connection, "PUT", f"/_lfs/{pushed}/{oid}", iter([content]))[0] == 400
    assert answer_of(connection, "PUT", f"/_lfs/{pushed}/{oid}", iter([content, content]))[0] == 200
    assert answer_of(connection, "GET", "/api/whoami-v2")[0] == 200
    assert connection.sock is socket


def test_only_what_arrived_is_verified(hub, connection, pushed, trained):
    content = (trained / "model.safetensors").read_bytes()
    there = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    for body, status in ((there, 200), (there | {"size": 1}, 400), (there | {"oid": "0" * 64}, 400)):
        assert answer_of(connection, "POST", f"/{pushed}.git/info/lfs/objects/verify", json.dumps(body))[0] == status


def test_an_upload_that_breaks_off_leaves_nothing(hub, connection, pushed):
    connection.putrequest("PUT", f"/_lfs/{pushed}/{'0' * 64}")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"only this")
    connection.close()
    hub.reset()
    assert not list((hub.root / "unfinished").iterdir())


# -- survival


def test_a_server_started_again_has_the_same_repositories(hub, ask, pushed):
    ask("api.create_tag(sys.argv[1], tag='v1'); api.update_repo_settings(sys.argv[1], gated='manual'); say(0)", pushed)
    before = hub.tree(pushed)
    hub.stop()
    assert ask("say(failure(api.whoami))")[0] == "ConnectError"
    hub.start()
    assert hub.tree(pushed) == before
    assert ask("say(failure(api.hf_hub_download, sys.argv[1], 'README.md'))", pushed, token="hf_bob")[1] == 403
    assert ask("say(len(Path(api.hf_hub_download(sys.argv[1], 'README.md')).read_text()))", pushed) > 100


# -- processes of clients


def test_a_job_is_like_a_new_process(hub, client, tmp_path):
    code = """
import sys
from huggingface_hub import constants, get_token
print(__name__, sys.argv[1:], constants.HF_HOME, constants.ENDPOINT, constants.HF_HUB_OFFLINE, get_token(), input)
print("aside", file=sys.stderr)
assert sys.stdin.read() == ""
sys.exit(3)
"""
    result = client.run(code, "a b", "c", home=tmp_path, token=None, HF_HUB_OFFLINE="1")
    said = f"__main__ ['a b', 'c'] {tmp_path} {hub.url} True None <built-in function input>\n"
    assert (result.returncode, result.stdout, result.stderr) == (3, said, "aside\n")
    assert client.run("raise ValueError('x')").returncode == 1
    assert client.run("import sys; sys.exit('said so')").stderr == "said so\n"


def test_no_setting_of_a_job_is_left_from_before_it_was_known(client):
    code = """
import sys
places = ["home-of-a-" + "job", "endpoint-of-a-" + "job"]
for name, module in list(sys.modules.items()):
    if hasattr(module, "PLACE_OF_HOME"):
        continue  # the program of the warm client
    for key, value in list(getattr(module, "__dict__", {}).items()):
        text = getattr(value, "endpoint", value) if name.startswith("huggingface_hub") else value
        if isinstance(text, (str, type(sys))) and any(place in str(text) for place in places):
            print(name, key, value)
"""
    assert client.run(code).stdout == ""


def test_a_fresh_interpreter_does_the_same_as_a_job(hub, client, fresh, pushed, tmp_path):
    asked = []
    for run in (
        lambda code, home: client.run(code, pushed, home=home),
        lambda code, home: fresh(code, pushed, **hub.environment(home)),
    ):
        hub.reset()
        result = run(LOAD, tmp_path / str(len(asked)))
        assert result.returncode == 0, result.stderr
        asked.append([(entry["method"], entry["path"], entry["status"]) for entry in hub.log()])
    assert asked[0] == asked[1]
    files = [sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")) for name in "01"]
    assert files[0] == files[1]


LOAD = """
import sys
import vitreg_hf
from transformers import AutoImageProcessor, AutoModel
AutoModel.from_pretrained(sys.argv[1])
AutoImageProcessor.from_pretrained(sys.argv[1])
"""
