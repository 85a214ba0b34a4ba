"""Who may do what on the loopback Hub, and the errors that the real client makes of it."""

import urllib.error
import urllib.request

import pytest

WRONG_TOKEN = {"Authorization": "Bearer hf_nobody"}


def test_private_repositories_are_hidden_from_others(hub, ask, pushed):
    code = "say(failure(api.model_info, sys.argv[1])); "
    hub.settings(pushed, private=True)
    assert ask(code, pushed) is None
    assert ask(code, pushed, token="hf_reader") is None
    assert ask(code, pushed, token="hf_bob") == ["RepositoryNotFoundError", 404]
    assert ask(code, pushed, token=None) == ["RepositoryNotFoundError", 401]
    assert ask("api.update_repo_settings(sys.argv[1], private=False); say(0)", pushed) == 0
    assert ask(code, pushed, token=None) is None


def test_files_of_gated_repositories_are_for_those_who_were_let_in(hub, ask, pushed):
    code = "say([failure(api.hf_hub_download, sys.argv[1], 'config.json'), failure(api.model_info, sys.argv[1])])"
    assert (
        ask("api.update_repo_settings(sys.argv[1], gated='auto'); say(api.model_info(sys.argv[1]).gated)", pushed)
        == "auto"
    )
    assert ask(code, pushed) == [None, None]
    assert ask(code, pushed, token=None) == [["GatedRepoError", 401], None]
    assert ask(code, pushed, token="hf_bob") == [["GatedRepoError", 403], None]
    hub.settings(pushed, grant=["bob"])
    assert ask(code, pushed, token="hf_bob") == [None, None]


def test_a_wrong_token_is_told_from_a_missing_repository(hub, ask, pushed):
    code = "say([failure(api.model_info, sys.argv[1]), failure(api.whoami), failure(api.create_repo, 'x')])"
    assert ask(code, pushed, token="hf_nobody") == [["HfHubHTTPError", 401]] * 3
    # over https, as the Hub itself is reached, clients tell the two apart by this sentence
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(urllib.request.Request(f"{hub.url}/api/models/{pushed}", headers=WRONG_TOKEN))
    assert answer.value.headers["X-Error-Message"] == "Invalid credentials in Authorization header"
    answer.value.close()


def test_only_owners_with_a_token_to_write_may_write(hub, ask, pushed):
    code = """
        add = [CommitOperationAdd("a.safetensors", b"a")]
        say([failure(api.create_commit, sys.argv[1], add, commit_message="x"),
             failure(api.create_repo, "alice/another"), failure(api.create_tag, sys.argv[1], tag="t")])
    """
    before = hub.tree(pushed)
    assert ask(code, pushed, token="hf_reader") == [["HfHubHTTPError", 403]] * 3
    assert ask(code, pushed, token="hf_bob") == [["HfHubHTTPError", 403]] * 3
    assert [row[1] for row in ask(code, pushed, token=None)] == [401] * 3
    assert hub.tree(pushed) == before
    assert hub.tree("alice/another") == {}


def test_anybody_may_open_a_pull_request(hub, ask, pushed):
    code = """
        add = [CommitOperationAdd("a.safetensors", b"a")]
        pull = api.create_commit(sys.argv[1], add, commit_message="x", create_pr=True)
        more = [CommitOperationAdd("b.txt", b"b")]
        api.create_commit(sys.argv[1], more, commit_message="y", revision=pull.pr_revision)
        say(pull.pr_url)
    """
    assert ask(code, pushed, token="hf_bob") == f"{hub.url}/{pushed}/discussions/1"
    assert {"a.safetensors", "b.txt"} <= hub.tree(pushed)["refs/pr/1"]["files"].keys()
    assert hub.tree(pushed)["commits"] == {"main": 2, "refs/pr/1": 4}


def test_names_belong_to_their_owners(hub, ask):
    code = """
        mine, of_lab = api.create_repo("mine", private=True).repo_id, api.create_repo("lab/ours").repo_id
        taken = failure(api.create_repo, "alice/mine")
        again = api.create_repo("mine", exist_ok=True).repo_id
        say([mine, of_lab, again, taken, failure(api.create_repo, "bob/theirs"), failure(api.create_repo, "x--y"),
             api.model_info("mine").id])
    """
    mine, of_lab, again, taken, foreign, invalid, short = ask(code)
    assert (mine, of_lab, again, short) == ("alice/mine", "lab/ours", "alice/mine", "alice/mine")
    assert (taken, foreign) == (["HfHubHTTPError", 409], ["HfHubHTTPError", 403])
    assert invalid[0] == "HFValidationError"
    assert ask("me = api.whoami(); say([me['name'], [o['name'] for o in me['orgs']]])") == ["alice", ["lab"]]
