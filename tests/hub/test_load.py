"""What is on the Hub loads by its id: by every Auto class and revision, with this package and without it, offline."""

import hashlib
import inspect
import json
import shutil

import pytest
import torch

from vitreg_hf import ViTRegBackbone, ViTRegConfig, ViTRegForImageClassification, ViTRegImageProcessor
from vitreg_hf.model.modeling_vitreg import AUTO_MODELS

WITHOUT_PACKAGE = """
import importlib.abc, sys

class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vitreg_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuses())
"""
WITH_PACKAGE = "import vitreg_hf\n"
LOAD = """
import hashlib, json, os, sys
import torch, transformers

def loaded(name, repository, options):
    if name == "pipeline":
        return transformers.pipeline(model=repository, **options).model
    found = getattr(transformers, name, None) or getattr(sys.modules["vitreg_hf"], name)
    return found.from_pretrained(repository, **options)

def described(thing):
    about = {"class": type(thing).__name__, "module": type(thing).__module__}
    if isinstance(thing, torch.nn.Module):
        return about | {"digest": digest(thing)}
    return about | {"facts": {name: getattr(thing, name) for name in ("id2label", "image_mean") if hasattr(thing, name)}}

def failed(error):
    causes = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    return {"errors": [type(cause).__name__ for cause in causes], "message": str(error)}

for request in json.loads(sys.argv[1]):
    try:
        answer = described(loaded(*request))
    except Exception as error:
        answer = failed(error)
    answer["executed"] = sorted(os.listdir(os.environ["CANARY"])) if "CANARY" in os.environ else []
    print("\\nANSWER", json.dumps(answer))  # a question may stand on the line already
"""
UPLOAD = """
import json, sys
from huggingface_hub import HfApi

api = HfApi()
for folder, repository, revision, tag in json.loads(sys.argv[1]):
    api.create_repo(repository, exist_ok=True)
    if revision != "main":
        api.create_branch(repository, branch=revision)
    print(api.upload_folder(folder_path=folder, repo_id=repository, revision=revision).oid)
    if tag:
        api.create_tag(repository, tag=tag)
"""


def digest(model):
    """SHA-256 over names, types, shapes and bytes of all weights, sorted by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def answers(result):
    assert result.returncode == 0, result.stderr
    return [json.loads(line.removeprefix("ANSWER")) for line in result.stdout.splitlines() if line.startswith("ANSWER")]


def load(client, *requests, **settings):
    """What a process with this package finds: for each `(Auto class, repository, options)` what came of it."""
    code = WITH_PACKAGE + inspect.getsource(digest) + LOAD
    return answers(client.run(code, json.dumps(requests), **settings))


def upload(client, *steps):
    """Commits made by uploading each `(folder, repository, revision, tag)`."""
    result = client.run(UPLOAD, json.dumps([[str(folder), *rest] for folder, *rest in steps]))
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def save(folder, model_class=ViTRegForImageClassification, label="one", seed=0, **options):
    """Save a tiny model and its processor, both of which know `label`, and return the model."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTRegConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=4, id2label={0: label, 1: "two"})
    model = model_class(config).eval()
    model.save_pretrained(folder, **options)
    ViTRegImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, len(label) / 10]).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")
