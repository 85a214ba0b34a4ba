"""Shards of `torch.distributed.checkpoint`: put together whoever wrote them, and nothing in them is run."""

import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vitreg_hf import ViTRegModel
from vitreg_hf.conversion.convert import convert_checkpoint
from vitreg_hf.conversion.stored import open_source

from .forks import ended, forked
from .reference_files import SIZES_OF_16, dinov3_file, dinov3_source, tokens_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # what writing alone says


@pytest.fixture
def source(filled):
    return filled(dinov3_source(), std=0.1)


def training(source, student):
    """A training's state as DINOv3 saves it."""
    model = {f"teacher.backbone.{name}": tensor for name, tensor in dinov3_file(source).items()}
    model |= {f"student.backbone.{name}": tensor for name, tensor in dinov3_file(student).items()}
    model["teacher.dino_head.last_layer.weight"] = torch.randn(8, 8)
    state = {name: {"exp_avg": tensor, "step": torch.tensor(7.0)} for name, tensor in dinov3_file(student).items()}
    optimizer = {"state": state, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    return {"iteration": 7, "model": model, "optimizer": optimizer}


@pytest.fixture
def shards(source, filled, tmp_path):
    """A folder with the state of a training."""
    folder = tmp_path / "7"
    state = training(source, filled(dinov3_source(num_hidden_layers=2)))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def test_the_teacher_of_a_sharded_training_is_converted(source, shards, tmp_path, assert_same_outputs):
    converted = convert_checkpoint(shards, tmp_path / "converted")
    assert converted.report.layout == "dinov3"
    loaded = ViTRegModel.from_pretrained(tmp_path / "converted").eval()
    for model in (converted.model, loaded):
        assert_same_outputs(tokens_of(source), model, SIZES_OF_16[1:])


@pytest.mark.filterwarnings("error:torch.distributed is disabled:UserWarning")
def test_reading_says_nothing_of_processes_that_are_not_there(shards):
    assert convert_checkpoint(shards).model


def test_states_of_optimizers_are_not_read(shards):
    assert not [name for name in open_source(shards).tensors if "exp_avg" in name or name.startswith("optim")]


def test_values_and_types_are_those_that_were_saved(tmp_path):
    state = {
        "a": torch.randn(5, 3),
        "b": {"c": torch.randn(4).bfloat16(), "d": torch.arange(3)},
        "e": torch.tensor(2.0),
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    found = {name: one.read() for name, one in open_source(tmp_path).tensors.items()}
    expected = {"a": state["a"], "b.c": state["b"]["c"], "b.d": state["b"]["d"], "e": state["e"]}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def save_sharded(rank, folder):
    """One of two processes of a training under FSDP2."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    if rank == 0:
        torch.save(model.state_dict(), folder / "whole.pth")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    dcp.save({"model": model.state_dict(), "iteration": 3}, checkpoint_id=folder / "shards")
    dist.destroy_process_group()


def test_shards_of_two_processes_under_fsdp2_are_put_together(tmp_path, monkeypatch):
    """Of 7 rows one process has 4, the other 3."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    processes = [forked(save_sharded, rank, tmp_path) for rank in (0, 1)]
    assert [ended(process) for process in processes] == [0, 0]
    assert len(list((tmp_path / "shards").glob("*.distcp"))) == 2
    whole = torch.load(tmp_path / "whole.pth", weights_only=True)
    tensors = open_source(tmp_path / "shards").tensors
    assert tensors.keys() == {f"model.{name}" for name in whole}
    for name, tensor in whole.items():
        assert torch.equal(tensors[f"model.{name}"].read(), tensor)


# Hostile


@pytest.fixture
def refused(tmp_path):
    """Assert that a folder is refused with a message, and that nothing is left behind."""

    def check(folder, message):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(folder, tmp_path / "converted")
        assert sorted(tmp_path.rglob("*")) == before

    return check


class Runs:
    def __init__(self, function, *arguments):
        self.called = (function, arguments)

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("function", [os.system, eval, getattr, open], ids=lambda f: f.__name__)
def test_code_in_the_table_of_contents_is_refused_and_not_run(function, shards, refused, tmp_path):
    mark = tmp_path / "ran"
    arguments = {
        "system": (f"touch {mark}",),
        "eval": (f"open({str(mark)!r}, 'w')",),
        "getattr": ("text", "upper"),
        "open": (str(mark), "w"),
    }[function.__name__]
    (shards / ".metadata").write_bytes(pickle.dumps(Runs(function, *arguments)))
    refused(shards, r"table of contents of shards in .*one that names \w+\.")
    assert not mark.exists()


def test_code_in_a_shard_is_refused_and_not_run(shards, refused, tmp_path):
    mark, contents = tmp_path / "ran", pickle.loads((shards / ".metadata").read_bytes())
    torch.save(Runs(os.system, f"touch {mark}"), shards / "code")
    code = (shards / "code").read_bytes() + bytes(10**6)
    (shards / "code").write_bytes(code)
    for index, place in contents.storage_data.items():
        if index.fqn == "model.teacher.backbone.norm.bias":
            place.relative_path, place.offset, place.length = "code", 0, len(code)
    (shards / ".metadata").write_bytes(pickle.dumps(contents))
    refused(shards, "complete shards")
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"text", b"\x80\x04N."], ids=["empty", "cut", "text", "None"])
def test_a_damaged_table_of_contents_is_refused(content, shards, refused):
    (shards / ".metadata").write_bytes(content)
    refused(shards, "table of contents of shards")


def test_a_table_of_contents_cut_anywhere_is_refused(shards, refused):
    whole = (shards / ".metadata").read_bytes()
    for end in range(0, len(whole), len(whole) // 20 + 1):
        (shards / ".metadata").write_bytes(whole[:end])
        refused(shards, "table of contents of shards")


def test_a_missing_shard_is_refused(shards, refused):
    next(shards.glob("*.distcp")).unlink()
    refused(shards, r"complete shards, got .*distcp without a part of")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_a_shard_that_was_cut_is_refused(share, shards, refused):
    shard = next(shards.glob("*.distcp"))
    os.truncate(shard, int(share * shard.stat().st_size))
    refused(shards, r"complete shards, got .*distcp without a part of")


def test_a_shard_of_noise_is_refused_and_leaves_nothing(shards, refused):
    """Which is found while the result is being written."""
    shard = next(shards.glob("*.distcp"))
    shard.write_bytes(os.urandom(shard.stat().st_size))
    refused(shards, "complete shards in")


def edited(shards, edit):
    contents = pickle.loads((shards / ".metadata").read_bytes())
    edit(contents)
    (shards / ".metadata").write_bytes(pickle.dumps(contents))


NAME = "model.teacher.backbone.blocks.0.mlp.fc1.weight"


def test_a_tensor_without_all_of_its_parts_is_refused(shards, refused):
    """It would hold whatever was in memory."""
    edited(shards, lambda contents: contents.state_dict_metadata[NAME].chunks.clear())
    refused(shards, rf"all parts of '{NAME}' in .*, got 0 of 24576 values")


def test_a_tensor_of_a_size_that_its_shards_do_not_have_is_refused(shards, refused):
    """Before memory for it is asked for."""

    def enlarge(contents):
        about = contents.state_dict_metadata[NAME]
        about.size = torch.Size([10**9, 10**6])
        about.chunks[0].sizes = about.size

    edited(shards, enlarge)
    refused(shards, f"without a part of '{NAME}'")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "below/secret"])
def test_shards_outside_of_the_folder_are_refused(path, shards, refused):
    def move(contents):
        for place in contents.storage_data.values():
            place.relative_path = path

    edited(shards, move)
    refused(shards, r"a shard in .* with a part of")


def test_a_table_of_contents_of_other_things_is_refused(shards, refused):
    edited(shards, lambda contents: setattr(contents, "storage_data", None))
    refused(shards, r"table of contents of shards in .*damaged")
