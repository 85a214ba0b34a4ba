"""What a checkpoint can be stored as: files, folders and indices of every kind give the same tensors."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file

from vitreg_hf.cli import main
from vitreg_hf.conversion import stored
from vitreg_hf.conversion.convert import convert_checkpoint
from vitreg_hf.conversion.stored import open_source

from .reference_files import dinov2_file, dinov2_source

CONFIG = {"model_type": "anything", "hidden_size": 8}


@pytest.fixture
def weights():
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)
    return {f"tensor.{index}": torch.arange(12).reshape(3, 4).to(dtype) for index, dtype in enumerate(dtypes)}


def as_index(folder, weights, ending, parts=2):
    """Shards and an index, as Transformers writes them."""
    names, mapped = list(weights), {}
    stem = "model" if ending == "safetensors" else "pytorch_model"
    for part in range(parts):
        file = f"{stem}-{part + 1:05d}-of-{parts:05d}.{ending}"
        held = {name: weights[name] for name in names[part::parts]}
        (save_file if ending == "safetensors" else torch.save)(held, folder / file)
        mapped |= dict.fromkeys(held, file)
    index = f"{stem}.{ending}.index.json"
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}))
    return folder


def old_format(weights, path):
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def file_of(name, write):
    def save(folder, weights):
        write(weights, folder / name)
        return folder / name

    return save


def folder_of(name, write):
    def save(folder, weights):
        write(weights, folder / name)
        return folder

    return save


STORED = {
    "safetensors file": file_of("weights.safetensors", save_file),
    "torch.save file": file_of("weights.pth", torch.save),
    "torch.save file of old PyTorch": file_of("weights.pth", old_format),
    "file of another ending": file_of("checkpoint0100", torch.save),
    "model.safetensors": folder_of("model.safetensors", save_file),
    "pytorch_model.bin": folder_of("pytorch_model.bin", torch.save),
    "open_clip_model.safetensors": folder_of("open_clip_model.safetensors", save_file),
    "open_clip_pytorch_model.bin": folder_of("open_clip_pytorch_model.bin", torch.save),
    "one file of any name": folder_of("dinov2_vits14.pth", torch.save),
    "index of safetensors": lambda folder, weights: as_index(folder, weights, "safetensors"),
    "index of torch.save": lambda folder, weights: as_index(folder, weights, "bin"),
}


@pytest.mark.parametrize("kind", STORED)
def test_every_way_of_storing_gives_the_same_tensors(kind, weights, tmp_path):
    found = open_source(STORED[kind](tmp_path, weights)).tensors
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(found[name].read(), tensor)
        assert found[name].like().is_meta


@pytest.mark.parametrize("kind", ["safetensors file", "torch.save file", "index of safetensors"])
def test_opening_reads_no_values(kind, weights, tmp_path, monkeypatch):
    """A file of many gigabytes is opened at once: its values stay where they are until they are asked for."""
    big = {"big": torch.zeros(4, 2**20), **{name: weights[name] for name in weights}}
    path = STORED[kind](tmp_path, big)
    before = anonymous_memory()
    source = open_source(path)
    assert source.tensors["big"].shape == (4, 2**20)
    assert anonymous_memory() - before < 4 * 2**20


def anonymous_memory():
    """Bytes of this process that are no views of files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_the_preferred_of_several_forms_is_taken(weights, tmp_path):
    """Safetensors before pickles, as Transformers has it; what else is in the folder is no matter."""
    save_file(weights, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"other": torch.ones(2)}, tmp_path / "training_args.bin")
    (tmp_path / "flax_model.msgpack").write_bytes(b"junk")
    assert open_source(tmp_path).tensors.keys() == weights.keys()


def test_an_index_goes_before_a_single_file(weights, tmp_path):
    as_index(tmp_path, weights, "safetensors")
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_source(tmp_path).tensors.keys() == weights.keys()


def test_a_tensor_is_taken_from_the_shard_that_the_index_names(weights, tmp_path):
    as_index(tmp_path, weights, "safetensors")
    first, last = sorted(tmp_path.glob("*.safetensors"))
    stale = {name: torch.full_like(tensor, 1) for name, tensor in weights.items()}
    held = {name: weights[name] for name in list(weights)[0::2]}
    save_file(held, first)
    save_file({**stale, **{name: weights[name] for name in list(weights)[1::2]}}, last)
    for name, one in open_source(tmp_path).tensors.items():
        assert torch.equal(one.read(), weights[name])


def test_what_a_shard_has_beyond_the_index_is_not_overlooked(weights, tmp_path):
    """It would be left unused without a word."""
    as_index(tmp_path, weights, "safetensors")
    shard = min(tmp_path.glob("*.safetensors"))
    save_file({"more": torch.ones(2), **{name: weights[name] for name in list(weights)[0::2]}}, shard)
    assert open_source(tmp_path).tensors.keys() == {*weights, "more"}


def test_configs_beside_the_weights_are_read(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
    source = open_source(tmp_path)
    assert (source.config, source.open_clip) == (CONFIG, {"model_cfg": {}})
    assert source.processor == {"do_resize": True}


def test_an_image_processor_is_found_in_the_file_of_all_processors(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"do_resize": True}}))
    assert open_source(tmp_path).processor == {"do_resize": True}


def test_a_file_has_no_config(weights, tmp_path):
    """Not even one that lies beside it: a folder is what has a config."""
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert open_source(tmp_path / "model.safetensors").config is None


def test_views_of_one_storage_are_read_as_they_are(tmp_path):
    """As `torch.save` keeps tied weights and slices."""
    whole = torch.arange(24.0).reshape(4, 6)
    torch.save({"whole": whole, "same": whole, "part": whole[1:3, ::2], "turned": whole.T}, tmp_path / "views.pth")
    tensors = open_source(tmp_path / "views.pth").tensors
    assert torch.equal(tensors["part"].read(), whole[1:3, ::2])
    assert torch.equal(tensors["turned"].read(), whole.T)
    assert torch.equal(tensors["same"].read(), whole)


def test_parameters_are_tensors_and_everything_else_is_no_weight(tmp_path):
    content = {"a": torch.nn.Parameter(torch.ones(2)), "epoch": 3, "name": "x", "none": None, "list": [torch.ones(1)]}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert open_source(tmp_path / "checkpoint.pth").tensors.keys() == {"a"}


def test_folders_are_named_by_any_kind_of_path(weights, tmp_path, monkeypatch):
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path.parent)
    for place in (tmp_path, str(tmp_path), tmp_path.name, f"./{tmp_path.name}"):
        assert open_source(place).tensors.keys() == weights.keys()


# Types


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_the_type_of_the_source_is_kept(dtype, form, filled, tmp_path):
    source = filled(dinov2_source(num_hidden_layers=1))
    weights = {name: tensor.to(dtype) for name, tensor in dinov2_file(source).items()}
    (save_file if form == "safetensors" else torch.save)(weights, tmp_path / f"weights.{form}")
    converted = convert_checkpoint(tmp_path / f"weights.{form}")
    assert converted.config.dtype == dtype
    assert {parameter.dtype for parameter in converted.model.parameters()} == {dtype}
    assert torch.equal(converted.model.embeddings.cls_token, weights["cls_token"])


def test_of_several_types_that_of_most_tensors_is_taken(filled, tmp_path):
    source = filled(dinov2_source(num_hidden_layers=1))
    weights = {name: t if "norm" in name else t.half() for name, t in dinov2_file(source).items()}
    torch.save(weights, tmp_path / "weights.pth")
    assert {parameter.dtype for parameter in convert_checkpoint(tmp_path / "weights.pth").model.parameters()} == {
        torch.float16
    }


def test_another_type_can_be_asked_for(filled, tmp_path):
    source = filled(dinov2_source(num_hidden_layers=1))
    torch.save(dinov2_file(source), tmp_path / "weights.pth")
    converted = convert_checkpoint(tmp_path / "weights.pth", dtype=torch.bfloat16)
    assert converted.model.dtype == torch.bfloat16
    expected = source.embeddings.cls_token.bfloat16()
    assert torch.equal(converted.model.embeddings.cls_token, expected)


@pytest.mark.parametrize(
    "dtype", ["float16", torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_weights_are_written_in_floating_point_of_16_bits_or_more(dtype, tmp_path):
    with pytest.raises(ValueError, match=r"Expected a dtype of torch\.float16, .*torch\.float64, got"):
        convert_checkpoint(tmp_path / "is-not-opened.pth", tmp_path / "own", dtype=dtype)
    assert not (tmp_path / "own").exists()


def answering(error):
    """A Hub that answers so."""

    def answer(*_, **__):
        raise error

    return answer


@pytest.mark.parametrize("kind", [GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError])
def test_a_hub_that_refuses_is_no_mistake_of_the_user_s(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stored.HfApi, "model_info", answering(kind("it is gated", response=Mock(headers={}))))
    with pytest.raises(ConnectionError, match=r"Expected a/b on the Hub, got: .*it is gated"):
        convert_checkpoint("a/b")
    assert main(["convert", "a/b", str(tmp_path / "own")]) == 1
    assert capsys.readouterr().err.startswith("vitreg convert: Expected a/b on the Hub, got: ")
    assert not (tmp_path / "own").exists()


def test_a_hub_that_stops_answering_is_no_mistake_of_the_user_s(monkeypatch, tmp_path):
    found = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])
    monkeypatch.setattr(stored.HfApi, "model_info", lambda *_, **__: found)
    monkeypatch.setattr(stored, "snapshot_download", answering(LocalEntryNotFoundError("it does not answer")))
    with pytest.raises(
        ConnectionError, match="Expected a/b as a file or folder, or on the Hub or in its cache, got none"
    ):
        convert_checkpoint("a/b")
    assert main(["convert", "a/b", str(tmp_path / "own")]) == 1
