"""Pipelines by the id of a repository: the task comes from its card, the results are those of the local model."""

import inspect
import json

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import pipeline

from vitreg_hf import (
    ViTRegConfig,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegImageProcessor,
    ViTRegModel,
)
from vitreg_hf.pipelines import TOKENS

MODELS = {
    "image-classification": ViTRegForImageClassification,
    "image-feature-extraction": ViTRegModel,
    "image-segmentation": ViTRegForSemanticSegmentation,
}
AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
    "image-segmentation": "AutoModelForSemanticSegmentation",
}
SEGMENTATION = ("semantic-segmentation", "image-segmentation")
WITHOUT_PACKAGE = """
import sys
sys.modules["vitreg_hf"] = None  # importing it fails
"""
WITH_PACKAGE = "import vitreg_hf\n"
RUN = """
import json, sys
import numpy as np, PIL.Image
from transformers import pipeline

for task, repository, images, made, called in json.loads(sys.argv[1]):
    try:
        run = pipeline(task, model=repository, **made)
        answer = {"task": run.task, "class": type(run).__name__, "result": plain(run(images, **called))}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print("\\nANSWER", json.dumps(answer))
"""
UPLOAD = """
import json, sys
from huggingface_hub import HfApi

api = HfApi()
for folder, repository, revision in json.loads(sys.argv[1]):
    api.create_repo(repository, exist_ok=True)
    if revision != "main":
        api.create_branch(repository, branch=revision)
    api.upload_folder(folder_path=folder, repo_id=repository, revision=revision)
"""


def plain(value):
    """The result of a pipeline as JSON has it: pictures and arrays as lists."""
    if isinstance(value, PIL.Image.Image):
        value = np.asarray(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


RUN = inspect.getsource(plain) + RUN


def answers(result):
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("ANSWER")]
    return [json.loads(line.removeprefix("ANSWER")) for line in lines]


def request(task, repository, images, made=None, **called):
    return [task, str(repository), images if isinstance(images, list) else str(images), made or {}, called]


@pytest.fixture
def run(client):
    """What came of each `request` in one process which has this package."""
    return lambda *requests, **settings: answers(client.run(WITH_PACKAGE + RUN, json.dumps(requests), **settings))


def locally(task, folder, images, made=None, **called):
    """The result of the pipeline on a folder, in this process."""
    return plain(pipeline(task, model=str(folder), **(made or {}))(request(task, folder, images)[2], **called))


def save(folder, model_class, card, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTRegConfig(
        **sizes, image_size=32, patch_size=8, num_register_tokens=4, num_labels=3, initializer_range=0.2
    )
    model_class(config).eval().save_pretrained(folder)
    ViTRegImageProcessor(size={"height": 32, "width": 48}, do_center_crop=False).save_pretrained(folder)
    (folder / "README.md").write_text(card)


def card_for(task):
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\n---\n"


def upload(client, *steps):
    result = client.run(UPLOAD, json.dumps([[str(folder), *rest] for folder, *rest in steps]))
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def folders(client, tmp_path_factory, picture):
    """Folders by task, each of which is also `alice/<task>`; classification has a branch with other weights."""
    found = {}
    for task, model_class in MODELS.items():
        found[task] = tmp_path_factory.mktemp(task)
        save(found[task], model_class, card_for(task))
        (found[task] / "picture.png").write_bytes(picture.read_bytes())
    found["branch"] = tmp_path_factory.mktemp("branch")
    save(found["branch"], ViTRegForImageClassification, card_for("image-classification"), seed=1)
    steps = [(found[task], f"alice/{task}", "main") for task in MODELS]
    upload(client, *steps, (found["branch"], "alice/image-classification", "dev/x"))
    return found


def same(found, expected):
    """Equal up to what another process may round otherwise."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else found == expected


@pytest.mark.parametrize("task", MODELS)
def test_the_task_is_inferred_from_the_card(folders, run, picture, task):
    [found] = run(request(None, f"alice/{task}", picture))
    assert found["task"] == task
    assert same(found["result"], locally(task, folders[task], picture))


def test_a_folder_as_a_training_leaves_it_answers_with_its_classes(client, run, trained, picture):
    upload(client, (trained, "alice/trained", "main"))
    [found] = run(request(None, "alice/trained", picture))
    assert {one["label"] for one in found["result"]} == {"cat", "dog", "bird"}
    assert same(found["result"], locally("image-classification", trained, picture))


def test_semantic_segmentation_is_image_segmentation(folders, run, picture):
    alias, usual = run(*(request(task, "alice/image-segmentation", picture) for task in SEGMENTATION))
    assert alias["result"] == usual["result"]
    covered = sum(np.array(one["mask"]) > 0 for one in alias["result"])
    assert covered.shape == (40, 56)
    assert (covered == 1).all()


def test_features_come_by_name(folders, run, picture):
    task = "image-feature-extraction"
    *single, found = run(
        *(request(task, f"alice/{task}", picture, {"tokens": name}) for name in TOKENS),
        request(task, f"alice/{task}", picture, tokens=list(TOKENS)),
    )
    expected = locally(task, folders[task], picture, tokens=list(TOKENS))
    assert same(found["result"], expected)
    assert [one["result"] for one in single] == [found["result"][name] for name in TOKENS]
    assert np.array(found["result"]["patch_map"]).shape == (1, 32, 4, 6)
    assert np.array(found["result"]["register_tokens"]).shape == (1, 4, 32)


def test_attention_maps_come_by_id(folders, run, picture):
    [found] = run(request("attention-maps", "alice/image-classification", picture))
    expected = locally("attention-maps", folders["image-classification"], picture)
    overlay, own = np.array(found["result"].pop("overlay")), np.array(expected.pop("overlay"))
    assert same(found["result"], expected)
    assert found["result"]["tokens"] == ["CLS", *(f"register {number}" for number in range(1, 5))]
    assert np.array(found["result"]["maps"]).shape == (5, 4, 6)
    assert overlay.ndim == 3
    assert overlay.std() > 0
    assert overlay.shape[1:] == own.shape[1:]  # its title is the name of the model, and may take another line


def test_a_branch_answers_with_its_own_weights(folders, run, picture):
    revisions = (None, "main", "dev/x")
    found = run(*(request(None, "alice/image-classification", picture, {"revision": one}) for one in revisions))
    usual, main, branch = (one["result"] for one in found)
    assert usual == main
    assert same(branch, locally("image-classification", folders["branch"], picture))
    assert not same(branch, main)


def test_addresses_paths_and_lists_of_both_are_read(folders, run, hub, picture):
    url = f"{hub.url}/alice/image-classification/resolve/main/picture.png"
    ask = ("image-classification", "alice/image-classification")
    path, address, both, batch = run(
        *(request(*ask, images) for images in (picture, url, [str(picture), url])),
        request(*ask, [str(picture), url, url], batch_size=2),
    )
    assert path["result"] == address["result"]
    assert both["result"] == [path["result"]] * 2
    assert same(batch["result"], [path["result"]] * 3)


def test_an_address_without_an_image_names_itself(folders, run, hub, picture):
    missing = f"{hub.url}/alice/image-classification/resolve/main/missing.png"
    card = f"{hub.url}/alice/image-classification/resolve/main/README.md"
    ask = ("image-classification", "alice/image-classification")
    alone, in_a_list = run(request(*ask, missing), request(*ask, [str(picture), card]))
    assert alone["error"] == in_a_list["error"] == "ValueError"
    assert f"Expected a readable image, got '{missing}'" in alone["message"]
    assert f"Expected a readable image, got image 2 of 2, '{card}'" in in_a_list["message"]


# -- what cannot be loaded


def test_a_card_without_a_task_and_missing_repositories_say_so(client, run, picture, tmp_path):
    save(tmp_path, ViTRegModel, "# No metadata\n")
    upload(client, (tmp_path, "alice/no-task", "main"))
    no_task, named, no_repository, no_revision = run(
        request(None, "alice/no-task", picture),
        request("image-feature-extraction", "alice/no-task", picture),
        request(None, "alice/nothing", picture),
        request(None, "alice/no-task", picture, {"revision": "nowhere"}),
    )
    assert "does not seem to have a correct `pipeline_tag`" in no_task["message"]
    assert "result" in named
    assert "alice/nothing is not a local folder and is not a valid model identifier" in no_repository["message"]
    assert "nowhere is not a valid git identifier" in no_revision["message"]


@pytest.mark.parametrize("task", [None, "image-classification"])
def test_private_models_need_their_owners_token(folders, client, run, hub, picture, task):
    repository = f"alice/private-{task or 'inferred'}"
    upload(client, (folders["image-classification"], repository, "main"))
    hub.settings(repository, private=True)
    ask = (task, repository, picture)
    [passed], [in_environment] = run(request(*ask, {"token": "hf_alice"}), token=None), run(request(*ask))
    assert passed["result"] == in_environment["result"]
    for token in (None, "hf_bob"):
        [refused] = run(request(*ask), token=token)
        assert "is not a valid model identifier" in refused["message"]
    [wrong] = run(request(*ask), token="hf_wrong")
    assert "Invalid credentials in Authorization header" in wrong["message"]


def test_offline_the_task_has_to_be_named(folders, run, picture, tmp_path):
    requests = [request(task, f"alice/{task}", picture) for task in MODELS]
    requests.append(request("attention-maps", "alice/image-classification", picture, overlay=False))
    online = run(*requests, home=tmp_path)
    assert all("result" in one for one in online)
    *offline, inferred = run(
        *requests, request(None, "alice/image-classification", picture), home=tmp_path, HF_HUB_OFFLINE="1"
    )
    assert offline == online
    assert inferred["message"] == "You cannot infer task automatically within `pipeline` when using offline mode"


def test_trusted_code_runs_in_the_pipelines_where_the_package_is_missing(
    folders, client, hub, fresh, picture, tmp_path, monkeypatch
):
    for class_ in (*MODELS.values(), ViTRegImageProcessor):
        monkeypatch.setattr(class_, "_auto_class", None)  # undone after the test: registering is global
    ViTRegImageProcessor.register_for_auto_class()
    for task, model_class in MODELS.items():
        model_class.register_for_auto_class(AUTO_CLASSES[task])
        save(tmp_path / task, model_class, card_for(task))
    upload(client, *((tmp_path / task, f"alice/code-{task}", "main") for task in MODELS))
    requests = [request(None, f"alice/code-{task}", picture, {"trust_remote_code": True}) for task in MODELS]
    found = answers(fresh(WITHOUT_PACKAGE + RUN, json.dumps(requests), **hub.environment(tmp_path / "home")))
    for task, answer in zip(MODELS, found, strict=True):
        assert answer.get("task") == task, answer
        assert same(answer["result"], locally(task, folders[task], picture))
