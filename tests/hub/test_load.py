"""What is on the Hub loads by its id: by every Auto class, from every revision, offline, and with known errors."""

import contextlib
import hashlib
import inspect
import json
import signal
from dataclasses import dataclass

import pytest
import torch

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegImageProcessor
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
    about = {"class": type(thing).__name__, "module": type(thing).__module__.split(".")[0]}
    if isinstance(thing, torch.nn.Module):
        return about | {"digest": digest(thing)}
    return about | {"label": thing.id2label[0] if hasattr(thing, "id2label") else thing.size["height"]}

def failed(error):
    names, cause = [], error
    while cause:
        names.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return {"errors": names, "message": str(error)}

for request in json.loads(sys.argv[1]):
    try:
        answer = described(loaded(*request))
    except Exception as error:
        answer = failed(error)
    answer["executed"] = sorted(os.listdir(os.environ["CANARY"])) if "CANARY" in os.environ else []
    print("\\nANSWER", json.dumps(answer), flush=True)  # a question may stand on the line already
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


LOAD = inspect.getsource(digest) + LOAD


def answers(result):
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("ANSWER")]
    return [json.loads(line.removeprefix("ANSWER")) for line in lines]


@pytest.fixture
def load(client):
    """Tells what came of each `(Auto class, repository, options)`, in one process which has this package."""

    def run(*requests, **settings):
        return answers(client.run(WITH_PACKAGE + LOAD, json.dumps(requests), **settings))

    return run


@pytest.fixture
def load_without_package(fresh, hub):
    """As `load`, where this package cannot be imported."""

    def run(*requests, home, **settings):
        environment = hub.environment(home, **settings)
        return answers(fresh(WITHOUT_PACKAGE + LOAD, json.dumps(requests), **environment))

    return run


def upload(client, *steps):
    """Ids of the commits made by uploading each `(folder, repository, revision, tag)`."""
    result = client.run(UPLOAD, json.dumps([[str(folder), *rest] for folder, *rest in steps]))
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def save(folder, model_class=ViTRegForImageClassification, seed=0, **options):
    """Save a tiny model and its processor, in which all numbers and labels differ between seeds; return the model."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    labels = {0: f"label {seed}", 1: "other"}
    model = model_class(ViTRegConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=4, id2label=labels))
    model.eval().save_pretrained(folder, **options)
    ViTRegImageProcessor(size={"height": 32 + 8 * seed, "width": 32}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def make(client, tmp_path_factory):
    """Makes a repository with a tiny model, by name; returns the model."""

    def run(name, change=lambda folder: None, **options):
        folder = tmp_path_factory.mktemp(name)
        model = save(folder, **options)
        change(folder)
        upload(client, (folder, f"alice/{name}", "main", None))
        return model

    return run


@dataclass(frozen=True)
class Revisions:
    """A repository whose branches and commits all hold other weights, with the seeds by the names of revisions."""

    seeds: dict[str, int]
    digests: list[str]
    repository: str = "alice/revisions"


@pytest.fixture(scope="module")
def revisions(client, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("revision") for _ in range(4)]
    digests = [digest(save(folder, seed=seed)) for seed, folder in enumerate(folders)]
    repository = Revisions.repository
    steps = [(repository, "main", "v1.0"), (repository, "main", None), (repository, "next", None)]
    steps.append((repository, "dev/x", None))
    commits = upload(client, *[(folder, *step) for folder, step in zip(folders, steps, strict=True)])
    seeds = {"v1.0": 0, commits[0]: 0, commits[0][:8]: 0, "main": 1, commits[1]: 1, "next": 2, "dev/x": 3}
    return Revisions(seeds, digests)


@pytest.fixture(scope="module")
def classifier(make):
    """The model in `alice/classifier`, which tests only read."""
    return make("classifier")


CLASSIFIER = ("AutoModelForImageClassification", "alice/classifier", {})


# -- by every class and revision, from an empty cache


@pytest.mark.parametrize("auto", AUTO_MODELS)
def test_every_auto_class_loads_the_same_bits(make, load, auto):
    saved = make(auto, model_class=AUTO_MODELS[auto])
    [found] = load((auto, f"alice/{auto}", {}))
    assert found == {
        "class": AUTO_MODELS[auto].__name__,
        "module": "vitreg_hf",
        "digest": digest(saved),
        "executed": [],
    }


def test_backbones_load_from_a_model_with_a_head(classifier, load):
    names = ("AutoModel", "AutoBackbone", "ViTRegBackbone")
    found = load(*((name, "alice/classifier", {}) for name in names))
    assert [one["class"] for one in found] == ["ViTRegModel", "ViTRegBackbone", "ViTRegBackbone"]
    assert {one["digest"] for one in found} == {digest(classifier.vitreg)}


@pytest.mark.parametrize("backend", [None, "torchvision", "pil"])
def test_image_processors_of_both_backends_load(revisions, load, backend):
    [found] = load(("AutoImageProcessor", revisions.repository, {"backend": backend}))
    expected = "ViTRegImageProcessorPil" if backend == "pil" else "ViTRegImageProcessor"
    assert (found["class"], found["label"]) == (expected, 40)


def expected_of(revisions, name):
    seed = revisions.seeds[name]
    return [f"label {seed}", 32 + 8 * seed, revisions.digests[seed]]


def test_every_kind_of_revision_is_told_apart_from_an_empty_cache(revisions, load):
    assert len(set(revisions.digests)) == 4
    names = ("AutoConfig", "AutoImageProcessor", "AutoModelForImageClassification")
    for revision in [None, *revisions.seeds]:
        found = load(*((name, revisions.repository, {"revision": revision}) for name in names))
        found = [one.get("digest") or one.get("label") for one in found]
        assert found == expected_of(revisions, revision or "main"), revision


def test_revisions_in_one_cache_do_not_mix(revisions, load):
    order = [*revisions.seeds, *reversed(revisions.seeds)]
    name = "AutoModelForImageClassification"
    found = load(*((name, revisions.repository, {"revision": revision}) for revision in order))
    assert [one["digest"] for one in found] == [expected_of(revisions, revision)[2] for revision in order]


def test_a_branch_that_moved_is_loaded_anew(make, load, tmp_path):
    for seed in range(2):
        saved = make("moves", seed=seed)
        [found] = load(("AutoModelForImageClassification", "alice/moves", {}), home=tmp_path)
        assert found["digest"] == digest(saved)


def test_sharded_weights_load(make, load, hub):
    saved = make("sharded", max_shard_size="20KB")
    [found] = load(("AutoModelForImageClassification", "alice/sharded", {}))
    assert found["digest"] == digest(saved)
    files = hub.tree("alice/sharded")["main"]["files"]
    assert "model.safetensors.index.json" in files
    assert len([path for path in files if path.endswith(".safetensors")]) > 2


# -- when the Hub is not there


@contextlib.contextmanager
def nobody_answers(hub):
    hub.stop()
    try:
        yield
    finally:
        hub.start()


# AutoBackbone asks the Hub whether the repository exists, each time
OFFLINE = ("AutoConfig", "AutoImageProcessor", *(name for name in AUTO_MODELS if name != "AutoBackbone"))


@pytest.mark.parametrize("settings", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "unreachable"])
def test_what_is_in_the_cache_loads_without_the_hub(classifier, load, hub, tmp_path, settings):
    requests = [(name, "alice/classifier", {}) for name in (*OFFLINE, "ViTRegBackbone")]
    online = load(*requests, home=tmp_path)
    with nobody_answers(hub):
        offline = load(*requests, home=tmp_path, **settings)
    assert [one["class"] for one in offline] == [one["class"] for one in online]
    assert "errors" not in {key for one in offline for key in one}
    by_name = dict(zip((name for name, *_ in requests), offline, strict=True))
    assert by_name["AutoModelForImageClassification"]["digest"] == digest(classifier)
    assert by_name["AutoModel"]["digest"] == by_name["ViTRegBackbone"]["digest"] == digest(classifier.vitreg)


def test_every_revision_in_the_cache_loads_offline(revisions, load, tmp_path):
    requests = [(CLASSIFIER[0], revisions.repository, {"revision": revision}) for revision in revisions.seeds]
    load(*requests, home=tmp_path)
    offline = load(*requests, home=tmp_path, HF_HUB_OFFLINE="1")
    assert [one["digest"] for one in offline] == [expected_of(revisions, revision)[2] for revision in revisions.seeds]


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModel", "ViTRegBackbone"])
def test_what_is_not_in_the_cache_says_so_offline(classifier, load, name):
    [found] = load((name, "alice/classifier", {}), HF_HUB_OFFLINE="1")
    assert found["errors"][:2] == ["OSError", "LocalEntryNotFoundError"]
    assert "We couldn't connect" in found["message"]


# -- errors users know

MISSING = ("RepositoryNotFoundError", "is not a valid model identifier")
WRONG_TOKEN = ("HfHubHTTPError", "Invalid credentials in Authorization header")
GATED = ("GatedRepoError", "You are trying to access a gated repo")
PRIVATE_TO = {"hf_alice": None, "hf_reader": None, "hf_bob": MISSING, "hf_wrong": WRONG_TOKEN, None: MISSING}
GATED_TO = {
    "hf_alice": (None, None),
    "hf_bob": ((*GATED, "not in the authorized list"), None),
    "hf_wrong": (WRONG_TOKEN, WRONG_TOKEN),
    None: ((*GATED, "be authenticated"), (*GATED, "be authenticated")),
}


def check_outcome(found, saved, error):
    """Weights, or an error of Transformers with this cause and these phrases."""
    if error is None:
        assert found.get("digest") == digest(saved), found.get("message")
    else:
        assert found["errors"][:2] == ["OSError", error[0]]
        assert all(phrase in found["message"] for phrase in error[1:]), found["message"]


def test_private_repositories_load_for_their_owners_only(make, load, hub):
    saved = make("private").vitreg
    hub.settings("alice/private", private=True)
    for token, error in PRIVATE_TO.items():
        [found] = load(("AutoModel", "alice/private", {}), token=token)
        check_outcome(found, saved, error)
        found = load(("AutoImageProcessor", "alice/private", {}), token=token)[0]
        assert ("label" in found) == (error is None)


def test_a_token_can_be_passed_as_an_argument(make, load, hub):
    saved = make("private-too").vitreg
    hub.settings("alice/private-too", private=True)
    options = {"token": "hf_alice"}
    for found in load(*((name, "alice/private-too", options) for name in ("AutoModel", "ViTRegBackbone")), token=None):
        check_outcome(found, saved, None)


def test_gated_repositories_load_for_those_who_were_let_in(make, load, hub):
    saved = make("gated").vitreg
    for granted, grant in enumerate(([], ["bob"])):
        hub.settings("alice/gated", gated="manual", grant=grant)
        for token, errors in GATED_TO.items():
            [found] = load(("AutoModel", "alice/gated", {}), token=token)
            check_outcome(found, saved, errors[granted])


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModel", "AutoImageProcessor"])
def test_missing_revisions_and_repositories_are_named(classifier, load, name):
    no_branch, no_commit, no_repository = load(
        (name, "alice/classifier", {"revision": "nowhere"}),
        (name, "alice/classifier", {"revision": "0" * 40}),
        (name, "alice/nothing", {}),
    )
    check_outcome(no_branch, None, ("RevisionNotFoundError", "nowhere is not a valid git identifier"))
    check_outcome(no_commit, None, ("RevisionNotFoundError", f"{'0' * 40} is not a valid git identifier"))
    check_outcome(no_repository, None, (MISSING[0], f"alice/nothing is not a local folder and {MISSING[1]}"))


# -- damaged and interrupted downloads


@pytest.mark.parametrize("kept", [0, 4, 100, 50_000, -4])
def test_truncated_weights_on_the_hub_are_refused(make, load, kept):
    def truncate(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])

    make(f"truncated{kept}", truncate)
    [found] = load(("AutoModel", f"alice/truncated{kept}", {}))
    assert found["errors"][:2] == ["ValueError", "SafetensorError"]
    assert "Expected a readable safetensors file" in found["message"]


@pytest.fixture
def next_download(classifier, load, hub):
    """Lets the next download of the weights of `CLASSIFIER` go wrong."""
    hub.reset()
    load(CLASSIFIER)
    [at] = [entry["number"] for entry in hub.log() if is_download(entry)]
    hub.reset()
    yield lambda kind, **more: hub.fault(at, kind, **more)
    hub.reset()


def is_download(entry):
    return entry["method"] == "GET" and entry["path"].endswith("/model.safetensors")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"status": 503}, ("HfHubHTTPError", "503")),
        ({"status": 200, "body": "less than announced"}, ("Consistency check failed",)),
    ],
)
def test_a_failed_download_is_reported_and_works_when_run_again(
    classifier, load, next_download, tmp_path, answer, error
):
    next_download("status", **answer)
    [failed], [again] = load(CLASSIFIER, home=tmp_path), load(CLASSIFIER, home=tmp_path)
    assert failed["errors"][0] == "OSError"
    assert error[-1] in failed["message"]
    assert again["digest"] == digest(classifier)


def test_a_connection_cut_in_the_middle_of_the_weights_is_resumed(classifier, client, hub, next_download, tmp_path):
    classifier.save_pretrained(tmp_path / "same")
    start = (tmp_path / "same" / "model.safetensors").read_bytes()[:300]
    assert start.isascii()  # or it could not be sent as text
    chunked = {"Transfer-Encoding": "chunked", "Connection": "close"}
    next_download("status", status=200, headers=chunked, body=f"{len(start):x}\r\n{start.decode()}\r\n")
    small_chunks = "import huggingface_hub\nhuggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 64\n"  # 10 MB otherwise
    [found] = answers(client.run(small_chunks + WITH_PACKAGE + LOAD, json.dumps([CLASSIFIER])))
    assert [entry["status"] for entry in hub.log() if is_download(entry)] == [200, 206]
    assert found["digest"] == digest(classifier)


def test_a_client_killed_in_the_middle_of_the_weights_completes_when_run_again(classifier, client, load, tmp_path):
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"  # it dies of the byte after these
    killed = client.run(limit + WITH_PACKAGE + LOAD, json.dumps([CLASSIFIER]), home=tmp_path)
    assert killed.returncode == -signal.SIGXFSZ
    assert [path.stat().st_size for path in tmp_path.rglob("*.incomplete")] == [40_000]
    [again] = load(CLASSIFIER, home=tmp_path)
    assert again["digest"] == digest(classifier)


# -- with the code beside the weights

CANARY = "\n\nimport os, pathlib\npathlib.Path(os.environ['CANARY'], __name__.rpartition('.')[2]).touch()\n"
CARD = "---\npipeline_tag: image-classification\nlibrary_name: transformers\n---\n"
ALL = ("AutoConfig", "AutoImageProcessor", *AUTO_MODELS, "pipeline")


@pytest.fixture(scope="module")
def with_code(make):
    """The model in `alice/with-code`, saved as the README says; every file of its code leaves a trace when it runs."""

    def add_canaries(folder):
        for file in folder.glob("*.py"):
            file.write_text(file.read_text() + CANARY)
        (folder / "README.md").write_text(CARD)

    with pytest.MonkeyPatch.context() as patch:
        for class_ in (ViTRegForImageClassification, ViTRegImageProcessor):
            patch.setattr(class_, "_auto_class", None)  # undone at the end: registering is global
        ViTRegForImageClassification.register_for_auto_class("AutoModelForImageClassification")
        ViTRegImageProcessor.register_for_auto_class()
        return make("with-code", add_canaries, seed=2)


@pytest.fixture
def canary(tmp_path):
    folder = tmp_path / "canary"
    folder.mkdir()
    return folder


def code_requests(names, options):
    return [(name, "alice/with-code", options) for name in names]


def test_code_of_the_hub_is_refused_and_not_run_unless_trusted(with_code, load_without_package, canary, tmp_path):
    requests = [*code_requests(ALL, {}), *code_requests(ALL, {"trust_remote_code": False})]
    for found in load_without_package(*requests, home=tmp_path / "home", CANARY=str(canary)):
        assert found["errors"][0] == "ValueError"
        assert "pass the argument `trust_remote_code=True`" in found["message"]
        assert found["executed"] == []


def test_trusted_code_loads_everything_without_the_package_also_offline(
    with_code, classifier, load_without_package, hub, canary, tmp_path
):
    settings = {"home": tmp_path / "home", "CANARY": str(canary)}
    plain = [("AutoConfig", "alice/classifier", {}), ("AutoModel", "alice/classifier", {})]
    *online, no_config, no_model = load_without_package(
        *code_requests(ALL, {"trust_remote_code": True}), *plain, **settings
    )
    for found in (no_config, no_model):
        assert "model type `vitreg` but Transformers does not recognize this architecture" in found["message"]
    with nobody_answers(hub):
        options = {"trust_remote_code": True}
        offline = load_without_package(*code_requests(OFFLINE, options), HF_HUB_OFFLINE="1", **settings)
    check_trusted(ALL, online, with_code)
    check_trusted(OFFLINE, offline, with_code)
    assert {"configuration_vitreg", "modeling_vitreg", "image_processing_vitreg"} <= set(online[-1]["executed"])


def check_trusted(names, answered, saved):
    """Every class comes from the repository, and has what was saved."""
    found = dict(zip(names, answered, strict=True))
    assert {one.get("module", one.get("message")) for one in answered} == {"transformers_modules"}
    for name in AUTO_MODELS.keys() & found.keys():
        assert found[name]["class"] == AUTO_MODELS[name].__name__
    assert (found["AutoConfig"]["label"], found["AutoImageProcessor"]["label"]) == ("label 2", 48)
    for name in {"AutoModelForImageClassification", "pipeline"} & found.keys():
        assert found[name]["digest"] == digest(saved)
    for name in {"AutoModel", "AutoBackbone"} & found.keys():
        assert found[name]["digest"] == digest(saved.vitreg)


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_with_the_package_its_own_code_is_used_whatever_is_trusted(with_code, load, canary, options):
    found = dict(zip(ALL, load(*code_requests(ALL, options), CANARY=str(canary)), strict=True))
    assert {one.get("module", one.get("message")) for one in found.values()} == {"vitreg_hf"}
    assert found["AutoModelForImageClassification"]["digest"] == digest(with_code)
    assert not any(one["executed"] for one in found.values())
