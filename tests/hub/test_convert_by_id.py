"""Checkpoints of other families convert by their id on the Hub: every revision, offline, and with known errors."""

import contextlib
import json

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from vitreg_hf.conversion.convert import convert_checkpoint

CONVERT = """
import hashlib, json, os, sys
from vitreg_hf.conversion.convert import convert_checkpoint

def digest(model):
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()

for source, output, options in json.loads(sys.argv[1]):
    try:
        found = convert_checkpoint(source, output, **options)
        answer = {"layout": found.report.layout, "digest": digest(found.model), "size": dict(found.processor.size)}
    except Exception as error:
        bases = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": bases, "message": str(error), "left": os.path.exists(output or "/nothing")}
    print("\\nANSWER", json.dumps(answer), flush=True)
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
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


@pytest.fixture
def convert(client):
    """Tells what came of each `(source, output, options)`, converted in one process."""

    def run(*requests, **settings):
        requests = [(*request, None, {})[:3] if len(request) < 3 else request for request in requests]
        result = client.run(CONVERT, json.dumps(requests), **settings)
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if line.startswith("ANSWER")]
        return [json.loads(line.removeprefix("ANSWER")) for line in lines]

    return run


def saved(folder, seed=0):
    """A folder with a tiny DINOv2 with registers as Transformers saves it; another one for every seed."""
    torch.manual_seed(seed)
    model = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZES))
    model.save_pretrained(folder)
    hf.BitImageProcessor(size={"shortest_edge": 32 + seed}, crop_size=28).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def upload(client):
    """Upload each `(folder, repository, revision, tag)`; returns the ids of the commits."""

    def run(*steps):
        result = client.run(UPLOAD, json.dumps([[str(folder), *rest] for folder, *rest in steps]))
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    return run


def digest_of(folder):
    """Digest of what a folder converts to, as the other process computes it."""
    names = {}
    exec(CONVERT.split("for source")[0], names)
    return names["digest"](convert_checkpoint(folder).model)


@pytest.fixture(scope="module")
def revisions(upload, tmp_path_factory):
    """A repository whose revisions all hold other weights; the folders by the names of revisions."""
    folders = [saved(tmp_path_factory.mktemp("revision"), seed) for seed in range(3)]
    repository = "alice/dinov2"
    steps = [(folders[0], repository, "main", "v1.0"), (folders[1], repository, "main", None)]
    commits = upload(*steps, (folders[2], repository, "dev/x", None))
    return {None: 1, "main": 1, "v1.0": 0, "dev/x": 2, commits[0]: 0, commits[1]: 1}, folders


def downloaded(hub):
    """Names of files that were fetched."""
    paths = [entry["path"] for entry in hub.log() if entry["method"] == "GET"]
    return {path.split("/resolve/")[1].split("/", 1)[1] for path in paths if "/resolve/" in path}


def test_every_revision_is_converted(revisions, convert, tmp_path):
    seeds, folders = revisions
    requests = [("alice/dinov2", None, {"revision": revision}) for revision in seeds]
    found = convert(*requests, home=tmp_path)
    assert [one["layout"] for one in found] == ["dinov2_with_registers"] * len(seeds)
    assert [one["digest"] for one in found] == [digest_of(folders[seed]) for seed in seeds.values()]
    assert [one["size"] for one in found] == [{"shortest_edge": 32 + seed} for seed in seeds.values()]
    assert len({one["digest"] for one in found}) == 3


def test_what_was_converted_by_id_is_saved(revisions, convert, tmp_path):
    _, folders = revisions
    [found] = convert(("alice/dinov2", str(tmp_path / "converted"), {}))
    assert found["digest"] == digest_of(folders[1])
    report = json.loads((tmp_path / "converted" / "conversion.json").read_text())
    assert report["source"] == "alice/dinov2"


EXPORT = """
import json, sys
from vitreg_hf.conversion.back import export_checkpoint
print("WRITTEN", export_checkpoint(*json.loads(sys.argv[1])))
"""


def test_the_way_back_knows_the_layout_of_what_was_published(upload, client, tmp_path):
    folder = saved(tmp_path / "source")
    convert_checkpoint(folder, tmp_path / "converted")
    upload((tmp_path / "converted", "alice/converted", "main", None))
    ended = client.run(EXPORT, json.dumps(["alice/converted", str(tmp_path / "back")]))
    assert ended.returncode == 0, ended.stderr
    model, again = (hf.Dinov2WithRegistersModel.from_pretrained(path) for path in (folder, tmp_path / "back"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) or name == "embeddings.mask_token"


def test_only_what_is_needed_is_fetched(upload, convert, hub, tmp_path):
    """Of two forms of the weights the safe one, and nothing else that a repository may have."""
    folder = saved(tmp_path / "with junk")
    torch.save({"other": torch.ones(2)}, folder / "pytorch_model.bin")
    for name in ("tf_model.h5", "flax_model.msgpack", "training_args.bin", "README.md", "optimizer.pt"):
        (folder / name).write_bytes(b"junk")
    (folder / "onnx").mkdir()
    for name in ("model.onnx", "config.json", "model.safetensors"):
        (folder / "onnx" / name).write_bytes(b"junk")
    upload((folder, "alice/with-junk", "main", None))
    hub.reset()
    [found] = convert(("alice/with-junk",))
    assert found["digest"] == digest_of(folder)
    assert downloaded(hub) == {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_of_shards_those_that_the_index_names_are_fetched(upload, convert, hub, tmp_path):
    whole = saved(tmp_path / "whole")
    folder = tmp_path / "shards"
    hf.Dinov2WithRegistersModel.from_pretrained(whole).save_pretrained(folder, max_shard_size="30KB")
    save_file({"other": torch.ones(2)}, folder / "adapter.safetensors")
    upload((folder, "alice/shards", "main", None))
    hub.reset()
    [found] = convert(("alice/shards",))
    assert found["digest"] == digest_of(whole)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {"config.json", "model.safetensors.index.json", *index["weight_map"].values()}
    assert len(names) > 4
    assert downloaded(hub) == names


def dinov2_pth(width=64):
    """The reference implementation's layout, of one block."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width), "register_tokens": (1, 4, width)}
    shapes |= {
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
    }
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (96, width)}
    for name, (rows, columns) in {**linear, "mlp.fc2": (width, 96)}.items():
        shapes |= {f"blocks.0.{name}.weight": (rows, columns), f"blocks.0.{name}.bias": (rows,)}
    for name in ("norm.", "blocks.0.norm1.", "blocks.0.norm2."):
        shapes |= {f"{name}weight": (width,), f"{name}bias": (width,)}
    shapes |= {f"blocks.0.ls{number}.gamma": (width,) for number in (1, 2)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_a_pickle_of_any_name_is_fetched_where_there_is_nothing_else(upload, convert, hub, tmp_path):
    torch.save(dinov2_pth(), tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    (tmp_path / "README.md").write_text("about")
    upload((tmp_path, "alice/pickle", "main", None))
    hub.reset()
    [found] = convert(("alice/pickle",))
    assert found["layout"] == "dinov2"
    assert downloaded(hub) == {"dinov2_vits14_reg4_pretrain.pth"}


def test_of_several_files_none_of_which_is_preferred_none_is_fetched(upload, convert, hub, tmp_path):
    for name in ("dinov2_vits14.pth", "dinov2_vitb14.pth"):
        torch.save(dinov2_pth(), tmp_path / name)
    upload((tmp_path, "alice/several", "main", None))
    hub.reset()
    [found] = convert(("alice/several", str(tmp_path / "converted"), {}))
    assert found["error"][0] == "ValueError"
    assert "got several: dinov2_vitb14.pth, dinov2_vits14.pth; download one and name its path" in found["message"]
    assert not found["left"]
    assert downloaded(hub) == set()


def test_a_repository_without_weights_is_refused(upload, convert, tmp_path):
    (tmp_path / "README.md").write_text("about")
    upload((tmp_path, "alice/empty", "main", None))
    [found] = convert(("alice/empty",))
    assert (found["error"][0], "one file of weights in alice/empty, got none" in found["message"]) == (
        "ValueError",
        True,
    )


def test_code_on_the_hub_is_refused_and_not_run(upload, convert, tmp_path):
    class Runs:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save({"model": Runs()}, folder / "pytorch_model.bin")
    upload((folder, "alice/code", "main", None))
    [found] = convert(("alice/code",))
    assert found["error"][0] == "ValueError"
    assert "code or objects" in found["message"]
    assert not (tmp_path / "ran").exists()


# When the Hub is not there


@contextlib.contextmanager
def nobody_answers(hub):
    hub.stop()
    try:
        yield
    finally:
        hub.start()


@pytest.mark.parametrize("settings", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "unreachable"])
def test_what_is_in_the_cache_converts_without_the_hub(settings, revisions, convert, hub, tmp_path):
    seeds, _ = revisions
    requests = [("alice/dinov2", None, {"revision": revision}) for revision in (None, "v1.0", list(seeds)[-1])]
    online = convert(*requests, home=tmp_path)
    with nobody_answers(hub):
        offline = convert(*requests, home=tmp_path, **settings)
    assert offline == online


@pytest.mark.parametrize("settings", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "unreachable"])
def test_what_is_not_in_the_cache_says_so(settings, revisions, convert, hub, tmp_path):
    with nobody_answers(hub):
        [found] = convert(("alice/dinov2", str(tmp_path / "converted"), {}), **settings)
    assert "OSError" in found["error"]
    assert found["message"].startswith(
        "Expected alice/dinov2 as a file or folder, or on the Hub or in its cache, got none: "
    )
    assert not found["left"]


def test_a_cache_with_a_config_alone_is_refused(revisions, convert, client, hub, tmp_path):
    """As loading the config leaves it."""
    code = "import transformers; transformers.AutoConfig.from_pretrained('alice/dinov2')"
    assert client.run(code, home=tmp_path).returncode == 0
    with nobody_answers(hub):
        [found] = convert(("alice/dinov2",), home=tmp_path)
    assert {"ValueError", "OSError"} & set(found["error"])
    assert found["message"].startswith("Expected ")


# Errors


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("alice/nothing-of-this-name", {}, "Repository Not Found"),
        ("alice/dinov2", {"revision": "v9"}, "Revision Not Found"),
        ("alice/dinov2", {"revision": "0" * 40}, "Revision Not Found"),
    ],
    ids=["repository", "branch", "commit"],
)
def test_what_is_not_there_is_one_sentence(source, options, message, revisions, convert, tmp_path):
    [found] = convert((source, str(tmp_path / "converted"), options))
    assert "OSError" in found["error"]
    assert found["message"].startswith(f"Expected {source} on the Hub, got: ")
    assert message in found["message"]
    assert "\n" not in found["message"]
    assert not found["left"]


@pytest.mark.parametrize("name", ["a--b", "-a/b", "a/b..c", "a b/c"])
def test_an_id_that_no_repository_can_have_is_refused(name, convert):
    [found] = convert((name,))
    assert "ValueError" in found["error"]
    assert repr(name) in found["message"]


def test_a_private_repository_converts_for_its_owner_alone(upload, convert, hub, tmp_path):
    folder = saved(tmp_path / "private")
    upload((folder, "alice/private", "main", None))
    hub.settings("alice/private", private=True)
    [found] = convert(("alice/private",))
    assert found["digest"] == digest_of(folder)
    for token in ("hf_bob", None):
        [found] = convert(("alice/private", str(tmp_path / "converted"), {}), token=token)
        assert "OSError" in found["error"]
        assert "Repository Not Found" in found["message"]
        assert not found["left"]


def test_a_gated_repository_says_what_to_do(upload, convert, hub, tmp_path):
    folder = saved(tmp_path / "gated")
    upload((folder, "alice/gated", "main", None))
    hub.settings("alice/gated", gated="manual")
    [found] = convert(("alice/gated",), token="hf_bob")
    assert "OSError" in found["error"]
    assert "gated" in found["message"]
    hub.settings("alice/gated", gated="manual", grant=["bob"])
    [found] = convert(("alice/gated",), token="hf_bob")
    assert found["digest"] == digest_of(folder)


def test_the_command_prints_one_line(client, revisions, tmp_path):
    code = "import sys; from vitreg_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = client.run(code, "convert", "alice/nothing-of-this-name", tmp_path / "converted")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("vitreg convert: Expected alice/nothing-of-this-name on the Hub, got: ")
    assert not (tmp_path / "converted").exists()
