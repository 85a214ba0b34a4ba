"""From a folder or a training to the Hub and back, by the commands that a person types."""

import json
import pathlib
import re
import shutil

import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN = ROOT / "examples" / "train_image_classification.py"
SMALL = ["--num_hidden_layers", "1", "--hidden_size", "32", "--max_train_samples", "160", "--num_train_epochs", "1"]

VITREG = "import sys; from vitreg_hf.cli import main; sys.exit(main(sys.argv[1:]))"
EXAMPLE = "import runpy, sys; sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of a trained model, where it may be changed."""
    return shutil.copytree(trained, tmp_path / "model")


def test_push_says_what_it_did_and_the_second_time_that_nothing_changed(hub, client, folder):
    first = client.run(VITREG, "push", folder, "vitreg-pets", "--tag", "v1.0", "--message", "First weights")
    assert first.returncode == 0, first.stderr
    assert f"{hub.url}/alice/vitreg-pets" in first.stdout
    tree = hub.tree("alice/vitreg-pets")
    assert tree["tags"]["v1.0"]["files"] == tree["main"]["files"]
    assert {"config.json", "model.safetensors", "README.md", "results.json"} <= set(tree["main"]["files"])
    second = client.run(VITREG, "push", folder, "vitreg-pets", "--tag", "v1.0")
    assert second.returncode == 0, second.stderr
    assert hub.tree("alice/vitreg-pets") == tree
    assert first.stdout.startswith("published ")
    assert second.stdout.startswith("unchanged ")


@pytest.mark.parametrize(
    ("arguments", "token", "code", "sentence"),
    [
        (["lab/ok"], "hf_wrong", 1, "does not know this token"),
        (["lab/ok"], None, 1, "hf auth login"),
        (["bob/not-mine"], "hf_alice", 2, "bob"),
        (["lab/ok", "--license", "gpl-99"], "hf_alice", 2, "licence"),
        (["no good/name"], "hf_alice", 2, "no good/name"),
    ],
)
def test_a_mistake_is_one_sentence_and_sends_nothing(hub, client, folder, arguments, token, code, sentence):
    ended = client.run(VITREG, "push", folder, *arguments, token=token)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.startswith("vitreg push: ")
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr
    assert hub.tree(arguments[0]) == {}


def test_a_connection_that_fails_is_one_sentence_and_exit_code_1(hub, client, folder):
    hub.reset()
    assert client.run(VITREG, "push", folder, "lab/counted").returncode == 0
    commit = next(request["number"] for request in hub.log() if "/commit/" in request["path"])
    hub.reset()
    hub.fault(commit, "close_before")
    ended = client.run(VITREG, "push", folder, "lab/dropped")
    hub.reset()
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("vitreg push: ")
    assert "Traceback" not in ended.stderr
    assert client.run(VITREG, "push", folder, "lab/dropped").returncode == 0
    assert hub.tree("lab/dropped")["main"]["files"].keys() == hub.tree("lab/counted")["main"]["files"].keys()


def test_card_command_takes_up_a_licence(client, folder):
    ended = client.run(VITREG, "card", folder, "--model-id", "lab/pets", "--license", "cc-by-4.0")
    assert ended.returncode == 0, ended.stderr
    text = (folder / "README.md").read_text()
    assert "license: cc-by-4.0" in text
    assert '"lab/pets"' in text
    assert ended.stdout.split()[-1] == str(folder / "README.md")


def test_a_training_publishes_at_its_end(hub, client, tmp_path):
    options = ["--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "lab/trained"]
    options += ["--hub_private_repo", "--hub_revision", "first/try"]
    ended = client.run(EXAMPLE, TRAIN, *SMALL, *options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"{hub.url}/lab/trained" in ended.stdout
    tree = hub.tree("lab/trained")
    assert tree["commits"]["first/try"] == tree["commits"]["main"] + 1
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json"}
    assert expected | {"training_curve.png"} <= set(tree["first/try"]["files"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["license"] == "apache-2.0"
    assert not [name for name in results["hyperparameters"] if "hub" in name]


def test_a_training_that_may_not_publish_does_not_begin(client, tmp_path):
    options = ["--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "bob/his"]
    ended = client.run(EXAMPLE, TRAIN, *SMALL, *options)
    assert ended.returncode != 0
    assert "bob" in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_the_readme_says_of_publishing_works(hub, client, fresh, folder, tmp_path):
    section = re.search(r"## Publish and use\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    commands, code = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("bash", "text"))
    (command,) = re.findall(r"^vitreg (push .*?)\s*(?:#.*)?$", commands, re.MULTILINE)
    arguments = command.replace("outputs/digits", str(folder)).replace("you/", "alice/").split()
    assert client.run(VITREG, *arguments).returncode == 0
    assert len(re.findall(r"\S.*\n", commands + code)) <= 10
    PIL.Image.new("RGB", (40, 32)).save(tmp_path / "digit.png")
    code = code.replace("you/", "alice/").replace('"digit.png"', repr(str(tmp_path / "digit.png")))
    code = code.replace(".show()", f".save({str(tmp_path / 'overlay.png')!r})")
    environment = hub.environment(tmp_path / "home", token=None)
    ended = fresh(code, **environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    with PIL.Image.open(tmp_path / "overlay.png") as overlay:
        assert overlay.width > 300
