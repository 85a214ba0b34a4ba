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
    return lambda *requests, **settings: answers(
        client.run(WITH_PACKAGE + RUN, json.dumps(requests), **settings)
    )


def locally(task, folder, images, made=None, **called):
    """The result of the pipeline on a folder, in this process."""
    return plain(pipeline(task, model=str(folder), **(made or {}))(request(task, folder, images)[2], **called))


def save(folder, model_class, card, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTRegConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=4, num_labels=3, initializer_range=0.2)
    model_class(config).eval().save_pretrained(folder)
    ViTRegImageProcessor(size={"height": 32, "width": 48}, do_center_crop=False).save_pretrained(folder)
    (folder / "README.md").write_text(card)


def card_for(task):
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\n---\n"


def upload(client, *steps):
    result = client.run(UPLOAD, json.dumps([[str(folder), *rest] for folder, *rest in steps]))
    assert result.returncode == 0, result.stderr


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
    if isinstance(expected, list) and any(isinstance(one, (dict, list)) for one in expected):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == pytest.approx(expected, abs=1e-5) if not isinstance(expected, str) else found == expected
